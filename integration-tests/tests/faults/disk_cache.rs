//! What was fetched once and lies on disk: it saves the store's answers, is checked like them, and is never needed.

use std::fs;
use std::path::{Path, PathBuf};

use rewarm_integration_tests::checks::{Answers, server_answers_as_before};
use rewarm_integration_tests::mounts::{mount, unmount};
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Replica, Rewarm, Slow, World, needs};
use serde_json::Value;

use super::filling::{MIB, answers_of, far};

/// A cache folder of this world's own.
fn cache(world: &World) -> PathBuf {
    world.files().join("cache")
}

/// A call that keeps what it fetches in the world's own folder. CRIU stays where it is.
fn keeping(world: &World, call: Rewarm) -> Rewarm {
    let criu = needs::cache().join("criu/sbin/criu");
    let call = call.env("REWARM_CACHE", cache(world)).env("REWARM_CACHE_DISK", "1GiB");
    if criu.exists() { call.env("REWARM_CRIU", criu) } else { call }
}

/// Restores, compares, and waits until nothing is in memory any more. What it read from the store, in bytes.
fn restore(world: &World, slow: &Slow, server: &Server, before: &Answers) -> u64 {
    let passed = slow.passed();
    // All of it: what has not arrived when a clone is gone is not fetched any more.
    let flags = ["--name", &world.name("clone"), "--mode", "eager"];
    let call = world.restore_call(server.name, "v1", server.port, &flags);
    let output = keeping(world, call).ok();
    let clones = Replica::of_restore(world, server.port, &output);
    server_answers_as_before(&clones[0], server, before);
    clones[0].remove();
    world.await_no_services();
    slow.passed() - passed
}

fn shown(world: &World) -> Value {
    keeping(world, world.rewarm_json()).args(["cache"]).ok().json()["disk"].clone()
}

fn packs(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder.join("packs")).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

#[test]
fn a_later_fetcher_reads_from_disk_what_an_earlier_one_fetched() {
    let server = Server::memory_of(64);
    let Some((world, slow)) = far(&server) else { return };
    let before = answers_of(&world, &server);
    let first = restore(&world, &slow, &server, &before);
    let kept = shown(&world);
    assert!(kept["packs"].as_u64() > Some(0) && kept["bytes"].as_u64() > Some(32 * MIB), "{kept}");
    let second = restore(&world, &slow, &server, &before);
    assert!(second < first / 8, "{second} bytes were read again of {first}");
    // Cleared, it is fetched anew.
    keeping(&world, world.rewarm()).args(["cache", "--clear"]).ok();
    assert_eq!(shown(&world)["packs"], 0);
    let third = restore(&world, &slow, &server, &before);
    assert!(third > first / 2, "{third} bytes were read, {first} the first time");
    world.finish();
}

#[test]
fn what_is_damaged_on_disk_is_fetched_again() {
    let server = Server::memory_of(64);
    let Some((world, slow)) = far(&server) else { return };
    let before = answers_of(&world, &server);
    let first = restore(&world, &slow, &server, &before);
    let files = packs(&cache(&world));
    assert!(!files.is_empty());
    for file in files {
        let mut bytes = fs::read(&file).expect("a pack");
        bytes.iter_mut().step_by(50_000).for_each(|byte| *byte ^= 1);
        fs::write(&file, bytes).expect("a pack");
    }
    let second = restore(&world, &slow, &server, &before);
    assert!(second > first / 2, "{second} bytes were read, {first} the first time");
    // It was written anew.
    let third = restore(&world, &slow, &server, &before);
    assert!(third < first / 8, "{third} bytes were read again of {first}");
    world.finish();
}

#[test]
fn a_full_disk_costs_nothing_but_what_it_would_have_saved() {
    let server = Server::memory_of(64);
    let Some((world, _slow)) = far(&server) else { return };
    let before = answers_of(&world, &server);
    let folder = cache(&world).join("packs");
    fs::create_dir_all(&folder).expect("our own folder");
    mount(&["-t", "tmpfs", "-o", "size=4m", "tmpfs"], &folder);
    let call = world.restore_call(server.name, "v1", server.port, &[]);
    let output = keeping(&world, call).env("REWARM_FETCHER_IDLE", "4s").ok();
    let clones = Replica::of_restore(&world, server.port, &output);
    let disk = shown(&world);
    let text = keeping(&world, world.rewarm()).args(["cache"]).ok().stdout;
    assert!(disk["trouble"].as_str().is_some_and(|trouble| trouble.contains("No space left")), "{disk}");
    assert!(text.contains("not all could be kept"), "{text}");
    server_answers_as_before(&clones[0], &server, &before);
    clones[0].remove();
    world.await_no_services();
    unmount(&folder);
    world.finish();
}
