//! Other devices than at the checkpoint, full ones, and drivers that are missing, old or incomplete.

use libtest_mimic::{Failed, Trial};
use rewarm_gpu::place::InProcess;
use rewarm_gpu::topology;
use rewarm_gpu::{Aftermath, CallError, Code, Group, Helper, Pair, order};

use crate::world::{LOCK, MIB, World};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        Trial::test("devices::a_server_moves_to_another_device", a_server_moves_to_another_device),
        Trial::test("devices::a_map_that_does_not_fit_is_refused", a_map_that_does_not_fit_is_refused),
        Trial::test(
            "devices::a_full_device_leaves_the_server_paused_until_there_is_room",
            a_full_device_leaves_the_server_paused_until_there_is_room,
        ),
        Trial::test(
            "devices::a_driver_that_is_missing_old_or_incomplete_is_named",
            a_driver_that_is_missing_old_or_incomplete_is_named,
        ),
        Trial::test(
            "devices::what_is_done_to_copies_is_said_to_be_simulated",
            what_is_done_to_copies_is_said_to_be_simulated,
        ),
        Trial::test("devices::an_old_driver_refuses_a_map", an_old_driver_refuses_a_map),
    ]
}

fn pair(old: usize, new: usize) -> Pair {
    Pair { old: World::uuid(old), new: World::uuid(new) }
}

fn a_server_moves_to_another_device() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "16"]);
    let mut helper = world.helper();
    let there = helper.devices()?;
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
    world.remove_device(0);
    world.add_device(1, 64);
    let pairs = topology::map(&there, &helper.devices()?, &topology::Wish::Same, &topology::Room::default())?;
    assert_eq!(pairs, [pair(0, 1)]);
    order::resume(&mut helper, &world.group, &suspended.processes, &pairs, &mut InProcess::default())?;
    assert_eq!((world.used(0), world.used(1)), (0, 18 * MIB));
    server.is_whole();
    Ok(())
}

fn a_map_that_does_not_fit_is_refused() -> Result<(), Failed> {
    let mut world = World::new(&[64, 64]);
    let server = world.serve(&["--mib", "4"]);
    let mut helper = world.helper();
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
    world.add_device(2, 64);
    world.add_device(3, 64);
    std::fs::write(world.path("devices").join("3/name"), "Another simulated GPU")?;
    let twice = [pair(0, 0), pair(1, 0)];
    let too_few = [pair(0, 2)];
    let unknown = [pair(0, 7), pair(1, 1)];
    let another_kind = [pair(0, 1), pair(1, 3)];
    for bad in [&twice[..], &too_few, &unknown, &another_kind] {
        let failure =
            order::resume(&mut helper, &world.group, &suspended.processes, bad, &mut InProcess::default())
                .expect_err("refused");
        assert!(failure.to_string().contains("invalid value (1)"), "{failure}");
        assert_eq!(failure.aftermath, Aftermath::Suspended);
        assert!(world.group.is_frozen());
    }
    order::resume(
        &mut helper,
        &world.group,
        &suspended.processes,
        &[pair(0, 1), pair(1, 2)],
        &mut InProcess::default(),
    )?;
    server.is_whole();
    assert_eq!((world.used(0), world.used(1)), (0, 6 * MIB));
    Ok(())
}

fn a_full_device_leaves_the_server_paused_until_there_is_room() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "32"]);
    let mut helper = world.helper();
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
    let neighbour = world.path("devices").join("0/neighbour");
    std::fs::write(&neighbour, vec![1; 48 << 20])?;
    let failure =
        order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())
            .expect_err("full");
    assert!(failure.to_string().contains("out of memory (2); the server stays paused"), "{failure}");
    assert_eq!(failure.aftermath, Aftermath::Suspended);
    std::fs::remove_file(&neighbour)?;
    order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
    server.is_whole();
    Ok(())
}

fn a_driver_that_is_missing_old_or_incomplete_is_named() -> Result<(), Failed> {
    let world = World::new(&[64]);
    let reason = |helper: &mut Helper| match helper.start() {
        Err(CallError::NoDriver { reason }) => reason,
        other => panic!("{other:?}"),
    };
    let missing = world.path("libcuda.so.9");
    let text = reason(&mut Helper::new(world.launch_with(&missing)));
    assert!(text.contains("libcuda.so.9 cannot be loaded"), "{text}");
    let text = reason(&mut world.helper_of_version(12_040));
    assert!(text.contains("supports CUDA 12.4, at least 12.8 (R570) is needed"), "{text}");
    // The name is spoiled in the library's table of names, so that the loader does not find it.
    let mut bytes = std::fs::read(world.driver())?;
    let name = b"\0cuCheckpointProcessUnlock\0";
    let at = bytes.windows(name.len()).position(|window| window == name).expect("its name");
    bytes[at + name.len() - 2] = b'!';
    let incomplete = world.path("incomplete.so");
    std::fs::write(&incomplete, bytes)?;
    let text = reason(&mut Helper::new(world.launch_with(&incomplete)));
    assert!(text.contains("has no cuCheckpointProcessUnlock"), "{text}");
    let empty = World::new(&[]);
    let text = reason(&mut empty.helper());
    assert_eq!(text, "cuInit: no device (100)");
    Ok(())
}

fn an_old_driver_refuses_a_map() -> Result<(), Failed> {
    let mut world = World::new(&[64, 64]);
    let server = world.serve(&["--mib", "4"]);
    let mut helper = world.helper_of_version(12_080);
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
    let pairs = [pair(0, 1), pair(1, 0)];
    let failure =
        order::resume(&mut helper, &world.group, &suspended.processes, &pairs, &mut InProcess::default())
            .expect_err("too old");
    assert!(failure.to_string().contains("needs CUDA 13.0 (R580), the driver has 12.8"), "{failure}");
    order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
    server.is_whole();
    assert_eq!(
        helper.lock(server.pid, LOCK).and_then(|_| helper.lock(server.pid, LOCK)).expect_err("locked").code(),
        Some(Code::ILLEGAL_STATE)
    );
    Ok(())
}

fn what_is_done_to_copies_is_said_to_be_simulated() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "16", "--threads", "0"]);
    let mut helper = world.helper();
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
    // Its own threads answer, while its device memory is away.
    world.group.thaw()?;
    let mut from = suspended.processes[0].copies[0].start;
    for path in ["/populated", "/huge", "/put-back", "/absent"] {
        let to = from + 2 * MIB;
        let said: serde_json::Value =
            serde_json::from_str(&server.ask("POST", &format!("{path}?{from:x}-{to:x}"), "")?)?;
        assert_eq!(said["simulated"], true, "{path}: {said}");
        from = to;
    }
    Ok(())
}
