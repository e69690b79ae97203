//! The verbs of stores: `verify`, `diff`, `cp`, `rm`, `gc`, `ls` and `inspect --mappings`, as a user calls them.

use std::fs;
use std::path::PathBuf;

use rewarm_integration_tests::checks::{answers, server_answers_as_before, store_verifies};
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Need, World, needs};
use serde_json::Value;

use crate::{world, world_for};

fn packs(world: &World) -> Vec<PathBuf> {
    let entries = fs::read_dir(world.store_folder().join("packs")).expect("packs");
    entries.map(|entry| entry.expect("readable").path()).collect()
}

#[test]
fn verify_reports_each_damaged_object() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    world.snapshot(&source, "v1", &[]);
    let reference = world.reference("plain", "v1");
    let whole = world.rewarm_json().args(["verify", &reference]).ok().json();
    assert_eq!(whole["variants"][0]["whole"], true, "{whole:#}");
    assert!(whole["variants"][0]["read_bytes"].as_u64().is_some_and(|read| read > 0), "{whole:#}");
    let pack = packs(&world).remove(0);
    let good = fs::read(&pack).expect("readable");
    let mut bad = good.clone();
    for at in [100, good.len() / 2, good.len() - 1] {
        bad[at] ^= 1;
    }
    fs::write(&pack, &bad).expect("our own folder");
    let name = pack.file_name().expect("a name").to_string_lossy().into_owned();
    world.rewarm().args(["verify", &reference]).fails(5).says(&[&name, "damaged"]);
    let told = world.rewarm_json().args(["verify", &reference]).fails(5).json_lines().remove(0);
    assert!(told["variants"][0]["damage"].as_array().is_some_and(|found| found.len() > 1), "{told:#}");
    fs::write(&pack, &good).expect("our own folder");
    fs::remove_file(&pack).expect("our own folder");
    world.rewarm().args(["verify", &reference]).fails(5).says(&[&name, "missing"]);
    fs::write(&pack, &good).expect("our own folder");
    world.rewarm().args(["verify", &reference]).ok();
    // A damaged boot object is found, and hides nothing else.
    let boots = world.store_folder().join("boots");
    let boot = fs::read_dir(boots).expect("boots").next().expect("one").expect("readable").path();
    let good = fs::read(&boot).expect("readable");
    let mut bad = good.clone();
    bad[30] ^= 1;
    fs::write(&boot, &bad).expect("our own folder");
    world.rewarm().args(["verify", &reference]).fails(5).says(&["boots/"]);
    world.rewarm().args(["ls", world.store()]).ok().says(&["not known", "boots/"]);
    world.rewarm().args(["gc", world.store()]).fails(5).says(&["boots/"]);
    fs::write(&boot, &good).expect("our own folder");
    world.finish();
}

#[test]
fn diff_names_the_process_and_the_mapping_that_changed() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    world.snapshot(&source, "v1", &[]);
    assert_eq!(source.ask("POST", "/noise", Some("{}")).expect("an answer").status, 200);
    world.snapshot(&source, "v2", &[]);
    let (v1, v2) = (world.reference("plain", "v1"), world.reference("plain", "v2"));
    let same = world.rewarm_json().args(["diff", &v1, &v1]).ok().json();
    assert_eq!(same["only_first"]["chunks"], 0);
    assert_eq!(same["mappings"].as_array().map(Vec::len), Some(0), "{same:#}");
    let differ = world.rewarm_json().args(["diff", &v1, &v2]).ok().json();
    assert!(differ["only_second"]["chunks"].as_u64().is_some_and(|chunks| chunks > 0), "{differ:#}");
    let mappings = differ["mappings"].as_array().expect("mappings");
    let program = |mapping: &Value| mapping["program"].as_str().is_some_and(|path| path.contains("python"));
    assert!(!mappings.is_empty() && mappings.iter().all(program), "{differ:#}");
    world.rewarm().args(["diff", &v1, &v2]).ok();
    // The same mappings, as a snapshot has them.
    let inspected = world.rewarm_json().args(["inspect", &v2, "--mappings"]).ok().json();
    let processes = inspected["variants"][0]["processes"].as_array().expect("processes").clone();
    assert_eq!(processes[0]["pid"], 1);
    let content = |process: &Value| -> u64 {
        let mappings = process["mappings"].as_array().expect("mappings");
        mappings.iter().filter_map(|mapping| mapping["content_bytes"].as_u64()).sum()
    };
    let stored: u64 = processes.iter().map(content).sum();
    let manifest = &inspected["variants"][0]["manifest"]["facts"]["memory"];
    let tasks: u64 =
        manifest["tasks"].as_array().expect("tasks").iter().filter_map(|task| task["bytes"].as_u64()).sum();
    assert!(stored > 0 && stored <= tasks, "{stored} of {tasks}");
    world.finish();
}

/// Memory that was stored in each codec comes back the same, and a wanted rate is taken.
#[test]
fn a_server_in_every_codec() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    let calls: [(&str, &[&str]); 4] = [
        ("planes", &["--compression", "planes"]),
        ("zstd", &["--compression", "zstd:3"]),
        ("none", &["--compression", "none"]),
        ("rate", &["--rate", "100MB"]),
    ];
    // A store for each: chunks that are there are not written again in another codec.
    for (tag, flags) in calls {
        let store = world.root().join(tag).to_string_lossy().into_owned();
        let reference = format!("{store}/plain@{tag}");
        world.rewarm().args(["snapshot", source.name(), &reference]).args(flags).ok();
        world.rewarm().args(["verify", &reference]).ok();
        let clone = world.name(tag);
        let port = format!("0:{}", server.port);
        let output =
            world.rewarm_json().args(["restore", &reference, "--name", &clone, "--publish", &port]).ok();
        let clones = rewarm_integration_tests::Replica::of_restore(&world, server.port, &output);
        server_answers_as_before(&clones[0], &server, &before);
        clones[0].remove();
    }
    world.finish();
}

fn copy_and_collect(world: &World, elsewhere: &str) {
    let server = Server::plain();
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    let report = world.snapshot(&source, "v1", &[]);
    world.snapshot(&source, "v2", &[]);
    source.remove();
    let reference = world.reference("plain", "v1");
    // There and back again, under another name: the digest stays.
    let there = format!("{elsewhere}/copy@v1");
    let copied = world.rewarm_json().args(["cp", &reference, &there]).ok().json();
    assert_eq!(copied["variants"][0]["digest"], report["digest"]);
    let again = world.rewarm_json().args(["cp", &reference, &there]).ok().json();
    assert_eq!(again["variants"][0]["objects"], 0, "{again:#}");
    // Of the second snapshot only what the first has not brought: what is new, its boot object and its manifest.
    let next = world.rewarm_json().args(["cp", &world.reference("plain", "v2"), &there.replace("v1", "v2")]);
    let next = next.ok().json()["variants"][0].clone();
    let of = |copied: &Value, key: &str| copied[key].as_u64().expect(key);
    assert!(of(&next, "present") > 0 && (2..=3).contains(&of(&next, "objects")), "{next:#}");
    assert!(of(&next, "bytes") < of(&copied["variants"][0], "bytes") / 2, "{next:#} after {copied:#}");
    world.rewarm().args(["verify", &there]).ok();
    let list = world.rewarm_json().args(["ls", world.store()]).ok().json();
    let rows = list["snapshots"].as_array().expect("snapshots");
    assert_eq!(rows.len(), 2, "{list:#}");
    for row in rows {
        let [unique, stored] = ["unique_bytes", "stored_bytes"].map(|key| row[key].as_u64().expect(key));
        assert!(unique > 0 && unique < stored, "most of it is shared: {row:#}");
    }
    for tag in ["v1", "v2"] {
        world.rewarm().args(["rm", &world.reference("plain", tag)]).ok();
        world.rewarm().args(["rm", &world.reference("plain", tag)]).fails(4);
    }
    let gc = |flags: &[&str]| world.rewarm_json().args(["gc", world.store()]).args(flags).ok().json();
    let dry = gc(&["--dry-run"]);
    assert!(dry["marked"]["objects"].as_u64().is_some_and(|objects| objects >= 6), "{dry:#}");
    assert_eq!(gc(&[])["removed"]["objects"], 0, "nothing goes at once");
    assert_eq!(gc(&[])["removed"]["objects"], 0, "nothing goes before its time");
    let removed = gc(&["--grace", "0s"]);
    assert_eq!(removed["removed"], dry["marked"], "{removed:#}");
    assert_eq!(gc(&["--dry-run"])["alive"]["objects"], 0);
    world.rewarm().args(["restore", &reference]).fails(4);
    // From the copy it comes back.
    world.rewarm().args(["cp", &there, &reference]).ok();
    let clones = world.restore("plain", "v1", server.port, &[]);
    server_answers_as_before(&clones[0], &server, &before);
    store_verifies(world);
}

#[test]
fn a_copy_outlives_its_original() {
    let Some(world) = world(needs::REPLICA) else { return };
    let elsewhere = world.root().join("elsewhere").to_string_lossy().into_owned();
    copy_and_collect(&world, &elsewhere);
    world.finish();
}

#[test]
fn a_copy_in_a_folder_outlives_its_original_in_a_bucket() {
    let needs: Vec<Need> = needs::REPLICA.iter().copied().chain([Need::Garage]).collect();
    let Some(world) = world(&needs) else { return };
    let world = world.on_garage();
    let elsewhere = world.root().join("elsewhere").to_string_lossy().into_owned();
    copy_and_collect(&world, &elsewhere);
    world.finish();
}

/// gc in a loop while a server is snapshotted, its snapshots are removed and others are restored.
#[test]
fn gc_beside_snapshots_and_restores() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    for round in 0..3 {
        let tag = format!("v{round}");
        let snapshot = world.snapshot_call(&source, &tag, &[]).spawn();
        let gc = || world.rewarm().args(["gc", world.store(), "--grace", "0s"]).run();
        for _ in 0..4 {
            let output = gc();
            assert!(matches!(output.code, Some(0)), "{output}");
        }
        snapshot.wait().expect_code(0);
        gc().expect_code(0);
        world.rewarm().args(["verify", &world.reference("plain", &tag)]).ok();
        if round > 0 {
            world.rewarm().args(["rm", &world.reference("plain", &format!("v{}", round - 1))]).ok();
        }
    }
    let clone = world.name("clone");
    let restore = world.restore_call("plain", "v2", server.port, &["--name", &clone]).spawn();
    world.rewarm().args(["gc", world.store()]).ok();
    restore.wait().expect_code(0);
    server_answers_as_before(&source, &server, &before);
    world.finish();
}
