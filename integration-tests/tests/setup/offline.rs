//! Set-up on a machine without a network: what is there is enough, and what is missing is named.
//!
//! Each script runs in a network namespace of its own, in which there is nothing, not even loopback.

use std::fs;
use std::path::Path;
use std::time::Duration;

use rewarm_integration_tests::{Need, Rewarm, World};

use crate::world;

/// npm asks three times as a rule and waits for more than a minute between; a build for nothing takes seconds.
const OFFLINE_MAX: Duration = Duration::from_secs(100);

fn offline(world: &World, script: &str) -> Rewarm {
    world.setup(script).under("unshare", &["--net", "--"]).timeout(OFFLINE_MAX)
}

/// Makes `call` find nothing that was fetched before, neither by Rewarm nor by the programs that fetch for it.
fn with_nothing_kept(call: Rewarm, folder: &Path) -> Rewarm {
    let empty = |name: &str| {
        let path = folder.join(name);
        fs::create_dir_all(&path).expect("our own folder");
        path
    };
    call.env("REWARM_CACHE", empty("cache"))
        .env("CARGO_HOME", empty("cargo"))
        .env("npm_config_cache", empty("npm"))
        .env("npm_config_fetch_retries", "0")
        .env("PIP_NO_CACHE_DIR", "1")
}

#[test]
fn each_piece_that_cannot_be_fetched_is_named() {
    // Its pieces need compilers, Node and Python before they need a network.
    let Some(world) = world(&[Need::Root, Need::Garage, Need::Node, Need::Torch]) else { return };
    let output = with_nothing_kept(offline(&world, "all"), &world.files()).fails(1);
    output.says(&[
        "setup/venv: cannot install the Python packages of setup/requirements.txt (no network?)",
        "setup/npm: cannot install azurite, playwright-core and axe-core (no network?)",
        "setup/garage: cannot build Garage",
        "(no network, or a compiler is missing)",
        "setup/all: not done: ",
    ]);
    // A machine whose own CRIU is good enough needs no network for it.
    if !output.stdout.contains("criu: using this machine's own") {
        output.says(&["criu: no source of CRIU could be fetched; without network, put a CRIU"]);
    }
    let not_done = output.stderr.lines().find(|line| line.starts_with("setup/all: not done: "));
    for piece in ["venv", "npm", "garage"] {
        assert!(not_done.is_some_and(|line| line.contains(piece)), "{piece} is not counted by\n{output}");
    }
    // What was begun does not count as there when the next run looks.
    for piece in ["venv/stamp", "npm/stamp", "garage/bin/garage"] {
        assert!(!world.files().join("cache").join(piece).exists(), "{piece} is there");
    }
    world.finish();
}

/// A mount namespace in which Debian's `python3-venv` is not installed and apt has no lists, as on a fresh machine. Folders
/// that the script writes to are covered, so that the machine's own stay as they are.
const WITHOUT_A_PACKAGE: &str = r#"
set -eu
folder=$1; shift
awk -v RS= -v ORS='\n\n' '!/^Package: python3-venv\n/' /var/lib/dpkg/status >"$folder/status"
mount --bind "$folder/status" /var/lib/dpkg/status
for covered in /var/lib/apt/lists /var/cache/apt "$folder/layers"; do mount -t tmpfs none "$covered"; done
mkdir "$folder/layers/upper" "$folder/layers/work"
mount -t overlay none -o "lowerdir=/usr/sbin,upperdir=$folder/layers/upper,workdir=$folder/layers/work" /usr/sbin
exec "$@"
"#;

#[test]
fn a_debian_package_that_cannot_be_fetched_is_named() {
    // Where all packages are there, one can be taken away.
    let Some(world) = world(&[Need::Root, Need::Garage, Need::Node, Need::Torch]) else { return };
    let folder = world.files().join("machine");
    fs::create_dir_all(folder.join("layers")).expect("our own folder");
    let prefix = ["--net", "--mount", "sh", "-c", WITHOUT_A_PACKAGE, "sh", &folder.to_string_lossy()];
    let call = world.setup("packages").under("unshare", &prefix).timeout(OFFLINE_MAX);
    let output = with_nothing_kept(call, &world.files()).fails(1);
    output.says(&["setup/packages: apt cannot refresh its lists (no network?); missing: python3-venv"]);
    world.finish();
}

#[test]
fn a_second_set_up_needs_no_network() {
    let all = [
        Need::Root,
        Need::Criu,
        Need::Runc,
        Need::Garage,
        Need::Azurite,
        Need::Gcs,
        Need::Chromium,
        Need::Torch,
    ];
    let Some(world) = world(&all) else { return };
    let output = offline(&world, "all").ok();
    for piece in ["packages are there", "already at", "environment is there", "axe-core are there", "Garage"]
    {
        assert!(output.stdout.contains(piece), "{piece:?} is not said by\n{output}");
    }
    assert!(!output.stdout.contains("installing") && !output.stdout.contains("building"), "{output}");
    world.finish();
}

/// What runs without set-up says which of it is missing, before it starts anything.
#[test]
fn what_needs_a_program_that_was_not_built_says_so() {
    let Some(world) = world(&[Need::Root]) else { return };
    for script in ["demo", "soak"] {
        let absent = world.files().join("absent");
        let output = world.setup(script).env("REWARM", &absent).fails(1);
        output.says(&[&format!("setup/{script}: no {}: run make build", absent.display())]);
    }
    world.finish();
}
