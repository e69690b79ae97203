//! The `rewarm` program, built in this package so that its tests can start it.

fn main() -> std::process::ExitCode {
    rewarm_cli::main_impl()
}
