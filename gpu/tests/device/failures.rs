//! Calls that fail, hang or lie: what is true afterwards, and that it is said.

use std::time::Duration;

use libtest_mimic::{Failed, Trial};
use rewarm_gpu::place::InProcess;
use rewarm_gpu::{Aftermath, Cause, Code, Group, State, Step, order};
use rewarm_report::{Class, Classify};

use crate::world::{LOCK, World};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        Trial::test(
            "failures::a_lock_under_a_long_kernel_times_out_and_the_server_goes_on",
            a_lock_under_a_long_kernel_times_out_and_the_server_goes_on,
        ),
        Trial::test(
            "failures::a_checkpoint_that_fails_for_the_second_of_three_undoes_all",
            a_checkpoint_that_fails_for_the_second_of_three_undoes_all,
        ),
        Trial::test(
            "failures::a_failed_process_is_named_and_the_others_run",
            a_failed_process_is_named_and_the_others_run,
        ),
        Trial::test(
            "failures::a_state_that_nobody_knows_counts_as_no_success",
            a_state_that_nobody_knows_counts_as_no_success,
        ),
        Trial::test(
            "failures::an_unlock_that_errs_although_it_was_done_is_done",
            an_unlock_that_errs_although_it_was_done_is_done,
        ),
        Trial::test(
            "failures::a_call_that_never_returns_is_given_up_and_undone",
            a_call_that_never_returns_is_given_up_and_undone,
        ),
        Trial::test(
            "failures::a_call_of_the_way_back_that_never_returns_is_given_up_and_can_be_repeated",
            a_call_of_the_way_back_that_never_returns_is_given_up_and_can_be_repeated,
        ),
        Trial::test(
            "failures::a_call_that_never_returns_ends_the_beginning_of_a_clone",
            a_call_that_never_returns_ends_the_beginning_of_a_clone,
        ),
        Trial::test(
            "failures::a_clone_that_is_given_up_is_off_its_devices_before_it_is_killed",
            a_clone_that_is_given_up_is_off_its_devices_before_it_is_killed,
        ),
        Trial::test("failures::a_result_that_nobody_knows_is_told", a_result_that_nobody_knows_is_told),
        Trial::test(
            "failures::a_restore_that_broke_the_process_for_good_is_stranded",
            a_restore_that_broke_the_process_for_good_is_stranded,
        ),
        Trial::test("failures::a_slow_driver_is_waited_for", a_slow_driver_is_waited_for),
        Trial::test(
            "failures::a_call_that_goes_on_without_its_caller_counts_when_it_is_done",
            a_call_that_goes_on_without_its_caller_counts_when_it_is_done,
        ),
        Trial::test("failures::a_success_that_is_a_lie_is_found", a_success_that_is_a_lie_is_found),
    ]
}

fn a_lock_under_a_long_kernel_times_out_and_the_server_goes_on() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "4"]);
    let answer = server.generate();
    server.ask("POST", "/kernel?1500", "")?;
    let mut helper = world.helper();
    let failure =
        order::suspend(&mut helper, &world.group, Duration::from_millis(100), &mut InProcess::default())
            .expect_err("a kernel runs");
    assert!(
        failure.to_string().ends_with("the driver says not ready (600); the server runs on"),
        "{failure}"
    );
    assert_eq!(failure.class(), Class::Failed);
    assert_eq!(helper.state(server.pid)?, State::RUNNING);
    assert_eq!(server.generate(), answer);
    // With enough time the same server can be locked.
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
    order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
    server.is_whole();
    Ok(())
}

fn a_checkpoint_that_fails_for_the_second_of_three_undoes_all() -> Result<(), Failed> {
    let mut world = World::new(&[128]);
    let servers = [(); 3].map(|()| world.serve(&["--mib", "4"]));
    let answers = servers.map(|server| server.generate());
    world.control(&format!("checkpoint@{} result 801", servers[1].pid));
    let mut helper = world.helper();
    let failure =
        order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default()).expect_err("refused");
    let text = format!(
        "checkpoint of process {}: the driver says not supported (801); the server runs on; managed memory and CUDA IPC are what drivers refuse so (docs/gpu.md)",
        servers[1].pid
    );
    assert_eq!(failure.to_string(), text);
    assert!(!world.group.is_frozen());
    for (server, answer) in servers.iter().zip(answers) {
        assert_eq!(helper.state(server.pid)?, State::RUNNING);
        server.is_whole();
        assert_eq!(server.generate(), answer);
    }
    Ok(())
}

fn a_failed_process_is_named_and_the_others_run() -> Result<(), Failed> {
    let mut world = World::new(&[128]);
    let servers = [(); 2].map(|()| world.serve(&["--mib", "4"]));
    let bad = servers[1].pid;
    world.control(&format!("checkpoint@{bad} failed"));
    let mut helper = world.helper();
    let failure =
        order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default()).expect_err("failed");
    assert_eq!(failure.aftermath, Aftermath::Stranded(vec![(bad, "failed".into())]));
    assert_eq!(failure.class(), Class::Stranded);
    assert!(
        failure.to_string().contains(&format!("process {bad} is left failed; only stopping")),
        "{failure}"
    );
    servers[0].is_whole();
    Ok(())
}

fn a_state_that_nobody_knows_counts_as_no_success() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "4"]);
    let mut helper = world.helper();
    helper.start()?;
    // The first question is asked before the lock; the second is answered with a state of the future.
    world.control("state*1 value 0\nstate*1 value 99");
    let failure =
        order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default()).expect_err("unknown");
    let lock = Step::Lock;
    assert!(
        matches!(&failure.cause, Cause::State { step, seen: State(99), .. } if *step == lock),
        "{failure}"
    );
    assert_eq!(failure.aftermath, Aftermath::Running);
    server.is_whole();
    // One that stays unknown is no state from which the server goes on.
    world.control("state value 99");
    let failure =
        order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default()).expect_err("unknown");
    assert_eq!(failure.aftermath, Aftermath::Stranded(vec![(server.pid, "unknown state 99".into())]));
    world.control("");
    server.is_whole();
    Ok(())
}

fn an_unlock_that_errs_although_it_was_done_is_done() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "4"]);
    let mut helper = world.helper();
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
    world.control("unlock then-result 401");
    order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
    server.is_whole();
    Ok(())
}

fn a_slow_driver_is_waited_for() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "4"]);
    let mut helper = world.helper();
    helper.start()?;
    let first = helper.pid();
    for call in ["thread", "state", "lock", "checkpoint", "restore", "unlock"] {
        world.control(&format!("{call}*1 wait 1200"));
        let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
        order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
        server.is_whole();
        world.control("");
    }
    assert_eq!(helper.pid(), first, "nothing of it was a reason to kill the helper");
    Ok(())
}

/// The helper is killed when its time is over; what it asked for goes on in the server, and the state tells when it is done.
fn a_call_that_goes_on_without_its_caller_counts_when_it_is_done() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "4"]);
    let mut helper = world.helper().with_deadline(Duration::from_millis(800));
    helper.start()?;
    let first = helper.pid();
    // 6 MiB in 1.5 seconds.
    world.control("checkpoint rate 4");
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
    assert_ne!(helper.pid(), first, "its time was over");
    assert!(world.group.is_frozen());
    world.control("restore rate 4");
    order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
    server.is_whole();
    Ok(())
}

fn a_call_that_never_returns_is_given_up_and_undone() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "4"]);
    let mut helper = world.helper().with_deadline(Duration::from_millis(1500));
    helper.start()?;
    let first = helper.pid();
    for (rule, done) in [
        ("lock hang", false),
        ("checkpoint hang", false),
        ("lock then-hang", true),
        ("checkpoint then-hang", true),
        ("thread*1 hang", false),
    ] {
        world.control(rule);
        let result = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default());
        world.control("");
        match result {
            Ok(suspended) if done => {
                order::resume(
                    &mut helper,
                    &world.group,
                    &suspended.processes,
                    &[],
                    &mut InProcess::default(),
                )?;
            }
            Err(failure) if !done => {
                assert!(failure.to_string().contains("no answer within 1 s"), "{rule}: {failure}");
                assert_eq!(failure.aftermath, Aftermath::Running, "{rule}");
            }
            other => panic!("{rule}: {other:?}"),
        }
        server.is_whole();
    }
    assert_ne!(helper.pid(), first, "a helper that hangs is replaced");
    Ok(())
}

fn a_call_of_the_way_back_that_never_returns_is_given_up_and_can_be_repeated() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "4"]);
    let mut helper = world.helper().with_deadline(Duration::from_millis(1500));
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
    for (rule, done) in [
        ("restore hang", false),
        ("restore then-hang", true),
        ("unlock hang", false),
        ("unlock then-hang", true),
        ("state hang", false),
    ] {
        let first = helper.pid();
        world.control(rule);
        let resume = |helper: &mut rewarm_gpu::Helper| {
            order::resume(helper, &world.group, &suspended.processes, &[], &mut InProcess::default())
        };
        // A helper that is started after the first hangs no more.
        let result = world.once(|| resume(&mut helper));
        assert_ne!(helper.pid(), first, "{rule}: a helper that hangs is replaced");
        match result {
            Ok(_) if done => {}
            Err(failure) if !done => {
                assert!(failure.to_string().contains("no answer within 1 s"), "{rule}: {failure}");
                assert_eq!(failure.aftermath, Aftermath::Suspended, "{rule}");
                assert!(world.group.is_frozen(), "{rule}");
                resume(&mut helper)?;
            }
            other => panic!("{rule}: {other:?}"),
        }
        server.is_whole();
        let again = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
        assert_eq!(again.bytes(), suspended.bytes(), "{rule}");
    }
    Ok(())
}

/// As CRIU leaves them: stopped, with device memory in host memory. A signal lets them go on.
struct Stopped<'a>(&'a crate::world::Freezer);

impl Stopped<'_> {
    fn tell(&self, signal: nix::sys::signal::Signal) {
        for pid in self.0.processes() {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).expect("it lives");
        }
    }
}

impl Group for Stopped<'_> {
    fn processes(&self) -> Vec<i32> {
        self.0.processes()
    }

    fn freeze(&self) -> std::io::Result<()> {
        self.0.freeze()
    }

    fn thaw(&self) -> std::io::Result<()> {
        self.tell(nix::sys::signal::Signal::SIGCONT);
        Ok(())
    }
}

fn a_call_that_never_returns_ends_the_beginning_of_a_clone() -> Result<(), Failed> {
    for (rule, done) in [
        ("restore hang", false),
        ("unlock hang", false),
        ("state hang", false),
        ("restore then-hang", true),
        ("unlock then-hang", true),
    ] {
        let mut world = World::new(&[64]);
        let server = world.serve(&["--mib", "4"]);
        let mut helper = world.helper().with_deadline(Duration::from_millis(1500));
        let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
        let stopped = Stopped(&world.group);
        stopped.tell(nix::sys::signal::Signal::SIGSTOP);
        world.group.thaw()?;
        world.control(rule);
        let begun = world.once(|| {
            order::begin(&mut helper, &stopped, suspended.processes.clone(), &[], &mut InProcess::default())
        });
        match begun {
            Ok(_) if done => server.is_whole(),
            // Its caller kills it.
            Err(cause) if !done => {
                assert!(cause.to_string().contains("no answer within 1 s"), "{rule}: {cause}");
            }
            other => panic!("{rule}: {other:?}"),
        }
    }
    Ok(())
}

/// Drivers were reported to hang at the end of a process that they had restored.
fn a_clone_that_is_given_up_is_off_its_devices_before_it_is_killed() -> Result<(), Failed> {
    for rule in ["unlock@SECOND result 401", "unlock@SECOND value 0", "restore@SECOND result 2"] {
        let mut world = World::new(&[64]);
        let servers = [(); 2].map(|()| world.serve(&["--mib", "4"]));
        let mut helper = world.helper();
        let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
        let stopped = Stopped(&world.group);
        stopped.tell(nix::sys::signal::Signal::SIGSTOP);
        world.group.thaw()?;
        let second = suspended.processes[1].pid;
        world.control(&rule.replace("SECOND", &second.to_string()));
        let state = &mut InProcess::default();
        order::begin(&mut helper, &stopped, suspended.processes, &[], state).expect_err("it fails");
        world.control("");
        for server in servers {
            assert_eq!(helper.state(server.pid)?, State::CHECKPOINTED, "{rule}");
        }
        assert_eq!(world.used(0), 0, "{rule}");
        assert!(world.group.is_frozen(), "{rule}: nothing of it runs meanwhile");
    }
    Ok(())
}

fn a_result_that_nobody_knows_is_told() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "4"]);
    world.control("checkpoint result 4321");
    let mut helper = world.helper();
    let failure =
        order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default()).expect_err("refused");
    assert!(failure.to_string().contains("result 4321, which this program does not know"), "{failure}");
    assert_eq!(failure.aftermath, Aftermath::Running);
    server.is_whole();
    Ok(())
}

/// The state that the driver tells is the same as before: `checkpointed`.
fn a_restore_that_broke_the_process_for_good_is_stranded() -> Result<(), Failed> {
    for (rule, first) in [("restore*1 oom", Class::Stranded), ("restore oom", Class::Failed)] {
        let mut world = World::new(&[64]);
        let (server, other) = (world.serve(&["--mib", "4"]), world.serve(&["--mib", "4"]));
        let mut helper = world.helper();
        let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
        let resume = |helper: &mut rewarm_gpu::Helper| {
            order::resume(helper, &world.group, &suspended.processes, &[], &mut InProcess::default())
                .expect_err("broken")
        };
        world.control(&rule.replace("restore", &format!("restore@{}", server.pid)));
        let failure = resume(&mut helper);
        assert!(failure.to_string().contains("out of memory (2)"), "{failure}");
        assert_eq!(failure.class(), first, "{failure}");
        // As long as the driver says the same it may still be true.
        world.control("");
        let failure = if first == Class::Stranded { failure } else { resume(&mut helper) };
        let seen = "checkpointed, and the driver will not restore it: operating system (304)";
        assert_eq!(failure.aftermath, Aftermath::Stranded(vec![(server.pid, seen.into())]), "{failure}");
        assert_eq!(failure.class(), Class::Stranded);
        assert!(world.group.is_frozen(), "what is not whole does not answer");
        for pid in [server.pid, other.pid] {
            assert_eq!(helper.state(pid)?, State::CHECKPOINTED);
        }
    }
    Ok(())
}

fn a_success_that_is_a_lie_is_found() -> Result<(), Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "4"]);
    let mut helper = world.helper();
    world.control("checkpoint value 0");
    let failure = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())
        .expect_err("nothing was done");
    let text = format!(
        "after checkpoint process {} is locked, expected checkpointed; the server runs on",
        server.pid
    );
    assert_eq!(failure.to_string(), text);
    world.control("");
    let suspended = order::suspend(&mut helper, &world.group, LOCK, &mut InProcess::default())?;
    world.control("restore value 0");
    let failure =
        order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())
            .expect_err("nothing was done");
    assert_eq!(failure.aftermath, Aftermath::Suspended, "{failure}");
    world.control("");
    order::resume(&mut helper, &world.group, &suspended.processes, &[], &mut InProcess::default())?;
    server.is_whole();
    assert_eq!(Code::SUCCESS, Code(0));
    Ok(())
}
