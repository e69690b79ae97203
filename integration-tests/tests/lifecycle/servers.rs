//! The whole life of each kind of server: run, check, snapshot, still serves, stop, three clones, same answers.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rewarm_integration_tests::checks::{answers, server_answers_as_before, store_verifies};
use rewarm_integration_tests::server::{Server, examples};
use rewarm_integration_tests::{World, needs};

use crate::world_for;

/// Takes `server` through its life and restores it once alone and `count` times side by side.
fn whole_life(world: World, server: &Server, count: usize) {
    let source = world.start(server.name, server);
    let before = answers(&source, server);
    let report = world.snapshot(&source, "v1", &[]);
    assert_eq!(report["digest"].as_str().map(|digest| digest.starts_with("blake3:")), Some(true), "{report}");
    server_answers_as_before(&source, server, &before);
    source.remove();

    let alone = world.restore(server.name, "v1", server.port, &[]);
    assert_eq!(alone.len(), 1);
    assert_eq!(alone[0].name(), world.name(server.name), "the default name is the snapshot's");
    server_answers_as_before(&alone[0], server, &before);
    alone[0].remove();

    let clones = world.restore(server.name, "v1", server.port, &["--count", &count.to_string()]);
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
        let clones = rewarm_integration_tests::Replica::of_restore(&world, server.port, &output);
        server_answers_as_before(&clones[0], &server, &before);
        clones[0].remove();
    }
    world.finish();
}
