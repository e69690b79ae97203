//! Filling the driver's copies of device memory, first of all and while the tree is stopped.
//!
//! All threads write them, zero pages too, since a driver that meets absent memory takes it page after page in one thread. Then
//! they are out of the userfaultfd: what is pinned must be there as ordinary memory.

use std::ops::Range;
use std::sync::Arc;

use super::Device;
use super::error::Error;
use super::pending::Piece;
use super::plan::Mapping;
use super::ranges::Ranges;
use super::space::Space;
use super::stopped::Stopped;
use super::userfault::Userfault;

/// Takes the ranges of device memory of an address space out of its userfaultfd.
pub(super) fn unregister<U: Userfault>(space: &Space<U>, device: &Device) -> Result<(), Error> {
    let gate = space.enter_alone();
    let mut state = space.state();
    for range in ranges(device) {
        if let Some(uffd) = gate.as_ref() {
            uffd.unregister(range.start, range.end - range.start).map_err(|errno| Error::Refused {
                task: space.task,
                vaddr: range.start,
                errno,
            })?;
        }
        state.registered.remove(range);
    }
    Ok(())
}

/// Content and zero pages in as few pieces as there are, each inside one mapping.
fn ranges(device: &Device) -> Vec<Range<u64>> {
    let mut joined = Ranges::default();
    device
        .plan
        .pieces()
        .iter()
        .map(Piece::addresses)
        .chain(zeros(device))
        .for_each(|part| joined.insert(part));
    let within = |map: &Mapping| {
        let (start, end) = (map.start, map.end);
        joined.iter().map(move |range| range.start.max(start)..range.end.min(end)).collect::<Vec<_>>()
    };
    device.plan.mappings().iter().flat_map(within).filter(|range| !range.is_empty()).collect()
}

/// Zero pages, cut where mappings end.
fn zeros(device: &Device) -> impl Iterator<Item = Range<u64>> + '_ {
    device.zeros.iter().flat_map(|zero| {
        let overlap = |start: u64, end: u64| start.max(zero.start)..end.min(zero.end);
        let parts = device.plan.mappings().iter().map(move |map| overlap(map.start, map.end));
        parts.filter(|part| !part.is_empty())
    })
}

/// Device memory of a task that stands still, `pid` as seen from here; all of it is in `space`'s userfaultfd, if there is one.
pub(super) fn stopped<U>(device: &Device, pid: i32, space: Option<Arc<Space<U>>>) -> Stopped<U> {
    let mut own = Ranges::default();
    ranges(device).into_iter().for_each(|range| own.insert(range));
    Stopped {
        pid,
        task: device.stream,
        pieces: device.plan.pieces().to_vec(),
        zeros: zeros(device).collect(),
        space,
        own,
    }
}
