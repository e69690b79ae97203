//! `--engine`: steps around a snapshot, a pause and a wake.

use rewarm_integration_tests::Replica;
use rewarm_integration_tests::checks::{answers, server_answers_as_before};
use rewarm_integration_tests::server::Server;

use super::{start, world_with};
use crate::world_for;

const MIB: u64 = 1 << 20;

#[test]
fn a_kv_cache_is_left_out_of_a_snapshot_and_is_back_at_its_address() {
    let Some((world, devices)) = world_with(&[128]) else { return };
    let server = devices.python_server();
    let source = start(&world, &devices, "cuda", &server);
    let before = answers(&source, &server);
    let used = devices.used_mib(0);
    let steps = "[[before]]\nname = 'drop'\npost = '/sleep'\nstatus = 200\n\
                 [[after]]\nname = 'take'\npost = '/wake'\nretries = 2\npause = '100ms'\n\
                 [[after]]\nname = 'check'\nget = '/check'\n";
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("engine.toml");
    std::fs::write(&file, steps).expect("write");
    let file = file.display().to_string();
    world.snapshot(&source, "v1", &["--engine", &file]);
    server_answers_as_before(&source, &server, &before);
    assert_eq!(devices.used_mib(0), used);
    let inspected = world.rewarm_json().args(["inspect", &world.reference("cuda", "v1")]).ok().json();
    let device = &inspected["variants"][0]["manifest"]["facts"]["device"];
    let copies = device["processes"][0]["copies"].as_array().expect("a list");
    let bytes =
        |copy: &serde_json::Value| copy["end"].as_u64().zip(copy["start"].as_u64()).map(|(e, s)| e - s);
    let carried: u64 = copies.iter().filter_map(bytes).sum();
    assert_eq!(carried, 8 * MIB, "the weights without the cache of 8 MiB: {device}");
    let call = world.restore_call("cuda", "v1", server.port, &["--name", &world.name("clone")]);
    let clones = Replica::of_restore(&world, server.port, &devices.seen_by(call).ok());
    assert_eq!(devices.used_mib(0), 2 * used, "the clone's cache is there again");
    server_answers_as_before(&clones[0], &server, &before);
    // A pause takes the same steps.
    let name = clones[0].name();
    let paused = world.rewarm_json().args(["pause", name, "--engine", &file]).ok().json();
    assert_eq!(paused["device_bytes"], 8 * MIB, "{paused}");
    world.rewarm().args(["wake", name, "--engine", &file]).ok();
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

#[test]
fn a_step_that_fails_is_named_and_leaves_the_server_serving() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    let folder = tempfile::tempdir().expect("a folder");
    let write = |steps: &str| {
        let file = folder.path().join("engine.toml");
        std::fs::write(&file, steps).expect("write");
        file.display().to_string()
    };
    let noted = |replica: &str| world.rewarm().args(["exec", replica, "--", "cat", "/tmp/steps"]).ok().stdout;
    let note = |list: &str, word: &str| {
        format!("[[{list}]]\nname = '{word}'\ncommand = 'echo {word} >> /tmp/steps'\n")
    };
    let (first, last) = (note("before", "first"), note("after", "last"));
    let file = write(&format!(
        "{first}[[before]]\nname = 'absent'\ncommand = 'exit 3'\nretries = 2\npause = '10ms'\n{last}"
    ));
    let output = world.snapshot_call(&source, "v1", &["--engine", &file]).fails(1);
    output.says(&["step \"absent\" failed 3 times: ended with exit status: 3", "serving"]);
    assert_eq!(noted(source.name()), "first\nlast\n", "what was begun is undone");
    server_answers_as_before(&source, &server, &before);
    let file = write(&format!("{first}{last}"));
    world.snapshot(&source, "v1", &["--engine", &file]);
    let call = world.restore_call("plain", "v1", server.port, &["--name", &world.name("clone")]);
    let clones = Replica::of_restore(&world, server.port, &call.ok());
    assert_eq!(noted(clones[0].name()), "first\nlast\nfirst\nlast\n");
    clones[0].remove();
    // After a restore a step that fails kills the clone.
    let traces = world.traces();
    let file = write("[[after]]\nname = 'never'\ncommand = 'test -e /run/rewarm/no-such'\n");
    world.snapshot(&source, "v2", &["--engine", &file]);
    let call = world.restore_call("plain", "v2", server.port, &["--name", &world.name("clone")]);
    call.fails(1).says(&["step \"never\" failed at once: ended with"]);
    rewarm_integration_tests::checks::no_residue(&world, &traces);
    let output = world.snapshot_call(&source, "v3", &["--engine", "tgi"]).fails(2);
    output.says(&["vllm, sglang, torch, llamacpp, generic"]);
    world.finish();
}
