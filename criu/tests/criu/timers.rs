//! Timers and clocks of a restored process go on as if no time had passed.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rewarm_criu::config::Config;
use rewarm_criu::image::files::{self, FileKind, Timerfd};
use rewarm_criu::image::namespaces::{self, Clocks};
use rewarm_criu::patch;

use crate::needs;
use crate::world::{World, wait_for};

/// Timer descriptors by libc, which Python knows only from 3.13 on.
const TIMERFD: &str = "
import ctypes, os, select, struct, time
libc = ctypes.CDLL(None, use_errno=True)
def timerfd(clock, flags, value, interval):
    fd = libc.timerfd_create(clock, 0)
    split = lambda s: (int(s), int((s - int(s)) * 1e9))
    spec = struct.pack('4q', *split(interval), *split(value))
    assert fd >= 0 and libc.timerfd_settime(fd, flags, spec, None) == 0
    return fd
def ticks(fd, patience):
    ready, _, _ = select.select([fd], [], [], patience)
    return struct.unpack('Q', os.read(fd, 8))[0] if ready else 0
";

fn timerfds(world: &World) -> Vec<Timerfd> {
    let files = files::read(&world.images()).expect("open files");
    files
        .into_iter()
        .filter_map(|file| if let FileKind::Timerfd(timer) = file.kind { Some(timer) } else { None })
        .collect()
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970")
}

#[test]
fn a_periodic_timer_that_expired_while_frozen_goes_on() {
    let Some(criu) = needs::criu() else { return };
    let mut world = World::start(criu);
    world.run(TIMERFD);
    // A period so short that it expires between the freeze and the moment at which CRIU looks.
    world.run("timer = timerfd(time.CLOCK_MONOTONIC, 0, 0.002, 0.002)");
    world.dump();
    let before = timerfds(&world);
    assert!(
        matches!(before[..], [Timerfd { value: Duration::ZERO, .. }]),
        "the case did not arise: {before:?}"
    );

    let rearmed = patch::rearm_timerfds(&world.images()).expect("mended");
    assert_eq!(rearmed.len(), 1);
    assert_eq!(timerfds(&world), [rearmed[0].after]);
    assert!(patch::rearm_timerfds(&world.images()).expect("looked at").is_empty(), "mended twice");
    world.restore();
    assert!(world.number("ticks(timer, 10)") >= 1.0, "never expired");
    // The first expiration can be one from before the dump; the second cannot.
    world.run("time.sleep(0.01)");
    assert!(world.number("ticks(timer, 10)") >= 1.0, "expired once and never again");
}

#[test]
fn a_timer_set_to_an_absolute_time_does_not_expire_early() {
    let Some(criu) = needs::criu() else { return };
    let mut world = World::start(criu);
    world.run(TIMERFD);
    world.run("deadline = time.clock_gettime(time.CLOCK_MONOTONIC) + 4");
    world.run("steady = timerfd(time.CLOCK_MONOTONIC, 1, deadline, 0)");
    world.dump();
    let rearmed = patch::rearm_timerfds(&world.images()).expect("mended");
    assert_eq!(rearmed.len(), 1);
    assert!(rearmed[0].before.settime_flags == 1 && rearmed[0].after.settime_flags == 0, "{rearmed:?}");
    // CRIU's way is early by the fraction of the clock's second at the restore: late in a second it shows.
    wait_for("the end of a second", || (now().subsec_millis() > 600).then_some(()));
    world.restore();
    assert_eq!(world.number("ticks(steady, 60)"), 1.0);
    let late = world.number("time.clock_gettime(time.CLOCK_MONOTONIC) - deadline");
    assert!((0.0..30.0).contains(&late), "{late}");
}

#[test]
fn an_alarm_stays_at_its_time_of_day() {
    let Some(criu) = needs::criu() else { return };
    let mut world = World::start(criu);
    world.run(TIMERFD);
    world.run("alarm = timerfd(time.CLOCK_REALTIME, 1, time.time() + 2000, 0)");
    world.run("missed = timerfd(time.CLOCK_REALTIME, 1, time.time() + 1000, 0)");
    world.run("idle = timerfd(time.CLOCK_REALTIME, 1, 0, 0)");
    world.dump();
    let rearmed = patch::rearm_timerfds(&world.images()).expect("mended");
    assert!(matches!(rearmed[..], [patch::Rearmed { after, .. }] if after.value.is_zero()), "{rearmed:?}");
    let moved = patch::forward_alarms(&world.images(), Duration::from_secs(1500)).expect("patched");
    assert_eq!(moved.len(), 2, "{moved:?}");
    world.restore();
    let info = world.run("open('/proc/self/fdinfo/%d' % alarm).read()");
    let (_, value) = info.split_once("it_value: (").expect("a value");
    let left: u64 = value.split_once(',').expect("seconds").0.parse().expect("a number");
    assert!((400..=500).contains(&left), "{left}");
    assert_eq!(world.number("ticks(missed, 10)"), 1.0);
    assert_eq!(world.number("ticks(idle, 0)"), 0.0);
}

/// An event loop that notes down a deadline by its own clock, as libuv and asyncio do.
const LOOP: &str = "
import threading, time
beats = []
def beat():
    deadline = time.monotonic()
    while True:
        deadline += 0.05
        time.sleep(max(0, deadline - time.monotonic()))
        beats.append(time.monotonic())
threading.Thread(target=beat, daemon=True).start()
";

#[test]
fn an_event_loop_goes_on_under_a_clock_with_another_offset() {
    let Some(criu) = needs::criu() else { return };
    // Another boot: clocks that are a day ahead, and clocks that have only just begun.
    for offset in ["100000", "behind"] {
        let mut world = World::start(criu.clone());
        world.run(LOOP);
        world.run("while len(beats) < 3: time.sleep(0.01)");
        let before = world.number("time.monotonic()");
        world.dump();
        let clocks = namespaces::clocks(&world.images()).expect("readable").expect("time namespaces");
        assert!(clocks.monotonic.as_secs_f64() >= before);
        let offset = if offset == "behind" {
            let uptime = std::fs::read_to_string("/proc/uptime").expect("uptime");
            let uptime: f64 = uptime.split(' ').next().and_then(|text| text.parse().ok()).expect("a number");
            format!("-{}", (uptime - 5.0) as u64)
        } else {
            offset.to_owned()
        };
        world.restore_with(|command| {
            let mut wrapped = std::process::Command::new("unshare");
            wrapped.args(["--time", "--monotonic", &offset, "--boottime", &offset, "--"]);
            wrapped.arg(command.get_program()).args(command.get_args());
            wrapped
        });
        let after = world.number("time.monotonic()");
        assert!((before..before + 60.0).contains(&after), "offset {offset}: {before} became {after}");
        let beats = world.number("len(beats)");
        world.run(&format!("while len(beats) < {beats} + 5: time.sleep(0.01)"));
        // No burst of beats that were missed, no pause until a deadline of another clock.
        let gaps = "max(b - a for a, b in zip(beats[-5:], beats[-4:]))";
        assert!(world.number(gaps) < 5.0);
    }
}

#[test]
fn the_clocks_in_the_images_are_the_ones_that_count() {
    let Some(criu) = needs::criu() else { return };
    let mut world = World::start(criu);
    world.run("import time");
    world.dump();
    let clocks =
        Clocks { monotonic: Duration::from_secs(5_000_000), boottime: Duration::from_secs(6_000_000) };
    assert_eq!(patch::set_clocks(&world.images(), clocks).expect("patched"), 1);
    assert_eq!(namespaces::clocks(&world.images()).expect("readable"), Some(clocks));
    world.restore();
    assert!((5e6..5e6 + 60.0).contains(&world.number("time.monotonic()")));
    assert!((6e6..6e6 + 60.0).contains(&world.number("time.clock_gettime(time.CLOCK_BOOTTIME)")));
}

#[test]
fn a_replica_that_was_restored_can_be_dumped_again() {
    let Some(criu) = needs::criu() else { return };
    let mut world = World::start(criu);
    world.run("import time");
    let clocks =
        Clocks { monotonic: Duration::from_secs(5_000_000), boottime: Duration::from_secs(5_000_000) };
    world.dump();
    patch::set_clocks(&world.images(), clocks).expect("patched");
    world.restore();
    // The clocks of the second dump are those of the time namespace that CRIU made, under another number.
    world.clear_images();
    world.dump();
    let second = namespaces::clocks(&world.images()).expect("readable").expect("clocks");
    assert!((5_000_000..5_000_060).contains(&second.monotonic.as_secs()), "{second:?}");
    world.restore();
    assert!((5e6..5e6 + 60.0).contains(&world.number("time.monotonic()")));
}

/// A thread that waits with a relative timeout, in C: Python would wait again by itself.
const WAITER: &str = "
import ctypes, threading, time
libc = ctypes.CDLL(None, use_errno=True)
outcome = []
def wait():
    outcome.append((libc.poll(None, 0, 60000), ctypes.get_errno()))
threading.Thread(target=wait, daemon=True).start()
time.sleep(0.2)
";

#[test]
fn a_wait_with_a_relative_timeout_ends_early_in_source_and_clone() {
    let Some(criu) = needs::criu() else { return };
    let world = World::start(criu);
    world.run(WAITER);
    let config = Config::dump_to_images().leave_running();
    world.criu("dump", &config, None, |command| command).succeeds();
    let interrupted = "[(-1, 4)]";
    world.run("while not outcome: time.sleep(0.01)");
    assert_eq!(world.run("outcome"), interrupted);
    world.kill();
    world.restore();
    world.run("while not outcome: time.sleep(0.01)");
    assert_eq!(world.run("outcome"), interrupted);
}
