//! Filling the driver's copies of device memory, first of all and while the tree is stopped.
//!
//! They are taken out of the userfaultfd before: what is pinned must be there as ordinary memory. Then all threads write them, in
//! huge pages, zero pages too; a driver that meets absent memory takes it page after page in one thread.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use rewarm_sys::procmem;

use super::Device;
use super::eager::{Stopped, Written, fill_stopped};
use super::error::Error;
use super::pending::Piece;
use super::plan::Mapping;
use super::ranges::Ranges;
use super::source::Source;
use super::space::Space;
use super::userfault::Userfault;

/// Bytes of one write of zeros: a huge page.
const STEP: u64 = 2 << 20;

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

/// Writes device memory of tasks that stand still; `pids` as seen from here, in the order of `devices`.
pub(super) fn fill(
    devices: &[Device],
    pids: &[i32],
    source: &dyn Source,
    threads: usize,
) -> Result<Written, Error> {
    let began = Instant::now();
    let stopped: Vec<Stopped> = devices
        .iter()
        .zip(pids)
        .map(|(device, pid)| Stopped {
            pid: *pid,
            task: device.stream,
            pieces: device.plan.pieces().to_vec(),
        })
        .collect();
    let content = fill_stopped(&stopped, source, threads)?;
    let mut steps = Vec::new();
    for (device, pid) in devices.iter().zip(pids) {
        for zero in zeros(device) {
            let mut at = zero.start;
            while at < zero.end {
                let end = (at / STEP + 1) * STEP;
                steps.push((*pid, device.pid, at..end.min(zero.end)));
                at = end;
            }
        }
    }
    write_zeros(&steps, threads)?;
    let zero_bytes: u64 = steps.iter().map(|(_, _, step)| step.end - step.start).sum();
    Ok(Written { bytes: content.bytes + zero_bytes, time: began.elapsed() })
}

fn write_zeros(steps: &[(i32, u32, Range<u64>)], threads: usize) -> Result<(), Error> {
    let (next, failure) = (AtomicUsize::new(0), Mutex::new(None));
    let zeros = vec![0; STEP as usize];
    let work = || {
        while let Some((pid, task, step)) = steps.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut at = step.start;
            while at < step.end {
                let bytes = &zeros[..(step.end - at) as usize];
                match procmem::write(*pid, &[procmem::Piece { target: at, bytes }]) {
                    Ok(written) if written > 0 => at += written,
                    result => {
                        let errno = result.err().unwrap_or(nix::errno::Errno::EFAULT);
                        let error = Error::Refused { task: *task, vaddr: at, errno };
                        failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                        next.store(steps.len(), Ordering::Relaxed);
                        return;
                    }
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(steps.len()) {
            scope.spawn(work);
        }
        work();
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}
