//! What the verbs print when all is well. Help, manual pages and completions, which need no machine, are looked at in the
//! `cli` crate.

use std::collections::BTreeSet;

use rewarm_integration_tests::replica::entries;
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{World, needs};
use rewarm_report::{Operation, Stage};
use serde_json::Value;

use super::assert_printed;
use crate::{world, world_for};

#[test]
fn doctor_tells_of_each_need() {
    let Some(world) = world(needs::REPLICA) else { return };
    let json = world.rewarm_json().arg("doctor").ok().json();
    let needs = json["needs"].as_array().unwrap_or_else(|| panic!("no needs in {json}"));
    let text = json.to_string().to_lowercase();
    for word in ["kernel", "criu", "runc", "cgroup", "userfaultfd", "overlay", "capabilit", "disk"] {
        assert!(text.contains(word), "doctor says nothing of {word}: {text}");
    }
    for need in needs {
        let state = need["state"].as_str().unwrap_or_default();
        assert!(["ok", "missing", "degraded"].contains(&state), "{need}");
        assert!(state == "ok" || need["fix"].is_string(), "no fix in {need}");
    }
    // A person sees the same needs.
    let shown = world.rewarm().arg("doctor").ok().stdout;
    for need in needs {
        let name = need["name"]
            .as_str()
            .or_else(|| need["need"].as_str())
            .unwrap_or_else(|| panic!("no name in {need}"));
        assert!(shown.contains(name), "{name} is missing in\n{shown}");
    }
}

#[test]
fn the_life_of_a_replica_in_text() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    assert_printed("ps-empty", &world, &world.rewarm().arg("ps").ok());
    assert_printed("ls-empty", &world, &world.rewarm().args(["ls", world.store()]).ok());
    let name = world.name("plain");
    let run = world
        .rewarm()
        .args(["run", &name, "--publish", "0:8000", "--ready", &server.ready, "--"])
        .args(&server.command);
    assert_printed("run", &world, &run.ok());
    let reference = world.reference("plain", "v1");
    assert_printed("snapshot", &world, &world.rewarm().args(["snapshot", &name, &reference]).ok());
    let clone = world.name("clone");
    let restore = world.rewarm().args(["restore", &reference, "--name", &clone, "--publish", "0:8000"]);
    assert_printed("restore", &world, &restore.ok());
    assert_printed("stop", &world, &world.rewarm().args(["stop", &clone, "--timeout", "300ms"]).ok());
    let waited = world.rewarm().args(["wait", &clone]).run();
    assert_printed("wait", &world, &waited);
    assert_printed("ps", &world, &world.rewarm().arg("ps").ok());
    assert_printed("ps-all", &world, &world.rewarm().args(["ps", "--all"]).ok());
    assert_printed("ls", &world, &world.rewarm().args(["ls", world.store()]).ok());
    assert_printed("rm", &world, &world.rewarm().args(["rm", &clone]).ok());
    let absent = world.reference("plain", "v2");
    let cold = world.rewarm().args([
        "restore",
        &absent,
        "--name",
        &clone,
        "--ready",
        "cmd:true",
        "--cold-fallback",
        "--",
    ]);
    assert_printed("restore-cold", &world, &cold.args(&server.command).ok());
    let inspected = world.rewarm().args(["inspect", &reference]).ok();
    assert!(inspected.stdout.ends_with("\nthis machine can restore it\n"), "{inspected}");
    world.finish();
}

/// Says something on both outputs, and ends with 7 when it is stopped.
const TALKER: &str =
    "trap 'exit 7' TERM; echo loading; echo careful >&2; touch /tmp/ready; while :; do sleep 0.05; done";

/// What a script reads from the verbs that act on a replica.
#[test]
fn the_life_of_a_replica_in_json() {
    let Some(world) = world(needs::REPLICA) else { return };
    let name = world.name("talker");
    let ready = "cmd:test -e /tmp/ready";
    let run = world.rewarm_json().args(["run", &name, "--publish", "0:8000", "--ready", ready, "--"]);
    assert_printed("run-json", &world, &run.args(["/bin/sh", "-c", TALKER]).ok());
    let reference = world.reference("talker", "v1");
    world.rewarm().args(["snapshot", &name, &reference]).ok();
    assert_printed("logs-json", &world, &world.rewarm_json().args(["logs", &name]).ok());
    assert_printed("stop-json", &world, &world.rewarm_json().args(["stop", &name]).ok());
    // Its exit code is the server's.
    assert_printed("wait-json", &world, &world.rewarm_json().args(["wait", &name]).fails(7));
    assert_printed("rm-json", &world, &world.rewarm_json().args(["rm", &name, &reference]).ok());
    world.finish();
}

/// The stages in `--json` are those of the pipelines, in order, each with its time.
#[test]
fn json_tells_the_stages() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let snapshot = world.snapshot(&source, "v1", &[]);
    assert_stages(&snapshot, Operation::Snapshot);
    let restore =
        world.restore_call("plain", "v1", server.port, &["--name", &world.name("clone")]).ok().json();
    let one = restore["replicas"].get(0).cloned().unwrap_or_else(|| restore.clone());
    let with_stages = if restore["stages"].is_array() { &restore } else { &one };
    assert_stages(with_stages, Operation::Restore);
    world.finish();
}

fn assert_stages(report: &Value, operation: Operation) {
    let stages = report["stages"].as_array().unwrap_or_else(|| panic!("no stages in {report}"));
    let names: BTreeSet<&str> = stages.iter().filter_map(|stage| stage["stage"].as_str()).collect();
    for stage in Stage::ALL.iter().filter(|stage| stage.operation() == operation) {
        // What has nothing to do may be left out.
        let optional = matches!(stage, Stage::Record | Stage::Drain | Stage::Replay);
        assert!(optional || names.contains(stage.name()), "{stage} is missing in {names:?}");
    }
    for stage in stages {
        assert!(stage["took_ms"].as_f64().is_some_and(|took| took >= 0.0), "{stage}");
    }
    let begun =
        |stage: &Value| stage["start_ms"].as_f64().unwrap_or_else(|| panic!("no beginning of {stage}"));
    assert!(stages.is_sorted_by_key(begun), "stages are told as they began: {report}");
    let place = |stage: &Value| Stage::ALL.iter().position(|known| stage["stage"] == known.name());
    // Those of a restore go on side by side.
    if operation == Operation::Snapshot {
        assert!(stages.is_sorted_by_key(place), "stages begin in their order: {report}");
    }
}

/// Every reading verb gives JSON, and no text beside it.
#[test]
fn reading_verbs_have_json() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    world.snapshot(&source, "v1", &[]);
    let whole = |arguments: &[&str]| -> Value {
        let output = world.rewarm_json().args(arguments).ok();
        serde_json::from_str(&output.stdout)
            .unwrap_or_else(|error| panic!("not one JSON value ({error}):\n{output}"))
    };
    let _ = whole(&["doctor"]);
    let _ = whole(&["ls", world.store()]);
    let _ = whole(&["inspect", &world.reference("plain", "v1")]);
    let ps = world.rewarm_json().args(["ps", "--all"]).ok();
    assert_eq!(entries(&ps).len(), 1);
    keys_of(&world);
    world.finish();
}

/// What a script reads from `ps --json`.
fn keys_of(world: &World) {
    let entry = entries(&world.rewarm_json().arg("ps").ok()).remove(0);
    for key in ["name", "status", "publish"] {
        assert!(entry.get(key).is_some(), "no {key} in {entry}");
    }
}
