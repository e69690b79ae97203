//! What a test needs of the machine. A missing need prints `skipped: needs ...`, and fails the test where the environment
//! variable `REWARM_TEST_NEEDS` says that the machine has it.

use std::path::{Path, PathBuf};

use rewarm_criu::Binary;

/// The CRIU to test with, if the test can run: as root, with a CRIU that is new enough and a Python to dump.
pub(crate) fn criu() -> Option<Binary> {
    if !nix::unistd::geteuid().is_root() {
        return missing("root");
    }
    let Ok(binary) = Binary::find(None, Some(&cache().join("criu"))) else { return missing("criu") };
    if !Path::new("/usr/bin/python3").exists() {
        return missing("python3");
    }
    Some(binary)
}

#[expect(clippy::print_stderr, reason = "whoever runs the tests must see what was left out")]
fn missing<T>(need: &str) -> Option<T> {
    let met = std::env::var("REWARM_TEST_NEEDS").unwrap_or_default();
    assert!(!met.split(',').any(|met| met.trim() == need), "this machine should have {need}, and has not");
    eprintln!("skipped: needs {need}");
    None
}

fn cache() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    match std::env::var_os("REWARM_CACHE") {
        Some(cache) => cache.into(),
        None => std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("rewarm"),
    }
}
