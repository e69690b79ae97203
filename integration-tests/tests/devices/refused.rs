//! What `pause` and `snapshot` refuse by what they read of a living server: a debugger, a limit of memory.

use std::sync::mpsc;

use nix::sys::ptrace;
use nix::unistd::{Pid, gettid};
use rewarm_integration_tests::checks::{answers, server_answers_as_before};
use rewarm_integration_tests::{Output, Replica};

use super::{start, world_with};

/// Does `work` while a debugger, of which it is told the number, has the first thread of a process. The thread runs on.
fn traced(pid: i32, work: impl FnOnce(Pid)) {
    std::thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        scope.spawn(move || {
            ptrace::seize(Pid::from_raw(pid), ptrace::Options::empty()).expect("nobody else has it");
            tell.send(gettid()).expect("it is waited for");
            // What it has is let go with the end of this thread.
            let _ = ended.recv();
        });
        work(told.recv().expect("it has the thread"));
        drop(end);
    });
}

/// What a pause and a snapshot of it say, both with exit 3.
fn refusals(source: &Replica<'_>) -> [Output; 2] {
    let world = source.world();
    let pause = world.rewarm().args(["pause", source.name()]).fails(3);
    [pause, world.snapshot_call(source, "v1", &[]).fails(3)]
}

#[test]
fn a_server_that_a_debugger_has_is_refused_before_anything_is_locked() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    let pid = source.entry().and_then(|entry| entry["pid"].as_i64()).expect("it is listed");
    let pid = i32::try_from(pid).expect("a process");
    // A lock would be seen.
    devices.control("lock die");
    traced(pid, |tracer| {
        for output in refusals(&source) {
            output.says(&[&format!(
                "thread {pid} of process {pid} is traced by process {tracer}; end that debugger first"
            )]);
        }
        assert!(!devices.met_rule(), "the driver was called: {:?}", devices.met());
        server_answers_as_before(&source, &server, &before);
    });
    devices.control("");
    world.rewarm().args(["pause", source.name()]).ok();
    world.rewarm().args(["wake", source.name()]).ok();
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

/// Memory of simulated devices counts for the replica, so the limit has to have room for it once.
#[test]
fn a_limit_without_room_for_device_memory_is_refused_before_anything_is_locked() {
    const DEVICE_BYTES: u64 = (64 + 2) << 20;
    let Some((world, devices)) = world_with(&[128]) else { return };
    let server = devices.server(64);
    let name = world.name("device");
    let call = devices.seen_by(world.run_call(&name, &server, &["--memory", "120MiB"]));
    let source = Replica::of_run(&world, name, server.port, &call.ok());
    let before = answers(&source, &server);
    devices.control("lock die");
    for output in refusals(&source) {
        let said = output.to_string();
        let needed = format!("{DEVICE_BYTES} bytes of device memory go into host memory, of which ");
        let rest = said.split_once(&needed).unwrap_or_else(|| panic!("no {needed:?} in {output}")).1;
        let (free, rest) = rest.split_once(' ').expect("a number");
        let free: u64 = free.parse().expect("a number");
        assert!(free < DEVICE_BYTES && rest.starts_with("are free within the replica's limit"), "{output}");
    }
    assert!(!devices.met_rule(), "the driver was called: {:?}", devices.met());
    devices.control("");
    server_answers_as_before(&source, &server, &before);
    world.finish();
}
