//! Entry point; everything is in the library so that tests can reach it.

fn main() -> std::process::ExitCode {
    rewarm_cli::main_impl()
}
