//! Servers that do with their memory whatever a program may do, while it is being filled and after.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rewarm_integration_tests::checks::{answers, server_answers_as_before};
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Replica, World, residue};

use super::filling::{
    LARGE_MIB, MIB, TOLD_MAX, answers_of, await_present, entry, far, lazily, nothing_fills,
};
use crate::world_for;

#[test]
fn awkward_memory_comes_back_in_every_mode() {
    let server = Server::edges(0);
    let Some(world) = world_for(&server) else { return };
    let source = world.start(server.name, &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    for mode in ["lazy", "eager", "auto"] {
        let flags = ["--mode", mode, "--name", &world.name(mode)];
        let clone = world.restore(server.name, "v1", server.port, &flags).remove(0);
        for _ in 0..3 {
            let _ = answers(&clone, &server);
        }
        await_present(&world, &clone);
        let _ = answers(&clone, &server);
        clone.remove();
    }
    world.finish();
}

/// Longer than any answer to who asks for what a fault waits for, and shorter than any to who asks for the rest.
const SHORT: u64 = 2 * MIB;

/// All that it does is done while memory is filled: what lies in front of it does not come before.
#[test]
fn awkward_memory_is_used_while_it_is_filled() {
    let server = Server::edges(LARGE_MIB);
    let Some((world, slow)) = far(&server) else { return };
    slow.throttle(16 * MIB);
    let replica = lazily(&world, &server, "60s");
    slow.hold_above(SHORT);
    slow.throttle(0);
    for _ in 0..3 {
        assert_eq!(entry(&replica)["memory"], "filling");
        let _ = answers(&replica, &server);
    }
    assert_eq!(entry(&replica)["memory"], "filling");
    slow.hold_above(0);
    await_present(&world, &replica);
    nothing_fills(&world);
    let _ = answers(&replica, &server);
    world.finish();
}

fn children(parent: i32) -> Vec<i32> {
    let threads = std::fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    lists.flat_map(|list| list.split(' ').filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect()
}

/// Kills workers of the fetcher, each as soon as it is there and some time has passed, until so many were killed.
fn kill_workers(world: &World, count: u32) {
    let (began, mut killed) = (Instant::now(), 0);
    while killed < count {
        assert!(began.elapsed() < TOLD_MAX, "{killed} workers were killed, {count} expected");
        std::thread::sleep(Duration::from_millis(150 + u64::from(killed) * 37 % 200));
        for (keeper, _) in residue::services(world.id()) {
            for worker in children(keeper) {
                // It may have ended by itself.
                killed += u32::from(kill(Pid::from_raw(worker), Signal::SIGKILL).is_ok());
            }
        }
    }
}

/// Memory changes in every way, forks included, while it is filled by workers that are killed over it.
#[test]
fn workers_killed_while_memory_is_filled_cost_time_only() {
    let server = Server::changing(LARGE_MIB);
    let Some((world, slow)) = far(&server) else { return };
    let before = answers_of(&world, &server);
    for round in 0..2 {
        let name = world.name(&format!("clone-{round}"));
        let flags = ["--mode", "lazy", "--count", "2", "--name", &name];
        // What was fetched before is not to be had.
        let call = world.restore_call(server.name, "v1", server.port, &flags);
        let call = call.env("REWARM_CACHE_MEMORY", "0").env("REWARM_CACHE_DISK", "0");
        slow.throttle(32 * MIB);
        let running = call.spawn();
        kill_workers(&world, 2);
        let output = running.wait();
        output.expect_code(0);
        slow.hold_above(SHORT);
        slow.throttle(0);
        let clones = Replica::of_restore(&world, server.port, &output);
        std::thread::scope(|scope| {
            for clone in &clones {
                let (server, before) = (&server, &before);
                scope.spawn(move || server_answers_as_before(clone, server, before));
            }
            kill_workers(&world, 3);
            for clone in &clones {
                assert_eq!(entry(clone)["memory"], "filling", "round {round}");
            }
            slow.hold_above(0);
        });
        for clone in &clones {
            await_present(&world, clone);
            server_answers_as_before(clone, &server, &before);
            clone.remove();
        }
        nothing_fills(&world);
        world.await_no_services();
    }
    world.finish();
}
