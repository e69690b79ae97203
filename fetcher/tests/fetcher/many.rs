//! What is fetched once, for whom, and how long it stays.

use std::time::Duration;

use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rewarm_fetcher::{BLOCK_BYTES, Fetcher, Kind, Status, Stream};
use rewarm_report::{Class, Classify};

use crate::world::World;

const LONG: Duration = Duration::from_secs(60);
const REGIONS: &[u64] = &[3000, 1, 0, 700];
/// To decode them takes long enough to be met in the middle of it.
const LONG_REGIONS: &[u64] = &[60_000];

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        every_byte_arrives_and_a_second_restore_reads_nothing,
        many_at_once_cost_one_download,
        what_is_wanted_first_comes_first,
        streams_that_nobody_holds_stay_up_to_the_limit,
        memory_that_is_needed_is_given_back,
        what_a_store_does_not_have_is_told_by_kind,
        a_damaged_pack_is_told_to_who_waits,
        a_fetcher_without_work_ends,
        what_the_only_reader_is_done_with_is_dropped,
        what_has_passed_is_decoded_for_the_next_restore,
        a_restore_does_not_wait_for_what_is_decoded_for_later,
        what_is_decoded_for_later_gives_way_to_who_needs_the_memory,
        what_has_no_room_beside_what_is_held_is_not_decoded_for_later,
        what_two_restores_read_stays_until_both_are_done,
        what_does_not_fit_the_bound_passes_and_takes_no_memory_beside_it,
        what_has_to_stay_waits_for_room_within_the_bound,
        a_fetcher_that_runs_is_bound_too,
    ]
}

fn status(world: &World) -> Status {
    Fetcher::status(&world.state()).expect("it answers").expect("it runs")
}

fn every_byte_arrives_and_a_second_restore_reads_nothing() {
    let world = World::new(1 << 30, LONG);
    world.publish("one", 1, REGIONS);
    let stream = world.open("one").expect("opened");
    stream.begin(Vec::new()).expect("begun");
    World::assert_content(&stream, 1, REGIONS);
    World::await_that("the stream is complete", || status(&world).streams[0].complete);
    let read = status(&world).streams[0].read_bytes;
    assert!(read > 0);
    drop(stream);
    // The store is gone, and nobody needs it.
    std::fs::rename(world.store().join("packs"), world.store().join("away")).expect("renamed");
    let again = world.open("one").expect("opened");
    again.begin(Vec::new()).expect("begun");
    World::assert_content(&again, 1, REGIONS);
    let streams = status(&world).streams;
    assert_eq!((streams.len(), streams[0].read_bytes), (1, read));
}

fn many_at_once_cost_one_download() {
    let world = World::new(1 << 30, LONG);
    world.publish("one", 2, REGIONS);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let stream = world.open("one").expect("opened");
                stream.begin(Vec::new()).expect("begun");
                World::assert_content(&stream, 2, REGIONS);
            });
        }
    });
    World::await_that("the stream is complete", || status(&world).streams.iter().all(|one| one.complete));
    let streams = status(&world).streams;
    let stored: u64 = REGIONS.iter().sum::<u64>() * 4096;
    assert_eq!(streams.len(), 1);
    assert!(streams[0].read_bytes <= stored + stored / 10, "{} read of {stored}", streams[0].read_bytes);
}

/// The last block is asked for first, over a store of which each pack is read on its own.
fn what_is_wanted_first_comes_first() {
    let world = World::new(1 << 30, LONG);
    let regions = &[60_000];
    world.publish("one", 3, regions);
    let stream = world.open("one").expect("opened");
    let last = (stream.layout().bytes() - 1) / BLOCK_BYTES;
    stream.begin(vec![(last * BLOCK_BYTES, BLOCK_BYTES)]).expect("begun");
    stream.wait(last, LONG).expect("it arrives");
    let here = (0..last).filter(|block| stream.reader().has(*block)).count() as u64;
    assert!(here < last, "all of it was here before what was wanted first");
    World::assert_content(&stream, 3, regions);
}

fn streams_that_nobody_holds_stay_up_to_the_limit() {
    let size = 2000 * 4096;
    let world = World::new(2 * size + 2 * BLOCK_BYTES, LONG);
    for (seed, name) in ["a", "b", "c"].into_iter().enumerate() {
        world.publish(name, seed as u64, &[2000]);
        let stream = world.open(name).expect("opened");
        stream.begin(Vec::new()).expect("begun");
        World::assert_content(&stream, seed as u64, &[2000]);
        World::await_that("complete", || status(&world).streams.iter().all(|one| one.complete));
        drop(stream);
        World::await_that("let go", || status(&world).streams.iter().all(|one| one.holders == 0));
    }
    let kept = status(&world).streams;
    assert_eq!(kept.len(), 2, "{kept:?}");
    let first = world.find("a").expect("found").digest().to_string();
    assert!(kept.iter().all(|one| one.digest != first), "the oldest is the one to go");
    // A stream whose fetch was never finished is of no use to anybody.
    let unfinished = world.open("a").expect("opened");
    drop(unfinished);
    World::await_that("dropped", || status(&world).streams.iter().all(|one| one.complete));
}

fn memory_that_is_needed_is_given_back() {
    let world = World::new(1 << 30, LONG);
    world.publish("one", 4, &[2000]);
    let stream = world.open("one").expect("opened");
    stream.begin(Vec::new()).expect("begun");
    World::assert_content(&stream, 4, &[2000]);
    World::await_that("complete", || status(&world).streams.iter().all(|one| one.complete));
    world.fetcher().trim(u64::MAX).expect("trimmed");
    assert_eq!(status(&world).streams.len(), 1, "it is held");
    drop(stream);
    World::await_that("let go", || status(&world).streams.iter().all(|one| one.holders == 0));
    world.fetcher().trim(1).expect("trimmed");
    assert_eq!(status(&world).streams.len(), 1, "a byte is free anyway");
    world.fetcher().trim(u64::MAX).expect("trimmed");
    assert!(status(&world).streams.is_empty());
}

fn what_a_store_does_not_have_is_told_by_kind() {
    let world = World::new(1 << 30, LONG);
    world.publish("one", 5, &[10]);
    let error = world.find("absent").expect_err("absent");
    assert_eq!((error.kind(), error.class()), (Kind::NotFound, Class::NotFound), "{error}");
    assert_eq!(error.to_string(), format!("absent@v1 does not exist in {}", world.url()));
    std::fs::rename(world.store(), world.store().with_extension("away")).expect("renamed");
    let error = world.find("one").expect_err("the store is gone");
    assert_eq!(error.class(), Class::NotFound, "{error}");
}

fn a_damaged_pack_is_told_to_who_waits() {
    let world = World::new(1 << 30, LONG);
    world.publish("one", 6, REGIONS);
    let pack =
        std::fs::read_dir(world.store().join("packs")).expect("packs").next().expect("one").expect("read");
    let mut bytes = std::fs::read(pack.path()).expect("read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(pack.path(), bytes).expect("written");
    let stream = world.open("one").expect("opened");
    stream.begin(Vec::new()).expect("begun");
    let blocks = stream.layout().bytes() / BLOCK_BYTES;
    let errors: Vec<_> = (0..blocks).filter_map(|block| stream.wait(block, LONG).err()).collect();
    assert!(!errors.is_empty(), "the damage was not found");
    assert!(errors.iter().all(|error| error.class() == Class::Integrity), "{errors:?}");
    assert!(errors[0].to_string().contains("is damaged"), "{}", errors[0]);
    // Nobody gets this stream any more.
    drop(stream);
    assert!(status(&world).streams.is_empty());
}

fn a_fetcher_without_work_ends() {
    let world = World::new(1 << 30, Duration::from_millis(200));
    world.publish("one", 7, &[10]);
    let stream = world.open("one").expect("opened");
    std::thread::sleep(Duration::from_millis(600));
    let keeper = world.keeper().expect("somebody holds a stream");
    drop(stream);
    World::await_that("the fetcher has ended", || world.keeper().is_none());
    World::await_that("its process is gone", || {
        !std::path::Path::new(&format!("/proc/{keeper}/exe")).exists()
    });
    // The next one who needs it starts it.
    world.open("one").expect("opened");
}

/// Releases all of a stream. Whoever has an answer to a later question over the same line has it behind the release.
fn release_all(stream: &Stream) {
    let lease = stream.lease().expect("the fetcher is there");
    lease.release(0..stream.layout().bytes().div_ceil(BLOCK_BYTES));
    assert!(lease.is_alive());
    drop(lease);
}

fn what_the_only_reader_is_done_with_is_dropped() {
    let world = World::new(1 << 30, LONG);
    world.publish("one", 1, REGIONS);
    let first = world.open("one").expect("published");
    first.begin_passing(Vec::new()).expect("the fetcher is there");
    World::assert_content(&first, 1, REGIONS);
    release_all(&first);
    World::await_that("the release", || !first.reader().has(0));
    assert!(first.reader().has_arrived(0) && first.lost().is_none());
    first.wait(0, LONG).expect_err("it was given back");
    // Who comes now gets all of it, and of two restores at the same time it stays.
    let next = world.open("one").expect("published");
    assert!(!next.reader().has(0));
    next.begin_passing(Vec::new()).expect("the fetcher is there");
    World::assert_content(&next, 1, REGIONS);
    World::await_that("the stream is complete", || status(&world).streams.iter().all(|one| one.complete));
    release_all(&next);
    drop((first, next));
    World::await_that("one stream", || status(&world).streams.len() == 1);
    World::assert_content(&world.open("one").expect("published"), 1, REGIONS);
}

fn what_has_passed_is_decoded_for_the_next_restore() {
    let world = World::new(1 << 30, LONG);
    world.publish("one", 1, REGIONS);
    let first = world.open("one").expect("published");
    take_in(&first, 1, REGIONS);
    drop(first);
    World::await_that("it is decoded", || is_decoded(&status(&world)));
    assert_eq!(status(&world).streams[0].holders, 0);
    // The store is gone, and nobody needs it.
    std::fs::rename(world.store().join("packs"), world.store().join("away")).expect("renamed");
    let next = world.open("one").expect("opened");
    next.begin_passing(Vec::new()).expect("begun");
    World::assert_content(&next, 1, REGIONS);
    release_all(&next);
    drop(next);
    assert!(is_decoded(&status(&world)), "it stays");
}

/// The only stream is complete.
fn is_decoded(status: &Status) -> bool {
    matches!(&status.streams[..], [stream] if stream.complete)
}

/// Restores a long snapshot, and holds the worker still that decodes it for later.
fn held_still(world: &World) -> i32 {
    world.publish("long", 1, LONG_REGIONS);
    let first = world.open("long").expect("published");
    take_in(&first, 1, LONG_REGIONS);
    drop(first);
    let keeper = world.keeper().expect("it has been used");
    let mut held = None;
    while held.is_none() {
        held = World::workers(keeper).into_iter().find(|pid| is_idle(*pid));
    }
    let held = held.expect("the loop ends with one");
    kill(Pid::from_raw(held), Signal::SIGSTOP).expect("it runs");
    World::await_that("it is among the streams", || status(world).streams.len() == 1);
    assert!(!is_decoded(&status(world)), "it was decoded before it could be held");
    held
}

/// Whether a process is of the kernel's idle class (`policy`, field 41 of proc_pid_stat(5); 5 is SCHED_IDLE).
fn is_idle(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(38)) == Some("5")
}

fn is_gone(pid: i32) -> bool {
    !std::path::Path::new(&format!("/proc/{pid}/exe")).exists()
}

fn a_restore_does_not_wait_for_what_is_decoded_for_later() {
    let world = World::new(1 << 30, LONG);
    let held = held_still(&world);
    let next = world.open("long").expect("published");
    World::await_that("who decodes for later is ended", || is_gone(held));
    take_in(&next, 1, LONG_REGIONS);
    drop(next);
    World::await_that("it is decoded after this one", || is_decoded(&status(&world)));
    World::assert_content(&world.open("long").expect("published"), 1, LONG_REGIONS);
}

fn what_is_decoded_for_later_gives_way_to_who_needs_the_memory() {
    let give_way: [fn(&World); 2] = [
        |world| world.fetcher().trim(u64::MAX).expect("trimmed"),
        |world| assert!(Fetcher::clear(&world.state()).expect("cleared")),
    ];
    for give_way in give_way {
        let world = World::new(1 << 30, LONG);
        let held = held_still(&world);
        give_way(&world);
        assert!(status(&world).streams.is_empty());
        World::await_that("who decodes for later is ended", || is_gone(held));
    }
}

fn what_has_no_room_beside_what_is_held_is_not_decoded_for_later() {
    let regions = [2000];
    let world = World::new(2000 * 4096 + BLOCK_BYTES, LONG);
    for (seed, name) in ["a", "b"].into_iter().enumerate() {
        world.publish(name, seed as u64, &regions);
    }
    let held = world.open("a").expect("published");
    held.begin(Vec::new()).expect("the fetcher is there");
    World::assert_content(&held, 0, &regions);
    let pass = || {
        let other = world.open("b").expect("published");
        take_in(&other, 1, &regions);
        other.digest().to_string()
    };
    let passed = pass();
    std::thread::sleep(Duration::from_millis(300));
    let only = status(&world).streams;
    assert_eq!((only.len(), &only[0].digest), (1, &held.digest().to_string()), "{only:?}");
    // What is not held makes room.
    drop(held);
    pass();
    World::await_that("the other is decoded", || {
        let status = status(&world);
        is_decoded(&status) && status.streams[0].digest == passed
    });
}

fn what_two_restores_read_stays_until_both_are_done() {
    let world = World::new(1 << 30, LONG);
    world.publish("one", 1, REGIONS);
    let [first, second] = [(); 2].map(|()| world.open("one").expect("published"));
    first.begin_passing(Vec::new()).expect("the fetcher is there");
    World::assert_content(&first, 1, REGIONS);
    release_all(&first);
    drop(first);
    World::await_that("the release", || status(&world).streams.iter().all(|stream| stream.holders == 1));
    World::assert_content(&second, 1, REGIONS);
}

/// Bytes of memory that the content of a stream takes now.
fn memory(stream: &Stream) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let [content, _] = stream.files();
    let content = std::fs::File::from(content.try_clone_to_owned().expect("a descriptor"));
    content.metadata().expect("its size").blocks() * 512
}

/// Reads all of it as a pager does that is its only reader.
fn take_in(stream: &Stream, seed: u64, regions: &[u64]) {
    stream.begin_passing(Vec::new()).expect("the fetcher is there");
    World::assert_content(stream, seed, regions);
    release_all(stream);
    World::await_that("its memory is given back", || memory(stream) < BLOCK_BYTES);
}

fn what_does_not_fit_the_bound_passes_and_takes_no_memory_beside_it() {
    let regions = [2000];
    let mut world = World::new(1 << 30, LONG);
    for (seed, name) in ["a", "b"].into_iter().enumerate() {
        world.publish(name, seed as u64, &regions);
    }
    let held = world.open("a").expect("published");
    let bytes = held.layout().bytes();
    world.bind(bytes + bytes / 2);
    held.begin(Vec::new()).expect("the fetcher is there");
    World::assert_content(&held, 0, &regions);
    // A second and a third time too, when the content of a folder would stay otherwise.
    for _ in 0..3 {
        let [one, other] = [(); 2].map(|()| world.open("b").expect("published"));
        take_in(&one, 1, &regions);
        take_in(&other, 1, &regions);
    }
    World::await_that("nothing of it stays", || status(&world).streams.len() == 1);
    let status = status(&world);
    assert!(status.bounded && status.limit_bytes == bytes + bytes / 2, "{status:?}");
    assert_eq!(status.streams[0].digest, held.digest().to_string());
    // What is not held makes room for what is opened.
    World::await_that("complete", || self::status(&world).streams[0].complete);
    drop(held);
    let next = world.open("b").expect("published");
    next.begin(Vec::new()).expect("there is room now");
    World::assert_content(&next, 1, &regions);
    assert_eq!(self::status(&world).streams.len(), 1, "the other one is gone");
}

/// As device memory does.
fn what_has_to_stay_waits_for_room_within_the_bound() {
    let regions = [2000];
    let mut world = World::new(1 << 30, LONG);
    for (seed, name) in ["a", "b"].into_iter().enumerate() {
        world.publish(name, seed as u64, &regions);
    }
    world.publish("long", 2, &[4000]);
    let held = world.open("a").expect("published");
    let bytes = held.layout().bytes();
    world.bind(bytes + bytes / 2);
    held.begin(Vec::new()).expect("the fetcher is there");
    World::assert_content(&held, 0, &regions);
    let waits = world.open("b").expect("published");
    std::thread::scope(|scope| {
        let begun = scope.spawn(|| waits.begin(Vec::new()));
        std::thread::sleep(Duration::from_millis(300));
        assert!(!begun.is_finished() && memory(&waits) == 0, "there is no room beside what is held");
        drop(held);
        begun.join().expect("no panic").expect("there is room now");
    });
    World::assert_content(&waits, 1, &regions);
    let long = world.open("long").expect("published");
    let error = long.begin(Vec::new()).expect_err("it never fits").to_string();
    let told = format!("takes {} bytes", long.layout().bytes());
    assert!(error.contains(&told) && error.contains("raise cache in [serve]"), "{error}");
}

fn a_fetcher_that_runs_is_bound_too() {
    let mut world = World::new(1 << 30, LONG);
    let mut bytes = 0;
    for (seed, name) in ["a", "b"].into_iter().enumerate() {
        world.publish(name, seed as u64, &[2000]);
        let stream = world.open(name).expect("published");
        stream.begin(Vec::new()).expect("the fetcher is there");
        World::assert_content(&stream, seed as u64, &[2000]);
        World::await_that("complete", || status(&world).streams.iter().all(|one| one.complete));
        bytes = stream.layout().bytes();
    }
    World::await_that("let go", || status(&world).streams.iter().all(|one| one.holders == 0));
    assert_eq!((status(&world).streams.len(), status(&world).bounded), (2, false));
    world.bind(bytes + bytes / 2);
    world.find("b").expect("whatever is asked says how much there is");
    let kept = status(&world).streams;
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert_eq!(kept[0].digest, world.find("b").expect("found").digest().to_string());
}
