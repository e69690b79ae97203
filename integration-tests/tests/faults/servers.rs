//! Servers that cannot be dumped as they are, and servers that die at the wrong moment.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rewarm_integration_tests::checks::{
    answers, no_residue, server_answers_as_before, store_verifies, visible,
};
use rewarm_integration_tests::garage::free_port;
use rewarm_integration_tests::server::{Server, fixtures};
use rewarm_integration_tests::{Replica, World, residue};
use rewarm_report::Stage;
use serde_json::Value;

use crate::world_for;

/// Process ids, on the host, of what runs inside the replicas of a world.
fn inner_processes(world: &World) -> Vec<i32> {
    let inside = |command: &str| {
        !command.starts_with("rewarm") && !command.contains(" shim ") && !command.contains("runc")
    };
    residue::processes(world.id())
        .into_iter()
        .filter(|(_, command)| inside(command))
        .map(|(pid, _)| pid)
        .collect()
}

/// The name of a process and its state, as the kernel names it: T is stopped.
pub(crate) fn state(pid: i32) -> Option<(String, char)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, named) = stat.split_once(" (")?;
    let (name, rest) = named.rsplit_once(") ")?;
    Some((name.to_owned(), rest.chars().next()?))
}

fn nothing_visible(world: &World, replica: &Replica<'_>) {
    assert!(!visible(world).to_string().contains(replica.name()), "a snapshot is visible");
}

#[test]
fn a_server_that_dies_during_the_dump() {
    for stage in [Stage::Dump, Stage::Delta, Stage::Resume] {
        let server = Server::plain();
        let Some(world) = world_for(&server) else { return };
        let source = world.start("plain", &server);
        let mut running = world.snapshot_call(&source, "v1", &[]).pause_at(stage).spawn();
        running.await_stderr(&format!("paused at {stage}"));
        for pid in inner_processes(&world) {
            // It may be another's child that is gone already.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        running.go_on();
        let output = running.wait();
        match (stage, output.code) {
            (Stage::Dump, code) => assert_eq!(code, Some(1), "{stage}: {output}"),
            // It dies when it is let go, which CRIU may or may not see: all of it has been dumped by then.
            (_, code) => assert!(matches!(code, Some(0 | 1)), "{stage}: {output}"),
        }
        match output.code {
            Some(0) => store_verifies(&world),
            _ => nothing_visible(&world, &source),
        }
        world.finish();
    }
}

/// A process that is stopped after the preflight keeps CRIU waiting. Who gives the snapshot up then gets the server back.
#[test]
fn a_dump_that_waits_for_ever_can_be_given_up() {
    for flags in [&[][..], &["--stop"]] {
        let server = Server::plain();
        let Some(world) = world_for(&server) else { return };
        let source = world.start("plain", &server);
        let before = answers(&source, &server);
        let traces = world.traces();
        let call = world.snapshot_call(&source, "v1", flags).pause_at(Stage::Dump);
        // The deadline of the freeze is minutes away.
        let mut running = call.timeout(Duration::from_secs(40)).spawn();
        running.await_stderr("paused at dump");
        let stopped = inner_processes(&world);
        assert!(!stopped.is_empty());
        for pid in &stopped {
            kill(Pid::from_raw(*pid), Signal::SIGSTOP).expect("it runs");
        }
        // One that is frozen before it has stopped can be dumped.
        world.await_state("they stand", Duration::from_secs(20), || {
            stopped.iter().all(|pid| state(*pid).is_some_and(|(_, state)| state == 'T'))
        });
        running.go_on();
        world.await_state("CRIU runs", Duration::from_secs(20), || {
            residue::processes(world.id()).iter().any(|(_, command)| command.contains("criu"))
        });
        // Long enough for a dump of a server that can be stopped.
        std::thread::sleep(Duration::from_secs(2));
        running.signal(Signal::SIGTERM);
        let output = running.wait();
        output.expect_code(1);
        output.says(&["interrupted by SIGTERM", "stage dump", "the server goes on serving"]);
        for pid in &stopped {
            kill(Pid::from_raw(*pid), Signal::SIGCONT).expect("it is there");
        }
        server_answers_as_before(&source, &server, &before);
        no_residue(&world, &traces);
        nothing_visible(&world, &source);
        world.snapshot(&source, "v1", &[]);
        world.finish();
    }
}

/// One clone of eight fails: the others serve, the failure is reported.
#[test]
fn the_third_of_eight_clones_fails() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    let name = world.name("clone");
    let hook =
        format!("! grep -q '\"{name}-3\"' /run/rewarm/identity.json || {{ echo the third >&2; exit 1; }}");
    world.snapshot(&source, "v1", &["--post", &hook]);
    let output = world.restore_call("plain", "v1", server.port, &["--name", &name, "--count", "8"]).fails(1);
    output.says(&[&format!("{name}-3"), "the third"]);
    let clones = Replica::of_restore(&world, server.port, &output);
    let mut names: Vec<&str> = clones.iter().map(Replica::name).collect();
    names.sort_unstable();
    let expected: Vec<String> =
        (1..=8).filter(|number| *number != 3).map(|number| format!("{name}-{number}")).collect();
    assert_eq!(names, expected);
    for clone in &clones {
        server_answers_as_before(clone, &server, &before);
    }
    world.rewarm().args(["logs", &format!("{name}-3")]).fails(4);
    world.finish();
}

/// A command that runs by `exec` is not part of the server and could not be restored with it: the user is told to wait.
#[test]
fn a_snapshot_while_a_command_runs_inside() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    let running = source.exec(&["sh", "-c", "echo inside; exec sleep 30"]).spawn();
    running.await_stdout("inside");
    // runc writes down who it is a moment later.
    let noted = world.state().join("replicas").join(source.name()).join("exec-0").join("pid");
    let sleeps = || {
        let runs = residue::processes(world.id()).iter().any(|(_, command)| command == "sleep 30");
        runs && std::fs::metadata(&noted).is_ok_and(|file| file.len() > 0)
    };
    world.await_state("the command runs", Duration::from_secs(10), sleeps);
    let traces = world.traces();
    let output = world.snapshot_call(&source, "v1", &[]).run();
    output.expect_code(1);
    output.says(&[source.name(), "a command runs inside"]);
    no_residue(&world, &traces);
    server_answers_as_before(&source, &server, &before);
    drop(running);
    world.await_state("the command is gone", Duration::from_secs(10), || {
        !residue::processes(world.id()).iter().any(|(_, command)| command.starts_with("sleep 30"))
    });
    world.finish();
}

/// A connection to the outside cannot come back: the other end knows nothing of a clone.
#[test]
fn a_connection_to_the_outside_is_refused_with_both_addresses() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let address = listener.local_addr().expect("bound");
    let server = Server::outside(address, free_port());
    let Some(world) = world_for(&server) else { return };
    let source = world.start_with("outside", &server, &["--net", "host"]);
    let (mut kept, local) = listener.accept().expect("the server connects");
    let (before, traces) = (answers(&source, &server), world.traces());
    world.snapshot_call(&source, "v1", &[]).fails(3).says(&[&address.to_string(), &local.to_string()]);
    server_answers_as_before(&source, &server, &before);
    assert_eq!(source.json("/connection")["state"], "open", "the refusal closed it");
    no_residue(&world, &traces);
    nothing_visible(&world, &source);

    // Allowed, it and only it comes back closed; on the source it stays open.
    world.snapshot(&source, "v1", &["--tcp-close"]);
    assert_eq!(source.json("/connection")["state"], "open");
    kept.write_all(b"still here").expect("the connection is open");
    source.remove();
    // The port of the source is free again, and the clone takes it.
    let clones = world.restore("outside", "v1", server.port, &[]);
    assert_eq!(clones[0].json("/connection")["state"], "closed");
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

/// A path leads out of the replica's network where a mount brings it in. What is connected within the replica is no reason.
#[test]
fn a_unix_connection_to_the_outside_is_refused_with_both_ends() {
    let mut server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let folder = world.files().join("sockets");
    std::fs::create_dir(&folder).expect("our own folder");
    let listener = UnixListener::bind(folder.join("outside.sock")).expect("our own folder");
    server.mounts.push(format!("{}:/sockets", folder.display()));
    server.command[2] = format!(
        "import socket\ninside = socket.socketpair()\nkept = socket.socket(socket.AF_UNIX)\nkept.connect('/sockets/outside.sock')\n{}",
        server.command[2]
    );
    let source = world.start("plain", &server);
    let (kept, _) = listener.accept().expect("the server connects");
    let (before, traces) = (answers(&source, &server), world.traces());
    let output = world.snapshot_call(&source, "v1", &[]).fails(3);
    output.says(&["holds a Unix connection from socket ", &folder.join("outside.sock").to_string_lossy()]);
    assert!(!output.stderr.contains("\n  - "), "one reason: {output}");
    server_answers_as_before(&source, &server, &before);
    no_residue(&world, &traces);
    nothing_visible(&world, &source);
    // An end that is alone is no connection.
    drop((kept, listener));
    world.snapshot(&source, "v1", &["--stop"]);
    let clones = world.restore("plain", "v1", server.port, &[]);
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

/// What the kernel makes for a process and CRIU cannot dump, and how it is refused.
const NOT_TO_BE_HAD: [(&str, &str); 2] =
    [("io_uring", "holds an io_uring (fd "), ("userfaultfd", "holds a userfaultfd (fd ")];

/// Asks the server to make one.
fn made(replica: &Replica<'_>, what: &str) -> Value {
    replica.ask("POST", &format!("/make?what={what}"), None).expect("an answer").json()
}

/// The seccomp profile answers ENOSYS, so libraries fall back to what CRIU can dump.
#[test]
fn io_uring_and_userfaultfd_are_not_to_be_had() {
    let server = Server::uring();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("uring", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    let clones = world.restore("uring", "v1", server.port, &["--name", &world.name("clone")]);
    server_answers_as_before(&clones[0], &server, &before);
    // The profile is part of what comes back.
    for (what, _) in NOT_TO_BE_HAD {
        let answer = made(&clones[0], what);
        assert_eq!(answer["error"], "ENOSYS", "{what}: {answer}");
    }
    world.finish();
}

/// Asks for the use of AMX tiles, for oneself and for a guest, and prints how each call ended. Beside them a call of the same
/// kind that must work.
#[cfg(target_arch = "x86_64")]
const AMX: &str = r#"
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
SYS_ARCH_PRCTL, ARCH_GET_XCOMP_SUPP, TILE_DATA = 158, 0x1021, 18
def call(request, argument):
    failed = libc.syscall(SYS_ARCH_PRCTL, request, argument)
    return errno.errorcode[ctypes.get_errno()] if failed else "done"
supported = ctypes.c_uint64()
print(call(0x1023, TILE_DATA), call(0x1025, TILE_DATA), call(ARCH_GET_XCOMP_SUPP, ctypes.byref(supported)))
"#;

/// The state of AMX tiles does not fit into CRIU's images, so nobody gets any. Without the profile it would be granted, or be
/// EOPNOTSUPP or EINVAL where the processor has none.
#[cfg(target_arch = "x86_64")]
#[test]
fn amx_tiles_are_not_to_be_had() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let ask = |replica: &Replica<'_>| replica.exec(&["python3", "-c", AMX]).ok().stdout.trim().to_owned();
    assert_eq!(ask(&source), "EPERM EPERM done");
    world.snapshot(&source, "v1", &[]);
    let clones = world.restore("plain", "v1", server.port, &["--name", &world.name("clone")]);
    assert_eq!(ask(&clones[0]), "EPERM EPERM done");
    world.finish();
}

/// One that was made all the same would make CRIU fail in the middle: it is found before anything is touched.
#[test]
fn an_io_uring_or_a_userfaultfd_that_was_made_all_the_same_is_refused() {
    let server = Server::uring();
    let Some(world) = world_for(&server) else { return };
    for (what, refusal) in NOT_TO_BE_HAD {
        let source = world.start("uring", &server);
        let init = inner_processes(&world)[0];
        let mut allowing = Command::new("python3")
            .arg(fixtures().join("uring.py"))
            .args(["--allow", &init.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start Python");
        let mut line = String::new();
        BufReader::new(allowing.stdout.take().expect("piped")).read_line(&mut line).expect("text");
        assert_eq!(line.trim(), "allowed");
        let made = made(&source, what);
        drop(allowing.stdin.take());
        allowing.wait().expect("our own child");
        assert!(made["descriptor"].is_u64(), "{what}: {made}");
        let (before, traces) = (answers(&source, &server), world.traces());
        world.snapshot_call(&source, "v1", &[]).fails(3).says(&[refusal, "preflight"]);
        server_answers_as_before(&source, &server, &before);
        no_residue(&world, &traces);
        nothing_visible(&world, &source);
        source.remove();
    }
    world.finish();
}

#[test]
fn a_deleted_file_below_the_limit_comes_back() {
    let server = Server::ghost(64, false);
    let Some(world) = world_for(&server) else { return };
    let source = world.start("ghost", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    server_answers_as_before(&source, &server, &before);
    source.remove();
    for clone in world.restore("ghost", "v1", server.port, &["--count", "2"]) {
        server_answers_as_before(&clone, &server, &before);
    }
    world.finish();
}

#[test]
fn a_deleted_file_above_the_limit_is_refused_with_its_path() {
    let server = Server::ghost(1100, true);
    let Some(world) = world_for(&server) else { return };
    let source = world.start("ghost", &server);
    let (before, traces) = (answers(&source, &server), world.traces());
    world.snapshot_call(&source, "v1", &[]).fails(3).says(&["/tmp/ghost", "preflight"]);
    server_answers_as_before(&source, &server, &before);
    no_residue(&world, &traces);
    nothing_visible(&world, &source);
    world.finish();
}

/// The same where nothing but a mapping holds it any more.
#[test]
fn a_deleted_file_above_the_limit_that_is_only_mapped_is_refused_with_its_path() {
    let mut server = Server::ghost(1100, true);
    let Some(world) = world_for(&server) else { return };
    server.command.push("--mapped".to_owned());
    let source = world.start("ghost", &server);
    let (before, traces) = (answers(&source, &server), world.traces());
    world.snapshot_call(&source, "v1", &[]).fails(3).says(&["/tmp/ghost", "preflight"]);
    server_answers_as_before(&source, &server, &before);
    no_residue(&world, &traces);
    nothing_visible(&world, &source);
    world.finish();
}

#[test]
fn a_deleted_file_below_the_limit_that_is_only_mapped_comes_back() {
    let mut server = Server::ghost(8, false);
    let Some(world) = world_for(&server) else { return };
    server.command.push("--mapped".to_owned());
    let source = world.start("ghost", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &["--stop"]);
    let clones = world.restore("ghost", "v1", server.port, &[]);
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

/// A process of another user than the server's.
const OTHER: &str = r"
import os, signal
if os.fork() == 0:
    os.setgid(4343)
    os.setuid(4242)
    signal.pause()
";

/// What this machine cannot dump is refused before anything is touched; one that can dumps it.
#[test]
fn processes_of_two_users_are_refused_where_their_limits_cannot_be_read() {
    let mut server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    server.command[2] = format!("{OTHER}\n{}", server.command[2]);
    let source = world.start("plain", &server);
    let (before, traces) = (answers(&source, &server), world.traces());
    if rewarm_sys::process::may_change_limits() {
        world.snapshot(&source, "v1", &[]);
        let clones = world.restore("plain", "v1", server.port, &["--name", &world.name("clone")]);
        server_answers_as_before(&clones[0], &server, &before);
    } else {
        let output = world.snapshot_call(&source, "v1", &["--pre", "touch /srv/drained"]).fails(3);
        output.says(&["preflight", "user 0 of group 0", "user 4242 of group 4343", "CAP_SYS_RESOURCE"]);
        source.exec(&["test", "-e", "/srv/drained"]).fails(1);
        no_residue(&world, &traces);
        nothing_visible(&world, &source);
    }
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

/// Takes a descriptor over a socket in a mounted folder, and keeps it.
const TAKE: &str = r"
import socket, threading
def take():
    global kept
    listener = socket.socket(socket.AF_UNIX)
    listener.bind('/shared/hand')
    listener.listen()
    connection, _ = listener.accept()
    kept = socket.recv_fds(connection, 1, 1)
    connection.close()
    listener.close()
threading.Thread(target=take, daemon=True).start()
";

/// Hands a descriptor of the second file to who listens on the first, and waits until it is taken.
const HAND: &str = r"
import socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
file = open(sys.argv[2])
socket.send_fds(connection, [b'x'], [file.fileno()])
connection.recv(1)
";

/// A descriptor of a file that lies outside of the replica's root, handed in over a socket in a mounted folder.
#[test]
fn a_file_from_outside_the_root_is_refused_with_its_path() {
    let mut server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let folder = world.files().join("shared");
    std::fs::create_dir(&folder).expect("our own folder");
    server.mounts.push(format!("{}:/shared", folder.display()));
    server.command[2] = format!("{TAKE}\n{}", server.command[2]);
    // On a file system that no path inside the replica leads to.
    let outside = Path::new("/dev/shm").join(world.id());
    std::fs::write(&outside, "from outside").expect("shared memory of the host");
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    hand_over(&folder.join("hand"), &outside);
    let traces = world.traces();
    let output = world.snapshot_call(&source, "v1", &[]).run();
    std::fs::remove_file(&outside).expect("our own file");
    output.expect_code(3);
    output.says(&[world.id()]);
    server_answers_as_before(&source, &server, &before);
    no_residue(&world, &traces);
    nothing_visible(&world, &source);
    world.finish();
}

/// Sends a descriptor of `file` over the Unix socket `socket`.
fn hand_over(socket: &Path, file: &Path) {
    let output =
        Command::new("python3").args(["-c", HAND]).arg(socket).arg(file).output().expect("start Python");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A device in the root file system is nothing that could be made again elsewhere.
#[test]
fn a_device_in_the_root_is_refused_with_its_path() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let pid = source.entry().expect("ps shows it")["pid"].to_string();
    source.sh("mkdir /srv/devices");
    let made = Command::new("mknod")
        .arg(format!("/proc/{pid}/root/srv/devices/null"))
        .args(["c", "1", "3"])
        .status();
    assert!(made.expect("mknod is part of the base system").success());
    assert_eq!(source.sh("stat -c %F /srv/devices/null"), "character special file");
    let (before, traces) = (answers(&source, &server), world.traces());
    for flags in [&[][..], &["--stop"]] {
        let output = world.snapshot_call(&source, "v1", flags).fails(1);
        output.says(&["srv/devices/null", "the server goes on serving"]);
        server_answers_as_before(&source, &server, &before);
        no_residue(&world, &traces);
        nothing_visible(&world, &source);
    }
    source.sh("rm /srv/devices/null");
    world.snapshot(&source, "v1", &[]);
    world.finish();
}

/// Two snapshots of one server at once: one is made, the other waits or is told; the server serves in both cases.
#[test]
fn two_snapshots_of_one_server_at_once() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    let mut first = world
        .snapshot_call(&source, "v1", &[])
        .pause_at(Stage::Delta)
        .timeout(Duration::from_secs(90))
        .spawn();
    first.await_stderr("paused at delta");
    let second = world.snapshot_call(&source, "v2", &[]).timeout(Duration::from_secs(90)).spawn();
    // Time enough to be told, or to begin to wait.
    std::thread::sleep(Duration::from_secs(2));
    first.go_on();
    first.wait().expect_code(0);
    let second = second.wait();
    second.expect_code(1);
    second.says(&[source.name(), "busy"]);
    server_answers_as_before(&source, &server, &before);
    world.finish();
}
