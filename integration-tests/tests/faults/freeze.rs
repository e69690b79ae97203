//! What the store does to a frozen server: short memory and a slow store make it wait, up to a deadline, and nothing else.

use std::time::{Duration, Instant};

use rewarm_integration_tests::checks::{
    answers, no_half_uploads, no_residue, server_answers_as_before, store_verifies, visible,
};
use rewarm_integration_tests::load::Load;
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::slow::Slow;
use rewarm_integration_tests::{Need, World, needs};

use crate::{world, world_for};

/// More than the writer holds (256 MiB) and the arena together.
const LARGE_MIB: u32 = 300;

/// Too slow by far for that in 4 s, and fast enough for the requests that take uploads back.
const TOO_SLOW: u64 = 500_000;

const COUNTS_MAX: Duration = Duration::from_secs(30);

const MIB: u64 = 1 << 20;

/// How long the snapshot of one GiB over a slow way may take on a busy machine.
const TAKES_MAX: Duration = Duration::from_secs(240);

/// A world whose bucket takes so many bytes a second once it is told to.
fn slow_world() -> Option<(World, Slow)> {
    let needs: Vec<Need> = needs::REPLICA.iter().copied().chain([Need::Garage]).collect();
    world(&needs).map(|world| world.heavy().on_garage().behind())
}

/// Nothing of snapshots that were given up is in the bucket. Only the announcements of their sessions may be (3 bytes each): a store
/// that is too slow for the snapshot may be too slow for its last word, and gc removes what nobody renews.
fn bucket_is_empty(world: &World, given_up: u64) {
    let is_empty = |info: &str| {
        let number = |key: &str| {
            let value = info.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
            value.split_whitespace().next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(u64::MAX)
        };
        let (objects, bytes) = (number("Objects:"), number("Size:"));
        // Uploads that were begun and neither completed nor aborted have a line of their own.
        objects <= given_up && bytes == 3 * objects && !info.contains("nfinished")
    };
    // Garage brings its counts up to date in the background.
    let began = Instant::now();
    loop {
        let info = world.bucket_info();
        if is_empty(&info) {
            return;
        }
        assert!(began.elapsed() < COUNTS_MAX, "left in the store:\n{info}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// 16 MiB for 300: CRIU waits for the store again and again, and all that happens is that it takes longer.
#[test]
fn a_server_with_far_more_memory_than_there_is_room_for_survives() {
    let server = Server::memory_of(LARGE_MIB);
    let Some(world) = world_for(&server) else { return };
    let world = world.heavy();
    let source = world.start("large", &server);
    let (before, traces) = (answers(&source, &server), world.traces());
    // The second finds everything in the store, the third has other codecs; chunks of each go another way.
    for (tag, flags) in [("v1", &[][..]), ("v2", &[]), ("v3", &["--compression", "zstd:1"])] {
        let flags = [&["--freeze-memory", "16MiB"], flags].concat();
        world.snapshot(&source, tag, &flags);
        server_answers_as_before(&source, &server, &before);
        no_residue(&world, &traces);
    }
    store_verifies(&world);
    world.snapshot(&source, "v4", &["--freeze-memory", "16MiB", "--stop"]);
    source.remove();
    for tag in ["v1", "v4"] {
        let clones = world.restore("large", tag, server.port, &[]);
        server_answers_as_before(&clones[0], &server, &before);
        clones[0].remove();
    }
    world.finish();
}

#[test]
fn a_store_that_is_too_slow_for_a_frozen_server_is_given_up_at_the_deadline() {
    let Some((world, slow)) = slow_world() else { return };
    let server = Server::memory_of(LARGE_MIB);
    let source = world.start("large", &server);
    let (before, traces) = (answers(&source, &server), world.traces());
    for (given_up, stop) in [(1, &[][..]), (2, &["--stop"])] {
        slow.throttle(TOO_SLOW);
        let flags = [&["--freeze-memory", "16MiB", "--freeze-timeout", "4s"], stop].concat();
        let output = world.snapshot_call(&source, "v1", &flags).timeout(Duration::from_secs(60)).fails(1);
        output.says(&["16 MiB", "4 s", "--freeze-memory", "--freeze-timeout"]);
        // What the kernel still holds of connections that were closed would make everything after it wait for a minute.
        slow.throttle(0);
        server_answers_as_before(&source, &server, &before);
        no_residue(&world, &traces);
        assert!(!visible(&world).to_string().contains(source.name()), "a snapshot is visible");
        bucket_is_empty(&world, given_up);
    }
    world.finish();
}

/// Runs a call and writes its largest resident memory, in bytes, to the file that comes first.
const MEASURED: &str = "import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
open(sys.argv[1], 'w').write(str(peak << 10))
sys.exit(code)";

/// However much the server has, and however slow the store is: the pages that wait, 256 MiB that are on their way, and little else.
#[test]
fn a_snapshot_takes_no_more_memory_than_it_may() {
    let Some((world, slow)) = slow_world() else { return };
    let server = Server::memory_of(1024);
    let source = world.start("large", &server);
    let before = answers(&source, &server);
    slow.throttle(100 * MIB);
    // Each where nothing of it lies yet: what a store has is not held until it is stored.
    for (part, flags, mib_max) in
        [("goes-on", &["--freeze-memory", "64MiB"][..], 64 + 256 + 128), ("stops", &["--stop"], 512)]
    {
        let (report, store) = (world.files().join(part), format!("{}/{part}", world.store()));
        let reference = format!("{store}/large@v1");
        let call = world.rewarm().args(["snapshot", source.name(), &reference]).args(flags);
        let report_path = report.display().to_string();
        call.under("/usr/bin/python3", &["-c", MEASURED, &report_path]).timeout(TAKES_MAX).ok();
        let peak: u64 = std::fs::read_to_string(report).expect("a report").parse().expect("a number");
        assert!(peak > 64 * MIB, "{part}: {peak} bytes are not those of a snapshot");
        assert!(peak <= mib_max * MIB, "{part}: {} MiB, at most {mib_max} are allowed", peak / MIB);
        if part == "goes-on" {
            server_answers_as_before(&source, &server, &before);
        }
    }
    world.finish();
}

/// With memory for all of it, only CRIU decides how long the server is frozen.
#[test]
fn a_slow_store_costs_no_downtime_where_memory_is_ample() {
    let Some((world, slow)) = slow_world() else { return };
    slow.throttle(2_000_000);
    let server = Server::memory_of(16);
    let source = world.start("large", &server);
    let before = answers(&source, &server);
    let load = Load::start(source.port(), "/healthz");
    let report = world.snapshot(&source, "v1", &[]);
    let seen = load.stop();
    assert!(seen.failures.is_empty(), "{seen:?}");
    let total = Duration::from_secs_f64(report["total_ms"].as_f64().expect("a time") / 1000.0);
    assert!(seen.longest < total / 2, "the store decided how long: {:?} of {total:?}", seen.longest);
    server_answers_as_before(&source, &server, &before);
    store_verifies(&world);
    world.finish();
}

/// Connections through the published port stay open, and every request is answered.
#[test]
fn no_request_fails_while_snapshots_are_made() {
    let server = Server::memory_of(64);
    let Some(world) = world_for(&server) else { return };
    let source = world.start("large", &server);
    let before = answers(&source, &server);
    let load = Load::start(source.port(), "/touch?pages=100");
    for tag in ["v1", "v2", "v3"] {
        world.snapshot(&source, tag, &[]);
    }
    let seen = load.stop();
    assert!(seen.failures.is_empty(), "{seen:?}");
    assert!(seen.answers > 10, "{seen:?}");
    server_answers_as_before(&source, &server, &before);
    no_half_uploads(&world);
    let clones = world.restore("large", "v2", server.port, &["--name", &world.name("clone")]);
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}
