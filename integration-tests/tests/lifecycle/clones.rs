//! What clones have of their own, and what they share.

use std::collections::BTreeSet;

use rewarm_integration_tests::checks::{answers, server_answers_as_before};
use rewarm_integration_tests::http;
use rewarm_integration_tests::replica::{entries, names};
use rewarm_integration_tests::server::Server;
use serde_json::Value;

use crate::world_for;

/// `rewarm restore | head -1` ends its output; the replicas do not depend on it.
#[test]
fn clones_outlive_a_reader_that_closes_the_pipe() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    world.snapshot(&source, "v1", &[]);
    let (name, reference) = (world.name("clone"), world.reference("plain", "v1"));
    let readers =
        ["exec \"$0\" \"$@\" | head -c 1", "exec \"$0\" \"$@\" 2>&1 | true", "exec \"$0\" \"$@\" >&- 2>&-"];
    for (number, reader) in readers.iter().enumerate() {
        let name = format!("{name}-{number}");
        let call = world.rewarm().args([
            "restore",
            &reference,
            "--name",
            &name,
            "--count",
            "2",
            "--publish",
            "0:8000",
        ]);
        call.under("sh", &["-c", reader]).ok();
        let list = world.rewarm_json().arg("ps").ok();
        for entry in
            entries(&list).iter().filter(|entry| entry["name"].as_str().is_some_and(|n| n.starts_with(&name)))
        {
            let port = entry["publish"][0]["host_port"].as_u64().and_then(|port| u16::try_from(port).ok());
            let answer = http::get(port.expect("a port"), "/check").expect("an answer");
            assert_eq!(answer.status, 200, "{reader}: {entry}");
        }
        assert_eq!(names(&list).iter().filter(|n| n.starts_with(&name)).count(), 2, "{reader}: {list}");
    }
    world.finish();
}

#[test]
fn each_clone_has_a_fresh_identity() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let first = source.identity();
    assert_eq!(first["name"], source.name());
    world.snapshot(&source, "v1", &[]);
    assert_eq!(source.identity(), first, "a snapshot changes nothing about the source");
    let clones = world.restore("plain", "v1", server.port, &["--name", &world.name("clone"), "--count", "3"]);
    let mut uuids = BTreeSet::from([text(&first["uuid"])]);
    for clone in &clones {
        let identity = clone.identity();
        assert_eq!(identity["name"], clone.name());
        let generation = |identity: &Value| identity["generation"].as_u64().expect("a number");
        assert!(generation(&identity) > generation(&first), "{identity} after {first}");
        assert_ne!(identity["time"], first["time"]);
        assert!(uuids.insert(text(&identity["uuid"])), "two have the uuid of {identity}");
    }
    world.finish();
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is not text")).to_owned()
}

/// The server itself sees its own identity from its first instruction on: one that looks all the time never sees another one, and
/// never none, whatever the length of the clone's name.
#[test]
fn a_server_that_looks_all_the_time_sees_no_identity_but_its_own() {
    let mut server = Server::renewing();
    let Some(world) = world_for(&server) else { return };
    server.command.push("--watch-identity".to_owned());
    let source = world.start("renewing", &server);
    let own = text(&source.identity()["uuid"]);
    world.snapshot(&source, "v1", &[]);
    assert_eq!(source.json("/identities")["seen"], serde_json::json!([own]));
    for round in 0..3 {
        let name = world.name(&"a-clone-with-a-longer-name"[..9 + 8 * round]);
        let clones = world.restore("renewing", "v1", server.port, &["--name", &name]);
        let seen = clones[0].json("/identities")["seen"].clone();
        assert_eq!(seen, serde_json::json!([own, clones[0].identity()["uuid"]]), "{name}");
        clones[0].remove();
    }
    world.finish();
}

/// The generator of a clone's source is shared by all clones; the post hook is where it can be renewed.
#[test]
fn the_identity_is_there_when_the_post_hook_runs() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    world.snapshot(&source, "v1", &["--post", "cp /run/rewarm/identity.json /run/seen-by-hook.json"]);
    let clones = world.restore("plain", "v1", server.port, &["--name", &world.name("clone"), "--count", "2"]);
    for clone in &clones {
        let seen: Value = serde_json::from_str(&clone.sh("cat /run/seen-by-hook.json")).expect("JSON");
        assert_eq!(seen, clone.identity());
    }
    world.finish();
}

#[test]
fn clones_share_neither_files_nor_memory() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    source.sh("echo first > /srv/note; echo first > /dev/shm/note");
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    let clones = world.restore("plain", "v1", server.port, &["--name", &world.name("clone"), "--count", "2"]);
    clones[0].sh("echo second > /srv/note; echo second > /dev/shm/note");
    assert_eq!(clones[0].ask("POST", "/noise", Some("{}")).expect("an answer").status, 200);
    for other in [&source, &clones[1]] {
        assert_eq!(other.sh("cat /srv/note /dev/shm/note"), "first\nfirst", "{}", other.name());
        server_answers_as_before(other, &server, &before);
    }
    assert_ne!(answers(&clones[0], &server), before);
    // A clone is a replica like any other: it can be snapshotted, and its clones carry what it changed.
    let changed = answers(&clones[0], &server);
    let reference = world.reference("plain", "v2");
    world.rewarm_json().args(["snapshot", clones[0].name(), &reference]).ok();
    let second = world.restore("plain", "v2", server.port, &["--name", &world.name("second")]);
    server_answers_as_before(&second[0], &server, &changed);
    assert_eq!(second[0].sh("cat /srv/note /dev/shm/note"), "second\nsecond");
    world.finish();
}

/// Counters go on from where they were at the freeze, in each clone for itself.
#[test]
fn each_clone_goes_on_from_the_freeze() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    assert_eq!(source.json("/count")["count"], 1);
    assert_eq!(source.json("/count")["count"], 2);
    world.snapshot(&source, "v1", &[]);
    assert_eq!(source.json("/count")["count"], 3);
    let clones = world.restore("plain", "v1", server.port, &["--name", &world.name("clone"), "--count", "2"]);
    for clone in &clones {
        assert_eq!(clone.json("/count")["count"], 3, "{}", clone.name());
    }
    world.finish();
}

#[test]
fn an_environment_that_looks_like_secrets_is_warned_about() {
    let server = Server::secretive();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("secretive", &server);
    let output = world.snapshot_call(&source, "v1", &[]).ok();
    output.says(&["secret"]);
    for (name, value) in &server.env {
        output.says(&[name]);
        assert!(!output.stderr.contains(value), "the warning repeats the secret");
        assert!(!output.stdout.contains(value), "the report repeats the secret");
    }
    world.finish();
}

/// The state of a library's random generator is memory like any other: clones share it until a hook renews it.
#[test]
fn a_post_hook_renews_the_random_generator() {
    let server = Server::renewing();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("renewing", &server);
    world.snapshot(&source, "plain", &[]);
    world.snapshot(
        &source,
        "hook",
        &["--pre", "http://localhost/drain", "--post", "http://localhost/reseed"],
    );
    let numbers = |tag: &str| -> BTreeSet<String> {
        let flags = ["--name", &world.name(&format!("clone-{tag}")), "--count", "2"];
        let clones = world.restore("renewing", tag, server.port, &flags);
        clones.iter().map(|clone| clone.json("/random")["number"].to_string()).collect()
    };
    assert_eq!(numbers("plain").len(), 1, "clones without a hook share the generator");
    assert_eq!(numbers("hook").len(), 2, "the hook does not renew the generator");
    world.finish();
}
