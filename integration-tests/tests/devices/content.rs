//! What the fetcher holds of a snapshot with device memory: all of it, as long as it would keep any.
//!
//! Of an ordinary snapshot in a folder content is given back as soon as it lies in the server's memory, since a server's pager
//! says what it is done with. Of device memory nobody says so: the driver's copies are filled by another way, and what goes
//! past the server is read by the command. A stream that is given back in parts would have parts that nobody gives back, and
//! is not fetched further than so far ahead of its reader.

use std::path::Path;
use std::time::Duration;

use rewarm_gpu_sim::VERSION_ENV;
use rewarm_integration_tests::checks::{answers, server_answers_as_before};
use rewarm_integration_tests::devices::Devices;
use rewarm_integration_tests::{Need, Replica, World, needs};
use serde_json::Value;

use super::{start, world_with};
use crate::world;

const PATIENCE: Duration = Duration::from_secs(60);
/// How long the fetcher stays without work: longer than from one command to the next, so that only what was given back is gone.
const IDLE: &str = "10s";

/// What is held of a snapshot, and how much was read from stores.
fn held(world: &World, digest: &Value) -> (Option<Value>, u64) {
    let cache = world.rewarm_json().arg("cache").ok().json();
    let streams = cache["streams"].as_array().cloned().unwrap_or_default();
    let stream = streams.into_iter().find(|stream| stream["digest"] == *digest);
    (stream, cache["read_bytes"].as_u64().unwrap_or(0))
}

/// Each weight's first byte is like that of the others and its second is noise, in which neither LZ4 nor zstd finds anything.
#[test]
fn weights_of_16_bits_lie_in_planes_in_a_bucket() {
    let needs: Vec<Need> = needs::REPLICA.iter().copied().chain([Need::Garage]).collect();
    let Some(world) = world(&needs) else { return };
    let world = world.on_garage();
    let devices = Devices::new(Path::new(env!("CARGO_BIN_EXE_gpu-workload")), &[64]);
    let mut server = devices.server(16);
    server.command.push("--half".to_owned());
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    let seen = world.snapshot(&source, "v1", &[]);
    let [stored, content] =
        ["stored_bytes", "content_bytes"].map(|name| seen[name].as_u64().expect("a number"));
    // A quarter of the weights is zeros, and nearly all that the server has lies on the device. Where a chunk is stored as it is, or
    // by LZ4, nothing of it is saved.
    assert!(content >= 12 << 20, "{seen}");
    assert!(stored * 4 < content * 3, "{seen}");
    source.remove();
    for mode in ["lazy", "eager"] {
        let call = world.restore_call("device", "v1", server.port, &["--mode", mode]);
        let clones = Replica::of_restore(&world, server.port, &devices.seen_by(call).ok());
        server_answers_as_before(&clones[0], &server, &before);
        clones[0].remove();
    }
    world.finish();
}

#[test]
fn content_of_a_snapshot_with_device_memory_is_never_given_back_early() {
    let Some((world, devices)) = world_with(&[128]) else { return };
    for (name, flags) in [("host", &[][..]), ("device", &[]), ("direct", &["--gpu-direct"])] {
        // The pager has something to be done with only where the server has memory of its own, as one in Python.
        let mut server = if name == "direct" { devices.python_server() } else { devices.server(16) };
        server.name = name;
        if name == "host" {
            server.command.push("--host".to_owned());
        }
        let seen_by = |call| devices.seen_by(call).env(VERSION_ENV, "13040");
        let source = world.name(name);
        let output = seen_by(world.run_call(&source, &server, &[])).ok();
        let source = Replica::of_run(&world, source, server.port, &output);
        let before = answers(&source, &server);
        // Only the first restore of a snapshot may be one whose content passes.
        let digests =
            ["lazy", "eager"].map(|mode| (mode, world.snapshot(&source, mode, flags)["digest"].clone()));
        source.remove();
        for (mode, digest) in digests {
            let restore = || {
                let call = world.restore_call(name, mode, server.port, &["--mode", mode]);
                let call = call.env("REWARM_FETCHER_IDLE", IDLE);
                let clone = Replica::of_restore(&world, server.port, &seen_by(call).ok()).remove(0);
                world.await_state("memory is complete", PATIENCE, || {
                    clone.entry().is_some_and(|entry| entry["memory"] == "present")
                });
                server_answers_as_before(&clone, &server, &before);
                clone.remove();
            };
            restore();
            if name == "host" {
                // Where content passes, this is what it looks like.
                world.await_state("it is given back", PATIENCE, || held(&world, &digest).0.is_none());
                continue;
            }
            world.await_state("nobody holds it any more", PATIENCE, || {
                held(&world, &digest).0.is_none_or(|stream| stream["holders"] == 0)
            });
            let (stream, read) = held(&world, &digest);
            let whole = stream.is_some_and(|stream| stream["complete"] == true);
            assert!(whole, "{name}, {mode}: a part was given back");
            restore();
            assert_eq!(held(&world, &digest).1, read, "{name}, {mode}: all of it was still there");
        }
    }
    world.finish();
}
