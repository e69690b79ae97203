//! Shared memory: nobody runs before all of it is there, whichever way it comes.

use std::time::{Duration, Instant};

use rewarm_integration_tests::checks::{no_residue, server_answers_as_before};
use rewarm_integration_tests::command::Running;
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Replica, Slow, World, residue};

use super::filling::{
    MIB, TOLD_MAX, answers_of, await_present, far, kill_all, nothing_fills, pagers, snapshot_of,
};
use super::servers::state;
use crate::world_for;

/// More than what is asked for at once, so that what CRIU needs comes long before the last of it.
const SHARED_MIB: u32 = 400;
/// Bytes a second until the server stands, and then.
const RATES: [u64; 2] = [32 * MIB, 8 * MIB];

/// The states of the server's processes, as the kernel names them: T is stopped. Their command lines lie in memory that may still
/// be missing, their names do not.
fn states(world: &World) -> Vec<char> {
    let all = residue::processes(world.id()).into_iter();
    all.filter_map(|(pid, _)| state(pid))
        .filter(|(name, _)| name == "python3")
        .map(|(_, state)| state)
        .collect()
}

/// Begins a restore of which shared memory comes slowly, and waits until the server stands.
fn standing(world: &World, slow: &Slow, server: &Server, patience: &str) -> Running {
    slow.throttle(RATES[0]);
    let call = world.restore_call(server.name, "v1", server.port, &["--mode", "lazy"]);
    let running = call.env("REWARM_STORE_PATIENCE", patience).spawn();
    let began = Instant::now();
    while states(world).is_empty() || states(world).iter().any(|state| *state != 'T') {
        assert!(began.elapsed() < TOLD_MAX, "the server does not stand: {:?}", states(world));
        std::thread::sleep(Duration::from_millis(10));
    }
    slow.throttle(RATES[1]);
    running
}

#[test]
fn nobody_runs_before_shared_memory_is_there() {
    let server = Server::shared_memory(SHARED_MIB, &["--fork"]);
    let Some((world, slow)) = far(&server) else { return };
    let before = answers_of(&world, &server);
    let running = standing(&world, &slow, &server, "60s");
    let passed = slow.passed();
    while slow.passed() < passed + 8 * MIB {
        assert_eq!(states(&world), ['T', 'T'], "server and child");
        std::thread::sleep(Duration::from_millis(10));
    }
    slow.throttle(0);
    let output = running.wait();
    output.expect_code(0);
    let replica = Replica::of_restore(&world, server.port, &output).remove(0);
    assert!(states(&world).iter().all(|state| *state != 'T'), "{:?}", states(&world));
    server_answers_as_before(&replica, &server, &before);
    await_present(&world, &replica);
    nothing_fills(&world);
    world.finish();
}

/// Whatever fails while the server stands ends it before its first instruction.
#[test]
fn a_restore_that_cannot_complete_shared_memory_leaves_nothing() {
    let server = Server::shared_memory(SHARED_MIB, &[]);
    let Some((world, slow)) = far(&server) else { return };
    let traces = world.traces();
    let running = standing(&world, &slow, &server, "60s");
    kill_all(pagers(&world));
    let output = running.wait();
    output.expect_code(1);
    output.says(&["pager"]);
    no_residue(&world, &traces);

    // Nothing of it is kept.
    world.await_no_services();
    let running = standing(&world, &slow, &server, "1s");
    slow.cut_after(1);
    let output = running.wait();
    output.expect_code(1);
    output.says(&[world.id()]);
    no_residue(&world, &traces);
    world.finish();
}

/// One segment is written once for all that map it, by each clone for itself, and a replica's own can be stored again.
#[test]
fn shared_memory_comes_back_in_every_mode_and_from_a_replica() {
    let server = Server::shared_memory(48, &["--fork"]);
    let Some(world) = world_for(&server) else { return };
    let before = snapshot_of(&world, &server);
    let from = |short: &str, tag: &str, mode: &str, count: &str| {
        let name = world.name(&format!("{mode}-of-{tag}"));
        let clones =
            world.restore(short, tag, server.port, &["--mode", mode, "--count", count, "--name", &name]);
        for clone in &clones {
            server_answers_as_before(clone, &server, &before);
            await_present(&world, clone);
            server_answers_as_before(clone, &server, &before);
        }
        clones
    };
    for mode in ["lazy", "eager"] {
        from(server.name, "v1", mode, "2").iter().for_each(Replica::remove);
    }
    let one = from(server.name, "v1", "auto", "1").remove(0);
    world.snapshot(&one, "v2", &[]);
    let again = from(one.short(), "v2", "lazy", "1").remove(0);
    again.remove();
    one.remove();
    world.finish();
}

/// The tree stands stopped until its shared memory is there, or with `eager` all of it: nobody in it is to see the signal that
/// ends the stop, nor a parent that its child was stopped. A child may have stopped before its
/// parent begins to.
#[test]
fn a_server_that_stood_while_it_was_filled_sees_no_signal() {
    for mib in [0, 32] {
        let server = Server::signals(mib);
        let Some(world) = world_for(&server) else { return };
        let before = snapshot_of(&world, &server);
        for mode in ["lazy", "eager", "auto"] {
            let flags = ["--mode", mode, "--name", &world.name(mode)];
            let clone = world.restore(server.name, "v1", server.port, &flags).remove(0);
            server_answers_as_before(&clone, &server, &before);
            let quiet = serde_json::json!({
                "server": { "SIGCONT": 0, "SIGCHLD": 0, "waits": [] }, "child": { "SIGCONT": 0 }, "wait": null,
            });
            assert_eq!(clone.json("/signals"), quiet, "{mode}, {mib} MiB");
            // The handlers are there, and one is seen.
            let seen = clone.ask("POST", "/continue", None).expect("it answers").json();
            assert_eq!(
                (&seen["server"]["SIGCONT"], &seen["child"]["SIGCONT"]),
                (&1.into(), &1.into()),
                "{seen}"
            );
            clone.remove();
        }
        world.finish();
    }
}

/// Files in memory and System V segments, which CRIU finds again by other means than anonymous memory. What the pager writes does
/// not pass through an image: from a slow store the server stands while they come.
#[test]
fn memfds_and_segments_of_system_v_are_written_while_the_server_stands() {
    for kind in ["memfd", "system_v"] {
        let server = Server::shared_by(kind, SHARED_MIB);
        let Some((world, slow)) = far(&server) else { return };
        let before = answers_of(&world, &server);
        let running = standing(&world, &slow, &server, "60s");
        let passed = slow.passed();
        while slow.passed() < passed + 4 * MIB {
            assert_eq!(states(&world), ['T', 'T'], "server and child, {kind}");
            std::thread::sleep(Duration::from_millis(10));
        }
        slow.throttle(0);
        let output = running.wait();
        output.expect_code(0);
        let replica = Replica::of_restore(&world, server.port, &output).remove(0);
        server_answers_as_before(&replica, &server, &before);
        await_present(&world, &replica);
        replica.remove();
        let name = world.name("eager");
        let eager = world.restore(server.name, "v1", server.port, &["--mode", "eager", "--name", &name]);
        server_answers_as_before(&eager[0], &server, &before);
        world.finish();
    }
}

/// What the pager cannot write goes through CRIU.
#[test]
fn shared_memory_that_nobody_may_write_comes_back() {
    let server = Server::shared_memory(32, &["--read-only"]);
    let Some(world) = world_for(&server) else { return };
    let before = snapshot_of(&world, &server);
    for mode in ["lazy", "eager"] {
        let flags = ["--mode", mode, "--name", &world.name(mode)];
        let clone = world.restore(server.name, "v1", server.port, &flags).remove(0);
        server_answers_as_before(&clone, &server, &before);
        clone.remove();
    }
    world.finish();
}
