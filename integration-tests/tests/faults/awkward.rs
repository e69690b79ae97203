//! Servers that do with their memory whatever a program may do, while it is being filled and after.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rewarm_integration_tests::checks::{answers, server_answers_as_before};
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Replica, residue};

use super::filling::{await_present, snapshot_of};
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

fn children(parent: i32) -> Vec<i32> {
    let threads = std::fs::read_dir(format!("/proc/{parent}/task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    lists.flat_map(|list| list.split(' ').filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect()
}

/// Memory changes in every way, forks included, while it is filled by workers that are killed over it.
#[test]
fn workers_killed_while_memory_is_filled_cost_time_only() {
    let server = Server::memory();
    let Some(world) = world_for(&server) else { return };
    let before = snapshot_of(&world, &server);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut wait = 0;
            while !stop.load(Ordering::Acquire) {
                for (keeper, _) in residue::services(world.id()) {
                    for worker in children(keeper) {
                        // It may have ended by itself.
                        let _ = kill(Pid::from_raw(worker), Signal::SIGKILL);
                    }
                }
                wait = (wait + 37) % 200;
                std::thread::sleep(Duration::from_millis(40 + wait));
            }
        });
        for round in 0..3 {
            let name = world.name(&format!("clone-{round}"));
            let call = world.restore_call(
                server.name,
                "v1",
                server.port,
                &["--mode", "lazy", "--count", "2", "--name", &name],
            );
            let output = call.env("REWARM_CACHE_MEMORY", "0").ok();
            for clone in Replica::of_restore(&world, server.port, &output) {
                server_answers_as_before(&clone, &server, &before);
                await_present(&world, &clone);
                server_answers_as_before(&clone, &server, &before);
                clone.remove();
            }
        }
        stop.store(true, Ordering::Release);
    });
    world.finish();
}
