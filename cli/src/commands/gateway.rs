//! `rewarm gateway`, hidden: the process of `rewarm serve` that has the clients and no rights.

pub(crate) fn run() -> u8 {
    rewarm_serve::control::main()
}
