//! The claims of `docs/gpu.md` about the driver, carried out one by one. Each leaves a line of JSON with what was expected
//! and what was seen, in the form in which runs on hardware are kept.

use std::fmt::Write as _;
use std::fs;
use std::time::{Duration, Instant};

use libtest_mimic::{Failed, Trial};
use rewarm_gpu::{CallError, Helper, State, order};

use crate::world::{LOCK, World};

pub(crate) fn trials() -> Vec<Trial> {
    vec![Trial::test(
        "claims::the_simulated_driver_does_what_the_documentation_says",
        the_simulated_driver_does_what_the_documentation_says,
    )]
}

/// Number in the documentation, what is expected, and how it is seen.
type Claim = (u32, &'static str, fn() -> Result<String, Failed>);

const CLAIMS: [Claim; 10] = [
    (1, "13.0", || Ok(World::new(&[64]).helper().start()?.to_string())),
    (3, "a thread of the process whose name is cuda and 11 hexadecimal digits", the_thread_has_its_name),
    (4, "none", a_process_without_cuda_has_no_thread),
    (6, "401 and locked", a_step_out_of_order),
    (7, "600 and running", a_lock_under_a_kernel),
    (8, "late and locked", a_frozen_process_blocks_steps_and_can_be_asked),
    (10, "0 nodes", nothing_is_held_after_a_checkpoint),
    (13, "locked", || after_a_restore(|helper, pid| Ok(helper.state(pid)?.to_string()))),
    (18, "0 MiB", memory_of_a_killed_process),
    (20, "none", a_forked_child_has_no_thread),
];

fn the_simulated_driver_does_what_the_documentation_says() -> Result<(), Failed> {
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/gpu.md"))?;
    let (mut lines, mut wrong) = (String::new(), Vec::new());
    for (number, expected, check) in CLAIMS {
        let row = format!("| {number} | ");
        assert!(page.lines().any(|line| line.starts_with(&row)), "claim {number} is not in docs/gpu.md");
        let seen = check().unwrap_or_else(|error| format!("error: {error:?}"));
        let line = serde_json::json!({
            "claim": number, "expected": expected, "seen": seen, "machine": "simulated", "driver": "simulated",
        });
        writeln!(lines, "{line}")?;
        if seen != expected {
            wrong.push(line.to_string());
        }
    }
    fs::write(concat!(env!("CARGO_TARGET_TMPDIR"), "/claims-simulated.jsonl"), &lines)?;
    if wrong.is_empty() { Ok(()) } else { Err(wrong.join("\n").into()) }
}

fn code(result: Result<Duration, CallError>) -> String {
    match result {
        Ok(_) => "0".to_owned(),
        Err(CallError::Late { .. }) => "late".to_owned(),
        Err(error) => error.code().map_or_else(|| error.to_string(), |code| code.0.to_string()),
    }
}

fn the_thread_has_its_name() -> Result<String, Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "2"]);
    let thread = world.helper().restore_thread(server.pid)?.ok_or("no thread")?;
    let name = fs::read_to_string(format!("/proc/{}/task/{thread}/comm", server.pid))?;
    let digits = name.trim().strip_prefix("cuda").unwrap_or_default();
    let fits = digits.len() == 11 && digits.chars().all(|digit| digit.is_ascii_hexdigit());
    Ok(if fits { CLAIMS[1].1.to_owned() } else { format!("{thread} called {name}") })
}

fn a_process_without_cuda_has_no_thread() -> Result<String, Failed> {
    let world = World::new(&[64]);
    let own = std::process::id().cast_signed();
    Ok(world.helper().restore_thread(own)?.map_or_else(|| "none".to_owned(), |thread| thread.to_string()))
}

fn a_step_out_of_order() -> Result<String, Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "2", "--threads", "0"]);
    let mut helper = world.helper();
    helper.lock(server.pid, LOCK)?;
    let refused = code(helper.restore(server.pid, 0, &[]));
    Ok(format!("{refused} and {}", helper.state(server.pid)?))
}

fn a_lock_under_a_kernel() -> Result<String, Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "2"]);
    server.ask("POST", "/kernel?1000", "")?;
    let mut helper = world.helper();
    let refused = code(helper.lock(server.pid, Duration::from_millis(50)));
    Ok(format!("{refused} and {}", helper.state(server.pid)?))
}

fn a_frozen_process_blocks_steps_and_can_be_asked() -> Result<String, Failed> {
    use rewarm_gpu::Group;
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "2", "--threads", "0"]);
    let mut helper = world.helper();
    helper.lock(server.pid, LOCK)?;
    world.group.freeze()?;
    let mut helper = helper.with_deadline(Duration::from_millis(300));
    let blocked = code(helper.checkpoint(server.pid, 0));
    Ok(format!("{blocked} and {}", helper.state(server.pid)?))
}

fn nothing_is_held_after_a_checkpoint() -> Result<String, Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "2"]);
    order::suspend(&mut world.helper(), &world.group, LOCK)?;
    Ok(format!("{} nodes", server.nodes().len()))
}

fn after_a_restore(look: fn(&mut Helper, i32) -> Result<String, Failed>) -> Result<String, Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "2", "--threads", "0"]);
    let mut helper = world.helper();
    helper.lock(server.pid, LOCK)?;
    helper.checkpoint(server.pid, 0)?;
    helper.restore(server.pid, 0, &[])?;
    let seen = look(&mut helper, server.pid)?;
    helper.unlock(server.pid)?;
    server.is_whole();
    Ok(seen)
}

fn memory_of_a_killed_process() -> Result<String, Failed> {
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "2"]);
    world.kill(server.pid);
    Ok(format!("{} MiB", world.used(0) >> 20))
}

fn a_forked_child_has_no_thread() -> Result<String, Failed> {
    use rewarm_gpu::Group;
    let mut world = World::new(&[64]);
    let server = world.serve(&["--mib", "2"]);
    server.ask("POST", "/fork", "")?;
    let deadline = Instant::now() + LOCK;
    let child = loop {
        let child = world.group.processes().into_iter().find(|pid| *pid != server.pid);
        match child {
            Some(child) => break child,
            None if Instant::now() > deadline => return Err("no child".into()),
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let mut helper = world.helper();
    assert_eq!(helper.state(server.pid)?, State::RUNNING);
    Ok(helper.restore_thread(child)?.map_or_else(|| "none".to_owned(), |thread| thread.to_string()))
}
