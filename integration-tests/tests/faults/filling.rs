//! Replicas that are ready before all of their memory is there, and what may happen to them until it is.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rewarm_integration_tests::checks::{Answers, answers, server_answers_as_before};
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Need, Replica, Slow, World, needs, residue};
use serde_json::Value;

use crate::{world, world_for};

pub(crate) const MIB: u64 = 1 << 20;
/// Memory of servers that must still be filled when they are ready: what is ready needs several ranges of 8 MiB.
pub(crate) const LARGE_MIB: u32 = 400;
/// How long a killed replica may take to be told as such.
pub(crate) const TOLD_MAX: Duration = Duration::from_secs(60);
/// How long memory may take to be complete once nothing is slow any more.
const PRESENT_MAX: Duration = Duration::from_secs(60);

/// A world with a bucket behind a slow way, and a snapshot of a server with memory in it.
pub(crate) fn far(server: &Server) -> Option<(World, Slow)> {
    let needs: Vec<Need> = needs::REPLICA.iter().copied().chain([Need::Garage]).collect();
    Some(world(&needs)?.on_garage().behind()).inspect(|(world, _)| drop(snapshot_of(world, server)))
}

/// Takes a snapshot of a server, which is removed. What it answered.
pub(crate) fn snapshot_of(world: &World, server: &Server) -> Answers {
    snapshot_with(world, server, &[])
}

/// The same, with further flags of `rewarm run`.
pub(crate) fn snapshot_with(world: &World, server: &Server, flags: &[&str]) -> Answers {
    let source = world.start_with(server.name, server, flags);
    let before = answers(&source, server);
    world.snapshot(&source, "v1", &["--compression", "none"]);
    source.remove();
    before
}

/// The answers of a server that nobody has snapshotted are the same: its content is known.
pub(crate) fn answers_of(world: &World, server: &Server) -> Answers {
    let again = world.start("again", server);
    let answers = answers(&again, server);
    again.remove();
    answers
}

pub(crate) fn lazily<'w>(world: &'w World, server: &Server, patience: &str) -> Replica<'w> {
    let call = world.restore_call(server.name, "v1", server.port, &["--mode", "lazy"]);
    let output = call.env("REWARM_STORE_PATIENCE", patience).ok();
    Replica::of_restore(world, server.port, &output).remove(0)
}

pub(crate) fn entry(replica: &Replica<'_>) -> Value {
    replica.entry().expect("it is listed")
}

pub(crate) fn await_present(world: &World, replica: &Replica<'_>) -> Value {
    world.await_state("memory is complete", PRESENT_MAX, || entry(replica)["memory"] == "present");
    entry(replica)
}

pub(crate) fn pagers(world: &World) -> Vec<i32> {
    let all = residue::processes(world.id()).into_iter();
    all.filter(|(_, command)| command.contains(" pager ")).map(|(pid, _)| pid).collect()
}

/// Kills processes of which some may end with others: a pager's guard with it, a worker with its keeper.
pub(crate) fn kill_all(pids: impl IntoIterator<Item = i32>) {
    let kill = |pid| kill(Pid::from_raw(pid), Signal::SIGKILL);
    let killed: Vec<_> = pids.into_iter().map(kill).collect();
    assert!(killed.contains(&Ok(())), "none was there: {killed:?}");
    assert!(killed.iter().all(|told| matches!(told, Ok(()) | Err(Errno::ESRCH))), "{killed:?}");
}

/// Waits until the replica was killed, and gives the reason.
pub(crate) fn await_crash(world: &World, replica: &Replica<'_>) -> String {
    world.await_state("the replica was killed", TOLD_MAX, || entry(replica)["status"] == "crashed");
    let exit = entry(replica)["exit"].clone();
    assert_eq!(exit["code"], 128 + Signal::SIGKILL as i32, "{exit}");
    let list = world.rewarm().args(["ps", "--all"]).ok().stdout;
    let reason = exit["reason"].as_str().expect("a reason").to_owned();
    assert!(list.contains(&reason), "{reason:?} is missing in\n{list}");
    world.await_state("the pager has ended", TOLD_MAX, || pagers(world).is_empty());
    reason
}

/// How the threads of a shim are called that every replica has, started cold or restored, and those that answer a command.
const SHIM_THREADS: [&str; 5] = ["publish", "reap", "accept", "log", "connection-"];

/// Waits until no process fills memory, and asserts that none holds a userfaultfd and that no shim has a thread for it.
pub(crate) fn nothing_fills(world: &World) {
    world.await_state("the pager has ended", TOLD_MAX, || pagers(world).is_empty());
    for (pid, command) in residue::processes(world.id()).into_iter().filter(|(_, it)| it.contains(" shim ")) {
        for thread in rewarm_sys::hold::threads(pid).into_iter().filter(|thread| *thread != pid) {
            let name = std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/comm")).unwrap_or_default();
            let name = name.trim_end();
            let known = SHIM_THREADS.iter().any(|known| name.starts_with(known));
            assert!(name.is_empty() || known, "{command} has a thread {name}");
        }
    }
    for (pid, command) in residue::processes(world.id()) {
        for fd in std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            let target = std::fs::read_link(fd.path()).unwrap_or_default();
            assert!(!target.to_string_lossy().contains("userfaultfd"), "{command} holds {target:?}");
        }
    }
}

#[test]
fn a_replica_is_ready_before_its_memory_is_complete() {
    let server = Server::memory_of(LARGE_MIB);
    let Some((world, slow)) = far(&server) else { return };
    let before = answers_of(&world, &server);
    // So slow that a busy machine, too, is ready long before it is complete.
    slow.throttle(8 * MIB);
    let replica = lazily(&world, &server, "30s");
    assert_eq!(entry(&replica)["memory"], "filling");
    let [pager, ..] = pagers(&world)[..] else { panic!("nothing fills") };
    // Where memory runs short the kernel may kill the server, but not leave it without who fills it.
    let spared = std::fs::read_to_string(format!("/proc/{pager}/oom_score_adj")).expect("it lives");
    // Only who may (CAP_SYS_RESOURCE) spares himself.
    if rewarm_sys::process::may_change_limits() {
        assert_eq!(spared.trim(), "-999");
    }
    assert_eq!(replica.sh("cat /proc/1/oom_score_adj"), "0");
    slow.throttle(64 * MIB);
    // All of it is read here, most of it before it has arrived by itself.
    server_answers_as_before(&replica, &server, &before);
    let present = await_present(&world, &replica);
    assert!(present["present_ms"].as_i64().is_some_and(|ms| ms > 0), "{present}");
    // Nothing is left of the filling: no process, and no userfaultfd in any.
    nothing_fills(&world);
    server_answers_as_before(&replica, &server, &before);
    world.finish();
}

#[test]
fn a_store_that_goes_away_ends_what_is_being_filled_with_the_reason() {
    let server = Server::memory_of(LARGE_MIB);
    let Some((world, slow)) = far(&server) else { return };
    slow.throttle(8 * MIB);
    let replica = lazily(&world, &server, "2s");
    assert_eq!(entry(&replica)["memory"], "filling");
    // Every connection breaks at once, and so does every further one.
    slow.cut_after(1);
    let reason = await_crash(&world, &replica);
    assert!(reason.contains(world.id()), "the store is not named: {reason}");
    world.finish();
}

/// Every connection is cut after a part of what was asked for; what is left is asked for again.
#[test]
fn connections_that_break_again_and_again_cost_time_only() {
    let server = Server::memory_of(48);
    let Some((world, slow)) = far(&server) else { return };
    let before = answers_of(&world, &server);
    slow.cut_after(11 * MIB);
    let replica = lazily(&world, &server, "60s");
    server_answers_as_before(&replica, &server, &before);
    await_present(&world, &replica);
    world.finish();
}

#[test]
fn a_killed_keeper_ends_what_is_being_filled_with_the_reason() {
    let server = Server::memory_of(LARGE_MIB);
    let Some((world, slow)) = far(&server) else { return };
    let before = answers_of(&world, &server);
    slow.throttle(8 * MIB);
    let replica = lazily(&world, &server, "60s");
    kill_all(residue::services(world.id()).into_iter().map(|(pid, _)| pid));
    let reason = await_crash(&world, &replica);
    assert!(reason.contains("is gone"), "{reason}");
    // The next restore starts another one.
    slow.throttle(0);
    let again = world.restore(server.name, "v1", server.port, &["--name", &world.name("again")]);
    server_answers_as_before(&again[0], &server, &before);
    world.finish();
}

#[test]
fn a_killed_pager_ends_what_is_being_filled_with_the_reason() {
    let server = Server::memory_of(LARGE_MIB);
    let Some((world, slow)) = far(&server) else { return };
    slow.throttle(8 * MIB);
    let replica = lazily(&world, &server, "60s");
    kill_all(pagers(&world));
    let reason = await_crash(&world, &replica);
    assert!(reason.contains("pager"), "{reason}");
    world.finish();
}

/// A restore whose fetcher is killed starts over once, with another one.
#[test]
fn a_keeper_killed_during_a_restore_is_replaced() {
    let server = Server::memory_of(48);
    let Some((world, slow)) = far(&server) else { return };
    let before = answers_of(&world, &server);
    slow.throttle(4 * MIB);
    let running = world.restore_call(server.name, "v1", server.port, &[]).spawn();
    let began = Instant::now();
    while slow.passed() < MIB {
        assert!(began.elapsed() < TOLD_MAX, "nothing is fetched");
        std::thread::sleep(Duration::from_millis(10));
    }
    kill_all(residue::services(world.id()).into_iter().map(|(pid, _)| pid));
    slow.throttle(0);
    let output = running.wait();
    output.expect_code(0);
    let clones = Replica::of_restore(&world, server.port, &output);
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

#[test]
fn eight_clones_cost_one_download() {
    let server = Server::memory_of(32);
    let Some((world, slow)) = far(&server) else { return };
    let before = answers_of(&world, &server);
    let passed = slow.passed();
    let one = world.restore(server.name, "v1", server.port, &["--name", &world.name("one")]);
    let cost = slow.passed() - passed;
    one[0].remove();
    world.await_no_services();
    let passed = slow.passed();
    let flags = ["--count", "8", "--name", &world.name("eight")];
    let eight = world.restore(server.name, "v1", server.port, &flags);
    let together = slow.passed() - passed;
    assert_eq!(eight.len(), 8);
    assert!(together <= cost + cost / 10, "{together} bytes for eight, {cost} for one");
    for clone in &eight {
        server_answers_as_before(clone, &server, &before);
    }
    world.finish();
}

/// The files that a process maps, by device and inode.
fn mapped(pid: u64) -> BTreeSet<(u64, u64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("our own process");
    let file = |line: &str| {
        let mut words = line.split_whitespace().skip(3);
        let (major, minor) = words.next()?.split_once(':')?;
        let number = |text: &str| u64::from_str_radix(text, 16).ok();
        let device = nix::libc::makedev(number(major)? as u32, number(minor)? as u32);
        Some((device, words.next()?.parse().ok()?)).filter(|(_, inode)| *inode > 0)
    };
    text.lines().filter_map(file).collect()
}

/// Each chunk is checked and decoded once for all of them, and what they are filled from is mapped by none of them: what a server
/// gives away (MADV_DONTNEED) would come back with old bytes.
#[test]
fn four_clones_are_filled_from_what_was_decoded_once() {
    let server = Server::memory_of(32);
    let Some(world) = world_for(&server) else { return };
    let source = world.start(server.name, &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &["--compression", "zstd:1"]);
    source.remove();
    // Nothing is asked for twice because a page fault could not wait.
    let flags = ["--mode", "eager", "--count", "4", "--name", &world.name("four")];
    let clones = world.restore(server.name, "v1", server.port, &flags);
    let cache = world.rewarm_json().args(["cache"]).ok().json();
    let streams = cache["streams"].as_array().expect("streams");
    let of = |key: &str| streams.iter().map(|stream| stream[key].as_u64().expect(key)).sum::<u64>();
    let (checked, content) = (of("checked_bytes"), of("bytes"));
    assert_eq!((streams.len(), &streams[0]["complete"]), (1, &Value::Bool(true)), "{cache:#}");
    assert!((content / 10 * 9..=content).contains(&checked), "{checked} checked of {content}");
    let keeper = cache["pid"].as_u64().expect("a process number");
    let descriptors = std::fs::read_dir(format!("/proc/{keeper}/fd")).expect("it runs").flatten();
    let files: BTreeSet<(u64, u64)> = descriptors
        .filter_map(|descriptor| std::fs::metadata(descriptor.path()).ok())
        .filter(|file| file.is_file())
        .map(|file| (file.dev(), file.ino()))
        .collect();
    assert!(!mapped(keeper).is_disjoint(&files), "the fetcher maps its own");
    for clone in &clones {
        let pid = entry(clone)["pid"].as_u64().expect("a process number");
        assert!(mapped(pid).is_disjoint(&files), "{} maps what the fetcher holds", clone.name());
        server_answers_as_before(clone, &server, &before);
    }
    world.finish();
}

/// A probe that touches a part of the memory.
fn probe(world: &World) -> String {
    let path = world.files().join("probe.toml");
    let text = "port = 8000\n\n[[request]]\npath = \"/touch?pages=64\"\ncompare = \"status\"\n";
    std::fs::write(&path, text).expect("our own folder");
    path.display().to_string()
}

/// The working sets that lie in a folder, by their file names, with the bytes that each names.
fn working_sets(world: &World) -> Vec<(String, u64)> {
    let rows = std::fs::read_dir(world.store_folder().join("working-sets")).into_iter().flatten().flatten();
    let files = rows.flat_map(|row| std::fs::read_dir(row.path()).into_iter().flatten().flatten());
    let read = |file: std::fs::DirEntry| {
        let text = std::fs::read_to_string(file.path()).expect("a working set");
        let json: Value = serde_json::from_str(&text).expect("JSON");
        let extents = json["extents"].as_array().expect("a list");
        let bytes = extents.iter().map(|extent| extent[2].as_u64().expect("a length")).sum();
        (file.file_name().to_string_lossy().into_owned(), bytes)
    };
    let mut found: Vec<_> = files.map(read).collect();
    found.sort();
    found
}

#[test]
fn the_first_restore_records_what_is_touched_and_later_ones_know() {
    let server = Server::memory_of(96);
    let Some(world) = world_for(&server) else { return };
    let source = world.start(server.name, &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &["--probe", &probe(&world)]);
    source.remove();
    let flags = ["--count", "2", "--mode", "lazy", "-vv"];
    let output = world.restore_call(server.name, "v1", server.port, &flags).ok();
    for clone in Replica::of_restore(&world, server.port, &output) {
        server_answers_as_before(&clone, &server, &before);
    }
    let first = working_sets(&world);
    let [(name, bytes)] = &first[..] else { panic!("one of the two writes one: {first:?}\n{output}") };
    assert_eq!(name, "000000001.json");
    assert!((MIB / 4..48 * MIB).contains(bytes), "{bytes} bytes were touched");
    // Whether the fetcher still has it or reads it again: it is good enough not to be written again.
    for wait in [false, true] {
        if wait {
            world.await_no_services();
        }
        let name = world.name("again");
        let again = world.restore(server.name, "v1", server.port, &["--name", &name, "--mode", "lazy"]);
        server_answers_as_before(&again[0], &server, &before);
        again[0].remove();
        assert_eq!(working_sets(&world), first);
    }
    // Garbage is collected around it.
    for _ in 0..2 {
        world.rewarm().args(["gc", world.store(), "--grace", "0s"]).ok();
    }
    assert_eq!(working_sets(&world), first);
    // One that names too little is written anew, the damaged and the old one beside it.
    let row = std::fs::read_dir(world.store_folder().join("working-sets")).expect("a folder");
    let row = row.flatten().next().expect("a row").path();
    let text = std::fs::read_to_string(row.join("000000001.json")).expect("a working set");
    let mut json: Value = serde_json::from_str(&text).expect("JSON");
    json["extents"] = serde_json::json!([[0, 0, 4096], [77, 0, 4096], [0, u64::MAX - 10, 4096]]);
    std::fs::write(row.join("000000002.json"), json.to_string()).expect("our own folder");
    world.await_no_services();
    let again =
        world.restore(server.name, "v1", server.port, &["--name", &world.name("third"), "--mode", "lazy"]);
    server_answers_as_before(&again[0], &server, &before);
    assert_eq!(working_sets(&world).last().map(|(name, _)| name.as_str()), Some("000000003.json"));
    std::fs::write(row.join("000000004.json"), "{").expect("our own folder");
    world.await_no_services();
    let again =
        world.restore(server.name, "v1", server.port, &["--name", &world.name("fourth"), "--mode", "lazy"]);
    server_answers_as_before(&again[0], &server, &before);
    world.finish();
}

#[test]
fn a_store_that_can_only_be_read_costs_a_warning() {
    let server = Server::memory_of(16);
    let Some(world) = world_for(&server) else { return };
    let folder = world.root().join("read-only");
    std::fs::create_dir(&folder).expect("our own folder");
    let mount = |options: &[&str]| {
        let status = std::process::Command::new("mount").args(options).arg(&folder).status();
        assert!(status.expect("mount is part of the base system").success(), "{options:?}");
    };
    mount(&["-t", "tmpfs", "-o", "size=256m", "tmpfs"]);
    let world = world.with_store(&folder);
    let before = snapshot_of(&world, &server);
    mount(&["-o", "remount,ro"]);
    let output = world.restore_call(server.name, "v1", server.port, &["--mode", "lazy"]).ok();
    output.says(&["could not be written down", "Read-only"]);
    let clones = Replica::of_restore(&world, server.port, &output);
    server_answers_as_before(&clones[0], &server, &before);
    clones[0].remove();
    world.await_no_services();
    let status = std::process::Command::new("umount").arg(&folder).status();
    assert!(status.expect("umount is part of the base system").success());
    world.finish();
}

/// Memory of every kind, two processes, and threads that change it: all of it in place before any of them runs.
#[test]
fn an_eager_restore_is_complete_before_the_server_runs() {
    let server = Server::memory();
    let Some(world) = world_for(&server) else { return };
    let before = snapshot_of(&world, &server);
    let clones = world.restore(server.name, "v1", server.port, &["--mode", "eager", "--count", "2"]);
    for clone in &clones {
        assert_eq!(entry(clone)["memory"], "present");
        server_answers_as_before(clone, &server, &before);
    }
    assert_eq!(pagers(&world), [] as [i32; 0]);
    // From what an eager one holds a snapshot can be taken again.
    world.snapshot(&clones[0], "v2", &[]);
    world.finish();
}

/// What CRIU takes of a block is given back as soon as it has all of it, and not before: here it takes many parts of each.
#[test]
fn shared_memory_with_gaps_passes_from_a_folder_and_stays_what_it_was() {
    let server = Server::shared_with_gaps(64);
    let Some(world) = world_for(&server) else { return };
    let _ = world.store_folder();
    let before = snapshot_of(&world, &server);
    for (name, mode) in [("first", "lazy"), ("second", "eager"), ("third", "auto")] {
        let clones =
            world.restore(server.name, "v1", server.port, &["--name", &world.name(name), "--mode", mode]);
        server_answers_as_before(&clones[0], &server, &before);
        clones[0].remove();
        // The next one is the first of its fetcher again.
        world.await_no_services();
    }
    world.finish();
}

/// An eager restore from a store that fails leaves nothing, and says why.
#[test]
fn an_eager_restore_that_cannot_be_completed_leaves_nothing() {
    let server = Server::memory_of(96);
    let Some((world, slow)) = far(&server) else { return };
    let traces = world.traces();
    slow.throttle(4 * MIB);
    let call = world.restore_call(server.name, "v1", server.port, &["--mode", "eager"]);
    let running = call.env("REWARM_STORE_PATIENCE", "1s").spawn();
    let (began, passed) = (Instant::now(), slow.passed());
    while slow.passed() < passed + 4 * MIB {
        assert!(began.elapsed() < TOLD_MAX, "nothing is fetched");
        std::thread::sleep(Duration::from_millis(10));
    }
    slow.cut_after(1);
    let output = running.wait();
    output.expect_code(1);
    output.says(&[world.id()]);
    rewarm_integration_tests::checks::no_residue(&world, &traces);
    world.finish();
}
