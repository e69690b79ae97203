//! Where in a process the driver's copies of device memory lie.
//!
//! The driver does not tell. They are the private anonymous memory that a checkpoint adds, seen by comparing the address
//! space before and after while no thread of the process can map anything. Addresses are compared and not lines: the
//! kernel merges neighbours.

use std::io;

use rewarm_sys::procmem;
use serde::{Deserialize, Serialize};

/// A range of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// First byte after it.
    pub end: u64,
}

impl Range {
    /// Its length.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }
}

/// The writable private anonymous memory of a process, in order, neighbours joined.
///
/// # Errors
/// When the process is gone or may not be looked at.
pub fn private_memory(pid: i32) -> io::Result<Vec<Range>> {
    let maps = procmem::maps(pid)?;
    let plain = maps.iter().filter(|map| {
        map.read
            && map.write
            && !map.shared
            && map.inode == 0
            && (map.path.is_empty() || map.path == "[heap]")
    });
    Ok(joined(plain.map(|map| Range { start: map.start, end: map.end })))
}

fn joined(ranges: impl Iterator<Item = Range>) -> Vec<Range> {
    let mut out: Vec<Range> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => out.push(range),
        }
    }
    out
}

/// What `after` has and `before` had not. Both are in order.
#[must_use]
pub fn added(before: &[Range], after: &[Range]) -> Vec<Range> {
    let mut out = Vec::new();
    for range in after {
        let mut start = range.start;
        for old in before.iter().filter(|old| old.end > range.start && old.start < range.end) {
            if old.start > start {
                out.push(Range { start, end: old.start });
            }
            start = start.max(old.end);
        }
        if start < range.end {
            out.push(Range { start, end: range.end });
        }
    }
    out
}

/// Whether a process has the driver's library in its memory. Without it there is no need to ask the driver.
#[must_use]
pub fn loads_driver(pid: i32) -> bool {
    procmem::maps(pid).is_ok_and(|maps| maps.iter().any(|map| is_driver(&map.path)))
}

/// Whether a path is that of the driver's library.
#[must_use]
pub fn is_driver(path: &str) -> bool {
    path.rsplit('/').next().unwrap_or_default().starts_with("libcuda.so")
}

/// Whether a process lives: one that has given up its memory already, or of which only the exit status is left, does not.
#[must_use]
pub fn exists(pid: i32) -> bool {
    procmem::maps(pid).is_ok_and(|maps| !maps.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> Range {
        Range { start, end }
    }

    #[test]
    fn what_was_added_is_found_inside_and_between_what_was_there() {
        let before = [range(10, 20), range(30, 40), range(90, 95)];
        assert_eq!(added(&before, &before), []);
        // Merged with both neighbours, grown at an end, and alone.
        let after = [range(10, 45), range(60, 70), range(90, 95)];
        assert_eq!(added(&before, &after), [range(20, 30), range(40, 45), range(60, 70)]);
        // What went away does not count.
        assert_eq!(added(&before, &[range(5, 12)]), [range(5, 10)]);
        assert_eq!(added(&[], &[range(1, 2)]), [range(1, 2)]);
    }

    #[test]
    fn neighbours_are_joined() {
        let list = [range(1, 2), range(2, 3), range(5, 6)];
        assert_eq!(joined(list.into_iter()), [range(1, 3), range(5, 6)]);
    }

    #[test]
    fn a_process_without_the_driver_is_told_without_asking_it() {
        let own = i32::try_from(std::process::id()).expect("pids are int");
        assert!(!loads_driver(own) && exists(own) && !exists(4_194_303));
        assert!(!private_memory(own).expect("own").is_empty());
    }
}
