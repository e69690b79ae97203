//! What the fetcher's processes may do, and who may ask them.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use libtest_mimic::Trial;
use rewarm_fetcher::USER;

use crate::world::World;

const LONG: Duration = Duration::from_secs(60);
/// `CAP_DAC_READ_SEARCH`, in the form of `/proc/PID/status`.
const READ_ANY_FILE: &str = "0000000000000004";
const NOTHING: &str = "0000000000000000";

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        keeper_and_workers_have_no_rights,
        a_folder_that_only_root_may_read_is_read,
        nobody_but_root_is_answered,
    ]
}

fn field(pid: i32, name: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_else(|| panic!("no {name} in {status}")).trim().replace('\t', " ")
}

fn keeper_and_workers_have_no_rights() {
    let world = World::new(1 << 30, LONG);
    world.publish("one", 1, &[100]);
    let _stream = world.open("one").expect("opened");
    let keeper = world.keeper().expect("it runs");
    let workers = World::workers(keeper);
    assert!(!workers.is_empty());
    for (pid, capabilities) in workers.iter().map(|pid| (*pid, NOTHING)).chain([(keeper, READ_ANY_FILE)]) {
        for kind in ["CapEff:", "CapPrm:"] {
            assert_eq!(field(pid, kind), capabilities, "{kind} of {pid}");
        }
        for kind in ["CapInh:", "CapAmb:"] {
            assert_eq!(field(pid, kind), NOTHING, "{kind} of {pid}");
        }
        assert_eq!(field(pid, "NoNewPrivs:"), "1");
        for kind in ["Uid:", "Gid:"] {
            assert_eq!(field(pid, kind), [USER; 4].map(|id| id.to_string()).join(" "), "{kind} of {pid}");
        }
        assert_eq!(field(pid, "Groups:"), "");
        // Not dumpable: the kernel gives its files in /proc to root.
        let owner = std::fs::metadata(format!("/proc/{pid}/environ")).expect("it runs");
        assert_eq!(std::os::unix::fs::MetadataExt::uid(&owner), 0);
    }
}

fn a_folder_that_only_root_may_read_is_read() {
    let world = World::new(1 << 30, LONG);
    world.publish("one", 2, &[500]);
    let mode = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("our own");
    };
    for entry in std::fs::read_dir(world.store().join("packs")).expect("packs").flatten() {
        mode(&entry.path(), 0o600);
    }
    mode(&world.store().join("packs"), 0o700);
    mode(&world.store(), 0o700);
    let stream = world.open("one").expect("opened");
    stream.begin(Vec::new()).expect("begun");
    World::assert_content(&stream, 2, &[500]);
}

fn nobody_but_root_is_answered() {
    let world = World::new(1 << 30, LONG);
    world.publish("one", 3, &[10]);
    world.open("one").expect("opened");
    let open = |path: &std::path::Path| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).expect("our own");
    };
    let state = world.state();
    open(state.parent().expect("a parent"));
    open(&state);
    let socket = state.join("fetcher.5.sock");
    open(&socket);
    let program = std::env::current_exe().expect("this program");
    // By its descriptor: other users may not enter the folder that it lies in.
    let knock = |uid: u32| {
        let mut command = Command::new(&program);
        command.args(["knock", &socket.display().to_string()]).uid(uid);
        command.status()
    };
    assert!(knock(0).expect("started").success(), "root is answered");
    match knock(65_534) {
        Ok(status) => assert_eq!(status.code(), Some(2), "another user got an answer"),
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied),
    }
}

/// Says hello at a socket: 0 if there is an answer, 2 if the connection is closed without one, 3 for another failure.
pub(crate) fn knock(path: &str) -> u8 {
    use std::io::{Read, Write};
    let Ok(mut socket) = UnixStream::connect(path) else { return 3 };
    let body = br#"{"hello":{"version":1}}"#;
    let mut frame = (body.len() as u32).to_le_bytes().to_vec();
    frame.extend(body);
    // A door that is shut at once may break the pipe before all is said.
    let _ = socket.write_all(&frame);
    let mut answer = [0; 4];
    if socket.read_exact(&mut answer).is_ok() { 0 } else { 2 }
}
