//! Rounds of snapshot, restore, pause and wake under load, with faults of the driver at random.
//!
//! `REWARM_SOAK_ROUNDS` says how many; without it as many as fit into some seconds. `REWARM_SOAK_SEED` repeats a run.

use std::time::{Duration, Instant};

use rewarm_integration_tests::checks::{Answers, answers, server_answers_as_before};
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Output, Replica, World};

use super::{start, world_with};

/// As long as a test may take among others.
const SHORT: Duration = Duration::from_secs(15);
/// What the shim and its helper may have more at the end than after the first rounds, in KiB.
const GROWTH_KIB_MAX: u64 = 16 << 10;
/// What goes wrong, with how often it may in one command.
const FAULTS: [&str; 9] = [
    "",
    "lock*1 result 600",
    "lock*1 die",
    "checkpoint*1 result 801",
    "checkpoint*1 then-die",
    "restore*1 die",
    "restore*1 result 2",
    "unlock*1 then-result 401",
    "unlock*1 then-die",
];

/// Numbers from a seed: SplitMix64.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((word ^ (word >> 31)) % sides as u64).expect("small")
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Descriptors and resident memory in KiB of a process.
fn size(pid: u64) -> (usize, u64) {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    (fds, kib.and_then(|kib| kib.trim().parse().ok()).unwrap_or(0))
}

/// The size of the shim when it has its helper, which a fault may have taken, and no connection that is just being closed.
fn at_rest(world: &World, source: &Replica<'_>, shim: u64) -> (usize, u64) {
    for verb in ["pause", "wake"] {
        world.rewarm().args([verb, source.name()]).ok();
    }
    let looks = (0..20).map(|_| {
        std::thread::sleep(Duration::from_millis(100));
        size(shim)
    });
    looks.min_by_key(|(fds, _)| *fds).expect("some")
}

/// One command with a fault of the driver. It may fail, and then the server is as it was.
fn tried(output: &Output) -> bool {
    // 6: a snapshot whose server did not get its devices back, and is paused.
    assert!(matches!(output.code, Some(0 | 1 | 6)), "neither done nor undone: {output}");
    output.code == Some(0)
}

fn is_as_before(replica: &Replica<'_>, server: &Server, before: &Answers) {
    assert_eq!(replica.entry().expect("it is listed")["status"], "ready");
    server_answers_as_before(replica, server, before);
}

/// Pauses until it is done, then wakes until that is.
fn pause_and_wake(world: &World, source: &Replica<'_>, control: &mut dyn FnMut(), calm: &dyn Fn()) {
    for verb in ["pause", "wake"] {
        control();
        let done = tried(&world.rewarm().args([verb, source.name()]).run());
        calm();
        if !done {
            world.rewarm().args([verb, source.name()]).ok();
        }
    }
}

#[test]
fn rounds_of_snapshot_restore_pause_and_wake_with_faults() {
    let Some((world, devices)) = world_with(&[128]) else { return };
    let (rounds, seed) = (number("REWARM_SOAK_ROUNDS"), number("REWARM_SOAK_SEED").unwrap_or(7));
    let mut dice = Dice(seed);
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    let used = devices.used_mib(0);
    let shim = source.entry().expect("it is listed")["shim_pid"].as_u64().expect("a number");
    let began = Instant::now();
    let (mut round, mut settled) = (0, None);
    while rounds.map_or_else(|| began.elapsed() < SHORT, |rounds| round < rounds) {
        round += 1;
        let calm = || devices.control("");
        pause_and_wake(&world, &source, &mut || devices.control(FAULTS[dice.roll(FAULTS.len())]), &calm);
        is_as_before(&source, &server, &before);
        let tag = format!("v{}", round % 2);
        devices.control(FAULTS[dice.roll(FAULTS.len())]);
        let published = tried(&world.snapshot_call(&source, &tag, &[]).run());
        calm();
        // A restore after the dump that failed leaves the server paused.
        if source.entry().expect("it is listed")["status"] == "paused" {
            world.rewarm().args(["wake", source.name()]).ok();
        }
        is_as_before(&source, &server, &before);
        if published {
            let name = world.name("clone");
            let restore =
                || devices.seen_by(world.restore_call("device", &tag, server.port, &["--name", &name]));
            devices.control(FAULTS[dice.roll(FAULTS.len())]);
            let output = restore().run();
            let first = tried(&output);
            calm();
            let output = if first { output } else { restore().ok() };
            let clones = Replica::of_restore(&world, server.port, &output);
            server_answers_as_before(&clones[0], &server, &before);
            clones[0].remove();
        }
        assert_eq!(devices.used_mib(0), used, "round {round} of seed {seed}");
        if round == 3 {
            settled = Some(at_rest(&world, &source, shim));
        }
    }
    if let Some((fds, kib)) = settled {
        let (fds_now, kib_now) = at_rest(&world, &source, shim);
        assert!(fds_now <= fds, "{fds} descriptors after three rounds, {fds_now} after {round}; seed {seed}");
        assert!(kib_now <= kib + GROWTH_KIB_MAX, "{kib} KiB after three rounds, {kib_now} after {round}");
    }
    world.finish();
}
