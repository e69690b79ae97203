//! Objects of a store that are missing, cut short or changed: nothing of them reaches a process.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rewarm_integration_tests::checks::{answers, no_residue, server_answers_as_before};
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Replica, World};

use crate::world_for;

/// A damaged object is an error at once, and no reason to wait for anything.
const RESTORE_MAX: Duration = Duration::from_secs(15);

/// Every object of a folder that is a store.
fn objects(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![folder.to_owned()];
    while let Some(folder) = waiting.pop() {
        for entry in fs::read_dir(folder).expect("a folder").flatten() {
            if entry.path().is_dir() { waiting.push(entry.path()) } else { found.push(entry.path()) }
        }
    }
    found.sort();
    found
}

/// Applies `damage` to one object after the other; each time a restore must fail with the code that `expected` gives for the
/// folder in which the object lies, name the object if that is 5, and leave nothing. Where it gives none the object is left alone.
fn each_object_damaged(expected: impl Fn(&str) -> Option<i32>, damage: impl Fn(&Path, &[u8])) {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    source.sh("echo delta > /srv/delta; echo shm > /dev/shm/shm");
    world.snapshot(&source, "v1", &[]);
    let (store, traces) = (world.store_folder(), world.traces());
    let mut kinds = BTreeSet::new();
    for object in objects(&store) {
        let inside =
            object.strip_prefix(&store).expect("an object of the store").to_string_lossy().into_owned();
        let kind = inside.split('/').next().unwrap_or_default();
        let Some(expected) = expected(kind) else { continue };
        kinds.insert(kind.to_owned());
        let intact = fs::read(&object).expect("an object");
        damage(&object, &intact);
        let call = world.restore_call("plain", "v1", server.port, &["--name", &world.name("clone")]);
        let output = call.run();
        assert_eq!(output.code, Some(expected), "{inside} damaged:\n{output}");
        if expected == 5 {
            output.says(&[&inside]);
        }
        no_residue(&world, &traces);
        assert!(output.took < RESTORE_MAX, "{output}");
        fs::write(object, intact).expect("our own folder");
    }
    let untouched = ["boots", "manifests", "packs", "tags"].iter().find(|kind| {
        let wanted = expected(kind).is_some();
        wanted != kinds.contains(**kind)
    });
    assert_eq!(untouched, None, "damaged were only {kinds:?}");
    restores(&world, &server, &before);
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

fn restores(world: &World, server: &Server, before: &rewarm_integration_tests::checks::Answers) {
    let clones = world.restore("plain", "v1", server.port, &["--name", &world.name("clone")]);
    server_answers_as_before(&clones[0], server, before);
}

/// A tag's index has no digest: it only leads to a manifest that has one.
#[test]
fn one_flipped_bit_anywhere_is_found() {
    let expected = |kind: &str| (kind != "tags").then_some(5);
    each_object_damaged(expected, |object, intact| {
        let mut changed = intact.to_vec();
        let middle = changed.len() / 2;
        changed[middle] ^= 1;
        fs::write(object, changed).expect("our own folder");
    });
}

#[test]
fn an_object_cut_short_is_found() {
    let half = |object: &Path, intact: &[u8]| fs::write(object, &intact[..intact.len() / 2]);
    each_object_damaged(|_| Some(5), |object, intact| half(object, intact).expect("our own folder"));
}

/// Without its tag or its manifest a snapshot is unknown (4); what a manifest names and is not there is damage (5).
#[test]
fn a_missing_object_is_found() {
    let expected = |kind: &str| Some(if ["tags", "manifests"].contains(&kind) { 4 } else { 5 });
    each_object_damaged(expected, |object, _| fs::remove_file(object).expect("our own folder"));
}

/// A damaged tag is no missing one: whoever takes it for that would publish over it.
#[test]
fn a_tag_that_is_cut_short_is_found() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    let store = world.store_folder();
    let [tag] = &objects(&store.join("tags"))[..] else { panic!("one snapshot, one tag") };
    let inside = tag.strip_prefix(&store).expect("an object of the store").to_string_lossy().into_owned();
    let intact = fs::read(tag).expect("an object");
    let traces = world.traces();
    for length in [0, 1, intact.len() / 2, intact.len() - 2] {
        fs::write(tag, &intact[..length]).expect("our own folder");
        let reference = world.reference("plain", "v1");
        let restore = world.restore_call("plain", "v1", server.port, &["--name", &world.name("clone")]);
        for call in [restore, world.rewarm().args(["inspect", &reference])] {
            call.fails(5).says(&[&inside]);
        }
        world.snapshot_call(&source, "v1", &[]).fails(5).says(&[&inside, "the server goes on serving"]);
        assert_eq!(fs::read(tag).expect("an object").len(), length, "somebody wrote the tag");
        server_answers_as_before(&source, &server, &before);
        no_residue(&world, &traces);
    }
    fs::write(tag, intact).expect("our own folder");
    restores(&world, &server, &before);
    world.finish();
}

/// Whoever would rather wait than do without gets a cold server, and is told which object it was.
#[test]
fn a_damaged_snapshot_is_started_cold_where_that_is_asked_for() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let [pack] = &objects(&world.store_folder().join("packs"))[..] else {
        panic!("a small server, one pack")
    };
    let intact = fs::read(pack).expect("an object");
    fs::write(pack, &intact[..intact.len() / 2]).expect("our own folder");
    let output = world.restore_call("plain", "v1", server.port, &["--cold-fallback"]).ok();
    let told = output.json();
    assert_eq!(told["started"], "cold", "{output}");
    let because = told["replicas"][0]["cold_because"].to_string();
    let name = pack.file_name().expect("a file").to_string_lossy();
    assert!(because.contains("stage fetch") && because.contains(&*name), "{output}");
    let cold = Replica::of_restore(&world, server.port, &output);
    assert_ne!(answers(&cold[0], &server), before, "a cold start makes its own token");
    cold[0].remove();
    fs::write(pack, intact).expect("our own folder");
    restores(&world, &server, &before);
    world.finish();
}

/// A manifest that a newer program wrote is refused by name of both versions; nothing is guessed about its content.
#[test]
fn a_newer_format_is_refused_by_both_versions() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let traces = world.traces();
    let is_manifest = |path: &PathBuf| {
        let bytes = fs::read(path).expect("an object");
        bytes.starts_with(b"{") && String::from_utf8_lossy(&bytes).contains("\"facts\"")
    };
    let path = objects(&world.store_folder()).into_iter().find(is_manifest).expect("a manifest");
    let text = fs::read_to_string(&path).expect("text");
    let newer = text.replacen("\"format\":1", "\"format\":99", 1);
    assert_ne!(newer, text, "the manifest does not begin with its format: {text}");
    let digest = rewarm_store::Digest::of(newer.as_bytes());
    let name = path.file_name().expect("a file").to_string_lossy().into_owned();
    let old = name.split('.').next().unwrap_or_default();
    fs::write(path.with_file_name(name.replace(old, &digest.hex())), &newer).expect("our own folder");
    let call = world.restore_call("plain", &digest.to_string(), server.port, &[]);
    call.fails(3).says(&["99", "1"]);
    no_residue(&world, &traces);
    world.finish();
}
