//! Servers that cannot be dumped as they are, and servers that die at the wrong moment.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rewarm_integration_tests::checks::{answers, no_residue, server_answers_as_before, visible};
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Replica, World, residue};
use rewarm_report::Stage;

use crate::world_for;

/// Process ids, on the host, of what runs inside the replicas of a world.
fn inner_processes(world: &World) -> Vec<i32> {
    let inside = |command: &str| {
        !command.starts_with("rewarm") && !command.contains(" shim ") && !command.contains("runc")
    };
    residue::processes(world.id())
        .into_iter()
        .filter(|(_, command)| inside(command))
        .map(|(pid, _)| pid)
        .collect()
}

fn nothing_visible(world: &World, replica: &Replica<'_>) {
    assert!(!visible(world).to_string().contains(replica.name()), "a snapshot is visible");
}

#[test]
fn a_server_that_dies_during_the_dump() {
    for stage in [Stage::Dump, Stage::Delta, Stage::Resume] {
        let server = Server::plain();
        let Some(world) = world_for(&server) else { return };
        let source = world.start("plain", &server);
        let running = world.snapshot_call(&source, "v1", &[]).pause_at(stage).spawn();
        running.await_stderr(&format!("paused at {stage}"));
        for pid in inner_processes(&world) {
            // It may be another's child that is gone already.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let output = running.wait();
        if stage == Stage::Dump || stage == Stage::Delta {
            assert!(matches!(output.code, Some(1)), "{stage}: {output}");
            nothing_visible(&world, &source);
        }
        world.finish();
    }
}

/// One clone of eight fails: the others serve, the failure is reported.
#[test]
fn the_third_of_eight_clones_fails() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    let name = world.name("clone");
    let hook =
        format!("! grep -q '\"{name}-3\"' /run/rewarm/identity.json || {{ echo the third >&2; exit 1; }}");
    world.snapshot(&source, "v1", &["--post", &hook]);
    let output = world.restore_call("plain", "v1", server.port, &["--name", &name, "--count", "8"]).fails(1);
    output.says(&[&format!("{name}-3"), "the third"]);
    let clones = Replica::of_restore(&world, server.port, &output);
    let mut names: Vec<&str> = clones.iter().map(Replica::name).collect();
    names.sort_unstable();
    let expected: Vec<String> =
        (1..=8).filter(|number| *number != 3).map(|number| format!("{name}-{number}")).collect();
    assert_eq!(names, expected);
    for clone in &clones {
        server_answers_as_before(clone, &server, &before);
    }
    world.rewarm().args(["logs", &format!("{name}-3")]).fails(4);
    world.finish();
}

/// A command that runs by `exec` while its replica is dumped is not part of the server.
#[test]
fn a_snapshot_while_a_command_runs_inside() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    let running = source.exec(&["sh", "-c", "echo inside; exec sleep 30"]).spawn();
    running.await_stdout("inside");
    let traces = world.traces();
    let output = world.snapshot_call(&source, "v1", &[]).run();
    match output.code {
        // It may be refused, with the reason.
        Some(3) => assert!(output.says(&["exec"]).stdout.is_empty() || !output.stderr.is_empty()),
        Some(0) => {
            let clones = world.restore("plain", "v1", server.port, &["--name", &world.name("clone")]);
            server_answers_as_before(&clones[0], &server, &before);
            assert_eq!(
                clones[0].sh("ps ax | grep -c '[s]leep 30' || true"),
                "0",
                "the command came back in the clone"
            );
            clones[0].remove();
        }
        _ => panic!("{output}"),
    }
    no_residue(&world, &traces);
    server_answers_as_before(&source, &server, &before);
    drop(running);
    world.await_state("the command is gone", Duration::from_secs(10), || {
        !residue::processes(world.id()).iter().any(|(_, command)| command.starts_with("sleep 30"))
    });
    world.finish();
}
