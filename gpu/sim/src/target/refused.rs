//! Memory that the driver cannot checkpoint: managed memory, and device memory that processes share (legacy IPC).

use super::{allocate, held};
use crate::{code, custom};

/// What another process opens shared memory by: process, descriptor and length, and nothing else.
pub(crate) type IpcHandle = [u8; 64];

/// From now on the process cannot be checkpointed.
fn refuse() {
    held().get_or_insert_default().refused = true;
}

/// Takes managed memory. It lies on the device here and does not move.
pub(crate) fn managed(number: usize, bytes: usize) -> Result<usize, u32> {
    let address = allocate(number, bytes)?;
    refuse();
    Ok(address)
}

/// Shares the memory that was allocated at `address`.
pub(crate) fn share(address: usize) -> Result<IpcHandle, u32> {
    let (fd, bytes) = {
        let mut guard = held();
        let allocation = guard.get_or_insert_default().allocations.get(&address);
        allocation.and_then(|one| one.memory.as_ref()).ok_or(code::INVALID_VALUE)?.descriptor()
    };
    refuse();
    let mut handle = [0; 64];
    handle[..4].copy_from_slice(&std::process::id().to_le_bytes());
    handle[4..8].copy_from_slice(&fd.to_le_bytes());
    handle[8..16].copy_from_slice(&(bytes as u64).to_le_bytes());
    Ok(handle)
}

/// Maps what another process shares.
pub(crate) fn open(handle: &IpcHandle) -> Result<usize, u32> {
    let word = |at: usize| i32::from_le_bytes([handle[at], handle[at + 1], handle[at + 2], handle[at + 3]]);
    let mut length = [0; 8];
    length.copy_from_slice(&handle[8..16]);
    let bytes = usize::try_from(u64::from_le_bytes(length)).map_err(|_| code::INVALID_VALUE)?;
    let (start, _) = custom::map(word(0), &[(word(4), bytes)])?;
    refuse();
    Ok(start)
}
