//! Whether this machine's devices can take a snapshot's device state, and which takes whose place.

use std::path::{Path, PathBuf};

use rewarm_container::Spec;
use rewarm_container::shim::DeviceRequest;
use rewarm_gpu::carried::Carried;
use rewarm_gpu::provide::{Places, ProvideError, Wanted};
use rewarm_gpu::topology::Room;
use rewarm_gpu::{Helper, Launch, Pair, Wish, preflight, ranges, topology};
use rewarm_store::{Facts, Manifest, RegionKind};

use crate::verdict::Reason;

/// Device state and where it goes.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) carried: Carried,
    /// The map of each replica.
    pub(crate) pairs: Vec<Vec<Pair>>,
}

impl Plan {
    /// What the replica of that number, counted from 0, is told.
    pub(crate) fn of(&self, number: usize) -> DeviceRequest {
        let pairs = self.pairs.get(number).cloned().unwrap_or_default();
        DeviceRequest { carried: self.carried.clone(), pairs }
    }
}

/// Asks the driver, in a helper of its own that ends with this call. Nothing is planned for a snapshot without device state.
pub(crate) fn plan(
    facts: &Facts,
    program: &Path,
    wish: &Wish,
    count: u32,
) -> Result<Option<Plan>, Vec<Reason>> {
    let Some(value) = facts.device.clone() else { return Ok(None) };
    let refuse = |reason: String| vec![Reason::Device { reason }];
    let carried: Carried = serde_json::from_value(value)
        .map_err(|error| refuse(format!("its description is not understood: {error}")))?;
    let mut helper =
        Helper::new(Launch { program: program.to_owned(), args: vec!["gpu-helper".into()], env: Vec::new() });
    // Neither this nor NVML attaches to the driver, which takes up to seconds: that is done beside the restore, by the shim.
    let driver = helper.version().map_err(|error| refuse(error.to_string()))?;
    let mut reasons = Vec::new();
    if driver != carried.driver {
        reasons.push(Reason::Driver { snapshot: carried.driver.to_string(), machine: driver.to_string() });
    }
    let machine = helper.machine().map_err(|error| refuse(error.to_string()))?.unwrap_or_default();
    let here = if machine.gpus.is_empty() {
        helper.devices().map_err(|error| refuse(error.to_string()))?
    } else {
        machine.devices()
    };
    if let Some(snapshot) = &carried.release
        && !machine.release.is_empty()
        && *snapshot != machine.release
    {
        let (snapshot, machine) = (snapshot.clone(), machine.release.clone());
        reasons.push(Reason::Release { snapshot, machine });
    }
    let unfit = preflight::Proc::here().machine().into_iter().chain(preflight::devices(&machine));
    reasons.extend(unfit.map(|refusal| Reason::Device { reason: refusal.to_string() }));
    let mut room = Room { needed: carried.needed(), free: machine.free() };
    let mut pairs = Vec::new();
    for _ in 0..count {
        match topology::map(&carried.devices, &here, wish, &room) {
            Ok(map) => {
                take(&mut room, &map);
                pairs.push(map);
            }
            Err(misfit) => {
                reasons.push(Reason::Device { reason: misfit.to_string() });
                break;
            }
        }
    }
    if reasons.is_empty() { Ok(Some(Plan { carried, pairs })) } else { Err(reasons) }
}

/// Bytes of host memory that a replica has at most. The driver's copies of device memory are filled as a whole before it is called, also
/// where they are zeros and nothing of them was dumped.
pub(crate) fn host_bytes(manifest: &Manifest) -> u64 {
    let memory = &manifest.facts.memory;
    let carried =
        manifest.facts.device.clone().and_then(|value| serde_json::from_value::<Carried>(value).ok());
    let processes = carried.iter().flat_map(|carried| &carried.processes);
    let copies: u64 = processes.flat_map(|process| &process.copies).map(ranges::Range::bytes).sum();
    let stored = manifest
        .regions
        .iter()
        .filter(|region| matches!(region.kind, RegionKind::Device { direct: false, .. }));
    let stored: u64 = stored.map(|region| region.bytes).sum();
    let filled = memory.logical_bytes.saturating_sub(memory.zero_bytes).saturating_sub(stored) + copies;
    memory.logical_bytes.max(filled)
}

/// What one replica will have is not free for the next one.
fn take(room: &mut Room, map: &[Pair]) {
    for (place, needed) in topology::placed(&room.needed, map) {
        if let Some(free) = room.free.get_mut(&place) {
            *free = free.saturating_sub(needed);
        }
    }
}

/// Finds what this machine gives a replica for the GPUs that its spec asks for. Where those are not here, others may take
/// their place, so it gets all.
pub(crate) fn provide(spec: &mut Spec, cdi: &[PathBuf]) -> Option<Reason> {
    let gpu = spec.gpu.as_mut()?;
    let places = Places::here(cdi.to_vec());
    let found = places.provide(&gpu.wanted).or_else(|error| match error {
        ProvideError::Unknown { .. } => places.provide(&Wanted::All),
        error => Err(error),
    });
    match found {
        Ok(provided) => {
            gpu.provided = provided;
            None
        }
        Err(error) => Some(Reason::Device { reason: error.to_string() }),
    }
}
