//! SIGINT and SIGKILL of `rewarm` at every stage of both pipelines, the list taken from [`Stage`]: a stage that is added is
//! covered here, or the test fails because nothing pauses there.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rewarm_integration_tests::checks::{
    Answers, answers, no_half_uploads, no_residue, server_answers_as_before, store_verifies, visible,
};
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Output, Replica, World, residue};
use rewarm_report::{Operation, Stage};

use crate::world_for;

fn stages(operation: Operation) -> impl Iterator<Item = Stage> {
    Stage::ALL.iter().copied().filter(move |stage| stage.operation() == operation)
}

/// Hooks and a probe, so that no stage is passed over because it has nothing to do.
fn probe_file(world: &World) -> PathBuf {
    let path = world.files().join("probe.toml");
    std::fs::write(&path, "port = 8000\n\n[[request]]\npath = \"/check\"\ncompare = \"body\"\n")
        .expect("our own folder");
    path
}

fn snapshot_ended_by(signal: Signal, stop: &[&str]) {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let probe = probe_file(&world);
    let probe = probe.to_string_lossy();
    // /tmp is part of the root, so the line that a clone adds is not the source's.
    let hooks = ["--probe", &probe, "--pre", "true", "--post", "echo post >> /tmp/hooks"];
    let flags: Vec<&str> = hooks.iter().chain(stop).copied().collect();
    let source = world.start("plain", &server);
    let posts = || source.sh("touch /tmp/hooks; wc -l < /tmp/hooks").parse::<usize>().expect("a number");
    let before = answers(&source, &server);
    let mut posted = 0;
    let mut drained = false;
    for stage in stages(Operation::Snapshot) {
        let (traces, list) = (world.traces(), visible(&world));
        let running = world.snapshot_call(&source, "v1", &flags).pause_at(stage).spawn();
        running.await_stderr(&format!("paused at {stage}"));
        running.signal(signal);
        let _ = ended(running, signal, stage);
        no_residue(&world, &traces);
        server_answers_as_before(&source, &server, &before);
        assert_eq!(visible(&world), list, "{stage}: a reader sees something new");
        if signal == Signal::SIGINT {
            no_half_uploads(&world);
            // What the pre hook took away comes back, whatever became of the snapshot.
            posted += usize::from(drained);
            assert_eq!(posts(), posted, "{stage}: so often the post hook ran on the source");
        }
        drained |= stage == Stage::Drain;
    }
    assert!(drained, "no stage drains");
    // All of that was nothing to the server: it can be snapshotted and its clone answers.
    world.snapshot(&source, "v1", &flags);
    store_verifies(&world);
    let clones = world.restore("plain", "v1", server.port, &["--name", &world.name("clone")]);
    server_answers_as_before(&clones[0], &server, &before);
    if signal == Signal::SIGKILL {
        world.collect_what_the_killed_left();
    }
    world.finish();
}

fn ended(running: rewarm_integration_tests::Running, signal: Signal, stage: Stage) -> Output {
    let output = running.wait();
    match signal {
        Signal::SIGKILL => assert_eq!(output.signal, Some(Signal::SIGKILL as i32), "{stage}: {output}"),
        _ => {
            assert_eq!(output.code, Some(1), "{stage}: {output}");
            output.says(&["interrupted by SIGINT"]);
        }
    }
    assert!(output.took < Duration::from_secs(25), "{stage}: it slept through the signal: {output}");
    output
}

#[test]
fn a_snapshot_interrupted_at_any_stage_leaves_the_server_serving() {
    snapshot_ended_by(Signal::SIGINT, &[]);
}

#[test]
fn a_snapshot_killed_at_any_stage_leaves_the_server_serving() {
    snapshot_ended_by(Signal::SIGKILL, &[]);
}

#[test]
fn a_snapshot_with_stop_interrupted_at_any_stage_leaves_the_server_serving() {
    snapshot_ended_by(Signal::SIGINT, &["--stop"]);
}

#[test]
fn a_snapshot_with_stop_killed_at_any_stage_leaves_the_server_serving() {
    snapshot_ended_by(Signal::SIGKILL, &["--stop"]);
}

/// What a killed command leaves undone, the shim does in its place, and that may take as long as a hook does.
#[test]
fn a_snapshot_right_after_a_killed_one_waits_until_the_server_goes_on() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let hooks = ["--pre", "true", "--post", "sleep 2; echo post >> /tmp/hooks"];
    let source = world.start("plain", &server);
    let running = world.snapshot_call(&source, "v1", &hooks).pause_at(Stage::Delta).spawn();
    running.await_stderr(&format!("paused at {}", Stage::Delta));
    running.signal(Signal::SIGKILL);
    let _ = ended(running, Signal::SIGKILL, Stage::Delta);
    world.snapshot(&source, "v1", &hooks);
    assert_eq!(source.sh("wc -l < /tmp/hooks"), "2", "so often the post hook ran");
    world.collect_what_the_killed_left();
    world.finish();
}

fn restore_ended_by(signal: Signal, count: &str) {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let probe = probe_file(&world);
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &["--probe", &probe.to_string_lossy(), "--post", "true"]);
    let name = world.name("clone");
    let flags = ["--name", &name, "--count", count];
    for stage in stages(Operation::Restore) {
        let (traces, alive) = (world.traces(), residue::processes(world.id()));
        let running = world.restore_call("plain", "v1", server.port, &flags).pause_at(stage).spawn();
        running.await_stderr(&format!("paused at {stage}"));
        running.signal(signal);
        let output = ended(running, signal, stage);
        if signal == Signal::SIGINT {
            // It has waited until nothing was left, and says what was given up.
            // Of several, another one may have come further, or not as far.
            if count == "1" {
                output.says(&[&format!("stage {stage}")]);
            }
            let begun = stage != Stage::Admit && !output.stderr.contains("no replica had been begun");
            if begun {
                output.says(&["given up", &name]);
            }
            assert!(
                begun || matches!(stage, Stage::Admit | Stage::Sandbox),
                "{stage}: nothing was begun\n{output}"
            );
            // What was killed ends when the kernel has time for it, the guard of a pager last.
            let began = std::time::Instant::now();
            loop {
                let left = residue::processes(world.id());
                if left.len() == alive.len() {
                    break;
                }
                let patience = Duration::from_secs(2);
                assert!(
                    began.elapsed() < patience,
                    "{stage}: {left:?} is left, expected {alive:?}\n{output}"
                );
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        no_residue(&world, &traces);
    }
    still_restores(&world, &server, &before, &flags);
    server_answers_as_before(&source, &server, &before);
    store_verifies(&world);
    world.finish();
}

/// The name that was used by all the failed ones is free.
fn still_restores(world: &World, server: &Server, before: &Answers, flags: &[&str]) {
    for clone in world.restore("plain", "v1", server.port, flags) {
        server_answers_as_before(&clone, server, before);
    }
}

#[test]
fn a_restore_interrupted_at_any_stage_leaves_nothing() {
    restore_ended_by(Signal::SIGINT, "1");
}

#[test]
fn a_restore_of_two_interrupted_at_any_stage_leaves_nothing() {
    restore_ended_by(Signal::SIGINT, "2");
}

/// A cold start too: while it is laid out, and while it is waited for.
#[test]
fn a_run_interrupted_at_any_stage_leaves_nothing() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let traces = world.traces();
    let name = world.name("plain");
    for stage in [Stage::Sandbox, Stage::Ready] {
        let running = world.run_call(&name, &server, &[]).pause_at(stage).spawn();
        running.await_stderr(&format!("paused at {stage}"));
        running.signal(Signal::SIGINT);
        let output = ended(running, Signal::SIGINT, stage);
        output.says(&[&format!("stage {stage}")]);
        assert_eq!(residue::processes(world.id()), [], "{stage}: {output}");
        no_residue(&world, &traces);
    }
    let waiting = Server { ready: "tcp:9999".to_owned(), ..server.clone() };
    let call = world.run_call(&name, &waiting, &[]).spawn();
    world.await_state("the server runs", Duration::from_secs(20), || {
        residue::processes(world.id()).iter().any(|(_, command)| command.starts_with("/usr/bin/python3"))
    });
    call.signal(Signal::SIGTERM);
    let output = call.wait();
    output.expect_code(1);
    output.says(&["interrupted by SIGTERM", "given up", &name]);
    no_residue(&world, &traces);
    let replica = world.start("plain", &server);
    assert_eq!(replica.json("/healthz")["ready"], true);
    world.finish();
}

/// A replica that its command has not handed out belongs to nobody.
#[test]
fn a_run_killed_at_any_stage_leaves_nothing() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let traces = world.traces();
    let name = world.name("plain");
    for stage in [Stage::Sandbox, Stage::Ready] {
        let running = world.run_call(&name, &server, &[]).pause_at(stage).spawn();
        running.await_stderr(&format!("paused at {stage}"));
        running.signal(Signal::SIGKILL);
        let _ = ended(running, Signal::SIGKILL, stage);
        no_processes(&world);
        no_residue(&world, &traces);
    }
    let replica = world.start("plain", &server);
    assert_eq!(replica.json("/healthz")["ready"], true);
    world.finish();
}

#[test]
fn a_restore_killed_at_any_stage_leaves_nothing() {
    restore_ended_by(Signal::SIGKILL, "1");
}

#[test]
fn a_restore_of_two_killed_at_any_stage_leaves_nothing() {
    restore_ended_by(Signal::SIGKILL, "2");
}

/// The shim owns the replica: when it is killed, the server must not go on without an owner, and the next command clears up.
#[test]
fn a_killed_shim_takes_its_replica_with_it() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let traces = world.traces();
    let replica = world.start("plain", &server);
    kill_shim(&world, &replica);
    // The kernel lets go of a killed process's lock a moment after the kill.
    let began = Instant::now();
    loop {
        let status = replica.entry().map(|entry| entry["status"].clone());
        if status.as_ref().is_none_or(|status| status == "crashed") {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "{status:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    no_processes(&world);
    world.rewarm().args(["rm", replica.name()]).ok();
    no_residue(&world, &traces);
    // The name is free.
    let again = world.start("plain", &server);
    assert_eq!(answers(&again, &server), answers(&again, &server));
    world.finish();
}

#[test]
fn a_shim_killed_during_a_dump_ends_the_snapshot_with_an_error() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let replica = world.start("plain", &server);
    let mut running = world.snapshot_call(&replica, "v1", &[]).pause_at(Stage::Delta).spawn();
    running.await_stderr("paused at delta");
    kill_shim(&world, &replica);
    running.go_on();
    let output = running.wait();
    // Nobody is left stopped, which would be 6: the server has ended with its shim.
    output.expect_code(1);
    assert!(!visible(&world).to_string().contains(replica.name()), "a snapshot is visible");
    let _ = world.rewarm_json().args(["ps", "--all"]).ok();
    no_processes(&world);
    world.finish();
}

fn kill_shim(world: &World, replica: &Replica<'_>) {
    let of_shim = |command: &str| command.contains(" shim ") && command.contains(replica.name());
    let shims: Vec<i32> = residue::processes(world.id())
        .into_iter()
        .filter(|(_, command)| of_shim(command))
        .map(|(pid, _)| pid)
        .collect();
    assert!(!shims.is_empty(), "no shim among {:?}", residue::processes(world.id()));
    for pid in shims {
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it runs");
    }
}

fn no_processes(world: &World) {
    world.await_state("no process is left", Duration::from_secs(20), || {
        residue::processes(world.id()).is_empty()
    });
}
