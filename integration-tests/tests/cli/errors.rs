//! What the verbs print when something is wrong: error texts are interface.

use rewarm_integration_tests::needs;
use rewarm_integration_tests::server::Server;

use super::assert_printed;
use crate::{world, world_for};

#[test]
fn unknown_things() {
    let Some(world) = world(needs::REPLICA) else { return };
    let (name, reference) = (world.name("absent"), world.reference("absent", "v1"));
    assert_printed("error-unknown-replica", &world, &world.rewarm().args(["stop", &name]).fails(4));
    assert_printed("error-unknown-snapshot", &world, &world.rewarm().args(["restore", &reference]).fails(4));
    assert_printed("error-unknown-json", &world, &world.rewarm_json().args(["stop", &name]).fails(4));
}

#[test]
fn a_server_that_fails() {
    let Some(world) = world(needs::REPLICA) else { return };
    let name = world.name("broken");
    let script = "echo loading; echo no weights found >&2; exit 42";
    let call = world.rewarm().args(["run", &name, "--ready", "tcp:8000", "--", "sh", "-c", script]);
    assert_printed("error-run-ended", &world, &call.fails(1));
    let call = world.rewarm().args([
        "run",
        &name,
        "--ready",
        "tcp:8000",
        "--ready-timeout",
        "500ms",
        "--",
        "sleep",
        "60",
    ]);
    assert_printed("error-run-not-ready", &world, &call.fails(1));
}

#[test]
fn pipelines_that_refuse() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    world.snapshot(&source, "v1", &[]);
    let reference = world.reference("plain", "v1");
    let text = |arguments: &[&str]| world.rewarm().args(arguments);
    assert_printed("error-name-in-use", &world, &text(&["restore", &reference]).fails(1));
    let small = ["restore", &reference, "--name", &world.name("clone"), "--memory", "2MiB"];
    assert_printed("error-memory-too-small", &world, &text(&small).fails(3));
    let hook = ["snapshot", source.name(), &reference, "--pre", "echo not today >&2; exit 3"];
    assert_printed("error-pre-hook", &world, &text(&hook).fails(1));
    let criu = ["snapshot", source.name(), &reference, "--criu", "/no/such/criu"];
    assert_printed("error-criu", &world, &text(&criu).fails(3));
    world.finish();
}
