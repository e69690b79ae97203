//! Helpers and servers that die in every moment.

use std::time::{Duration, Instant};

use libtest_mimic::{Failed, Trial};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rewarm_gpu::place::InProcess;
use rewarm_gpu::{Aftermath, Cause, Helper, State, order, ranges};

use crate::world::{LOCK, PATIENCE, World};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        Trial::test(
            "endings::the_helper_dies_in_each_call_of_a_suspend",
            the_helper_dies_in_each_call_of_a_suspend,
        ),
        Trial::test(
            "endings::the_helper_dies_in_each_call_of_a_resume",
            the_helper_dies_in_each_call_of_a_resume,
        ),
        Trial::test(
            "endings::the_helper_dies_while_it_asks_for_a_state",
            the_helper_dies_while_it_asks_for_a_state,
        ),
        Trial::test(
            "endings::the_helper_dies_or_hangs_while_it_attaches",
            the_helper_dies_or_hangs_while_it_attaches,
        ),
        Trial::test("endings::the_server_dies_in_each_state", the_server_dies_in_each_state),
        Trial::test("endings::the_server_dies_within_each_call", the_server_dies_within_each_call),
        Trial::test(
            "endings::a_helper_ends_with_its_owner_also_in_a_call",
            a_helper_ends_with_its_owner_also_in_a_call,
        ),
    ]
}

fn the_helper_dies_in_each_call_of_a_suspend() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "4"]);
    let answer = server.generate();
    let mut helper = world.helper();
    // Killed before it asked the driver: the call is not repeated, everything is undone.
    for call in ["thread", "lock", "checkpoint"] {
        world.control(&format!("{call}*1 die"));
        let failure = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())
            .expect_err("the helper died");
        assert!(failure.to_string().contains("the GPU helper ended during the call"), "{call}: {failure}");
        assert_eq!(failure.aftermath, Aftermath::Running, "{call}");
        assert_eq!(
            (helper.state(server.pid)?, server.generate()),
            (State::RUNNING, answer.clone()),
            "{call}"
        );
    }
    // Killed after it was done: the state shows it.
    for call in ["lock", "checkpoint"] {
        world.control(&format!("{call} then-die"));
        let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
        world.control("");
        order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
        server.is_whole();
    }
    Ok(())
}

fn the_helper_dies_in_each_call_of_a_resume() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "4"]);
    let answer = server.generate();
    let mut helper = world.helper();
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
    for call in ["restore", "unlock"] {
        world.control(&format!("{call} die"));
        let failure =
            order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())
                .expect_err("died");
        assert_eq!(failure.aftermath, Aftermath::Suspended, "{call}: {failure}");
        assert!(world.group.is_frozen(), "{call}");
    }
    for call in ["restore", "unlock"] {
        world.control(&format!("{call} then-die"));
        order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
        assert_eq!(server.generate(), answer, "{call}");
        world.control("");
        order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
    }
    let now = order::find(&mut helper, &world.group, &[])?;
    order::resume(&mut helper, &world.group, &now, &[], &mut InProcess::default())?;
    server.is_whole();
    Ok(())
}

/// Kills `helper` when it next asks for a state, during `work`. A `rule` counts once in each helper.
fn killed_at_a_state<T>(
    world: &World,
    helper: &mut Helper,
    rule: &str,
    work: impl FnOnce(&mut Helper) -> T,
) -> Result<T, Failed> {
    helper.start()?;
    let pid = Pid::from_raw(helper.pid().expect("it runs").cast_signed());
    let seen = world.path("control.seen");
    // No rule can end one helper only: the next one would end at its first question too.
    world.control(rule);
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            let deadline = Instant::now() + PATIENCE;
            while !seen.exists() {
                assert!(Instant::now() < deadline, "it never asks");
                std::thread::sleep(Duration::from_millis(1));
            }
            kill(pid, Signal::SIGKILL).expect("it waits");
        });
        work(helper)
    });
    world.control("");
    Ok(result)
}

fn the_helper_dies_while_it_asks_for_a_state() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "4"]);
    let answer = server.generate();
    let mut helper = world.helper();
    let failure = killed_at_a_state(&world, &mut helper, "state*1 wait 3000", |helper| {
        order::suspend(helper, &world.group, LOCK, &mut InProcess::default())
    })?
    .expect_err("the helper died");
    assert!(failure.to_string().contains("the GPU helper ended during the call"), "{failure}");
    assert_eq!((failure.aftermath, server.generate()), (Aftermath::Running, answer));
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
    let failure = killed_at_a_state(&world, &mut helper, "state*1 wait 3001", |helper| {
        order::resume(helper, &world.group, &suspended.processes, &[], &mut InProcess::default())
    })?
    .expect_err("the helper died");
    assert_eq!(failure.aftermath, Aftermath::Suspended, "{failure}");
    order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
    server.is_whole();
    Ok(())
}

fn the_helper_dies_or_hangs_while_it_attaches() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "4"]);
    for (rule, text) in [
        ("init die", "attach: the GPU helper ended during the call"),
        ("init hang", "attach: no answer within 1 s, so the GPU helper was killed"),
    ] {
        let mut helper = world.helper().with_deadline(Duration::from_millis(1500));
        world.control(rule);
        let failure = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())
            .expect_err("it does not attach");
        assert!(failure.to_string().contains(text), "{rule}: {failure}");
        assert_eq!((failure.aftermath, helper.pid()), (Aftermath::Running, None), "{rule}");
        world.control("");
        server.is_whole();
        // The next one attaches.
        let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
        order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
        server.is_whole();
    }
    Ok(())
}

fn the_server_dies_in_each_state() -> Result<(), Failed> {
    let mut world = World::new(&[128]);
    let mut helper = world.helper();
    // Running: there is nothing left to suspend.
    let server = world.serve(&["--mib", "4"]);
    world.kill(server.pid);
    assert!(order::find(&mut helper, &world.group, &[])?.is_empty());
    // Locked, then checkpointed; its memory is free at once.
    for checkpoint in [false, true] {
        let server = world.serve(&["--mib", "4"]);
        helper.lock(server.pid, LOCK)?;
        if checkpoint {
            helper.checkpoint(server.pid, 0)?;
        }
        world.kill(server.pid);
        assert!(helper.state(server.pid).is_err(), "a process that is gone has no state");
        assert_eq!(world.used(0), 0);
    }
    // Suspended, one of two: the other one goes on.
    let (gone, left) = (world.serve(&["--mib", "4"]), world.serve(&["--mib", "4"]));
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
    world.kill_frozen(gone.pid);
    order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
    left.is_whole();
    Ok(())
}

fn the_server_dies_within_each_call() -> Result<(), Failed> {
    for call in ["lock", "checkpoint"] {
        let mut world = World::new(&[64]);
        let (bad, good) = (world.serve(&["--mib", "4"]), world.serve(&["--mib", "4"]));
        let mut helper = world.helper();
        world.control(&format!("{call}@{} crash", bad.pid));
        let failure = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())
            .expect_err("it crashed");
        assert!(matches!(failure.cause, Cause::Gone { pid, .. } if pid == bad.pid), "{call}: {failure}");
        assert_eq!(failure.aftermath, Aftermath::Running, "{call}");
        good.is_whole();
    }
    for call in ["restore", "unlock"] {
        let mut world = World::new(&[64]);
        let (bad, good) = (world.serve(&["--mib", "4"]), world.serve(&["--mib", "4"]));
        let mut helper = world.helper();
        let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
        world.control(&format!("{call}@{} crash", bad.pid));
        let failure =
            order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())
                .expect_err("it crashed");
        assert!(matches!(failure.cause, Cause::Gone { pid, .. } if pid == bad.pid), "{call}: {failure}");
        assert_eq!(failure.aftermath, Aftermath::Suspended, "{call}");
        world.control("");
        order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
        good.is_whole();
    }
    Ok(())
}

fn a_helper_ends_with_its_owner_also_in_a_call() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "4"]);
    world.control("lock hang");
    let mut helper = world.helper();
    helper.start()?;
    let pid = helper.pid().expect("it runs").cast_signed();
    let calling =
        std::thread::spawn(move || helper.with_deadline(Duration::from_millis(300)).lock(server.pid, LOCK));
    calling.join().expect("no panic").expect_err("it hangs");
    let deadline = Instant::now() + PATIENCE;
    while ranges::exists(pid) {
        assert!(Instant::now() < deadline, "the helper lives on");
        std::thread::sleep(Duration::from_millis(10));
    }
    server.is_whole();
    Ok(())
}
