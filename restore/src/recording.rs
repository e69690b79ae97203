//! The working set: what a restored server touches between its first instruction and the end of the replayed probe.
//!
//! Each pager records it, and fills only what is touched or known until it is told to go on. Of several replicas of one
//! restore the first speaks for all. What is recorded is kept beside the snapshot, and comes first in later restores.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rewarm_store::WorkingSet;
use rewarm_sys::fdpass;

use crate::error::Cause;
use crate::pager;

/// Longest report of a pager, in bytes.
pub(crate) const REPORT_BYTES_MAX: usize = 64 << 20;
/// How long a pager may take to answer. Without its answer nothing is lost but the recording.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// A working set is written anew when more than one part in so many of what was touched is not in it.
const MISSED_PART: u64 = 10;

/// A part of a region: its index, offset and length in bytes.
type Extent = (u32, u64, u64);

/// The command's line to a pager. Dropping it lets the pager go on.
#[derive(Debug)]
pub(crate) struct Recorder {
    ours: UnixStream,
}

impl Recorder {
    /// A recorder, and the descriptor for the pager.
    pub(crate) fn new() -> Result<(Self, OwnedFd), Cause> {
        let (ours, theirs) = UnixStream::pair().map_err(Cause::io("make a line to the pager"))?;
        Ok((Self { ours }, theirs.into()))
    }

    /// Ends the recording and lets the pager fill the rest. What was touched, in order; nothing if the pager did not say.
    /// Blocks.
    pub(crate) fn stop(mut self) -> Vec<pager::Extent> {
        let touched = self.ask().unwrap_or_else(|error| {
            tracing::debug!(%error, "the pager told no working set");
            None
        });
        touched.map(|set| set.extents).unwrap_or_default()
    }

    fn ask(&mut self) -> std::io::Result<Option<pager::WorkingSet>> {
        self.ours.set_read_timeout(Some(ANSWER_WITHIN))?;
        // A pager that has filled everything has ended, and what it recorded waits to be read.
        let _ = self.ours.write_all(b"s");
        match fdpass::recv_frame(&self.ours, REPORT_BYTES_MAX, 0)? {
            Some((report, _)) => Ok(serde_json::from_slice(&report).map(Some)?),
            None => Ok(None),
        }
    }
}

/// What to write down after a restore, if anything: all that was touched where nothing was known, or the known set with
/// what it missed, if it missed too much.
pub(crate) fn next(known: Option<&WorkingSet>, touched: &[Extent]) -> Option<WorkingSet> {
    let Some(known) = known else {
        let set = WorkingSet { number: 0, extents: touched.to_vec() };
        return Some(set).filter(|set| !set.extents.is_empty());
    };
    let missed = without(touched, &known.extents);
    let missed_bytes: u64 = missed.iter().map(|(_, _, bytes)| bytes).sum();
    if missed_bytes.saturating_mul(MISSED_PART) <= known.bytes().saturating_add(missed_bytes) {
        return None;
    }
    let extents = known.extents.iter().copied().chain(missed).collect();
    Some(WorkingSet { number: known.number, extents })
}

/// The parts of `extents` that are not in `known`, in their order.
fn without(extents: &[Extent], known: &[Extent]) -> Vec<Extent> {
    // Per region, start to end, merged.
    let mut covered: BTreeMap<(u32, u64), u64> = BTreeMap::new();
    let mut sorted = known.to_vec();
    sorted.sort_unstable();
    let mut last: Option<(u32, u64)> = None;
    for (region, start, bytes) in sorted {
        let end = start.saturating_add(bytes);
        match last.and_then(|key| covered.get_mut(&key).map(|until| (key, until))) {
            Some(((same, _), until)) if same == region && *until >= start => *until = (*until).max(end),
            _ => {
                covered.insert((region, start), end);
                last = Some((region, start));
            }
        }
    }
    let mut rest = Vec::new();
    for &(region, start, bytes) in extents {
        let end = start.saturating_add(bytes);
        let mut at = start;
        while at < end {
            let before = covered.range(..=(region, at)).next_back();
            match before {
                Some((&(same, _), &until)) if same == region && until > at => at = until,
                _ => {
                    let next = covered.range((region, at)..(region, end)).next();
                    let until = next.map_or(end, |(&(_, start), _)| start);
                    rest.push((region, at, until - at));
                    at = until;
                }
            }
        }
    }
    rest
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn set(number: u64, extents: &[Extent]) -> WorkingSet {
        WorkingSet { number, extents: extents.to_vec() }
    }

    #[test]
    fn the_first_recording_is_kept_and_a_good_one_is_not_written_again() {
        assert_eq!(next(None, &[]), None);
        assert_eq!(next(None, &[(1, 0, 5)]), Some(set(0, &[(1, 0, 5)])));
        let known = set(4, &[(1, 0, 90)]);
        assert_eq!(next(Some(&known), &[(1, 80, 20)]), None, "a tenth is no more than a tenth");
        assert_eq!(next(Some(&known), &[(1, 80, 22)]), Some(set(4, &[(1, 0, 90), (1, 90, 12)])));
        assert_eq!(next(Some(&known), &[(2, 0, 50)]), Some(set(4, &[(1, 0, 90), (2, 0, 50)])));
    }

    #[test]
    fn a_recorder_gets_what_the_pager_says_also_when_that_has_ended() {
        let (recorder, theirs) = Recorder::new().expect("a pair");
        let theirs = UnixStream::from(theirs);
        let said = pager::WorkingSet { extents: vec![pager::Extent { task: 7, offset: 0, length: 4096 }] };
        let text = serde_json::to_vec(&said).expect("json");
        fdpass::send_frame(&theirs, &text, REPORT_BYTES_MAX, &[]).expect("sent");
        drop(theirs);
        assert_eq!(recorder.stop(), said.extents);
        let (recorder, theirs) = Recorder::new().expect("a pair");
        drop(theirs);
        assert_eq!(recorder.stop(), []);
    }

    proptest! {
        #[test]
        fn what_is_left_is_what_is_not_known(
            extents in prop::collection::vec((0_u32..3, 0_u64..40, 1_u64..12), 0..8),
            known in prop::collection::vec((0_u32..3, 0_u64..40, 1_u64..12), 0..8),
        ) {
            let bytes = |all: &[Extent]| -> BTreeSet<(u32, u64)> {
                all.iter().flat_map(|&(region, start, bytes)| (start..start + bytes).map(move |at| (region, at))).collect()
            };
            let rest = without(&extents, &known);
            prop_assert_eq!(bytes(&rest), &bytes(&extents) - &bytes(&known));
        }
    }
}
