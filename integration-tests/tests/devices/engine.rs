//! `--engine`: steps around a snapshot, a pause and a wake.

use std::time::Duration;

use nix::sys::signal::Signal;
use rewarm_integration_tests::checks::{answers, server_answers_as_before};

use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Replica, Rewarm, Running, World};
use rewarm_report::{Operation, Stage};

use super::luck::{probe_file, stages};
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
    // What it cost goes into its snapshots.
    assert_eq!(device["wake"], serde_json::Value::Null, "the source was never paused");
    world.snapshot(&clones[0], "v2", &["--engine", &file]);
    let reference = world.reference(clones[0].short(), "v2");
    let inspected = world.rewarm_json().args(["inspect", &reference]).ok().json();
    let wake = &inspected["variants"][0]["manifest"]["facts"]["device"]["wake"];
    assert_eq!(wake["wakes"], 1, "{wake}");
    assert!(wake["seconds_per_gib"].as_f64().is_some_and(|seconds| seconds > 0.0), "{wake}");
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
    // What lets the server go on is done although another step before it fails.
    let file = write(&format!(
        "{first}[[before]]\nname = 'absent'\ncommand = 'exit 3'\nretries = 2\npause = '10ms'\n\
         [[after]]\nname = 'lost'\ncommand = 'exit 4'\n{last}"
    ));
    let flags = ["--engine", &file];
    for call in [
        world.snapshot_call(&source, "v1", &flags),
        world.rewarm().args(["pause", source.name()]).args(flags),
    ] {
        let output = call.fails(1);
        output.says(&["step \"absent\" failed 3 times: ended with exit status: 3"]);
        output.says(&["step \"lost\" failed at once: ended with exit status: 4"]);
        assert_eq!(noted(source.name()), "first\nlast\n", "what was begun is undone: {output}");
        server_answers_as_before(&source, &server, &before);
        source.sh("rm /tmp/steps");
    }
    let file = write(&format!("{first}{last}"));
    world.snapshot(&source, "v1", &["--engine", &file]);
    let call = world.restore_call("plain", "v1", server.port, &["--name", &world.name("clone")]);
    let clones = Replica::of_restore(&world, server.port, &call.ok());
    assert_eq!(noted(clones[0].name()), "first\nlast\n");
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

#[test]
fn a_pause_that_fails_takes_the_steps_that_let_the_server_go_on() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    let step = |list: &str, word: &str| {
        format!("[[{list}]]\nname = '{word}'\ncommand = 'echo {word} >> /tmp/steps'\n")
    };
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("engine.toml");
    std::fs::write(&file, step("before", "drain") + &step("after", "go on")).expect("write");
    let file = file.display().to_string();
    let call = |verb: &str| world.rewarm().args([verb, source.name(), "--engine", &file]);
    let noted = || source.sh("cat /tmp/steps");
    devices.control("checkpoint result 801");
    call("pause").fails(1).says(&["not supported (801); the server runs on"]);
    devices.control("");
    assert_eq!(noted(), "drain\ngo on");
    server_answers_as_before(&source, &server, &before);
    // One that is paused already is asked nothing.
    call("pause").ok();
    call("pause").fails(1).says(&["is paused"]);
    call("wake").ok();
    assert_eq!(noted(), "drain\ngo on\ndrain\ngo on");
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

/// Says when it drains and goes on, in a file; waits as long as another file is there, and fails for a third.
const TOLD: &str = "[[before]]\nname = 'drain'\ncommand = 'echo drain >> /tmp/steps; while test -e /tmp/hold; do sleep 0.05; done'\n\
    [[after]]\nname = 'go on'\ncommand = 'echo on >> /tmp/steps; while test -e /tmp/keep; do sleep 0.05; done; test ! -e /tmp/broken'\n";

/// A server whose engine's steps leave notes in `/tmp/steps`.
struct Told<'a> {
    world: &'a World,
    source: &'a Replica<'a>,
    file: String,
}

impl<'a> Told<'a> {
    fn new(world: &'a World, source: &'a Replica<'a>) -> Self {
        let file = world.files().join("engine.toml");
        std::fs::write(&file, TOLD).expect("our own folder");
        Self { world, source, file: file.display().to_string() }
    }

    fn call(&self, verb: &str) -> Rewarm {
        self.world.rewarm().args([verb, self.source.name(), "--engine", &self.file])
    }

    fn wake(&self) -> Rewarm {
        self.world.rewarm().args(["wake", self.source.name()])
    }

    fn steps(&self) -> String {
        // A command inside would keep the pause from beginning.
        let pid = self.source.entry().expect("listed")["pid"].clone();
        let steps = std::fs::read_to_string(format!("/proc/{pid}/root/tmp/steps"));
        steps.map(|steps| steps.trim().to_owned()).unwrap_or_default()
    }

    /// Kills a command once so much was noted.
    fn kill_at(&self, running: Running, steps: &str) {
        let limit = Duration::from_secs(20);
        self.world.await_state("the step is taken", limit, || self.steps() == steps);
        assert!(self.is_drained());
        kill(running);
    }

    fn is_drained(&self) -> bool {
        self.source.entry().expect("listed")["drained"] == true
    }

    /// The server goes on by itself, by exactly these steps.
    fn goes_on(&self, steps: &str, when: &str) {
        let limit = Duration::from_secs(30);
        self.world.await_state(when, limit, || !self.is_drained() && self.steps() == steps);
        assert_eq!(self.source.entry().expect("listed")["status"], "ready", "{when}");
        self.source.sh("rm -f /tmp/steps");
    }
}

fn kill(running: Running) {
    running.signal(Signal::SIGKILL);
    let _ = running.wait();
}

#[test]
fn a_pause_or_wake_killed_between_steps_of_an_engine_leaves_no_server_waiting() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    let told = Told::new(&world, &source);

    source.sh("touch /tmp/hold");
    told.kill_at(told.call("pause").spawn(), "drain");
    told.goes_on("drain\non", "killed while it drains");
    source.sh("rm /tmp/hold");

    // The pause is not undone: what is left to do waits for the wake, whoever wakes it.
    devices.control("checkpoint wait 1500");
    let running = told.call("pause").spawn();
    devices.await_rule(&world);
    kill(running);
    devices.control("");
    let paused = || source.entry().is_some_and(|entry| entry["status"] == "paused");
    world.await_state("the replica is paused", Duration::from_secs(20), paused);
    assert!(told.is_drained());
    told.wake().ok();
    told.goes_on("drain\non", "killed while the driver was at it");

    source.sh("touch /tmp/keep");
    told.call("pause").ok();
    told.kill_at(told.call("wake").spawn(), "drain\non");
    source.sh("rm /tmp/keep");
    told.goes_on("drain\non\non", "killed while it wakes");

    devices.control("restore wait 1500");
    told.call("pause").ok();
    let running = told.wake().spawn();
    devices.await_rule(&world);
    kill(running);
    devices.control("");
    told.goes_on("drain\non", "killed while the driver wakes it");
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

#[test]
fn a_server_that_could_not_go_on_is_told_of_and_the_next_wake_tries_again() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let told = Told::new(&world, &source);
    let waits = |when: &str| {
        world.await_state(when, Duration::from_secs(20), || {
            // Nobody is at it any more.
            told.steps() == "drain\non" && told.wake().run().stderr.contains("\"go on\" failed")
        });
        let entry = source.entry().expect("listed");
        assert_eq!((&entry["status"], &entry["drained"]), (&"ready".into(), &true.into()), "{when}");
        let listed = world.rewarm().args(["ps"]).ok().stdout;
        assert!(listed.contains("ready, drained"), "{listed}");
        // Its clones would wait as it does.
        world.snapshot_call(&source, "v1", &[]).fails(3).says(&["the replica is drained, expected ready"]);
        source.sh("rm /tmp/steps /tmp/broken");
        told.wake().ok();
        told.goes_on("on", when);
        told.wake().fails(1).says(&["wake needs a replica that is paused, but", "is ready"]);
    };
    source.sh("touch /tmp/broken");
    told.call("pause").ok();
    told.wake().fails(1).says(&["step \"go on\" failed at once: ended with exit status: 1"]);
    waits("after a wake");

    source.sh("touch /tmp/broken /tmp/hold");
    told.kill_at(told.call("pause").spawn(), "drain");
    source.sh("rm /tmp/hold");
    waits("after a pause that was killed");
    world.finish();
}

#[test]
fn a_snapshot_killed_between_steps_of_an_engine_leaves_no_server_waiting() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    let told = Told::new(&world, &source);
    let probe = probe_file(&world);
    let hook = ["--probe", &probe, "--post", "echo hook >> /tmp/steps"];
    let snapshot = |flags: &[&str]| {
        let flags = [&["--engine", &told.file][..], &hook, flags].concat();
        world.snapshot_call(&source, "v1", &flags)
    };
    source.sh("touch /tmp/hold");
    told.kill_at(snapshot(&[]).spawn(), "drain");
    told.goes_on("drain\non\nhook", "killed while it drains");
    source.sh("rm /tmp/hold; touch /tmp/keep");
    told.kill_at(snapshot(&[]).spawn(), "drain\non");
    source.sh("rm /tmp/keep");
    told.goes_on("drain\non\non\nhook", "killed while the source goes on");
    for flags in [&[][..], &["--stop"]] {
        for stage in stages(Operation::Snapshot) {
            let running = snapshot(flags).pause_at(stage).spawn();
            running.await_stderr(&format!("paused at {stage}"));
            kill(running);
            let drained = stage > Stage::Drain;
            let steps = if drained { "drain\non\nhook" } else { "" };
            told.goes_on(steps, &format!("killed at {stage}"));
        }
    }
    server_answers_as_before(&source, &server, &before);
    world.collect_what_the_killed_left();
    world.finish();
}

/// The servers know the documented paths and refuse what comes out of order; there is nothing of the engines in them.
#[test]
fn presets_call_what_their_engines_document_in_an_order_that_these_allow() {
    const VLLM: [&str; 7] = [
        "POST /pause",
        "POST /sleep",
        "POST /wake_up",
        "POST /wake_up",
        "POST /resume",
        "GET /health",
        "POST /v1/completions",
    ];
    const SGLANG: [&str; 6] = [
        "POST /pause_generation",
        "POST /release_memory_occupation",
        "POST /resume_memory_occupation",
        "POST /continue_generation",
        "GET /health",
        "POST /generate",
    ];
    const LLAMACPP: [&str; 2] = ["GET /health", "POST /completion"];
    // vLLM answers what it has in work first; SGLang has only a way to end it, and llama.cpp has neither.
    for (engine, steps, work) in [
        ("vllm", &VLLM[..], Some(("/v1/completions", 200))),
        ("sglang", &SGLANG, Some(("/generate", 500))),
        ("llamacpp", &LLAMACPP, None),
    ] {
        let server = Server::engine(engine);
        let Some(world) = world_for(&server) else { return };
        let source = &world.start(engine, &server);
        let before = answers(source, &server);
        std::thread::scope(|scope| {
            let asked = work.map(|(path, status)| {
                let ask =
                    move || source.ask("POST", path, Some("{\"seconds\": 3}")).expect("an answer").status;
                (status, scope.spawn(ask))
            });
            let running = u64::from(asked.is_some());
            world.await_state("it has that in work", Duration::from_secs(10), || {
                source.json("/steps")["running"] == running
            });
            world.snapshot(source, "v1", &["--engine", engine]);
            if let Some((status, asked)) = asked {
                assert_eq!(asked.join().expect("no panic"), status, "{engine}");
            }
        });
        let work = work.map(|(path, _)| format!("POST {path}"));
        let expected: Vec<&str> = work.as_deref().into_iter().chain(steps.iter().copied()).collect();
        assert_eq!(source.json("/steps")["steps"], serde_json::json!(expected));
        server_answers_as_before(source, &server, &before);
        let clones = world.restore(engine, "v1", server.port, &["--name", &world.name("clone")]);
        assert_eq!(clones[0].json("/steps")["steps"], serde_json::json!(expected));
        server_answers_as_before(&clones[0], &server, &before);
        // A pause and a wake take the same steps.
        for verb in ["pause", "wake"] {
            world.rewarm().args([verb, source.name(), "--engine", engine]).ok();
        }
        let again: Vec<&str> = expected.iter().chain(steps).copied().collect();
        assert_eq!(source.json("/steps")["steps"], serde_json::json!(again));
        server_answers_as_before(source, &server, &before);
        world.finish();
    }
}

/// Each as it is printed, which is what somebody would copy and change.
#[test]
fn every_preset_is_listed_printed_and_taken_back_as_a_file() {
    let Some(world) = world_for(&Server::engine("vllm")) else { return };
    let listed = world.rewarm().arg("engine").ok().stdout;
    let names = ["vllm", "sglang", "torch", "llamacpp", "generic"];
    assert_eq!(listed.lines().collect::<Vec<_>>(), names);
    let all = world.rewarm_json().arg("engine").ok().json();
    for (index, name) in names.into_iter().enumerate() {
        let printed = world.rewarm().args(["engine", name]).ok().stdout;
        assert_eq!(all["engines"][index], serde_json::json!({ "name": name, "toml": printed }));
        let file = world.files().join("engine.toml");
        std::fs::write(&file, &printed).expect("our own folder");
        let file = file.display().to_string();
        // What has no steps of its own asks nothing of a server.
        let with_steps = printed.lines().any(|line| line.starts_with("[["));
        let server = if with_steps { Server::engine(name) } else { Server::plain() };
        let source = world.start(name, &server);
        let before = answers(&source, &server);
        let steps = |engine: &str| {
            let known =
                || if with_steps { source.json("/steps")["steps"].as_array().map_or(0, Vec::len) } else { 0 };
            let had = known();
            let output = world.snapshot(&source, "v1", &["--engine", engine]);
            assert!(output.is_object(), "{output}");
            known() - had
        };
        let taken = steps(&file);
        assert_eq!((taken, taken > 0), (steps(name), with_steps), "{name}: by its name as by its file");
        server_answers_as_before(&source, &server, &before);
        source.remove();
    }
    world.rewarm().args(["engine", "tgi"]).fails(2).says(&["tgi"]);
    world.finish();
}
