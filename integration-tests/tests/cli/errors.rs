//! What the verbs print when something is wrong: error texts are interface.

use std::fs;

use rewarm_integration_tests::garage::free_port;
use rewarm_integration_tests::needs;
use rewarm_integration_tests::server::{Server, own_library};

use super::assert_printed;
use crate::{world, world_for};

#[test]
fn unknown_things() {
    let Some(world) = world(needs::REPLICA) else { return };
    let (name, reference) = (world.name("absent"), world.reference("absent", "v1"));
    assert_printed("error-unknown-replica", &world, &world.rewarm().args(["stop", &name]).fails(4));
    assert_printed("error-unknown-snapshot", &world, &world.rewarm().args(["restore", &reference]).fails(4));
    assert_printed("error-unknown-json", &world, &world.rewarm_json().args(["stop", &name]).fails(4));
}

#[test]
fn a_server_that_fails() {
    let Some(world) = world(needs::REPLICA) else { return };
    let name = world.name("broken");
    let script = "echo loading; echo no weights found >&2; exit 42";
    let call = world.rewarm().args(["run", &name, "--ready", "tcp:8000", "--", "sh", "-c", script]);
    assert_printed("error-run-ended", &world, &call.fails(1));
    let call = world.rewarm().args([
        "run",
        &name,
        "--ready",
        "tcp:8000",
        "--ready-timeout",
        "500ms",
        "--",
        "sleep",
        "60",
    ]);
    assert_printed("error-run-not-ready", &world, &call.fails(1));
}

#[test]
fn pipelines_that_refuse() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    world.snapshot(&source, "v1", &[]);
    let reference = world.reference("plain", "v1");
    let text = |arguments: &[&str]| world.rewarm().args(arguments);
    assert_printed("error-name-in-use", &world, &text(&["restore", &reference]).fails(1));
    let small = ["restore", &reference, "--name", &world.name("clone"), "--memory", "2MiB"];
    assert_printed("error-memory-too-small", &world, &text(&small).fails(3));
    let hook = ["snapshot", source.name(), &reference, "--pre", "echo not today >&2; exit 3"];
    assert_printed("error-pre-hook", &world, &text(&hook).fails(1));
    let criu = ["snapshot", source.name(), &reference, "--criu", "/no/such/criu"];
    assert_printed("error-criu", &world, &text(&criu).fails(3));
    world.finish();
}

/// What is in the way of a snapshot, what differs from its machine, and what answers otherwise: each names all of it.
#[test]
fn lists_of_reasons() {
    let mut server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let libraries = ["libfirst.so", "libsecond.so"].map(|name| own_library(&world.files(), name));
    let preload = libraries.each_ref().map(|path| path.to_string_lossy()).join(":");
    server.env.push(("LD_PRELOAD".to_owned(), preload));
    let source = world.start("plain", &server);
    let probe = world.files().join("probe.toml");
    let questions = "port = 8000\n\n[[request]]\nname = \"counter\"\npath = \"/count\"\ncompare = \"body\"\n";
    fs::write(&probe, questions).expect("our own folder");
    let hook = format!("! grep -q '\"{}-2\"' /run/rewarm/identity.json", world.name("clone"));
    world.snapshot(&source, "v1", &["--probe", &probe.to_string_lossy(), "--post", &hook]);
    let (reference, clone) = (world.reference("plain", "v1"), world.name("clone"));
    let restore = |flags: &[&str]| world.rewarm().args(["restore", &reference, "--name", &clone]).args(flags);
    assert_printed("error-probe", &world, &restore(&[]).fails(5));
    let mut some = restore(&["--count", "3", "--no-probe"]).fails(1);
    // The stages of several go on side by side, in any order.
    some.stdout.clear();
    assert_printed("error-one-of-three", &world, &some);
    for number in ["1", "3"] {
        world.rewarm().args(["stop", &format!("{clone}-{number}"), "--timeout", "300ms"]).ok();
    }
    for library in &libraries {
        fs::write(library, [1; 4096]).expect("our own file");
    }
    assert_printed("error-verdict", &world, &restore(&[]).fails(3));
    world.finish();
}

#[test]
fn obstacles_to_a_snapshot() {
    let mut server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let files = ["first", "second"].map(|name| format!("/srv/{name}"));
    let script = files.each_ref().map(|path| {
        format!(
            "file = open({path:?}, 'w+'); files.append(file); os.unlink({path:?}); file.truncate(2 << 30)\n"
        )
    });
    server.command[2] = format!("import os\nfiles = []\n{}{}", script.concat(), server.command[2]);
    let source = world.start("plain", &server);
    let call = world.rewarm().args(["snapshot", source.name(), &world.reference("plain", "v1")]);
    assert_printed("error-obstacles", &world, &call.fails(3));
    world.finish();
}

#[test]
fn stores_that_fail() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    world.snapshot(&source, "v1", &[]);
    let pack =
        fs::read_dir(world.store_folder().join("packs")).expect("packs").flatten().next().expect("one");
    let intact = fs::read(pack.path()).expect("our own folder");
    fs::write(pack.path(), &intact[..intact.len() / 2]).expect("our own folder");
    let reference = world.reference("plain", "v1");
    let restore = world.rewarm().args(["restore", &reference, "--name", &world.name("clone")]);
    assert_printed("error-damaged", &world, &restore.fails(5));
    fs::write(pack.path(), intact).expect("our own folder");
    let endpoint = format!("http://127.0.0.1:{}", free_port());
    let nobody = format!("s3://bucket?endpoint={endpoint}&access_key_id=a&secret_access_key=b");
    assert_printed("error-unreachable", &world, &world.rewarm().args(["ls", &nobody]).fails(1));
    world.finish();
}
