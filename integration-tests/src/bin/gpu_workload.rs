//! A server with simulated device memory, built in this package so that its tests can start it.

use std::process::ExitCode;

use rewarm_gpu_sim::workload;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match workload::Options::parse(&args).and_then(|options| workload::main(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => refuse(&error),
    }
}

#[expect(clippy::print_stderr, reason = "the replica's log shows it")]
fn refuse(error: &str) -> ExitCode {
    eprintln!("{error}");
    ExitCode::from(2)
}
