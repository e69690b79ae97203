//! What only CRIU sees: its own reason reaches the user, with the process, and nothing is left behind.

use std::process::Command;

use rewarm_integration_tests::checks::{answers, no_residue, server_answers_as_before, visible};
use rewarm_integration_tests::server::Server;

use crate::world_for;

/// Keeps a socket for Multipath TCP, as Go's listeners are by default: CRIU has no way to carry one.
const MULTIPATH: &str = "import socket\nkept = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)";

#[test]
fn what_criu_cannot_dump_is_told_in_its_own_words() {
    let mut server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    server.command[2] = format!("{MULTIPATH}\n{}", server.command[2]);
    let source = world.start("plain", &server);
    let (before, traces) = (answers(&source, &server), world.traces());
    let pid = source.entry().expect("ps shows it")["pid"].to_string();
    for flags in [&[][..], &["--stop"]] {
        let output = world.snapshot_call(&source, "v1", flags).fails(1);
        output.says(&[
            "stage dump",
            "criu could not dump the server",
            &format!("process {pid}"),
            "inet: Unsupported proto 262",
            "the server goes on serving",
            "--pre",
        ]);
        server_answers_as_before(&source, &server, &before);
        no_residue(&world, &traces);
        assert!(!visible(&world).to_string().contains(source.name()), "a snapshot is visible");
    }
    world.finish();
}

/// What was mounted into a replica from outside is not its own: every restore would refuse it, so nobody gets to publish it.
#[test]
fn what_no_restore_would_admit_is_not_published() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    let pid = source.entry().expect("ps shows it")["pid"].to_string();
    let enter = |command: &[&str]| {
        let mut call = Command::new("nsenter");
        call.args(["--target", &pid, "--mount"]).args(command);
        assert!(call.status().expect("nsenter is part of the base system").success(), "{command:?}");
    };
    enter(&["mount", "-t", "tmpfs", "foreign", "/mnt"]);
    let traces = world.traces();
    let output = world.snapshot_call(&source, "v1", &[]).fails(3);
    output.says(&["/mnt", "no restore would admit it", "the server goes on serving"]);
    server_answers_as_before(&source, &server, &before);
    no_residue(&world, &traces);
    assert!(!visible(&world).to_string().contains(source.name()), "a snapshot is visible");
    enter(&["umount", "/mnt"]);
    world.snapshot(&source, "v1", &[]);
    world.finish();
}

/// A device of a GPU that is open is named with its process before anything is touched.
#[test]
fn an_open_gpu_device_is_refused_with_process_and_path() {
    let mut server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    // The null device under the name of another one: the replica may open it.
    let device = world.files().join("nvidia0");
    let made = Command::new("mknod").arg(&device).args(["c", "1", "3"]).status();
    assert!(made.expect("mknod is part of the base system").success());
    server.mounts.push(format!("{}:/dev/nvidia0", device.display()));
    server.command[2] = format!("device = open('/dev/nvidia0', 'rb')\n{}", server.command[2]);
    let source = world.start("plain", &server);
    let (before, traces) = (answers(&source, &server), world.traces());
    let pid = source.entry().expect("ps shows it")["pid"].to_string();
    let output = world.snapshot_call(&source, "v1", &[]).fails(3);
    output.says(&["stage preflight", &format!("process {pid} holds /dev/nvidia0")]);
    server_answers_as_before(&source, &server, &before);
    no_residue(&world, &traces);
    world.finish();
}

/// Listens on a Unix socket in a folder that is brought in from the host.
const LISTENING: &str = r"
import socket
control = socket.socket(socket.AF_UNIX)
control.bind('/shared/control')
control.listen()
";

#[test]
fn what_criu_cannot_restore_is_told_in_its_own_words() {
    let mut server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let folder = world.root().join("shared");
    std::fs::create_dir(&folder).expect("our own folder");
    server.mounts.push(format!("{}:/shared", folder.display()));
    server.command[2] = format!("{LISTENING}\n{}", server.command[2]);
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let traces = world.traces();
    // The folder is there, but nobody can make a socket in it: no verdict foresees that.
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m,ro", "tmpfs"]).arg(&folder).status();
    assert!(mounted.expect("mount is part of the base system").success());
    let output = world.restore_call("plain", "v1", server.port, &[]).run();
    let unmounted = Command::new("umount").arg(&folder).status();
    assert!(unmounted.expect("umount is part of the base system").success());
    output.expect_code(1);
    output.says(&[
        "stage skeleton",
        "criu could not restore the server",
        "process 1",
        "unix",
        "Read-only file system",
        "--cold-fallback",
    ]);
    no_residue(&world, &traces);
    let clones = world.restore("plain", "v1", server.port, &[]);
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}
