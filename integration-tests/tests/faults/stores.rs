//! Stores that cannot be reached, read or written: the server serves on, nothing half-done is visible.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rewarm_integration_tests::checks::{
    Answers, answers, no_half_uploads, no_residue, server_answers_as_before, visible,
};
use rewarm_integration_tests::garage::free_port;
use rewarm_integration_tests::mounts::{mount, unmount};
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Need, Replica, World, needs};
use rewarm_report::Stage;

use crate::{world, world_for};

/// A file system of its own at `path`; the world takes it away with everything else.
fn small_file_system(path: &Path, options: &str) {
    std::fs::create_dir_all(path).expect("our own folder");
    mount(&["-t", "tmpfs", "-o", options, "tmpfs"], path);
}

/// A replica whose state folder lies on a small file system that it has filled: until nothing more fits, it has written to
/// its own upper layer.
fn on_a_full_disk<'w>(world: &'w World, server: &Server) -> (Replica<'w>, Answers) {
    small_file_system(&world.state(), "size=24m");
    let source = world.start("plain", server);
    let before = answers(&source, server);
    source.exec(&["sh", "-c", "cat /dev/zero > /srv/fill; cat /dev/zero > /srv/last; true"]).run();
    // What that command itself took has become free again.
    let mut filler = std::fs::File::create(world.state().join("filler")).expect("a file takes no room");
    while std::io::Write::write(&mut filler, &[0; 4096]).is_ok() {}
    (source, before)
}

/// Makes that file system larger.
fn make_room(world: &World) {
    let larger = Command::new("mount").args(["-o", "remount,size=256m"]).arg(world.state()).status();
    assert!(larger.expect("mount is part of the base system").success());
}

#[test]
fn a_store_that_cannot_be_reached() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let (before, traces) = (answers(&source, &server), world.traces());
    let endpoint = format!("http://127.0.0.1:{}", free_port());
    let reference = "s3://bucket/plain@v1";
    for verb in [&["snapshot", source.name(), reference][..], &["restore", reference], &["ls", "s3://bucket"]]
    {
        let output = world
            .rewarm()
            .args(verb)
            .env("AWS_ENDPOINT", &endpoint)
            .env("AWS_ALLOW_HTTP", "true")
            .env("AWS_REGION", "garage")
            .env("AWS_ACCESS_KEY_ID", "id")
            .env("AWS_SECRET_ACCESS_KEY", "key")
            .timeout(Duration::from_secs(60))
            .fails(1);
        output.says(&["cannot reach s3://bucket to", "AWS_ENDPOINT_URL"]);
    }
    server_answers_as_before(&source, &server, &before);
    no_residue(&world, &traces);
    world.finish();
}

#[test]
fn a_wrong_key_and_a_missing_bucket() {
    let needs: Vec<Need> = needs::REPLICA.iter().copied().chain([Need::Garage]).collect();
    let Some(world) = world(&needs) else { return };
    let world = world.on_garage();
    let server = Server::plain();
    let source = world.start("plain", &server);
    let (before, traces) = (answers(&source, &server), world.traces());
    let wrong = "f".repeat(64);
    let call = world.snapshot_call(&source, "v1", &[]).env("AWS_SECRET_ACCESS_KEY", &wrong);
    let denied = format!("{} does not allow to", world.store());
    call.fails(1).says(&["stage preflight", &denied, "AWS_", "the server goes on serving"]);
    // Those who only read are told the same, a restore by another process than its own.
    let (whole, clone) = (world.reference("plain", "v1"), world.name("clone"));
    for words in [&["restore", &whole, "--name", &clone][..], &["inspect", &whole], &["ls", world.store()]] {
        let call = world.rewarm().args(words).env("AWS_SECRET_ACCESS_KEY", &wrong);
        call.fails(1).says(&[&denied, "AWS_"]);
    }
    let missing = format!("s3://absent-{}", world.id());
    let reference = format!("{missing}/plain@v1");
    let absent = format!("does not exist in {missing}");
    world.rewarm().args(["snapshot", source.name(), &reference]).fails(4).says(&[&absent]);
    world.rewarm().args(["restore", &reference, "--name", &world.name("clone")]).fails(4).says(&[&absent]);
    world.rewarm().args(["ls", &missing]).fails(4).says(&[&absent]);
    server_answers_as_before(&source, &server, &before);
    no_residue(&world, &traces);
    world.finish();
}

#[test]
fn a_folder_that_is_read_only() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let folder = world.root().join("read-only");
    small_file_system(&folder, "size=1m,ro");
    let world = world.with_store(&folder);
    let source = world.start("plain", &server);
    let (before, traces) = (answers(&source, &server), world.traces());
    // It is found before the pre hook, and so before anything is frozen.
    let output = world.snapshot_call(&source, "v1", &["--pre", "touch /srv/drained"]).fails(1);
    output.says(&["stage preflight", "Read-only", &folder.to_string_lossy(), "the server goes on serving"]);
    source.exec(&["test", "-e", "/srv/drained"]).fails(1);
    server_answers_as_before(&source, &server, &before);
    no_residue(&world, &traces);
    unmount(&folder);
    world.finish();
}

/// Credentials that may read and not write are found before anything is frozen, too.
#[test]
fn a_bucket_that_may_only_be_read() {
    let needs: Vec<Need> = needs::REPLICA.iter().copied().chain([Need::Garage]).collect();
    let Some(world) = world(&needs) else { return };
    let world = world.on_garage();
    let server = Server::plain();
    let source = world.start("plain", &server);
    world.snapshot(&source, "v1", &[]);
    let (before, traces) = (answers(&source, &server), world.traces());
    let reader = world.garage().read_only_env();
    let as_reader = |call: rewarm_integration_tests::Rewarm| {
        reader.iter().fold(call, |call, (name, value)| call.env(name, value))
    };
    let call = world.snapshot_call(&source, "v2", &["--pre", "touch /srv/drained"]);
    as_reader(call).fails(1).says(&["stage preflight", world.id(), "the server goes on serving"]);
    source.exec(&["test", "-e", "/srv/drained"]).fails(1);
    server_answers_as_before(&source, &server, &before);
    no_residue(&world, &traces);
    // To restore from it, reading is enough.
    let clone = world.restore_call("plain", "v1", server.port, &["--name", &world.name("clone")]);
    let clones = Replica::of_restore(&world, server.port, &as_reader(clone).ok());
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

#[test]
fn a_disk_that_is_full_while_packs_are_written() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let folder = world.root().join("full");
    small_file_system(&folder, "size=2m");
    let world = world.with_store(&folder);
    let source = world.start("plain", &server);
    let (before, traces) = (answers(&source, &server), world.traces());
    for flags in [&[][..], &["--stop"]] {
        let output = world.snapshot_call(&source, "v1", flags).fails(1);
        output.says(&["No space left", &folder.to_string_lossy()]);
        server_answers_as_before(&source, &server, &before);
        no_residue(&world, &traces);
        no_half_uploads(&world);
        assert!(!visible(&world).to_string().contains(source.name()), "a snapshot is visible");
    }
    unmount(&folder);
    world.finish();
}

/// The replica's own disk is full: CRIU cannot write its logs and images there, or Rewarm its copies.
#[test]
fn a_disk_that_is_full_while_dumping() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let (source, before) = on_a_full_disk(&world, &server);
    let traces = world.traces();
    world.snapshot_call(&source, "v1", &[]).fails(1).says(&["No space left"]);
    assert!(!visible(&world).to_string().contains(source.name()), "a snapshot is visible");
    server_answers_as_before(&source, &server, &before);
    no_residue(&world, &traces);
    // With room again it works.
    make_room(&world);
    world.snapshot(&source, "v2", &[]);
    source.remove();
    world.await_no_services();
    unmount(&world.state());
    let clones = world.restore("plain", "v2", server.port, &[]);
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

/// A command that cannot be started because the state folder's disk is full is told so.
#[test]
fn a_disk_that_is_full_when_a_command_is_run_inside() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let (source, before) = on_a_full_disk(&world, &server);
    let traces = world.traces();
    let output = source.exec(&["true"]).fails(1);
    output.says(&["No space left on device", &world.state().to_string_lossy(), "hint"]);
    no_residue(&world, &traces);
    server_answers_as_before(&source, &server, &before);
    make_room(&world);
    source.exec(&["true"]).ok();
    source.remove();
    unmount(&world.state());
    world.finish();
}

#[test]
fn a_disk_that_is_full_while_restoring() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    source.sh("head -c 30000000 /dev/urandom > /srv/big");
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let state = world.state();
    small_file_system(&state, "size=16m");
    let output = world.restore_call("plain", "v1", server.port, &[]).fails(1);
    output.says(&["No space left"]);
    assert!(rewarm_integration_tests::residue::processes(world.id()).is_empty());
    world.await_no_services();
    unmount(&state);
    let clones = world.restore("plain", "v1", server.port, &[]);
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

/// Several snapshots to one tag at once: each either has the tag at its own number, or says that another one took it.
#[test]
fn snapshots_to_one_tag_at_once() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let replicas: Vec<_> =
        ["one", "two", "three"].map(|short| world.start(short, &server)).into_iter().collect();
    let reference = world.reference("shared", "v1");
    let before: Vec<_> = replicas.iter().map(|replica| answers(replica, &server)).collect();
    let calls = replicas
        .iter()
        .map(|replica| world.rewarm_json().args(["snapshot", replica.name(), &reference]).spawn());
    let running: Vec<_> = calls.collect();
    let outputs: Vec<_> = running.into_iter().map(|running| running.wait()).collect();
    let winners: Vec<_> = outputs.iter().filter(|output| output.code == Some(0)).collect();
    assert!(!winners.is_empty(), "nobody won: {outputs:?}");
    for loser in outputs.iter().filter(|output| output.code != Some(0)) {
        loser.expect_code(1);
        loser.says(&["v1", "publish"]);
    }
    let digests: Vec<String> = winners.iter().map(|output| output.json()["digest"].to_string()).collect();
    let now =
        world.rewarm_json().args(["inspect", &reference]).ok().json()["variants"][0]["digest"].to_string();
    assert!(digests.contains(&now), "the tag is {now}, none of {digests:?}");
    for (replica, before) in replicas.iter().zip(&before) {
        server_answers_as_before(replica, &server, before);
    }
    world.finish();
}

/// The one that is published later finds that the tag is no longer what it began with, says so, and takes its packs away again.
fn of_two_snapshots_to_one_tag_the_later_one_is_refused(world: &World) {
    let server = Server::plain();
    let [first, second] = ["first", "second"].map(|short| world.start(short, &server));
    let reference = world.reference("shared", "v1");
    let before = [&first, &second].map(|replica| answers(replica, &server));
    let call = |replica: &Replica<'_>| world.rewarm_json().args(["snapshot", replica.name(), &reference]);
    let mut late = call(&first).pause_at(Stage::Publish).spawn();
    late.await_stderr("paused at publish");
    let packs = || -> Vec<_> {
        let folder = std::fs::read_dir(Path::new(world.store()).join("packs"));
        folder.into_iter().flatten().flatten().map(|entry| entry.file_name()).collect()
    };
    let winner = call(&second).ok().json()["digest"].to_string();
    let of_the_winner = packs();
    late.go_on();
    let late = late.wait();
    late.expect_code(1);
    late.says(&["another snapshot took this tag", "publish", "the server goes on serving"]);
    let now = world.rewarm_json().args(["inspect", &reference]).ok().json();
    assert_eq!(now["variants"].as_array().map(Vec::len), Some(1), "{now}");
    assert_eq!(now["variants"][0]["digest"].to_string(), winner);
    if world.store().starts_with('/') {
        assert!(!of_the_winner.is_empty());
        let left: Vec<_> = packs().into_iter().filter(|pack| !of_the_winner.contains(pack)).collect();
        assert!(left.is_empty(), "packs of the snapshot that was refused: {left:?}");
    }
    for (replica, before) in [&first, &second].into_iter().zip(&before) {
        server_answers_as_before(replica, &server, before);
    }
    // It may try again.
    call(&first).ok();
}

#[test]
fn of_two_snapshots_to_one_tag_in_a_folder_the_later_one_is_refused() {
    let Some(world) = world(needs::REPLICA) else { return };
    of_two_snapshots_to_one_tag_the_later_one_is_refused(&world);
    world.finish();
}

/// Garage ignores the condition of a put, so the loser finds out otherwise.
#[test]
fn of_two_snapshots_to_one_tag_in_a_bucket_the_later_one_is_refused() {
    let needs: Vec<Need> = needs::REPLICA.iter().copied().chain([Need::Garage]).collect();
    let Some(world) = world(&needs) else { return };
    let world = world.on_garage();
    of_two_snapshots_to_one_tag_the_later_one_is_refused(&world);
    world.finish();
}

/// Where the store is in the way of the replica: a folder that is a file.
#[test]
fn a_store_that_is_a_file() {
    let Some(world) = world(needs::REPLICA) else { return };
    let file = file(&world);
    world.rewarm().args(["ls", &file.to_string_lossy()]).fails(1).says(&[&file.to_string_lossy()]);
}

fn file(world: &World) -> PathBuf {
    let path = world.files().join("file");
    std::fs::write(&path, "not a folder").expect("our own folder");
    path
}
