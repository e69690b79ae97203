//! What works: servers are suspended and resumed, and nothing of theirs is changed.

use std::collections::BTreeSet;
use std::time::Duration;

use libtest_mimic::{Failed, Trial};
use rewarm_gpu::place::InProcess;
use rewarm_gpu::{Code, State, Step, order};

use crate::world::{LOCK, MIB, PATIENCE, World};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        Trial::test("steps::two_servers_are_suspended_and_resumed", two_servers_are_suspended_and_resumed),
        Trial::test(
            "steps::no_process_is_taken_a_step_further_before_all_have_taken_the_one_before",
            no_process_is_taken_a_step_further_before_all_have_taken_the_one_before,
        ),
        Trial::test("steps::rounds_under_threads_that_map_memory", rounds_under_threads_that_map_memory),
        Trial::test(
            "steps::threads_that_are_not_held_lose_memory_to_a_restore",
            threads_that_are_not_held_lose_memory_to_a_restore,
        ),
        Trial::test("steps::what_uses_no_device_is_only_frozen", what_uses_no_device_is_only_frozen),
        Trial::test(
            "steps::a_process_that_begins_meanwhile_is_suspended_too",
            a_process_that_begins_meanwhile_is_suspended_too,
        ),
        Trial::test(
            "steps::what_was_found_before_may_have_ended_and_others_begun",
            what_was_found_before_may_have_ended_and_others_begun,
        ),
        Trial::test(
            "steps::the_driver_allows_the_moves_of_the_table_and_no_others",
            the_driver_allows_the_moves_of_the_table_and_no_others,
        ),
        Trial::test("steps::one_helper_serves_all_calls", one_helper_serves_all_calls),
        Trial::test(
            "steps::a_call_waits_while_its_process_is_locked",
            a_call_waits_while_its_process_is_locked,
        ),
    ]
}

fn two_servers_are_suspended_and_resumed() -> Result<(), Failed> {
    let mut world = World::new(&[256]);
    let servers = [world.serve(&["--mib", "32"]), world.serve(&["--mib", "16", "--seed", "2"])];
    let answers = servers.map(|server| server.generate());
    assert_eq!(servers[0].nodes().len(), 2, "a running server holds the device's nodes");
    let mut helper = world.helper();
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
    // Weights and KV cache of both, in whole pieces of 2 MiB.
    assert_eq!(suspended.bytes(), (32 + 2 + 16 + 2) * MIB);
    assert_eq!(suspended.processes.len(), 2);
    assert_eq!(world.used(0), 0, "the device is free");
    assert!(world.group.is_frozen());
    assert!(servers.iter().all(|server| server.nodes().is_empty()), "no descriptor is left");
    let resumed =
        order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
    assert!(resumed.restore <= resumed.total);
    assert!(!world.group.is_frozen());
    assert_eq!(world.used(0), 52 * MIB);
    for (server, answer) in servers.iter().zip(answers) {
        server.is_whole();
        assert_eq!(server.generate(), answer);
        assert_eq!(server.nodes().len(), 2);
    }
    Ok(())
}

/// With drivers before R580 a call about one process hangs as long as its peer is locked and not yet checkpointed, or restored and
/// not yet unlocked.
fn no_process_is_taken_a_step_further_before_all_have_taken_the_one_before() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let servers = [(); 3].map(|()| world.serve(&["--mib", "4"]));
    let mut helper = world.helper();
    helper.start()?;
    let rules = ["lock", "checkpoint", "restore", "unlock", "state"]
        .map(|call| servers.map(|server| format!("{call}@{} wait 0", server.pid)).join("\n"));
    world.control(&rules.join("\n"));
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
    order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
    let met: Vec<String> =
        world.met().iter().map(|rule| rule.split('@').next().expect("a call").into()).collect();
    // The states are read before and after each step that changes them, of all processes.
    let three = |call: &str| [(); 3].map(|()| call.to_owned());
    let expected =
        ["state", "lock", "state", "checkpoint", "state", "state", "restore", "state", "unlock", "state"];
    assert_eq!(met, expected.map(three).concat());
    let once = world.met().into_iter().filter(|rule| !rule.starts_with("state")).collect::<BTreeSet<_>>();
    assert_eq!(once.len(), 4 * servers.len(), "each of them, and each once");
    for server in servers {
        server.is_whole();
    }
    Ok(())
}

fn rounds_under_threads_that_map_memory() -> Result<(), Failed> {
    let mut world = World::new(&[128]);
    let server = world.serve(&["--mib", "16", "--threads", "6"]);
    let mut helper = world.helper();
    for _ in 0..8 {
        let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
        assert_eq!(suspended.bytes(), 18 * MIB, "the copy is found exactly among memory that comes and goes");
        order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
        server.is_whole();
    }
    Ok(())
}

/// What the rounds above would find if a hold were left out: the driver alone, without this crate's order of steps.
fn threads_that_are_not_held_lose_memory_to_a_restore() -> Result<(), Failed> {
    const ROUNDS: usize = 100;
    let mut world = World::new(&[128]);
    let server = world.serve(&["--mib", "16", "--threads", "6"]);
    let mut helper = world.helper();
    for _ in 0..ROUNDS {
        helper.lock(server.pid, LOCK)?;
        helper.checkpoint(server.pid, 0)?;
        std::thread::sleep(Duration::from_millis(20));
        helper.restore(server.pid, 0, &[])?;
        helper.unlock(server.pid)?;
        let Ok(found) = server.ask("GET", "/check", "") else {
            // Device memory that a thread has unmapped for its own is the end of who touches it.
            return Ok(());
        };
        let found: serde_json::Value = serde_json::from_str(&found)?;
        if (&found["clobbered"], &found["spoiled"]) != (&0.into(), &0.into()) {
            return Ok(());
        }
    }
    Err(format!("in {ROUNDS} rounds nothing was found in the place of a device range").into())
}

fn what_uses_no_device_is_only_frozen() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--late"]);
    let mut helper = world.helper();
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
    assert_eq!((suspended.processes.len(), suspended.bytes()), (0, 0));
    assert_eq!(helper.pid(), None, "no helper is started for it");
    assert!(world.group.is_frozen());
    order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
    server.ask("GET", "/health", "")?;
    Ok(())
}

/// Asks the second server to begin just when the first is locked.
struct Late<'a> {
    group: &'a crate::world::Freezer,
    begin: crate::world::Server,
    looks: std::cell::Cell<u32>,
}

impl rewarm_gpu::Group for Late<'_> {
    fn processes(&self) -> Vec<i32> {
        self.looks.set(self.looks.get() + 1);
        if self.looks.get() == 2 {
            self.begin.ask("POST", "/begin", "").expect("it begins");
        }
        self.group.processes()
    }

    fn freeze(&self) -> std::io::Result<()> {
        self.group.freeze()
    }

    fn thaw(&self) -> std::io::Result<()> {
        self.group.thaw()
    }
}

fn a_process_that_begins_meanwhile_is_suspended_too() -> Result<(), Failed> {
    let mut world = World::new(&[128]);
    let (first, begin) = (world.serve(&["--mib", "4"]), world.serve(&["--mib", "8", "--late"]));
    let group = Late { group: &world.group, begin, looks: 0.into() };
    let mut helper = world.helper();
    let suspended = order::suspend(&mut helper, &group, LOCK, &mut InProcess::default())?;
    assert_eq!(suspended.processes.len(), 2);
    order::resume(&mut helper, &group, &suspended.processes, &[], &mut InProcess::default())?;
    first.is_whole();
    begin.is_whole();
    Ok(())
}

fn what_was_found_before_may_have_ended_and_others_begun() -> Result<(), Failed> {
    let mut world = World::new(&[128]);
    let (stays, ends) = (world.serve(&["--mib", "4"]), world.serve(&["--mib", "4", "--seed", "2"]));
    let late = world.serve(&["--mib", "8", "--late"]);
    let mut helper = world.helper();
    let found = order::find(&mut helper, &world.group, &[])?;
    let found_pids: BTreeSet<i32> = found.iter().map(|process| process.pid).collect();
    assert_eq!(found_pids, [stays.pid, ends.pid].into());
    world.kill(ends.pid);
    late.ask("POST", "/begin", "")?;
    let state = &mut InProcess::default();
    let suspended = order::suspend_found(&mut helper, &world.group, found, LOCK, state)?;
    let pids: BTreeSet<i32> = suspended.processes.iter().map(|process| process.pid).collect();
    assert_eq!(pids, [stays.pid, late.pid].into());
    order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
    stays.is_whole();
    late.is_whole();
    Ok(())
}

fn the_driver_allows_the_moves_of_the_table_and_no_others() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    // Nothing is held here, so there must be no thread that maps memory where a device range was.
    let server = world.serve(&["--mib", "4", "--threads", "0"]);
    let mut helper = world.helper();
    let ways: [(&[Step], State); 3] = [
        (&[], State::RUNNING),
        (&[Step::Lock], State::LOCKED),
        (&[Step::Lock, Step::Checkpoint], State::CHECKPOINTED),
    ];
    let take = |helper: &mut rewarm_gpu::Helper, step| match step {
        Step::Lock => helper.lock(server.pid, LOCK),
        Step::Checkpoint => helper.checkpoint(server.pid, 0),
        Step::Restore => helper.restore(server.pid, 0, &[]),
        Step::Unlock => helper.unlock(server.pid),
    };
    for (way, state) in ways {
        for step in Step::ALL {
            for step in way {
                take(&mut helper, *step)?;
            }
            assert_eq!(helper.state(server.pid)?, state);
            let result = take(&mut helper, step);
            let now = helper.state(server.pid)?;
            match step.from(state) {
                Some(to) => {
                    result?;
                    assert_eq!(now, to, "{step} from {state}");
                }
                None => {
                    let error = result.expect_err("not in the table");
                    assert_eq!(error.code(), Some(Code::ILLEGAL_STATE), "{step} from {state}: {error}");
                    assert_eq!(now, state, "a refused {step} changes nothing");
                }
            }
            for step in rewarm_gpu::states::way_back(now).expect("known states only") {
                take(&mut helper, *step)?;
            }
        }
    }
    server.is_whole();
    Ok(())
}

fn one_helper_serves_all_calls() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "4"]);
    let mut helper = world.helper();
    helper.start()?;
    let pid = helper.pid();
    for _ in 0..3 {
        let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
        order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
    }
    assert!(pid.is_some() && helper.pid() == pid);
    let devices = helper.devices()?;
    assert_eq!(devices.len(), 1);
    assert!(devices[0].name.contains("Simulated") && devices[0].uuid == World::uuid(0));
    server.is_whole();
    Ok(())
}

fn a_call_waits_while_its_process_is_locked() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "4"]);
    let answer = server.generate();
    let mut helper = world.helper();
    helper.lock(server.pid, LOCK)?;
    // What needs no device is answered.
    server.ask("GET", "/health", "")?;
    let (told, tells) = std::sync::mpsc::channel();
    let asking = std::thread::spawn(move || told.send(server.generate()));
    let early = tells.recv_timeout(Duration::from_millis(500));
    assert!(early.is_err(), "it answered although it is locked: {early:?}");
    helper.unlock(server.pid)?;
    assert_eq!(tells.recv_timeout(PATIENCE)?, answer);
    asking.join().expect("no panic")?;
    Ok(())
}
