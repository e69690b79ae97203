//! Timers of every kind go on in a clone as docs/clones.md says: with the time they had left, alarms at a time of day at
//! that time.

use std::time::{Duration, Instant};

use rewarm_integration_tests::server::Server;

use crate::world_for;

/// How long the snapshot lies in the store: what is not counted against the timers.
const PAUSE: Duration = Duration::from_secs(4);
/// Seconds for which each timer is set.
const SET_S: f64 = 60.0;

/// Sets one timer of each kind for a minute, and tells how many seconds each has left. `missed` is set to a time of day that
/// has passed when the clone begins.
const TIMERS: &str = r#"
import ctypes, signal, struct, threading, time
libc = ctypes.CDLL(None, use_errno=True)
class Spec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("interval_s", "interval_ns", "value_s", "value_ns")]
def spec(seconds):
    return Spec(0, 0, int(seconds), int(seconds % 1 * 1e9))
REALTIME, MONOTONIC, ABSTIME = 0, 1, 1
for number in (signal.SIGALRM, signal.SIGVTALRM):
    signal.signal(number, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 60)
signal.setitimer(signal.ITIMER_VIRTUAL, 60)
posix = {}
for name, clock in (("posix-realtime", REALTIME), ("posix-monotonic", MONOTONIC)):
    # SIGEV_NONE: it only counts.
    event = (ctypes.c_char * 64)(*struct.pack("qii", 0, 0, 1).ljust(64, b"\0"))
    timer = ctypes.c_void_p()
    assert libc.timer_create(clock, event, ctypes.byref(timer)) == 0
    assert libc.timer_settime(timer, 0, ctypes.byref(spec(60)), None) == 0
    posix[name] = timer
descriptors = {}
for name, clock, flags, seconds in (
    ("descriptor", MONOTONIC, 0, 60),
    ("time-of-day", REALTIME, ABSTIME, time.time() + 60),
    ("missed", REALTIME, ABSTIME, time.time() + SOON),
):
    fd = libc.timerfd_create(clock, 0o4000)
    assert libc.timerfd_settime(fd, flags, ctypes.byref(spec(seconds)), None) == 0
    descriptors[name] = fd
def timers():
    left = {"alarm": signal.getitimer(signal.ITIMER_REAL)[0], "virtual": signal.getitimer(signal.ITIMER_VIRTUAL)[0]}
    value = Spec()
    for name, timer in posix.items():
        libc.timer_gettime(timer, ctypes.byref(value))
        left[name] = value.value_s + value.value_ns / 1e9
    for name, fd in descriptors.items():
        libc.timerfd_gettime(fd, ctypes.byref(value))
        left[name] = value.value_s + value.value_ns / 1e9
    return left
"#;

#[test]
fn every_kind_of_timer_goes_on() {
    let mut server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    // Set while the snapshot is being made, and over when its clone begins.
    let timers = TIMERS.replace("SOON", &(PAUSE.as_secs_f64() - 0.5).to_string());
    let answer = "        elif self.path == \"/timers\":\n            self.answer(200, timers())\n        elif self.path == \"/environment\":";
    server.command[2] = format!(
        "{timers}\n{}",
        server.command[2].replace("        elif self.path == \"/environment\":", answer)
    );
    let source = world.start("plain", &server);
    let started = Instant::now();
    world.snapshot(&source, "v1", &["--stop"]);
    let age = started.elapsed().as_secs_f64();
    std::thread::sleep(PAUSE);
    let pause = Instant::now();
    let clones = world.restore("plain", "v1", server.port, &[]);
    let left = clones[0].json("/timers");
    // What the clone has lived, and what the source had lived at most.
    let lived = pause.elapsed().as_secs_f64() + age + 1.0;
    let of = |name: &str| left[name].as_f64().unwrap_or_else(|| panic!("no {name} in {left}"));
    for name in ["alarm", "posix-realtime", "posix-monotonic", "descriptor"] {
        assert!(
            of(name) > SET_S - lived && of(name) < SET_S,
            "{name}: the time in the store counted: {left}"
        );
    }
    assert!(of("virtual") > SET_S - 5.0, "{left}");
    let passed = PAUSE.as_secs_f64();
    assert!(of("time-of-day") < SET_S - passed && of("time-of-day") > SET_S - passed - lived, "{left}");
    assert!(of("missed") < f64::EPSILON, "an alarm that was missed has not gone off: {left}");
    world.finish();
}
