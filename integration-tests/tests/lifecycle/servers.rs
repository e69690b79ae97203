//! The whole life of each kind of server: run, check, snapshot, still serves, stop, three clones, same answers.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rewarm_integration_tests::checks::{answers, server_answers_as_before, store_verifies};
use rewarm_integration_tests::server::{Server, examples};
use rewarm_integration_tests::{Need, Replica, World, needs};

use crate::{world, world_for};

/// Takes `server` through its life and restores it once alone and `count` times side by side.
fn whole_life(world: World, server: &Server, count: usize) {
    let source = world.start(server.name, server);
    let before = answers(&source, server);
    let probe = server.probe.as_ref().map(|(file, _)| file.to_string_lossy().into_owned());
    let flags: Vec<&str> = probe.iter().flat_map(|file| ["--probe", file.as_str()]).collect();
    let report = world.snapshot(&source, "v1", &flags);
    assert_eq!(report["digest"].as_str().map(|digest| digest.starts_with("blake3:")), Some(true), "{report}");
    server_answers_as_before(&source, server, &before);
    source.remove();

    let alone = restored(&world, server, &[]);
    assert_eq!(alone.len(), 1);
    assert_eq!(alone[0].name(), world.name(server.name), "the default name is the snapshot's");
    server_answers_as_before(&alone[0], server, &before);
    alone[0].remove();

    let clones = restored(&world, server, &["--count", &count.to_string()]);
    let names: Vec<String> = clones.iter().map(|clone| clone.name().to_owned()).collect();
    let expected: Vec<String> =
        (1..=count).map(|number| format!("{}-{number}", world.name(server.name))).collect();
    assert_eq!(names, expected);
    for clone in &clones {
        server_answers_as_before(clone, server, &before);
    }
    // The clones are independent: the end of one is nothing to the others.
    clones[0].remove();
    for clone in &clones[1..] {
        server_answers_as_before(clone, server, &before);
    }
    store_verifies(&world);
    world.finish();
}

/// Clones of `server`, each handed out after it has answered the whole probe of its snapshot as its source did.
fn restored<'w>(world: &'w World, server: &Server, flags: &[&str]) -> Vec<Replica<'w>> {
    let output = world.restore_call(server.name, "v1", server.port, flags).ok();
    let questions = server.probe.as_ref().map_or(0, |(_, count)| *count);
    let report = output.json();
    for clone in report["replicas"].as_array().unwrap_or_else(|| panic!("no replicas in {report}")) {
        assert_eq!(clone["answers_equal"], questions, "{report}");
    }
    Replica::of_restore(world, server.port, &output)
}

/// Runs the test body for a server whose needs are met.
fn light(server: &Server) {
    if let Some(world) = world_for(server) {
        whole_life(world, server, 3);
    }
}

fn heavy(server: &Server, count: usize) {
    if let Some(world) = world_for(server) {
        whole_life(world.heavy(), server, count);
    }
}

#[test]
fn a_plain_server() {
    light(&Server::plain());
}

#[test]
fn a_tree_of_processes() {
    heavy(&Server::tree(), 2);
}

#[test]
fn an_event_loop_with_timers() {
    light(&Server::clock());
}

#[test]
fn a_server_with_a_connection_to_its_own_helper() {
    light(&Server::helper());
}

/// Of a child that nobody has waited for there is an exit status and nothing else: no memory, no threads.
#[test]
fn children_that_have_ended_keep_their_exit_status() {
    let server = Server::unreaped();
    let Some(world) = world_for(&server) else { return };
    let source = world.start(server.name, &server);
    world.snapshot(&source, "v1", &[]);
    let reference = world.reference(server.name, "v1");
    world.rewarm().args(["verify", &reference]).ok();
    world.rewarm().args(["inspect", "--mappings", &reference]).ok();
    source.remove();
    whole_life(world, &server, 2);
}

#[test]
fn memory_of_every_kind() {
    heavy(&Server::memory(), 2);
}

#[test]
fn node() {
    light(&Server::node());
}

#[test]
fn nginx_with_two_workers() {
    light(&Server::nginx());
}

#[test]
fn the_embedding_server_of_the_demo() {
    heavy(&Server::embedding(), 3);
}

#[test]
fn a_transformer_of_512_mib() {
    let server = Server::transformer(&weights_path());
    let Some(world) = world_for(&server) else { return };
    let world = world.heavy();
    make_weights();
    whole_life(world, &server, 2);
}

/// Looks at weights of the smallest size: how they spread, whether a seed gives them again, and which sizes there are.
const WEIGHTS: &str = "
import hashlib, pathlib, subprocess, sys
import numpy
script, out = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(script).parent))
import layout
digests = []
for folder, seed in (('one', 7), ('again', 7), ('other', 8)):
    subprocess.run([sys.executable, '-B', script, '--size', '200MiB', '--seed', str(seed), '--out', f'{out}/{folder}'], check=True)
    data = pathlib.Path(out, folder, 'model.safetensors').read_bytes()
    digests.append(hashlib.sha256(data).hexdigest())
print('the same seed', digests[0] == digests[1], 'another', digests[0] == digests[2])
values = numpy.frombuffer(data[-(100 << 20):], numpy.uint16).astype(numpy.uint32) << 16
values = values.view(numpy.float32)
# Norms are ones, and few.
values = values[values != 1]
print(f'mean {abs(values.mean()):.3f} deviation {values.std():.3f} within one {(abs(values) < 0.02).mean():.2f}')
for size in (200 << 20, 8 << 30):
    print(f'{layout.Shape.of_size(size).weights_bytes() / size:.2f} of what is wanted')
for size in ((200 << 20) - 1, (8 << 30) + 1):
    print(subprocess.run([sys.executable, '-B', script, '--size', str(size), '--out', out], capture_output=True, text=True).stderr.strip())
";

#[test]
fn weights_are_normal_of_the_wanted_size_and_the_same_for_a_seed() {
    let Some(world) = world(&[Need::Torch]) else { return };
    let out = world.files().join("weights");
    let output = Command::new(needs::venv_python())
        .args(["-B", "-c", WEIGHTS])
        .args([examples().join("transformer/make_weights.py"), out])
        .output()
        .expect("start Python");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let printed = String::from_utf8(output.stdout).expect("text");
    let lines: Vec<&str> = printed.lines().filter(|line| !line.contains("layers of width")).collect();
    assert_eq!(
        lines,
        [
            "the same seed True another False",
            "mean 0.000 deviation 0.020 within one 0.68",
            "1.01 of what is wanted",
            "1.00 of what is wanted",
            "make_weights: size is 209715199 bytes, expected 209715200 to 8589934592",
            "make_weights: size is 8589934593 bytes, expected 209715200 to 8589934592",
        ]
    );
    world.finish();
}

/// Weights of 512 MiB, made once and kept in the cache.
fn weights_path() -> PathBuf {
    needs::cache().join("models/512MiB/model.safetensors")
}

fn make_weights() {
    if weights_path().is_file() {
        return;
    }
    let output = Command::new(needs::venv_python())
        .arg(examples().join("transformer/make_weights.py"))
        .args(["--size", "512MiB", "--out"])
        .arg(weights_path().parent().expect("it has one"))
        .output()
        .expect("start Python");
    assert!(output.status.success(), "make weights: {}", String::from_utf8_lossy(&output.stderr));
}

/// The monotonic clock of the machine that restores has another value than the one that dumped: CRIU gives the clone a
/// time namespace, or timers that wait for an absolute time would fire at once or in years.
#[test]
fn timers_go_on_under_a_monotonic_clock_with_another_offset() {
    let server = Server::clock();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("clock", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    // A time namespace around the whole command: its children, so shim, runc, CRIU and server, see another uptime.
    for offset in ["100000", "-1"] {
        let uptime = std::fs::read_to_string("/proc/uptime").expect("proc is mounted");
        let uptime: f64 = uptime.split(' ').next().and_then(|text| text.parse().ok()).expect("a number");
        // An offset may not make the clock negative.
        let offset =
            if offset == "-1" { format!("-{}", (uptime - 5.0).max(0.0).trunc()) } else { offset.to_owned() };
        let output = world
            .restore_call("clock", "v1", server.port, &[])
            .under("unshare", &["--time", "--monotonic", &offset, "--boottime", &offset, "--fork", "--"])
            .timeout(Duration::from_secs(60))
            .ok();
        let clones = Replica::of_restore(&world, server.port, &output);
        server_answers_as_before(&clones[0], &server, &before);
        clones[0].remove();
    }
    world.finish();
}
