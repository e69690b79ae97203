//! Device memory that goes past the process: custom storage of CUDA 13.4.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use libtest_mimic::{Failed, Trial};
use rewarm_gpu::custom::VERSION_MIN;
use rewarm_gpu::place::{InFile, InProcess, Stream};
use rewarm_gpu::{Aftermath, Pair, Process, State, order, ranges};

use crate::world::{LOCK, MIB, PATIENCE, World};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        Trial::test("direct::memory_goes_to_a_file_and_back", memory_goes_to_a_file_and_back),
        Trial::test("direct::memory_comes_from_a_stream", memory_comes_from_a_stream),
        Trial::test("direct::an_older_driver_refuses_and_is_undone", an_older_driver_refuses_and_is_undone),
        Trial::test("direct::a_failure_puts_back_what_was_stored", a_failure_puts_back_what_was_stored),
        Trial::test(
            "direct::a_helper_that_dies_in_the_middle_strands_the_process",
            a_helper_that_dies_in_the_middle_strands_the_process,
        ),
        Trial::test("direct::what_does_not_fit_is_refused", what_does_not_fit_is_refused),
    ]
}

pub(crate) fn file() -> OwnedFd {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    nix::sys::memfd::memfd_create(c"device-state", flags).expect("a memory file")
}

/// Bytes of private memory that a process has.
fn private_bytes(pid: i32) -> u64 {
    ranges::private_memory(pid).expect("it runs").iter().map(ranges::Range::bytes).sum()
}

pub(crate) fn content(file: &OwnedFd, process: &Process) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::from(file.try_clone().expect("a descriptor"));
    let mut all = Vec::new();
    for part in &process.direct {
        let mut bytes = vec![0; usize::try_from(part.bytes).expect("small")];
        file.read_exact_at(&mut bytes, part.offset).expect("what was written");
        all.extend(bytes);
    }
    all
}

fn memory_goes_to_a_file_and_back() -> Result<(), Failed> {
    let mut world = World::new(&[128, 128]);
    let servers = [
        world.serve(&["--mib", "16", "--threads", "3"]),
        world.serve(&["--mib", "8", "--seed", "2", "--threads", "3"]),
    ];
    let answers = servers.map(|server| server.generate());
    let mut helper = world.helper_of_version(VERSION_MIN.0);
    for _ in 0..3 {
        let mut state = InFile::new(file());
        let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut state)?;
        assert_eq!(suspended.bytes(), (16 + 2 + 8 + 2) * MIB);
        assert_eq!((world.used(0), world.used(1)), (0, 0), "the devices are free");
        for process in &suspended.processes {
            assert!(process.copies.is_empty());
            assert!(private_bytes(process.pid) < 1 << 30, "nothing was copied into the process");
        }
        assert!(servers.iter().all(|server| server.nodes().is_empty()), "no descriptor is left");
        let pairs = [
            Pair { old: World::uuid(0), new: World::uuid(1) },
            Pair { old: World::uuid(1), new: World::uuid(0) },
        ];
        order::resume(&mut helper, &world.group, &suspended.processes, &pairs, &mut state)?;
        for (server, answer) in servers.iter().zip(&answers) {
            server.is_whole();
            assert_eq!(server.generate(), *answer);
        }
    }
    assert_eq!((world.used(0), world.used(1)), (0, 28 * MIB), "three moves to the other device");
    // What went past the process once may be in the process the next time.
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
    order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
    servers.iter().for_each(|server| server.is_whole());
    Ok(())
}

fn memory_comes_from_a_stream() -> Result<(), Failed> {
    let mut world = World::new(&[128]);
    let server = world.serve(&["--mib", "16"]);
    let answer = server.generate();
    let mut helper = world.helper_of_version(VERSION_MIN.0);
    let kept = file();
    let mut state = InFile::new(kept.try_clone()?);
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut state)?;
    let bytes = content(&kept, &suspended.processes[0]);
    // A stream that ends too early: nothing may go on with half of its memory.
    let stream = |bytes: Vec<u8>| {
        let (mut ours, theirs) = UnixStream::pair().expect("a pair");
        let feeder = std::thread::spawn(move || ours.write_all(&bytes));
        (Stream::new(theirs.into(), Duration::ZERO), feeder)
    };
    let (mut whole, feeder) = stream(bytes);
    order::begin(&mut helper, &world.group, suspended.processes.clone(), &[], &mut whole)?;
    feeder.join().expect("no panic")?;
    server.is_whole();
    assert_eq!(server.generate(), answer);
    let mut state = InFile::new(file());
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut state)?;
    let (mut cut, feeder) = stream(vec![7; usize::try_from(5 * MIB).expect("small")]);
    let cause = order::begin(&mut helper, &world.group, suspended.processes.clone(), &[], &mut cut)
        .expect_err("cut off");
    feeder.join().expect("no panic")?;
    assert!(cause.to_string().contains("get device memory at byte"), "{cause}");
    assert_eq!(helper.state(server.pid)?, State::RESTORING, "it does not run");
    world.kill(server.pid);
    assert_eq!(world.used(0), 0, "what was taken for it is free");
    Ok(())
}

fn an_older_driver_refuses_and_is_undone() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "16"]);
    let mut helper = world.helper();
    let mut state = InFile::new(file());
    let failure = order::suspend(&mut helper, &world.group, LOCK, &mut state).expect_err("too old");
    assert!(failure.to_string().contains("from CUDA 13.4 (R615) on, the driver has 13.0"), "{failure}");
    assert_eq!(failure.aftermath, Aftermath::Running);
    server.is_whole();
    Ok(())
}

fn a_failure_puts_back_what_was_stored() -> Result<(), Failed> {
    let mut world = World::new(&[128]);
    let servers = [world.serve(&["--mib", "16"]), world.serve(&["--mib", "8", "--seed", "2"])];
    let pids = servers.map(|server| server.pid);
    let mut helper = world.helper_of_version(VERSION_MIN.0);
    // The second of two at the checkpoint.
    let second = *pids.iter().max().expect("two");
    world.control(&format!("checkpoint@{second} result 801"));
    let mut state = InFile::new(file());
    let failure = order::suspend(&mut helper, &world.group, LOCK, &mut state).expect_err("refused");
    assert_eq!(failure.aftermath, Aftermath::Running, "{failure}");
    servers.iter().for_each(|server| server.is_whole());
    world.control("");
    // And at the restore: all of them are checkpointed and frozen again, and can be resumed.
    let mut state = InFile::new(file());
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut state)?;
    for rule in [format!("restore@{second} result 2"), format!("unlock@{second} result 401")] {
        world.control(&rule);
        let failure = order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut state)
            .expect_err("refused");
        assert_eq!(failure.aftermath, Aftermath::Suspended, "{failure}");
        assert_eq!(world.used(0), 0);
        world.control("");
    }
    order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut state)?;
    servers.iter().for_each(|server| server.is_whole());
    Ok(())
}

fn a_helper_that_dies_in_the_middle_strands_the_process() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "16"]);
    let mut helper = world.helper_of_version(VERSION_MIN.0);
    world.control("complete die");
    let mut state = InFile::new(file());
    let failure = order::suspend(&mut helper, &world.group, LOCK, &mut state).expect_err("it died");
    let left = vec![(server.pid, "in the middle of a checkpoint".to_owned())];
    assert_eq!(failure.aftermath, Aftermath::Stranded(left), "{failure}");
    world.control("");
    world.kill(server.pid);
    assert_eq!(world.used(0), 0, "its device memory is free");
    // Done, but nobody was told where the memory lies: it is not taken for a success.
    let server = world.serve(&["--mib", "16"]);
    world.control("complete then-die");
    let failure = order::suspend(&mut helper, &world.group, LOCK, &mut InFile::new(file()))
        .expect_err("nobody knows where it is");
    assert!(matches!(failure.aftermath, Aftermath::Stranded(_)), "{failure}");
    world.control("");
    world.kill(server.pid);
    let deadline = std::time::Instant::now() + PATIENCE;
    while world.used(0) > 0 {
        assert!(std::time::Instant::now() < deadline, "its device memory is free");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn what_does_not_fit_is_refused() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "16"]);
    let mut helper = world.helper_of_version(VERSION_MIN.0);
    let mut state = InFile::new(file());
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut state)?;
    // From its own memory, where nothing is: the driver refuses, and it can still be resumed.
    let plain =
        order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default());
    assert_eq!(plain.expect_err("nothing is there").aftermath, Aftermath::Suspended);
    let mut shorter = suspended.processes.clone();
    shorter[0].direct[0].bytes -= MIB;
    let (_ours, theirs) = UnixStream::pair()?;
    let cause = order::begin(
        &mut helper,
        &world.group,
        shorter,
        &[],
        &mut Stream::new(theirs.into(), Duration::ZERO),
    )
    .expect_err("too short");
    let text = "the driver wants 18874368 bytes of device memory for GPU-00000000-0000-0000-0000-0000000000d0, the snapshot has 17825792";
    assert!(cause.to_string().contains(text), "{cause}");
    world.kill(server.pid);
    Ok(())
}
