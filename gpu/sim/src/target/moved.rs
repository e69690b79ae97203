//! A restore that takes no processor, as a real driver's copying takes none: the pages of the copies are moved to the device's addresses.
//!
//! What lies there then is host memory that counts for no device. It is for measurements only, of drivers that are faster than this machine copies.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use super::{Held, PAGE_BYTES, keep_rate};
use crate::code;
use crate::page::PAGE;

/// A page that is there, or swapped out (`/proc/PID/pagemap`).
const THERE: u64 = 3 << 62;
/// Entries of the page map that are read at a time.
const ENTRIES: usize = 64 << 10;

/// Whether this restore is one: it is wanted, and all memory is of the kind that has no life of its own beside its address.
pub(super) fn is_wanted(held: &Held) -> bool {
    std::env::var_os(crate::MOVES_ENV).is_some()
        && held.copy.is_some()
        && held.allocations.values().all(|one| one.handle.is_none())
}

/// Moves all of it. Devices were looked at before.
pub(super) fn restore(held: &mut Held, began: Instant) -> Result<(), u32> {
    let (copy, total) = held.copy.expect("it is wanted");
    are_there(copy, total).map_err(|_| code::OPERATING_SYSTEM)?;
    let mut from = copy;
    for (address, allocation) in &mut held.allocations {
        let clobbered = move_pages(from, allocation.bytes, *address).map_err(|_| code::OPERATING_SYSTEM)?;
        PAGE.clobbered.fetch_add(clobbered.into(), std::sync::atomic::Ordering::SeqCst);
        from += allocation.bytes;
    }
    held.copy = None;
    keep_rate(began, total);
    Ok(())
}

/// As a driver pins: a page that is absent under a userfaultfd is an error and no fault. Those that are there need not be touched for it.
fn are_there(start: usize, bytes: usize) -> std::io::Result<()> {
    let (map, memory) = (File::open("/proc/self/pagemap")?, File::open("/proc/self/mem")?);
    let (first, pages) = (start / PAGE_BYTES, bytes / PAGE_BYTES);
    let mut entries = vec![0; ENTRIES * 8];
    for at in (0..pages).step_by(ENTRIES) {
        let part = &mut entries[..(pages - at).min(ENTRIES) * 8];
        map.read_exact_at(part, ((first + at) * 8) as u64)?;
        for (index, entry) in part.as_chunks::<8>().0.iter().enumerate() {
            if u64::from_ne_bytes(*entry) & THERE == 0 {
                memory.read_exact_at(&mut [0], ((first + at + index) * PAGE_BYTES) as u64)?;
            }
        }
    }
    Ok(())
}

/// Tells whether something else lay at the new place.
fn move_pages(from: usize, bytes: usize, to: usize) -> std::io::Result<bool> {
    let place = std::ptr::without_provenance_mut(to);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: replaces nothing.
    let free = unsafe { libc::mmap(place, bytes, libc::PROT_NONE, flags, -1, 0) };
    let clobbered = free == libc::MAP_FAILED;
    let (old, flags) =
        (std::ptr::with_exposed_provenance_mut(from), libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
    // SAFETY: a copy of this library's own; what lies at the new place is overwritten, as the driver that is simulated does.
    let got = unsafe { libc::mremap(old, bytes, bytes, flags, place) };
    if got == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: our own mapping. A child must not have the device's ranges.
    unsafe { libc::madvise(got, bytes, libc::MADV_DONTFORK) };
    Ok(clobbered)
}
