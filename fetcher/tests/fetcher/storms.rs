//! Processes that are killed at random moments: a worker's death costs time, the keeper's is told, no byte is wrong.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use rewarm_fetcher::BLOCK_BYTES;

use crate::world::{Numbers, World};

const LONG: Duration = Duration::from_secs(60);
const REGIONS: &[u64] = &[20_000, 3, 9000];
/// Snapshots that are fetched in a storm, one after another.
const ROUNDS: u64 = 8;

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        workers_killed_at_random_moments_leave_no_wrong_byte,
        a_worker_that_dies_again_and_again_is_given_up,
        who_waits_hears_that_the_keeper_was_killed,
    ]
}

/// Kills every worker that it sees at random moments until it is told to stop. Returns how many.
fn storm(keeper: i32, numbers: &mut Numbers, wait_us: u64, stop: &AtomicBool) -> u32 {
    let mut killed = 0;
    while !stop.load(Ordering::Acquire) {
        std::thread::sleep(Duration::from_micros(numbers.below(wait_us)));
        for pid in World::workers(keeper) {
            killed += u32::from(kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok());
        }
    }
    killed
}

fn workers_killed_at_random_moments_leave_no_wrong_byte() {
    let mut numbers = Numbers::seeded("workers_killed_at_random_moments_leave_no_wrong_byte");
    let world = World::new(0, LONG);
    world.publish("one", 1, REGIONS);
    let total = AtomicU32::new(0);
    for round in 0..ROUNDS {
        let stream = world.open("one").expect("opened");
        let keeper = world.keeper().expect("it runs");
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Slower from round to round: early rounds meet workers that have just begun.
            let wait_us = 60_000 + round * 30_000;
            let (numbers, stop) = (&mut numbers, &stop);
            let storming = scope.spawn(move || storm(keeper, numbers, wait_us, stop));
            stream.begin(Vec::new()).expect("begun");
            World::assert_content(&stream, 1, REGIONS);
            stop.store(true, Ordering::Release);
            total.fetch_add(storming.join().expect("no panic"), Ordering::Relaxed);
        });
        // Not one block was changed after it was complete.
        World::assert_content(&stream, 1, REGIONS);
    }
    let total = total.into_inner();
    println!("{total} workers were killed in {ROUNDS} rounds");
    assert!(total >= 4, "only {total} workers were killed");
}

fn a_worker_that_dies_again_and_again_is_given_up() {
    let mut numbers = Numbers::new(1);
    let world = World::new(0, LONG);
    world.publish("one", 2, REGIONS);
    let stream = world.open("one").expect("opened");
    let keeper = world.keeper().expect("it runs");
    let kept = hold_back(&world);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (numbers, stop) = (&mut numbers, &stop);
        scope.spawn(move || storm(keeper, numbers, 300, stop));
        stream.begin(Vec::new()).expect("begun");
        let last = (stream.layout().bytes() - 1) / BLOCK_BYTES;
        let waited = stream.wait(last, LONG).map(<[u8]>::len);
        stop.store(true, Ordering::Release);
        let error = waited.expect_err("no worker lives long enough");
        assert!(error.to_string().contains("died again and again"), "{error}");
    });
    drop(stream);
    for (pack, kept) in kept {
        std::fs::rename(kept, pack).expect("our own folder");
    }
    // The next restore is not held responsible.
    let stream = world.open("one").expect("opened");
    stream.begin(Vec::new()).expect("begun");
    World::assert_content(&stream, 2, REGIONS);
}

/// Puts a pipe in the place of each pack: whoever opens one waits for ever, so that no worker gets anywhere however quick the
/// machine is. Gives where each pack belongs and where it lies now.
fn hold_back(world: &World) -> Vec<(PathBuf, PathBuf)> {
    let packs = std::fs::read_dir(world.store().join("packs")).expect("packs");
    let packs: Vec<PathBuf> = packs.flatten().map(|entry| entry.path()).collect();
    let aside = world.store().join("aside");
    std::fs::create_dir(&aside).expect("our own folder");
    let hold = |pack: PathBuf| {
        let kept = aside.join(pack.file_name().expect("a file"));
        std::fs::rename(&pack, &kept).expect("our own folder");
        mkfifo(&pack, Mode::S_IRWXU | Mode::S_IRWXG | Mode::S_IRWXO).expect("a pipe");
        (pack, kept)
    };
    packs.into_iter().map(hold).collect()
}

fn who_waits_hears_that_the_keeper_was_killed() {
    let world = World::new(1 << 30, LONG);
    world.publish("one", 3, REGIONS);
    let stream = world.open("one").expect("opened");
    let lease = stream.lease().expect("leased");
    let keeper = world.keeper().expect("it runs");
    let workers = World::workers(keeper);
    std::thread::scope(|scope| {
        // Nothing has begun, so nothing arrives.
        let waiting = scope.spawn(|| stream.wait(0, LONG).map(<[u8]>::to_vec));
        std::thread::sleep(Duration::from_millis(50));
        assert!(lease.is_alive());
        kill(Pid::from_raw(keeper), Signal::SIGKILL).expect("it runs");
        let error = waiting.join().expect("no panic").expect_err("nobody can bring it");
        assert!(error.is_gone(), "{error:?}");
    });
    assert!(!lease.is_alive());
    World::await_that("its workers are gone", || {
        workers.iter().all(|pid| !std::path::Path::new(&format!("/proc/{pid}/exe")).exists())
    });
    assert!(stream.begin(Vec::new()).expect_err("it is gone").is_gone());
    // Another one takes its place.
    let again = world.open("one").expect("opened");
    again.begin(Vec::new()).expect("begun");
    World::assert_content(&again, 3, REGIONS);
}
