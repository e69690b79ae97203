//! What owner and helper say to each other, and what the helper holds between two calls.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use libtest_mimic::{Failed, Trial};
use rewarm_gpu::custom::VERSION_MIN;
use rewarm_gpu::helper::SOCKET_FD;
use rewarm_gpu::place::{InFile, InProcess, Stream};
use rewarm_gpu::wire::{self, Answer, Call, PAIRS_MAX, VERSION};
use rewarm_gpu::{CallError, Helper, Pair, State, order};

use crate::direct::{content, file as memory_file};
use crate::world::{LOCK, World};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        Trial::test(
            "protocol::a_helper_of_another_version_is_refused_with_both_numbers",
            a_helper_of_another_version_is_refused_with_both_numbers,
        ),
        Trial::test(
            "protocol::a_map_of_more_gpus_than_may_be_is_refused_and_changes_nothing",
            a_map_of_more_gpus_than_may_be_is_refused_and_changes_nothing,
        ),
        Trial::test(
            "protocol::the_helper_holds_neither_device_files_nor_device_memory",
            the_helper_holds_neither_device_files_nor_device_memory,
        ),
        Trial::test(
            "protocol::the_helper_holds_nothing_once_device_memory_went_past_the_process",
            the_helper_holds_nothing_once_device_memory_went_past_the_process,
        ),
    ]
}

/// A helper of a program that is newer than its owner.
pub(crate) fn another_version() -> ExitCode {
    let socket =
        UnixStream::from(rewarm_sys::process::take_inherited(SOCKET_FD).expect("its owner's socket"));
    while let Some(call) = wire::receive::<Call>(&socket).expect("a call") {
        assert!(matches!(call, Call::Hello { version: VERSION }), "{call} after it said its version");
        let answer = Answer::Hello { version: VERSION + 1, driver: Err("none".to_owned()) };
        wire::send(&socket, &answer).expect("its owner waits");
    }
    ExitCode::SUCCESS
}

fn a_helper_of_another_version_is_refused_with_both_numbers() -> Result<(), Failed> {
    let world = World::new(&[]);
    let mut launch = world.launch();
    launch.args = vec!["other-helper".into()];
    let mut helper = Helper::new(launch);
    let error = helper.start().expect_err("another version");
    assert!(matches!(error, CallError::Version { helper } if helper == VERSION + 1), "{error}");
    let (theirs, ours) = (VERSION + 1, VERSION);
    assert_eq!(
        error.to_string(),
        format!(
            "the GPU helper speaks version {theirs} of its protocol, and {ours} is needed: the program was replaced meanwhile"
        )
    );
    assert_eq!(helper.pid(), None, "it is not kept");
    Ok(())
}

fn a_map_of_more_gpus_than_may_be_is_refused_and_changes_nothing() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "4"]);
    let mut helper = world.helper();
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
    // The driver would be asked.
    world.control("restore result 999");
    let pair = Pair { old: World::uuid(0), new: World::uuid(0) };
    let error = helper.restore(server.pid, 0, &[pair; PAIRS_MAX + 1]).expect_err("too many");
    let wanted = format!("a map of {} GPUs, at most {PAIRS_MAX}", PAIRS_MAX + 1);
    assert!(matches!(&error, CallError::Unable { reason, .. } if *reason == wanted), "{error}");
    assert_eq!((world.met().len(), helper.state(server.pid)?), (0, State::CHECKPOINTED));
    world.control("");
    order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
    server.is_whole();
    Ok(())
}

/// Device files, and files on devices, that a process has open or mapped.
fn held(pid: i32, devices: &Path) -> Vec<String> {
    let is_held = |path: &str| {
        let of_a_device = path.contains(&*devices.to_string_lossy());
        of_a_device || (path.starts_with("/dev/") && path != "/dev/null")
    };
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).expect("it lives").flatten();
    let open = fds.filter_map(|fd| fs::read_link(fd.path()).ok()?.into_os_string().into_string().ok());
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("it lives");
    let mapped = maps.lines().filter_map(|line| line.find('/').map(|at| line[at..].to_owned()));
    open.chain(mapped.collect::<Vec<_>>()).filter(|path| is_held(path)).collect()
}

fn the_helper_holds_neither_device_files_nor_device_memory() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "4"]);
    let devices = world.path("devices");
    let mut helper = world.helper();
    helper.start()?;
    let pid = helper.pid().expect("it runs").cast_signed();
    // What is looked for is found where it is.
    let of_server = held(server.pid, &devices);
    for part in ["/dev/fuse", "/devices/0/"] {
        assert!(of_server.iter().any(|path| path.contains(part)), "{part}: {of_server:?}");
    }
    let nothing = |after: &str| assert_eq!(held(pid, &devices), Vec::<String>::new(), "after {after}");
    nothing("attaching");
    helper.devices()?;
    helper.machine()?;
    nothing("questions");
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
    nothing("a checkpoint");
    order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
    nothing("a restore");
    assert_eq!(helper.pid().map(u32::cast_signed), Some(pid), "one helper made all calls");
    server.is_whole();
    Ok(())
}

/// While it goes there the helper has contexts on all devices, and what is moved mapped.
fn the_helper_holds_nothing_once_device_memory_went_past_the_process() -> Result<(), Failed> {
    let mut world = World::new(&[64, 64]);
    let server = world.serve(&["--mib", "4"]);
    let devices = world.path("devices");
    let mut helper = world.helper_of_version(VERSION_MIN.0);
    helper.start()?;
    let pid = helper.pid().expect("it runs").cast_signed();
    let nothing = |after: &str| assert_eq!(held(pid, &devices), Vec::<String>::new(), "after {after}");
    // Each time it has contexts again.
    for _ in 0..2 {
        let kept = memory_file();
        let mut state = InFile::new(kept.try_clone()?);
        let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut state)?;
        nothing("a checkpoint into a file");
        order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut state)?;
        nothing("a restore from it");
        let mut state = InFile::new(kept.try_clone()?);
        let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut state)?;
        let bytes = content(&kept, &suspended.processes[0]);
        let (mut ours, theirs) = UnixStream::pair()?;
        let feeder = std::thread::spawn(move || ours.write_all(&bytes));
        let mut stream = Stream::new(theirs.into(), Duration::ZERO);
        order::begin(&mut helper, &world.group, suspended.processes, &[], &mut stream)?;
        feeder.join().expect("no panic")?;
        nothing("a restore from a stream");
    }
    assert_eq!(helper.pid().map(u32::cast_signed), Some(pid), "one helper made all calls");
    server.is_whole();
    Ok(())
}
