//! Hooks before and after: where they run, how often, and what their failure does.

use std::collections::BTreeSet;
use std::time::Duration;

use rewarm_integration_tests::checks::{answers, no_residue, server_answers_as_before, visible};
use rewarm_integration_tests::residue::{self, Trace};
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Replica, World};

use crate::world_for;

#[test]
fn hooks_run_on_the_source_and_in_each_clone() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let hooks = ["--pre", "echo pre >> /srv/hooks", "--post", "echo post >> /srv/hooks"];
    world.snapshot(&source, "v1", &hooks);
    assert_eq!(source.sh("cat /srv/hooks"), "pre\npost");
    let clones = world.restore("plain", "v1", server.port, &["--name", &world.name("clone"), "--count", "2"]);
    for clone in &clones {
        assert_eq!(clone.sh("cat /srv/hooks"), "pre\npost", "{}", clone.name());
    }
    world.finish();
}

#[test]
fn a_hook_may_be_a_request_to_the_server() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    // A POST changes the server's memory; the snapshot has the changed memory.
    world.snapshot(&source, "v1", &["--pre", "http://localhost/noise"]);
    let changed = answers(&source, &server);
    assert_ne!(changed, before, "the hook did not reach the server");
    let clones = world.restore("plain", "v1", server.port, &["--name", &world.name("clone")]);
    server_answers_as_before(&clones[0], &server, &changed);
    world.finish();
}

/// A snapshot whose pre hook failed is none, and leaves nothing. The post hook undoes what the pre hook began, so it has run.
fn aborted(world: &World, source: &Replica<'_>, traces: &BTreeSet<Trace>) {
    assert_eq!(source.sh("cat /srv/hooks"), "post");
    no_residue(world, traces);
    assert!(!visible(world).to_string().contains(source.name()), "a snapshot is visible");
}

#[test]
fn a_failing_pre_hook_aborts_with_the_server_serving() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let (before, traces) = (answers(&source, &server), world.traces());
    let hooks = ["--pre", "echo not today >&2; exit 3", "--post", "echo post >> /srv/hooks"];
    world.snapshot_call(&source, "v1", &hooks).fails(1).says(&["drain", "not today", "3"]);
    server_answers_as_before(&source, &server, &before);
    aborted(&world, &source, &traces);
    world.finish();
}

#[test]
fn a_failing_post_hook_kills_the_clone() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    // It fails in clones only, whose identity has another name.
    let hook = format!(
        "grep -q '\"{}\"' /run/rewarm/identity.json || {{ echo wrong name >&2; exit 4; }}",
        source.name()
    );
    world.snapshot(&source, "v1", &["--post", &hook]);
    let traces = world.traces();
    let call = world.restore_call("plain", "v1", server.port, &["--name", &world.name("clone")]);
    call.fails(1).says(&["identity", "wrong name", "4"]);
    no_residue(&world, &traces);
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

/// A minute is what a hook gets that nobody gave a time; this is far less, and says that the given time counts.
const GIVEN_UP_MAX: Duration = Duration::from_secs(30);

#[test]
fn a_pre_hook_that_does_not_end_is_killed_and_the_server_serves() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let (before, traces) = (answers(&source, &server), world.traces());
    let alive = residue::processes(world.id()).len();
    let hooks = ["--pre", "echo waiting; exec sleep 98", "--post", "echo post >> /srv/hooks"];
    let call = world.snapshot_call(&source, "v1", &hooks).args(["--hook-timeout", "500ms"]);
    let output = call.fails(1);
    output.says(&["stage drain", "it did not end within 500ms", "waiting", "the server goes on serving"]);
    assert!(output.took < GIVEN_UP_MAX, "{output}");
    let left = residue::processes(world.id());
    assert_eq!(left.len(), alive, "{left:?}");
    server_answers_as_before(&source, &server, &before);
    aborted(&world, &source, &traces);
    world.finish();
}

#[test]
fn a_post_hook_that_does_not_end_kills_the_clone() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    // It hangs in clones only, whose identity has another name.
    let hook = format!("grep -q '\"{}\"' /run/rewarm/identity.json || exec sleep 98", source.name());
    world.snapshot(&source, "v1", &["--post", &hook]);
    let (traces, alive) = (world.traces(), residue::processes(world.id()).len());
    let flags = ["--name", &world.name("clone"), "--hook-timeout", "500ms"];
    let output = world.restore_call("plain", "v1", server.port, &flags).fails(1);
    output.says(&["identity", "it did not end within 500ms"]);
    assert!(output.took < GIVEN_UP_MAX, "{output}");
    no_residue(&world, &traces);
    let left = residue::processes(world.id());
    assert_eq!(left.len(), alive, "{left:?}");
    server_answers_as_before(&source, &server, &before);
    world.finish();
}
