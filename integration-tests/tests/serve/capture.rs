//! A tag that heals itself: pools whose snapshot does not fit their machine.

use std::time::Duration;

use rewarm_integration_tests::World;
use rewarm_integration_tests::http;
use rewarm_integration_tests::pool::{Serving, free_port};
use rewarm_integration_tests::server::{Server, own_library};
use serde_json::Value;

use super::config;

/// How long a busy machine may take for a cold start and a snapshot.
const PATIENCE: Duration = Duration::from_secs(120);

/// A world with the snapshot `pool@v1`, of which a library has changed since; its source is gone.
fn outdated() -> Option<World> {
    let mut server = Server::pool();
    let world = crate::world_for(&server)?;
    let library = own_library(&world.files(), "libown.so");
    server.env.push(("LD_PRELOAD".to_owned(), library.to_string_lossy().into_owned()));
    let probe = world.files().join("probe.toml");
    std::fs::write(&probe, "port = 8000\n[[request]]\npath = '/check'\n").expect("our own folder");
    let source = world.start("pool", &server);
    world.snapshot(&source, "v1", &["--stop", "--probe", &probe.to_string_lossy()]);
    source.remove();
    let mut longer = std::fs::read(&library).expect("our own file");
    longer.extend_from_slice(b"upgraded");
    std::fs::write(&library, longer).expect("our own file");
    world.restore_call("pool", "v1", 8000, &[]).fails(3).says(&["libown.so"]);
    Some(world)
}

/// The newest variant of the tag.
fn newest(world: &World) -> Value {
    world.rewarm_json().args(["inspect", &world.reference("pool", "v1")]).ok().json()["variants"][0].clone()
}

/// The replicas that are being captured.
fn captured(world: &World) -> Vec<String> {
    let list = world.rewarm_json().arg("ps").ok().json();
    let replicas = list["replicas"].as_array().cloned().unwrap_or_default();
    let own = |one: &Value| one["labels"]["rewarm.captured"].as_str().map(str::to_owned);
    replicas.iter().filter_map(own).collect()
}

/// How the pool's replicas were started.
fn started(world: &World) -> Vec<String> {
    let list = world.rewarm_json().arg("ps").ok().json();
    let replicas = list["replicas"].as_array().cloned().unwrap_or_default();
    let serving = replicas.iter().filter(|one| !one["labels"]["rewarm.pool"].is_null());
    serving.map(|one| one["started"].as_str().unwrap_or_default().to_owned()).collect()
}

fn await_healed(serving: &Serving<'_>) {
    serving.running().await_stderr("has a variant that fits this machine");
}

#[test]
fn a_snapshot_that_does_not_fit_gets_a_variant_while_cold_replicas_serve() {
    let Some(world) = outdated() else { return };
    let before = newest(&world);
    let port = free_port();
    let serving = world.serve(&config(&world, port, "min_replicas = 1\nretry = false\ncapture = true\n"));
    let answer = http::get(port, "/check").expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(started(&world), ["cold"]);
    await_healed(&serving);
    assert_eq!(captured(&world), [] as [String; 0]);
    let after = newest(&world);
    assert_ne!(after["digest"], before["digest"]);
    let probe = |variant: &Value| variant["manifest"]["facts"]["probe"]["exchanges"].clone();
    assert_eq!(probe(&after), probe(&before), "the same questions and answers");
    assert_eq!(probe(&after).as_array().map(Vec::len), Some(1));
    // The next replica is restored from it, and answers what the cold ones did.
    assert_eq!(http::get(port, "/die").expect("an answer").status, 502);
    // Not while the dead one still takes connections, which it only resets.
    world.await_state("another one takes its place", PATIENCE, || started(&world) == ["restored"]);
    let again = http::get(port, "/check").expect("an answer");
    assert_eq!((again.status, again.text()), (200, answer.text()));
    serving.end();
    world.finish();
}

#[test]
fn what_is_captured_when_serve_is_killed_is_ended_by_the_next_one() {
    let Some(world) = outdated() else { return };
    let config = config(&world, free_port(), "capture = true\n");
    let serving = world.serve(&config);
    world.await_state("something is captured", PATIENCE, || !captured(&world).is_empty());
    let names = captured(&world);
    serving.kill();
    let serving = world.serve(&config);
    assert!(captured(&world).iter().all(|name| !names.contains(name)), "{names:?}");
    await_healed(&serving);
    assert_eq!(serving.replicas(), []);
    serving.end();
    world.finish();
}

#[test]
fn a_capture_that_fails_leaves_nothing_and_says_why() {
    let Some(world) = outdated() else { return };
    let before = newest(&world);
    let file = config(&world, free_port(), "capture = true\ncold = ['/bin/false']\n");
    let serving = world.serve(&file);
    serving.running().await_stderr("no variant was made");
    assert_eq!(captured(&world), [] as [String; 0]);
    assert_eq!(newest(&world), before);
    serving.end();
    // What could not be published is not begun.
    let digest = before["digest"].as_str().expect("a digest");
    let by_digest = file.replace("@v1", &format!("@{digest}"));
    world.configure(&by_digest);
    world.serve_call().fails(2).says(&["capture of pool", "expected a tag"]);
    world.finish();
}
