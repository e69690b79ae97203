//! Bad input: names, references, flags, ports, and machines that lack something.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use rewarm_integration_tests::checks::{answers, no_residue, server_answers_as_before};
use rewarm_integration_tests::needs;
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Need, World};

use crate::{world, world_for};

/// A folder with a link to the program that every user may run; the folder of the build may be closed to others.
fn open_program(world: &World) -> std::path::PathBuf {
    let copy = world.root().join("rewarm");
    fs::copy(env!("CARGO_BIN_EXE_rewarm-under-test"), &copy).expect("a copy in our own folder");
    fs::set_permissions(world.root(), fs::Permissions::from_mode(0o755)).expect("our own folder");
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).expect("our own file");
    copy
}

#[test]
fn without_root_everything_that_needs_it_says_so() {
    let Some(world) = world(needs::REPLICA) else { return };
    let traces = world.traces();
    let program = open_program(&world);
    let rewarm = program.to_string_lossy().into_owned();
    let state = world.state().to_string_lossy().into_owned();
    let (name, reference) = (world.name("plain"), world.reference("plain", "v1"));
    for verb in
        [&["run", &name, "--", "true"][..], &["restore", &reference], &["snapshot", &name, &reference]]
    {
        let output = std::process::Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", &rewarm, "--state", &state])
            .args(verb)
            .output()
            .expect("setpriv is part of the base system");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{verb:?}: {text}");
        assert!(text.contains("root"), "{verb:?}: {text}");
    }
    fs::remove_file(program).expect("our own file");
    no_residue(&world, &traces);
}

/// The verbs that make, dump or restore a container, for a replica and a snapshot that need not exist: what the machine lacks is
/// told before anything is looked for.
fn verbs_with_containers(world: &World) -> [Vec<String>; 3] {
    let (name, reference) = (world.name("plain"), world.reference("plain", "v1"));
    [&["run", &name, "--", "true"][..], &["snapshot", &name, &reference], &["restore", &reference]]
        .map(|verb| verb.iter().map(|word| (*word).to_owned()).collect())
}

#[test]
fn without_a_capability_it_is_named() {
    let Some(world) = world(needs::REPLICA) else { return };
    let traces = world.traces();
    for capability in ["sys_admin", "sys_ptrace", "net_admin", "checkpoint_restore"] {
        let (bounding, inherited) =
            (format!("--bounding-set=-{capability}"), format!("--inh-caps=-{capability}"));
        for verb in verbs_with_containers(&world) {
            let call = world.rewarm().args(&verb).under("setpriv", &[&bounding, &inherited]);
            let named = format!("CAP_{}", capability.to_uppercase());
            call.fails(3).says(&[&format!("without {named}")]);
        }
    }
    no_residue(&world, &traces);
}

#[test]
fn without_runc_it_is_named() {
    let Some(world) = world(needs::REPLICA) else { return };
    let traces = world.traces();
    let empty = world.files().to_string_lossy().into_owned();
    for verb in verbs_with_containers(&world) {
        world.rewarm().args(&verb).env("PATH", &empty).fails(3).says(&["runc"]);
    }
    no_residue(&world, &traces);
}

#[test]
fn a_criu_that_is_missing_or_too_old_is_refused_before_anything_is_touched() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    let traces = world.traces();
    let old = world.files().join("criu-3.17");
    fs::write(&old, "#!/bin/sh\necho 'Version: 3.17.1'\n").expect("our own folder");
    fs::set_permissions(&old, fs::Permissions::from_mode(0o755)).expect("our own file");
    let old = old.to_string_lossy().into_owned();
    for (criu, words) in [("/no/such/criu", ["/no/such/criu", "criu"]), (&old, ["3.17", "4.1"])] {
        world.snapshot_call(&source, "v2", &["--criu", criu]).fails(3).says(&words);
        world
            .restore_call("plain", "v1", server.port, &["--name", &world.name("clone"), "--criu", criu])
            .fails(3)
            .says(&words);
    }
    no_residue(&world, &traces);
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

#[test]
fn a_name_in_use_is_refused() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    let traces = world.traces();
    world.run_call(source.name(), &server, &[]).fails(1).says(&[source.name()]);
    // The default name is the snapshot's, which the source has.
    world.restore_call("plain", "v1", server.port, &[]).fails(1).says(&[source.name()]);
    no_residue(&world, &traces);
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

#[test]
fn a_port_in_use_is_refused_and_nothing_is_left() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    world.snapshot(&source, "v1", &[]);
    let traces = world.traces();
    let taken = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let port = taken.local_addr().expect("bound").port().to_string();
    let publish = format!("127.0.0.1:{port}:8000");
    let name = world.name("other");
    let call = world.rewarm().args(["run", &name, "--publish", &publish, "--ready", &server.ready, "--"]);
    call.args(&server.command).fails(1).says(&[&port]);
    let call = world.rewarm().args([
        "restore",
        &world.reference("plain", "v1"),
        "--name",
        &name,
        "--publish",
        &publish,
    ]);
    call.fails(1).says(&[&port]);
    no_residue(&world, &traces);
    world.finish();
}

#[test]
fn an_unknown_name_is_4_for_every_verb() {
    let Some(world) = world(needs::REPLICA) else { return };
    let (name, reference) = (world.name("absent"), world.reference("absent", "v1"));
    let verbs: &[&[&str]] = &[
        &["snapshot", &name, &reference],
        &["logs", &name],
        &["exec", &name, "--", "true"],
        &["stop", &name],
        &["wait", &name],
        &["rm", &name],
    ];
    for verb in verbs {
        world.rewarm().args(*verb).fails(4).says(&[&name]);
    }
}

#[test]
fn what_a_store_does_not_have_is_4() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    world.snapshot(&source, "v1", &[]);
    let traces = world.traces();
    let digest = format!("blake3:{}", "0".repeat(64));
    for tag in ["v2", "latest", &digest] {
        for verb in ["restore", "inspect"] {
            world.rewarm().args([verb, &world.reference("plain", tag)]).fails(4).says(&[source.name(), tag]);
        }
    }
    world.rewarm().args(["restore", &world.reference("other", "v1")]).fails(4);
    let no_folder = format!("{}/absent/store", world.root().display());
    world.rewarm().args(["ls", &no_folder]).fails(4).says(&["absent"]);
    world.rewarm().args(["restore", &format!("{no_folder}/plain@v1")]).fails(4);
    no_residue(&world, &traces);
    world.finish();
}

#[test]
fn malformed_input_is_2() {
    let Some(world) = world(&[Need::Root]) else { return };
    let traces = world.traces();
    let store = world.store();
    let upper = format!("{store}/Upper@v1");
    let no_name = format!("{store}/@v1");
    let bad_digest = format!("{store}/plain@blake3:abc");
    let bad_tag = format!("{store}/plain@v 1");
    let references = [&upper, &no_name, &bad_digest, &bad_tag, "ftp://host/store/plain", ""];
    for reference in references {
        world.rewarm().args(["inspect", reference]).fails(2);
        world.rewarm().args(["restore", reference]).fails(2);
    }
    let run: &[&[&str]] = &[
        &["run", "Upper", "--", "true"],
        &["run", "with/slash", "--", "true"],
        &["run", "a"],
        &["run", "a", "--memory", "much", "--", "true"],
        &["run", "a", "--cpus", "-1", "--", "true"],
        &["run", "a", "--net", "wifi", "--", "true"],
        &["run", "a", "--publish", "80", "--", "true"],
        &["run", "a", "--publish", "99999:80", "--", "true"],
        &["run", "a", "--port", "0", "--", "true"],
        &["run", "a", "--mount", "relative", "--", "true"],
        &["run", "a", "--env", "novalue", "--", "true"],
        &["run", "a", "--ready", "sometimes", "--", "true"],
        &["run", "a", "--ready-timeout", "soon", "--", "true"],
        &["snapshot", "a", store, "--compression", "zip"],
        &["restore", "/a/b@c", "--count", "0"],
        &["restore", "/a/b@c", "--", "true"],
        &["stop", "a", "--timeout", "-3"],
        &["no-such-verb"],
        &[],
    ];
    for arguments in run {
        let output = world.rewarm().args(*arguments).fails(2);
        assert!(!output.stderr.is_empty(), "no message for {arguments:?}");
    }
    no_residue(&world, &traces);
}

#[test]
fn a_server_that_never_becomes_ready_is_told_with_its_last_lines() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let traces = world.traces();
    let name = world.name("slow");
    let script = "echo working on it; echo still nothing >&2; sleep 60";
    let call = world.rewarm().args([
        "run",
        &name,
        "--ready",
        "tcp:8000",
        "--ready-timeout",
        "700ms",
        "--",
        "sh",
        "-c",
        script,
    ]);
    let output = call.fails(1);
    output.says(&["8000", "working on it", "still nothing"]);
    assert!(output.took < Duration::from_secs(15), "{output}");
    no_residue(&world, &traces);
    world.rewarm().args(["logs", &name]).fails(4);
}

/// A clone is asked what the user wants to know, and not what the source was asked.
#[test]
fn a_clone_that_never_becomes_ready_is_told_and_nothing_is_left() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    let traces = world.traces();
    let name = world.name("clone");
    let flags = ["--name", &name, "--ready", "tcp:9", "--ready-timeout", "500ms"];
    let output = world.restore_call("plain", "v1", server.port, &flags).fails(1);
    output.says(&[&name, "stage ready", "tcp:9", "500ms"]);
    assert!(output.took < Duration::from_secs(15), "{output}");
    no_residue(&world, &traces);
    world.rewarm().args(["logs", &name]).fails(4);
    let flags = ["--name", &name, "--ready", "cmd:test -e /run/rewarm/identity.json && touch /srv/asked"];
    let clones = world.restore("plain", "v1", server.port, &flags);
    assert_eq!(clones[0].sh("ls /srv/asked"), "/srv/asked", "it was not asked");
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

#[test]
fn a_server_that_ends_before_it_is_ready_is_told_with_its_status() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let traces = world.traces();
    let script = "echo no weights found >&2; exit 42";
    let call =
        world.rewarm().args(["run", &world.name("broken"), "--ready", "tcp:8000", "--", "sh", "-c", script]);
    let output = call.fails(1);
    output.says(&["42", "no weights found"]);
    assert!(output.took < Duration::from_secs(10), "it waited for a server that had ended: {output}");
    let call =
        world.rewarm().args(["run", &world.name("broken"), "--ready", "tcp:8000", "--", "/no/such/program"]);
    call.fails(1).says(&["/no/such/program"]);
    no_residue(&world, &traces);
}

#[test]
fn a_missing_mount_or_root_is_named() {
    let Some(world) = world(needs::REPLICA) else { return };
    let traces = world.traces();
    let name = world.name("plain");
    for flags in [["--mount", "/no/such/folder:/models"], ["--rootfs", "/no/such/folder"]] {
        world
            .rewarm()
            .args(["run", &name])
            .args(flags)
            .args(["--", "true"])
            .fails(3)
            .says(&["/no/such/folder"]);
    }
    no_residue(&world, &traces);
}
