//! The cold fallback: where no warm replica can be had, a cold one is started, and the output says so.

use rewarm_integration_tests::Replica;
use rewarm_integration_tests::server::Server;

use crate::world_for;

#[test]
fn a_missing_snapshot_falls_back_to_the_given_command() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let call = world.restore_call(
        "plain",
        "absent",
        server.port,
        &["--ready", &server.ready, "--cold-fallback", "--"],
    );
    let output = call.args(&server.command).ok();
    assert_eq!(output.json()["started"], "cold", "{output}");
    let replicas = Replica::of_restore(&world, server.port, &output);
    assert_eq!(replicas[0].json("/healthz")["ready"], true);
    // Without the fallback it is an error that names the reference.
    world.restore_call("plain", "absent", server.port, &[]).fails(4).says(&["absent"]);
    world.finish();
}

#[test]
fn a_clone_that_fails_falls_back_to_the_recorded_command() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let token = source.json("/check")["token"].clone();
    let hook = format!("grep -q '\"{}\"' /run/rewarm/identity.json", source.name());
    world.snapshot(&source, "v1", &["--post", &hook]);
    let flags = ["--name", &world.name("clone"), "--cold-fallback"];
    let output = world.restore_call("plain", "v1", server.port, &flags).ok();
    assert_eq!(output.json()["started"], "cold", "{output}");
    let replicas = Replica::of_restore(&world, server.port, &output);
    assert_ne!(replicas[0].json("/check")["token"], token, "a cold start makes its own token");
    world.finish();
}

/// Nothing can be started at all: both reasons are told.
#[test]
fn when_the_cold_start_fails_too_both_are_told() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let traces = world.traces();
    let flags = ["--ready", &server.ready, "--cold-fallback", "--", "/bin/false"];
    let output = world.restore_call("plain", "absent", server.port, &flags).fails(1);
    output.says(&["absent", "code 1"]);
    rewarm_integration_tests::checks::no_residue(&world, &traces);
    world.finish();
}
