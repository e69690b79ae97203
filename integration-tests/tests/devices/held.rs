//! What stands still while the driver works: every thread of a server but the driver's own.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rewarm_integration_tests::checks::{answers, server_answers_as_before};
use rewarm_integration_tests::command::Running;
use rewarm_integration_tests::devices::Devices;
use rewarm_integration_tests::{Output, Replica, World, residue};
use serde_json::Value;

use super::{start, world_with};

/// Milliseconds that a call of the driver takes: long enough for two looks.
const CALL_MS: u32 = 3000;
static NEXT: AtomicU32 = AtomicU32::new(0);
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);
/// The server's own threads in each process that uses CUDA: one that listens, two that map and unmap memory for ever.
const OWN_MIN: usize = 3;

/// A thread, as the kernel tells it.
#[derive(Debug, PartialEq, Eq)]
struct Thread {
    /// Process and thread in the server's own numbers.
    numbers: (i64, i64),
    state: char,
    /// Ticks on a processor, and how often it was taken off one.
    ran: [u64; 4],
}

/// What follows `key` in the status of a task.
fn field<'s>(status: &'s str, key: &str) -> &'s str {
    status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_else(|| panic!("no {key} in {status}"))
}

/// The last word of what follows `key`: the innermost of several numbers.
fn last(status: &str, key: &str) -> i64 {
    field(status, key).split_whitespace().next_back().and_then(|word| word.parse().ok()).expect("a number")
}

fn thread(task: &Path) -> Thread {
    let read = |name: &str| std::fs::read_to_string(task.join(name)).expect("it lives");
    let (status, stat) = (read("status"), read("stat"));
    let ticks = |at: usize| {
        // From the state on, which is the third.
        let rest = stat.rsplit_once(") ").expect("a name").1;
        rest.split(' ').nth(at - 3).and_then(|word| word.parse().ok()).expect("a number")
    };
    let switches = |key| last(&status, key).unsigned_abs();
    Thread {
        numbers: (last(&status, "NStgid:"), last(&status, "NSpid:")),
        state: field(&status, "State:").trim().chars().next().expect("a state"),
        ran: [
            ticks(14),
            ticks(15),
            switches("voluntary_ctxt_switches:"),
            switches("nonvoluntary_ctxt_switches:"),
        ],
    }
}

/// All threads of the only server of this world. Its processes have numbers of their own; command lines may not be there yet.
fn threads(world: &World) -> Vec<Thread> {
    let is_inside = |pid: &i32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.contains("NSpid:") && field(&status, "NSpid:").split_whitespace().count() > 1
    };
    residue::processes(world.id())
        .into_iter()
        .map(|(pid, _)| pid)
        .filter(is_inside)
        .flat_map(|pid| std::fs::read_dir(format!("/proc/{pid}/task")).expect("it lives").flatten())
        .map(|task| thread(&task.path()))
        .collect()
}

/// The driver's thread of each process, in the server's own numbers.
fn restore_threads(world: &World) -> BTreeMap<i64, i64> {
    let inspected = world.rewarm_json().args(["inspect", &world.reference("several", "v1")]).ok().json();
    let processes = &inspected["variants"][0]["manifest"]["facts"]["device"]["processes"];
    let number = |process: &Value, key: &str| process[key].as_i64().expect("a number");
    let processes = processes.as_array().expect("a list").iter();
    processes.map(|process| (number(process, "pid"), number(process, "restore_thread"))).collect()
}

/// Within each of these calls of the driver: the server's threads stand, and the driver's do not.
fn only_the_driver_runs(
    world: &World,
    devices: &Devices,
    drivers: &BTreeMap<i64, i64>,
    running: impl Fn() -> Running,
    steps: &[&str],
) -> Vec<Output> {
    let look = |step: &str| {
        // The first call only: the others are as quick as they are. A helper counts how often it has followed the same rule.
        let ms = CALL_MS + NEXT.fetch_add(1, Ordering::Relaxed);
        devices.control(&format!("{step}*1 wait {ms}\n{step} wait 0"));
        let running = running();
        devices.await_rule(world);
        let first = threads(world);
        std::thread::sleep(BETWEEN_LOOKS);
        let second = threads(world);
        assert_eq!(devices.met().len(), 1, "{step}: the looks came too late: {:?}", devices.met());
        let of_driver =
            |thread: &Thread| drivers.get(&thread.numbers.0).is_some_and(|own| *own == thread.numbers.1);
        let (of_drivers, own): (Vec<_>, Vec<_>) = first.iter().partition(|thread| of_driver(thread));
        assert_eq!(of_drivers.len(), drivers.len(), "{step}: {first:?}");
        // That of a shell beside those of processes that use CUDA.
        assert!(own.len() > OWN_MIN * drivers.len(), "{step}: {own:?}");
        for thread in &of_drivers {
            assert!(!matches!(thread.state, 't' | 'T' | 'D'), "{step}: the driver's stands: {thread:?}");
        }
        for thread in &own {
            assert!(matches!(thread.state, 't' | 'T'), "{step}: it does not stand: {thread:?}");
            assert!(second.contains(thread), "{step}: it went on: {thread:?}, {second:?}");
        }
        let output = running.wait();
        output.expect_code(0);
        devices.control("");
        output
    };
    steps.iter().map(|step| look(step)).collect()
}

#[test]
fn only_the_drivers_threads_run_while_a_server_is_taken_off_its_devices_and_back() {
    let Some((world, devices)) = world_with(&[64, 64]) else { return };
    let server = devices.several();
    let source = start(&world, &devices, "several", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    let drivers = restore_threads(&world);
    let snapshot = || world.snapshot_call(&source, "v2", &[]).spawn();
    only_the_driver_runs(&world, &devices, &drivers, snapshot, &["checkpoint", "restore", "unlock"]);
    server_answers_as_before(&source, &server, &before);
    let command = |verb: &'static str| world.rewarm().args([verb, source.name()]);
    for step in ["restore", "unlock"] {
        only_the_driver_runs(&world, &devices, &drivers, || command("pause").spawn(), &["checkpoint"]);
        only_the_driver_runs(&world, &devices, &drivers, || command("wake").spawn(), &[step]);
    }
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

#[test]
fn only_the_drivers_threads_run_while_it_restores_a_clone() {
    let Some((world, devices)) = world_with(&[64, 64]) else { return };
    let server = devices.several();
    let source = start(&world, &devices, "several", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let drivers = restore_threads(&world);
    for step in ["restore", "unlock"] {
        let restore = || {
            let call = world.restore_call("several", "v1", server.port, &["--name", &world.name("clone")]);
            devices.seen_by(call).spawn()
        };
        let outputs = only_the_driver_runs(&world, &devices, &drivers, restore, &[step]);
        let clones = Replica::of_restore(&world, server.port, &outputs[0]);
        server_answers_as_before(&clones[0], &server, &before);
        clones[0].remove();
    }
    world.finish();
}
