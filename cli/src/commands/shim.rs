//! `rewarm shim`, hidden: the process that owns one replica.

use crate::args::{Global, Shim};

pub(crate) fn run(args: &Shim, global: &Global) -> u8 {
    rewarm_container::shim::main(&global.state, &args.name)
}
