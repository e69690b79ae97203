//! Objects of a store that are missing, cut short or changed: nothing of them reaches a process.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rewarm_integration_tests::World;
use rewarm_integration_tests::checks::{answers, no_residue, server_answers_as_before, store_verifies};
use rewarm_integration_tests::server::Server;

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

/// Applies `damage` to one object after the other; each time a restore must fail with one of `codes` and leave nothing.
fn each_object_damaged(codes: &[i32], damage: impl Fn(&Path, &[u8])) {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    source.sh("echo delta > /srv/delta; echo shm > /dev/shm/shm");
    world.snapshot(&source, "v1", &[]);
    let objects = objects(&world.store_folder());
    assert!(objects.len() >= 4, "a pack, a boot object, a manifest and a tag, not {objects:?}");
    let traces = world.traces();
    // A tag's index has no digest: it only leads to a manifest that has one.
    let named_by_digest = |path: &&PathBuf| {
        !codes.contains(&5) || codes.len() > 1 || !path.starts_with(world.store_folder().join("tags"))
    };
    for object in objects.iter().filter(named_by_digest) {
        let intact = fs::read(object).expect("an object");
        damage(object, &intact);
        let output = world.restore_call("plain", "v1", server.port, &["--name", &world.name("clone")]).run();
        let code = output.code.unwrap_or(-1);
        assert!(codes.contains(&code), "{} damaged, expected one of {codes:?}:\n{output}", object.display());
        no_residue(&world, &traces);
        assert!(output.took < RESTORE_MAX, "{output}");
        fs::write(object, intact).expect("our own folder");
    }
    store_verifies(&world);
    restores(&world, &server, &before);
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

fn restores(world: &World, server: &Server, before: &rewarm_integration_tests::checks::Answers) {
    let clones = world.restore("plain", "v1", server.port, &["--name", &world.name("clone")]);
    server_answers_as_before(&clones[0], server, before);
}

#[test]
fn one_flipped_bit_anywhere_is_found() {
    each_object_damaged(&[5], |object, intact| {
        let mut changed = intact.to_vec();
        let middle = changed.len() / 2;
        changed[middle] ^= 1;
        fs::write(object, changed).expect("our own folder");
    });
}

#[test]
fn an_object_cut_short_is_found() {
    each_object_damaged(&[5], |object, intact| {
        fs::write(object, &intact[..intact.len() / 2]).expect("our own folder");
    });
}

/// Without its tag a snapshot is unknown (4); without anything else it is damaged.
#[test]
fn a_missing_object_is_found() {
    each_object_damaged(&[4, 5], |object, _| fs::remove_file(object).expect("our own folder"));
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
