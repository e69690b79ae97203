//! `rewarm shim`, hidden: the process that owns one replica.

use crate::args::{Global, Shim};
use crate::env;

pub(crate) fn run(args: &Shim, global: &Global) -> u8 {
    // A malformed value is no reason to leave a replica without its shim.
    let patience = env::gpu_patience().unwrap_or_else(|problem| {
        tracing::error!(problem, "as if it were not set");
        None
    });
    rewarm_container::shim::main(&global.state, &args.name, patience)
}
