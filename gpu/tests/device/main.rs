//! The device plane against the simulated driver: real processes, a real helper, a real freezer. Needs root.
//!
//! This program is also what is tested: with `helper` it is the helper, with `workload` a server that keeps its weights in
//! simulated device memory.

mod devices;
mod direct;
mod endings;
mod failures;
mod protocol;
mod steps;
mod world;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};
use rewarm_gpu_sim::workload;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.split_first() {
        Some((verb, rest)) if verb == "helper" => {
            let library = rest.first().map_or(rewarm_gpu::driver::LIBRARY, String::as_str);
            let nvml = rest.get(1).map_or(rewarm_gpu::nvml::LIBRARY, String::as_str);
            ExitCode::from(rewarm_gpu::helper::main(library.as_ref(), nvml.as_ref()))
        }
        Some((verb, _)) if verb == "other-helper" => protocol::another_version(),
        Some((verb, rest)) if verb == "workload" => {
            match workload::Options::parse(rest).and_then(|options| workload::main(&options)) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => refuse(&error),
            }
        }
        _ => run(),
    }
}

fn run() -> ExitCode {
    let trials: Vec<Trial> = [
        steps::trials(),
        devices::trials(),
        failures::trials(),
        endings::trials(),
        direct::trials(),
        protocol::trials(),
    ]
    .into_iter()
    .flatten()
    .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

#[expect(clippy::print_stderr, reason = "the test that started it shows its output")]
fn refuse(error: &str) -> ExitCode {
    eprintln!("{error}");
    ExitCode::from(2)
}
