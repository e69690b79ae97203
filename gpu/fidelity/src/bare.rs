//! A caller that has the driver's library and nothing else: `cuInit` is never called, and it may give its rights up.
//!
//! Each word is one call, and its line what came of it: the driver's result, behind it the value where there is one.
//! `nobody` gives the rights up, `namespace` leaves for a user namespace of its own, where it has all rights and over nobody.

use std::path::Path;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Uid, setuid};
use rewarm_gpu::{Code, Driver, Step};

/// The user without rights.
const NOBODY: u32 = 65_534;

/// Makes the calls one after the other.
pub(crate) fn run(library: &Path, pid: i32, words: &[&str]) -> Result<Vec<String>, String> {
    let driver = Driver::load(library).map_err(|error| error.to_string())?;
    words.iter().map(|word| call(&driver, pid, word)).collect()
}

fn call(driver: &Driver, pid: i32, word: &str) -> Result<String, String> {
    let step = |step| driver.step(step, pid, Duration::from_secs(5), &[]).map(|()| String::new());
    let result = match word {
        "nobody" => {
            setuid(Uid::from_raw(NOBODY)).map_err(|errno| format!("give the rights up: {errno}"))?;
            Ok(String::new())
        }
        "namespace" => {
            unshare(CloneFlags::CLONE_NEWUSER).map_err(|errno| format!("make a user namespace: {errno}"))?;
            Ok(String::new())
        }
        "state" => driver.state(pid).map(|state| format!(" {state}")),
        "thread" => driver.restore_thread(pid).map(|thread| format!(" {thread}")),
        "lock" => step(Step::Lock),
        "restore" => step(Step::Restore),
        other => return Err(format!("no call {other}")),
    };
    Ok(result.map_or_else(|Code(code)| code.to_string(), |value| format!("0{value}")))
}
