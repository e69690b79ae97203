//! The claims of `docs/gpu.md` about the CUDA driver, carried out one by one on the driver that is there.
//!
//! ```text
//! fidelity list                          numbers of all claims
//! fidelity environment [--simulated SO]  one line of JSON: rights and settings with which claims are carried out
//! fidelity claim N [--simulated SO]      carries one out, prints one line of JSON
//! ```
//!
//! The program needs nothing but the driver: it is its own helper and its own server, so it can be carried to a machine that
//! can install nothing (`gpu/fidelity/run`). With `--simulated` the library SO plays the driver. Two claims need a CRIU besides. The exit code is 0
//! where what was seen is what was expected, 3 where it could not be tried, else 1.

mod bare;
mod bench;
mod claims;
mod criu;
mod environment;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rewarm_gpu_sim::workload;

use crate::bench::Bench;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["helper", library, nvml] => {
            ExitCode::from(rewarm_gpu::helper::main(library.as_ref(), nvml.as_ref()))
        }
        ["workload", ..] => {
            let options = workload::Options::parse(&args[1..]);
            told(options.and_then(|options| workload::main(&options)).map(|()| Outcome::Holds))
        }
        ["workload-apart", ..] => {
            let options = workload::Options::parse(&args[1..]);
            let alone = nix::unistd::setsid().map_err(|errno| format!("begin a session: {errno}"));
            let served = alone.and(options).and_then(|options| workload::main(&options));
            told(served.map(|()| Outcome::Holds))
        }
        ["bare", library, pid, ..] => told(bare(library.as_ref(), pid, &words[3..])),
        ["list"] => {
            claims::ALL.iter().for_each(|claim| say(&claim.number.to_string()));
            ExitCode::SUCCESS
        }
        ["environment"] => told(Ok(environment(None))),
        ["environment", "--simulated", library] => told(Ok(environment(Some(library.into())))),
        ["claim", number] => told(claim(number, None)),
        ["claim", number, "--simulated", library] => told(claim(number, Some(library.into()))),
        _ => {
            told(Err("expected: list, environment or claim N, the last two with [--simulated SO]".to_owned()))
        }
    }
}

/// What came of a claim.
enum Outcome {
    Holds,
    DoesNot,
    NotTried,
}

fn bare(library: &Path, pid: &str, words: &[&str]) -> Result<Outcome, String> {
    let pid = pid.parse().map_err(|_| format!("process {pid:?}"))?;
    bare::run(library, pid, words)?.iter().for_each(|line| say(line));
    Ok(Outcome::Holds)
}

fn environment(simulated: Option<PathBuf>) -> Outcome {
    let mut bench = Bench::new(simulated.as_deref());
    let driver = bench.as_ref().map(Bench::driver).unwrap_or_default();
    let line = serde_json::json!({
        "claim": "environment", "what": "rights and settings", "expected": "told", "seen": "told",
        "notes": environment::notes(bench.as_mut().map_err(|error| error.as_str())),
        "machine": machine(simulated.is_some()), "driver": driver, "date": jiff::Timestamp::now().to_string(),
    });
    say(&line.to_string());
    Outcome::Holds
}

fn claim(number: &str, simulated: Option<PathBuf>) -> Result<Outcome, String> {
    let claim = claims::ALL.iter().find(|claim| claim.number.to_string() == number);
    let claim = claim.ok_or_else(|| format!("there is no claim {number}"))?;
    let machine = machine(simulated.is_some());
    let (seen, driver, notes) = match Bench::new(simulated.as_deref()) {
        Ok(mut bench) => {
            let driver = bench.driver();
            let seen = (claim.check)(&mut bench).unwrap_or_else(|error| format!("error: {error}"));
            (seen, driver, std::mem::take(&mut bench.notes))
        }
        Err(error) => (format!("error: {error}"), String::new(), Vec::new()),
    };
    let line = serde_json::json!({
        "claim": claim.number, "what": claim.what, "expected": claim.expected, "seen": seen, "notes": notes,
        "machine": machine, "driver": driver, "date": jiff::Timestamp::now().to_string(),
    });
    say(&line.to_string());
    Ok(match seen == claim.expected {
        true => Outcome::Holds,
        false if seen.starts_with("not tried") => Outcome::NotTried,
        false => Outcome::DoesNot,
    })
}

/// Kernel and processor, and nothing that names the machine.
fn machine(simulated: bool) -> String {
    if simulated {
        return "simulated".to_owned();
    }
    let kernel = rewarm_sys::machine::kernel_release().unwrap_or_default();
    let cpu = rewarm_sys::machine::cpu().unwrap_or_default();
    let sandbox = std::fs::read_to_string(Path::new("/proc/version"))
        .is_ok_and(|text| text.starts_with("Linux version 4.4.0 "));
    format!("{kernel}, {}{}", cpu.model, if sandbox { ", gVisor" } else { "" })
}

#[expect(clippy::print_stdout, reason = "the program's result")]
fn say(line: &str) {
    println!("{line}");
}

#[expect(clippy::print_stderr, reason = "the program's talk")]
fn told(result: Result<Outcome, String>) -> ExitCode {
    match result {
        Ok(Outcome::Holds) => ExitCode::SUCCESS,
        Ok(Outcome::DoesNot) => ExitCode::FAILURE,
        Ok(Outcome::NotTried) => ExitCode::from(3),
        Err(error) => {
            eprintln!("fidelity: {error}");
            ExitCode::from(2)
        }
    }
}
