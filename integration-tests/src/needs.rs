//! What a test needs of the machine, and what happens where it is missing.
//!
//! A missing need prints `skipped: needs ...`. Where the environment variable `REWARM_TEST_NEEDS` (a list with commas)
//! says that the machine has it, the test fails instead: a run that is meant to prove something cannot pass by skipping.

use std::path::{Path, PathBuf};
use std::process::Command;

/// One thing that not every machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The tests run as root.
    Root,
    /// `CAP_SYS_RESOURCE`: CRIU cannot read the limits of another user's processes without it.
    Resource,
    /// A CRIU that is 4.1 or newer.
    Criu,
    /// `runc` in the path.
    Runc,
    /// The Garage program, a real S3 server.
    Garage,
    /// The Azurite program, an Azure Blob server.
    Azurite,
    /// `gcp-storage-emulator`, a Google Cloud Storage server.
    Gcs,
    /// `node` in the path.
    Node,
    /// `nginx` in the path.
    Nginx,
    /// `tmux` in the path, for what is drawn on a terminal.
    Tmux,
    /// Chromium without a display, and the library that drives it.
    Chromium,
    /// The project's virtual environment with PyTorch and the servers of `examples/`.
    Torch,
}

/// What every test needs that starts a replica.
pub const REPLICA: &[Need] = &[Need::Root, Need::Criu, Need::Runc];

impl Need {
    /// The word for it in `REWARM_TEST_NEEDS`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Need::Root => "root",
            Need::Resource => "resource",
            Need::Criu => "criu",
            Need::Runc => "runc",
            Need::Garage => "garage",
            Need::Azurite => "azurite",
            Need::Gcs => "gcs",
            Need::Node => "node",
            Need::Nginx => "nginx",
            Need::Tmux => "tmux",
            Need::Chromium => "chromium",
            Need::Torch => "torch",
        }
    }

    /// Whether the machine has it.
    #[must_use]
    pub fn is_met(self) -> bool {
        match self {
            Need::Root => nix::unistd::geteuid().is_root(),
            Need::Resource => has_capability(24),
            Need::Criu => criu().is_some(),
            Need::Runc => in_path("runc").is_some(),
            Need::Garage => cache().join("garage/bin/garage").is_file(),
            Need::Azurite => cache().join("npm/node_modules/.bin/azurite").exists(),
            Need::Gcs => cache().join("venv/bin/gcp-storage-emulator").exists(),
            Need::Node => in_path("node").is_some(),
            Need::Nginx => in_path("nginx").is_some(),
            Need::Tmux => in_path("tmux").is_some(),
            Need::Chromium => chromium().is_some() && playwright().is_dir() && in_path("node").is_some(),
            Need::Torch => {
                let python = venv_python();
                python.is_file()
                    && Command::new(python)
                        .args(["-c", "import torch, fastapi, uvicorn, transformers"])
                        .output()
                        .is_ok_and(|output| output.status.success())
            }
        }
    }
}

/// Whether this process has the capability with that number in the kernel.
fn has_capability(number: u32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|bits| bits & (1 << number) != 0)
}

/// Whether all of `needs` are there. Says what is missing.
///
/// # Panics
///
/// Where a need is missing that `REWARM_TEST_NEEDS` promises.
#[must_use]
pub fn met(needs: &[Need]) -> bool {
    let missing: Vec<Need> = needs.iter().copied().filter(|need| !need.is_met()).collect();
    if missing.is_empty() {
        return true;
    }
    let names: Vec<&str> = missing.iter().map(|need| need.name()).collect();
    let line = format!("skipped: needs {}", names.join(", "));
    let promised = std::env::var("REWARM_TEST_NEEDS").unwrap_or_default();
    let broken = promised.split(',').any(|word| names.contains(&word.trim()));
    assert!(!broken, "{line}, and REWARM_TEST_NEEDS={promised} says that it is there");
    report(&line);
    false
}

#[expect(clippy::print_stderr, reason = "the reader of a test run must see what was not tested")]
fn report(line: &str) {
    eprintln!("{line}");
}

/// The project's cache of built things: `REWARM_CACHE`, else `rewarm` in the user's cache folder.
#[must_use]
pub fn cache() -> PathBuf {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    from("REWARM_CACHE").unwrap_or_else(|| {
        from("XDG_CACHE_HOME")
            .or_else(|| from("HOME").map(|home| home.join(".cache")))
            .unwrap_or_else(|| PathBuf::from("/var/cache"))
            .join("rewarm")
    })
}

/// Chromium, in the form that draws on no display.
#[must_use]
pub fn chromium() -> Option<PathBuf> {
    in_path("chromium-headless-shell")
}

/// The package that drives a browser.
#[must_use]
pub fn playwright() -> PathBuf {
    cache().join("npm/node_modules/playwright-core")
}

/// Python of the project's virtual environment.
#[must_use]
pub fn venv_python() -> PathBuf {
    cache().join("venv/bin/python")
}

/// The CRIU that the tests use: the project's own, else the machine's, where it is 4.1 or newer.
#[must_use]
pub fn criu() -> Option<PathBuf> {
    let own = cache().join("criu/sbin/criu");
    [Some(own), in_path("criu")].into_iter().flatten().find(|path| is_new_enough(path))
}

fn is_new_enough(criu: &Path) -> bool {
    let Ok(output) = Command::new(criu).arg("--version").output() else { return false };
    let text = String::from_utf8_lossy(&output.stdout);
    let Some(version) = text.lines().find_map(|line| line.strip_prefix("Version:")) else { return false };
    let mut parts = version.trim().split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (4, 1)
}

/// The first program of that name in the path, or in the folders of system programs.
#[must_use]
pub fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}
