//! Whether this machine's devices can take a snapshot's device state, and which takes whose place.

use std::path::Path;

use rewarm_gpu::carried::Carried;
use rewarm_gpu::{Helper, Launch, Pair, topology};
use rewarm_store::Facts;

use crate::verdict::Reason;

/// Device state and where it goes.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) carried: Carried,
    pub(crate) pairs: Vec<Pair>,
}

/// Asks the driver, in a helper of its own that ends with this call. Nothing is planned for a snapshot without device state.
pub(crate) fn plan(facts: &Facts, program: &Path) -> Result<Option<Plan>, Vec<Reason>> {
    let Some(value) = facts.device.clone() else { return Ok(None) };
    let refuse = |reason: String| vec![Reason::Device { reason }];
    let carried: Carried = serde_json::from_value(value)
        .map_err(|error| refuse(format!("its description is not understood: {error}")))?;
    let mut helper =
        Helper::new(Launch { program: program.to_owned(), args: vec!["gpu-helper".into()], env: Vec::new() });
    let driver = helper.start().map_err(|error| refuse(error.to_string()))?;
    let mut reasons = Vec::new();
    if driver != carried.driver {
        reasons.push(Reason::Driver { snapshot: carried.driver.to_string(), machine: driver.to_string() });
    }
    let here = helper.devices().map_err(|error| refuse(error.to_string()))?;
    match topology::map(&carried.devices, &here) {
        Ok(pairs) if reasons.is_empty() => return Ok(Some(Plan { carried, pairs })),
        Ok(_) => {}
        Err(misfit) => reasons.push(Reason::Device { reason: misfit.to_string() }),
    }
    Err(reasons)
}
