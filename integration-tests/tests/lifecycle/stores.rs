//! Snapshots in each kind of store, and what `ls` and `inspect` tell of them.

use rewarm_integration_tests::checks::{answers, server_answers_as_before, store_verifies, visible};
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Need, World, needs};

use crate::{world, world_for};

fn to_and_from(world: World) {
    let server = Server::plain();
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "", &[]);
    source.remove();
    // Without a tag it is `latest`.
    let clones = world.restore("plain", "latest", server.port, &[]);
    server_answers_as_before(&clones[0], &server, &before);
    store_verifies(&world);
    world.finish();
}

#[test]
fn a_folder() {
    if let Some(world) = world(needs::REPLICA) {
        to_and_from(world);
    }
}

#[test]
fn a_bucket_of_a_real_s3_server() {
    let needs: Vec<Need> = needs::REPLICA.iter().copied().chain([Need::Garage]).collect();
    if let Some(world) = world(&needs) {
        to_and_from(world.on_garage());
    }
}

#[test]
fn a_container_of_azure() {
    let needs: Vec<Need> = needs::REPLICA.iter().copied().chain([Need::Node, Need::Azurite]).collect();
    if let Some(world) = world(&needs) {
        to_and_from(world.on_azure());
    }
}

#[test]
fn a_bucket_of_google() {
    let needs: Vec<Need> = needs::REPLICA.iter().copied().chain([Need::Gcs]).collect();
    if let Some(world) = world(&needs) {
        to_and_from(world.on_google());
    }
}

#[test]
fn a_snapshot_is_immutable_under_its_digest() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let first = answers(&source, &server);
    let report = world.snapshot(&source, "v1", &[]);
    let digest = report["digest"].as_str().expect("a digest").to_owned();
    assert_eq!(source.ask("POST", "/noise", Some("{}")).expect("an answer").status, 200);
    let second = answers(&source, &server);
    // The tag moves, the digest stays.
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let moved = world.restore("plain", "v1", server.port, &[]);
    server_answers_as_before(&moved[0], &server, &second);
    moved[0].remove();
    let old = world.restore("plain", &digest, server.port, &[]);
    server_answers_as_before(&old[0], &server, &first);
    store_verifies(&world);
    world.finish();
}

/// The second snapshot of an unchanged server uploads next to nothing.
#[test]
fn what_the_store_has_is_not_uploaded_again() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let first = world.snapshot(&source, "v1", &[]);
    let second = world.snapshot(&source, "v2", &[]);
    let new = |report: &serde_json::Value| {
        report["new_bytes"].as_u64().unwrap_or_else(|| panic!("no new_bytes in {report}"))
    };
    assert!(new(&second) * 4 < new(&first), "{} bytes, then {}", new(&first), new(&second));
    let percent = |report: &serde_json::Value| report["new_percent"].as_f64().expect("a part of the whole");
    assert!(percent(&first) > 50.0 && percent(&second) < 25.0, "{first}\n{second}");
    world.finish();
}

#[test]
fn ls_and_inspect_tell_of_the_snapshot() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    assert!(!visible(&world).to_string().contains("plain"), "an empty store is not empty");
    let source = world.start("plain", &server);
    let report = world.snapshot(&source, "v1", &[]);
    let list = visible(&world).to_string();
    assert!(list.contains(source.name()) && list.contains("v1"), "{list}");
    let inspected = world.rewarm_json().args(["inspect", &world.reference("plain", "v1")]).ok().json();
    assert_eq!(inspected["variants"][0]["digest"], report["digest"]);
    let text = inspected.to_string();
    for word in ["criu", "kernel", "/usr/bin/python3"] {
        assert!(text.contains(word), "{word:?} is missing in {inspected:#}");
    }
    world.finish();
}
