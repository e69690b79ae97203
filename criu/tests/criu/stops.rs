//! A tree that comes back stopped: no parent in it has seen a child stop.

use rewarm_criu::config::Config;
use rewarm_criu::patch;

use crate::needs;
use crate::world::{World, wait_for};

const CHILD_SIGNAL: u64 = 1 << 16;
const USER_SIGNAL: u64 = 1 << 9;

/// A parent with two threads, of which one blocks another signal, and a child with the same handler.
const FAMILY: &str = "
import os, signal, threading, time
seen = []
signal.signal(signal.SIGCHLD, HANDLER)
def wait():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    ready.set()
    threading.Event().wait()
ready = threading.Event()
threading.Thread(target=wait, daemon=True).start()
ready.wait()
child = os.fork()
if child == 0:
    while True: time.sleep(1)
";

/// A field of a thread that holds a set of signals.
fn set(process: u32, thread: u32, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/task/{thread}/status")).expect("it lives");
    let value = status.lines().find_map(|line| line.strip_prefix(name)).expect("the kernel tells");
    u64::from_str_radix(value.trim(), 16).expect("a set")
}

fn is_stopped(process: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
}

#[test]
fn a_parent_that_stops_late_has_not_seen_its_child_stop() {
    let Some(criu) = needs::criu() else { return };
    for (handler, hears) in [("lambda *seen_now: seen.append(1)", true), ("signal.SIG_DFL", false)] {
        let mut world = World::start(criu.clone());
        world.run(&FAMILY.replace("HANDLER", handler));
        let child = world.number("child") as u32;
        world.dump();
        let mut changed = patch::block_child_stops(&world.images()).expect("patched");
        changed.sort_unstable();
        assert_eq!(changed.len(), if hears { 2 } else { 0 }, "{changed:?}");
        assert_eq!(patch::block_child_stops(&world.images()).expect("patched"), [0_u32; 0], "twice");
        world.criu("restore", &Config::restore().leave_stopped(), None, |command| command).succeeds();
        let parent = world.pid();
        wait_for("both to stop", || (is_stopped(parent) && is_stopped(child)).then_some(()));
        assert_eq!(set(child, child, "SigBlk:") & CHILD_SIGNAL, 0);
        assert_eq!(set(parent, parent, "ShdPnd:") & CHILD_SIGNAL != 0, hears);
        let threads: Vec<u32> = std::fs::read_dir(format!("/proc/{parent}/task"))
            .expect("it lives")
            .map(|task| {
                task.expect("an entry").file_name().to_str().expect("a number").parse().expect("a number")
            })
            .collect();
        assert_eq!(threads.len(), 2);
        for thread in threads {
            let blocked = set(parent, thread, "SigBlk:");
            assert_eq!(blocked & CHILD_SIGNAL != 0, hears, "{thread}");
            assert_eq!(blocked & USER_SIGNAL != 0, thread != parent, "{thread}: what it blocks itself");
            assert_eq!(changed.contains(&thread), hears, "{thread}");
        }
    }
}
