//! `rewarm pager`, hidden: fills the memory of one restored replica; a child of its shim.

use crate::args::Pager;

pub(crate) fn run(args: &Pager) -> u8 {
    rewarm_restore::resident::main(&args.work, args.cgroup.clone(), args.held)
}
