//! The working set: what a restored server touches first, in the order of its page faults.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Extents of one working set; what a file names beyond is cut off. At 64 KiB each this is 256 GiB.
pub const EXTENTS_MAX: usize = 4 << 20;

/// Bytes around a fault that come along: enough to save faults, small enough to tell what is touched from what is not.
const WINDOW: u64 = 64 << 10;
/// Most that comes along where one fault follows the other, as it does when weights are read.
const WINDOW_MAX: u64 = 1 << 20;

/// A part of a task's content stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// The task, by its pid inside its pid namespace.
    pub task: u32,
    /// Place in the task's content stream, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// Parts of content streams in the order in which they were first touched.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    /// In order of first touch, without overlaps.
    pub extents: Vec<Extent>,
}

impl WorkingSet {
    /// Bytes in all extents.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.extents.iter().map(|extent| extent.length).sum()
    }
}

/// Writes down what faults bring in.
#[derive(Debug, Default)]
pub(super) struct Recorder {
    set: WorkingSet,
    /// Task and start to end, for all that is in the set.
    seen: BTreeMap<(u32, u64), u64>,
    /// Where a fault is expected next by those who read on, and what came along last time: task and offset to bytes.
    expected: HashMap<(u32, u64), u64>,
}

impl Recorder {
    /// Notes a fault at `offset` and says what comes along with it from the chunk around it: twice as much each time that
    /// somebody reads on where the last window ended.
    pub(super) fn fault(&mut self, task: u32, offset: u64, chunk: &Range<u64>) -> Range<u64> {
        let start = (offset / WINDOW * WINDOW).max(chunk.start);
        let bytes = self.expected.remove(&(task, start)).map_or(WINDOW, |last| (last * 2).min(WINDOW_MAX));
        let window = start..(start / WINDOW * WINDOW + bytes).min(chunk.end);
        self.expected.insert((task, window.end), bytes);
        self.note(Extent { task, offset: window.start, length: window.end - window.start });
        window
    }

    /// Notes that a fault brought this extent in. Parts that are known are not noted again; an extent that goes on
    /// where the last one ended makes it longer.
    fn note(&mut self, extent: Extent) {
        let end = extent.offset + extent.length;
        let mut at = extent.offset;
        while at < end {
            let before = self.seen.range(..=(extent.task, at)).next_back();
            if let Some((&(task, _), &known)) = before
                && task == extent.task
                && known > at
            {
                at = known;
                continue;
            }
            let next = self.seen.range((extent.task, at)..(extent.task, end)).next();
            let until = next.map_or(end, |(&(_, start), _)| start);
            self.append(Extent { task: extent.task, offset: at, length: until - at });
            at = until;
        }
    }

    fn append(&mut self, extent: Extent) {
        if self.set.extents.len() >= EXTENTS_MAX {
            return;
        }
        self.seen.insert((extent.task, extent.offset), extent.offset + extent.length);
        match self.set.extents.last_mut() {
            Some(last) if last.task == extent.task && last.offset + last.length == extent.offset => {
                last.length += extent.length;
            }
            _ => self.set.extents.push(extent),
        }
    }

    /// What was noted.
    pub(super) fn finish(self) -> WorkingSet {
        self.set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_of_first_touch_without_repeats() {
        let mut recorder = Recorder::default();
        for (task, offset, length) in [(1, 100, 10), (1, 110, 10), (2, 100, 10), (1, 90, 50), (1, 95, 20)] {
            recorder.note(Extent { task, offset, length });
        }
        let set = recorder.finish();
        let flat: Vec<_> = set.extents.iter().map(|e| (e.task, e.offset, e.length)).collect();
        assert_eq!(flat, [(1, 100, 20), (2, 100, 10), (1, 90, 10), (1, 120, 20)]);
        assert_eq!(set.bytes(), 60);
    }

    #[test]
    fn who_reads_on_gets_more_each_time() {
        let mut recorder = Recorder::default();
        const KIB: u64 = 1 << 10;
        let (first, second) = (0..512 * KIB, 512 * KIB..1024 * KIB);
        let mut window = |offset: u64, chunk: &Range<u64>| {
            let window = recorder.fault(1, offset, chunk);
            (window.start / KIB, window.end / KIB)
        };
        assert_eq!(window(5 * KIB, &first), (0, 64));
        assert_eq!(window(64 * KIB, &first), (64, 192));
        assert_eq!(window(300 * KIB, &first), (256, 320), "somewhere else");
        assert_eq!(window(192 * KIB, &first), (192, 448), "on where it was");
        assert_eq!(window(448 * KIB, &first), (448, 512), "to the end of the chunk");
        assert_eq!(window(512 * KIB, &second), (512, 1024), "and on in the next one");
    }
}
