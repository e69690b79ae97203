//! Device memory in which address and memory are made apart (`cuMemAddressReserve`, `cuMemCreate`, `cuMemMap`): how a server
//! gives memory up and keeps the address.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Allocation, Call, Handle, held};
use crate::code;
use crate::device::{self, GRANULE, Memory};

static NEXT: AtomicU64 = AtomicU64::new(0x5000);

/// Maps nothing at a range, so that nobody else gets it.
fn guard_range(address: usize, bytes: usize, flags: libc::c_int) -> Result<usize, u32> {
    let place = std::ptr::with_exposed_provenance_mut(address);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | flags;
    // SAFETY: a new mapping, or over a range of this library's own.
    let got = unsafe { libc::mmap(place, bytes, libc::PROT_NONE, flags, -1, 0) };
    if got == libc::MAP_FAILED { Err(code::OUT_OF_MEMORY) } else { Ok(got.expose_provenance()) }
}

pub(crate) fn reserve(bytes: usize) -> Result<usize, u32> {
    let _call = Call::enter();
    if bytes == 0 || !bytes.is_multiple_of(GRANULE) {
        return Err(code::INVALID_VALUE);
    }
    let address = guard_range(0, bytes, 0)?;
    held().get_or_insert_default().reserved.insert(address, bytes);
    Ok(address)
}

pub(crate) fn unreserve(address: usize, bytes: usize) -> u32 {
    let _call = Call::enter();
    let mut guard = held();
    let held = guard.get_or_insert_default();
    let mapped = held.allocations.range(address..address + bytes).next().is_some();
    if held.reserved.get(&address) != Some(&bytes) || mapped {
        return code::INVALID_VALUE;
    }
    held.reserved.remove(&address);
    super::unmap(address, bytes);
    code::SUCCESS
}

pub(crate) fn create(number: usize, bytes: usize) -> Result<u64, u32> {
    let _call = Call::enter();
    let device = device::all().into_iter().nth(number).ok_or(code::INVALID_DEVICE)?;
    if bytes == 0 || !bytes.is_multiple_of(GRANULE) {
        return Err(code::INVALID_VALUE);
    }
    let memory = Memory::new(&device, bytes).map_err(|_| code::OUT_OF_MEMORY)?;
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let handle = Handle { device: device.uuid, bytes, memory: Some(memory) };
    held().get_or_insert_default().handles.insert(number, handle);
    Ok(number)
}

/// Memory that is mapped stays until it is unmapped.
pub(crate) fn release(handle: u64) -> u32 {
    let _call = Call::enter();
    let known = held().get_or_insert_default().handles.remove(&handle).is_some();
    if known { code::SUCCESS } else { code::INVALID_VALUE }
}

pub(crate) fn map(address: usize, bytes: usize, handle: u64) -> u32 {
    let _call = Call::enter();
    let mut guard = held();
    let held = guard.get_or_insert_default();
    let reserved = held.reserved.range(..=address).next_back();
    if reserved.is_none_or(|(start, length)| address + bytes > start + length) {
        return code::INVALID_VALUE;
    }
    let Some(known) = held.handles.get_mut(&handle).filter(|known| known.bytes == bytes) else {
        return code::INVALID_VALUE;
    };
    let Some(memory) = known.memory.take() else { return code::INVALID_VALUE };
    // What lies there is the reservation.
    if memory.map(Some(address)).is_err() {
        known.memory = Some(memory);
        return code::OUT_OF_MEMORY;
    }
    let allocation = Allocation { device: known.device, bytes, memory: Some(memory), handle: Some(handle) };
    held.allocations.insert(address, allocation);
    code::SUCCESS
}

pub(crate) fn unmap(address: usize, bytes: usize) -> u32 {
    let _call = Call::enter();
    let mut guard = held();
    let held = guard.get_or_insert_default();
    let fits = held.allocations.get(&address).is_some_and(|one| one.bytes == bytes && one.handle.is_some());
    if !fits || guard_range(address, bytes, libc::MAP_FIXED).is_err() {
        return code::INVALID_VALUE;
    }
    let allocation = held.allocations.remove(&address).expect("looked at above");
    if let Some(handle) = allocation.handle.and_then(|handle| held.handles.get_mut(&handle)) {
        handle.memory = allocation.memory;
        handle.device = allocation.device;
    }
    code::SUCCESS
}
