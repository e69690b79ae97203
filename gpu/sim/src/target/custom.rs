//! Custom storage (CUDA 13.4): the target leaves its memory to the caller, who copies it away or fills it and then says that it
//! is done. In between the state is one of its own, from which nothing but that leads on.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use super::{CHECKPOINTED, CHECKPOINTING, Held, LOCKED, RESTORING, held, places, unmap};
use crate::code;
use crate::device::{self, Memory};
use crate::page::{PAGE, Uuid};

/// A piece of device memory that is at the caller's disposal.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) device: Uuid,
    /// The descriptor of its memory in the target.
    pub(crate) fd: i32,
    pub(crate) pad: u32,
    pub(crate) bytes: u64,
}

/// Whether the request asks for it.
pub(super) fn wanted() -> bool {
    PAGE.custom.load(Ordering::SeqCst) != 0
}

/// Tells the caller of these pieces: device after device, in the order of addresses.
fn publish<'a>(pieces: &mut Vec<Piece>, memory: impl Iterator<Item = (Uuid, &'a Memory)>) {
    let mut by_device: BTreeMap<Uuid, Vec<Piece>> = BTreeMap::new();
    for (device, memory) in memory {
        let (fd, bytes) = memory.descriptor();
        by_device.entry(device).or_default().push(Piece { device, fd, pad: 0, bytes: bytes as u64 });
    }
    *pieces = by_device.into_values().flatten().collect();
    PAGE.pieces.store(pieces.as_ptr().expose_provenance() as u64, Ordering::SeqCst);
    PAGE.piece_count.store(u32::try_from(pieces.len()).unwrap_or(u32::MAX), Ordering::SeqCst);
}

pub(super) fn begin_checkpoint() -> u32 {
    let mut guard = held();
    let held = guard.get_or_insert_default();
    if held.is_refused() {
        return code::NOT_SUPPORTED;
    }
    let Held { allocations, pieces, .. } = held;
    publish(pieces, allocations.values().filter_map(|one| Some((one.device, one.memory.as_ref()?))));
    PAGE.state.store(CHECKPOINTING, Ordering::SeqCst);
    code::SUCCESS
}

pub(super) fn end_checkpoint() -> u32 {
    let mut guard = held();
    let held = guard.get_or_insert_default();
    for (address, allocation) in &mut held.allocations {
        unmap(*address, allocation.bytes);
        allocation.memory = None;
    }
    held.pieces.clear();
    held.away = true;
    held.visible = device::all();
    held.nodes.clear();
    PAGE.state.store(CHECKPOINTED, Ordering::SeqCst);
    code::SUCCESS
}

pub(super) fn begin_restore() -> u32 {
    let mut guard = held();
    let held = guard.get_or_insert_default();
    if !held.away {
        return code::INVALID_VALUE;
    }
    let places = match places(&held.visible) {
        Ok(places) => places,
        Err(code) => return code,
    };
    let Ok(nodes) = device::open_nodes() else { return code::NO_DEVICE };
    let mut taken = Vec::new();
    for (address, allocation) in &held.allocations {
        let Some(device) = places.get(&allocation.device) else { return code::INVALID_VALUE };
        let Ok(memory) = Memory::new(device, allocation.bytes) else { return code::OUT_OF_MEMORY };
        taken.push((*address, device.uuid, memory));
    }
    held.nodes = nodes;
    held.taken = taken;
    let Held { taken, pieces, .. } = held;
    publish(pieces, taken.iter().map(|(_, uuid, memory)| (*uuid, memory)));
    PAGE.state.store(RESTORING, Ordering::SeqCst);
    code::SUCCESS
}

pub(super) fn end_restore() -> u32 {
    let mut guard = held();
    let held = guard.get_or_insert_default();
    let taken = std::mem::take(&mut held.taken);
    if let Err(code) = held.place(taken) {
        return code;
    }
    held.pieces.clear();
    held.away = false;
    PAGE.state.store(LOCKED, Ordering::SeqCst);
    code::SUCCESS
}
