//! The recorded probe: a clone answers as its source did, or it is never handed a request.

use std::path::PathBuf;

use rewarm_integration_tests::World;
use rewarm_integration_tests::checks::{answers, no_residue, server_answers_as_before, visible};
use rewarm_integration_tests::server::Server;

use crate::world_for;

fn probe_file(world: &World, text: &str) -> PathBuf {
    let path = world.files().join("probe.toml");
    std::fs::write(&path, text).expect("our own folder");
    path
}

const SAME: &str = "port = 8000\n\n[[request]]\npath = \"/check\"\ncompare = \"body\"\n";
/// The answer counts how often it was asked for.
const DIFFERS: &str =
    "port = 8000\n\n[[request]]\nname = \"counter\"\npath = \"/count\"\ncompare = \"body\"\n";

#[test]
fn equal_answers_let_a_clone_through() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    let probe = probe_file(&world, SAME);
    world.snapshot(&source, "v1", &["--probe", &probe.to_string_lossy()]);
    let output = world.restore_call("plain", "v1", server.port, &["--name", &world.name("clone")]).ok();
    let clones = rewarm_integration_tests::Replica::of_restore(&world, server.port, &output);
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

#[test]
fn a_different_answer_kills_the_clone_and_names_the_request() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    let probe = probe_file(&world, DIFFERS);
    world.snapshot(&source, "v1", &["--probe", &probe.to_string_lossy()]);
    let traces = world.traces();
    let clone = world.name("clone");
    // The recorded answer is 1, and the counter went on from there.
    let output = world.restore_call("plain", "v1", server.port, &["--name", &clone]).fails(5);
    output.says(&["replay", "counter", "1", "2"]);
    no_residue(&world, &traces);
    world.rewarm().args(["logs", &clone]).fails(4);
    server_answers_as_before(&source, &server, &before);
    // Who knows that it differs may say so.
    let clones = world.restore("plain", "v1", server.port, &["--name", &clone, "--no-probe"]);
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

#[test]
fn a_probe_that_the_running_server_fails_makes_no_snapshot() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let (before, traces) = (answers(&source, &server), world.traces());
    let unknown =
        probe_file(&world, "port = 8000\n\n[[request]]\npath = \"/check\"\ncompare = \"body\"\nwurst = 1\n");
    let call = world.snapshot_call(&source, "v1", &["--probe", &unknown.to_string_lossy()]);
    call.fails(2).says(&["wurst"]);
    let closed = probe_file(&world, "port = 8001\n\n[[request]]\npath = \"/check\"\ncompare = \"body\"\n");
    let call = world.snapshot_call(&source, "v1", &["--probe", &closed.to_string_lossy()]);
    call.fails(1).says(&["record", "8001"]);
    server_answers_as_before(&source, &server, &before);
    no_residue(&world, &traces);
    assert!(!visible(&world).to_string().contains(source.name()));
    world.finish();
}
