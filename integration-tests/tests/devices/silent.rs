//! Drivers that do not answer, or whose first call ends who makes it: `REWARM_GPU_PATIENCE` says how long is waited.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rewarm_integration_tests::checks::{answers, no_residue, server_answers_as_before};
use rewarm_integration_tests::devices::Devices;
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Replica, World, residue};

use super::world_with;

const PATIENCE: &str = "2s";
const LATE: &str = "no answer within 2 s, so the GPU helper was killed";
const PAUSED: &str = "the server stays paused and can be woken again";
const ENDED: &str = "the GPU helper ended during the call";

/// A server with device memory whose shim waits no longer than [`PATIENCE`] for the driver.
fn impatient<'w>(world: &'w World, devices: &Devices, server: &Server) -> Replica<'w> {
    let name = world.name("device");
    let call = devices.seen_by(world.run_call(&name, server, &[])).env("REWARM_GPU_PATIENCE", PATIENCE);
    Replica::of_run(world, name, server.port, &call.ok())
}

#[test]
fn a_pause_whose_driver_does_not_answer_leaves_the_server_serving() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = impatient(&world, &devices, &server);
    let (before, used) = (answers(&source, &server), devices.used_mib(0));
    // Its shim has no helper yet: the first one dies or hangs while it attaches.
    for (rule, text) in [
        ("init die", ENDED),
        ("init hang", LATE),
        ("machine die", ENDED),
        ("machine hang", LATE),
        ("devices die", ENDED),
        ("devices hang", LATE),
        ("lock hang", LATE),
        ("checkpoint hang", LATE),
    ] {
        devices.control(rule);
        let output = world.rewarm().args(["pause", source.name()]).fails(1);
        output.says(&[text, "the server runs on"]);
        assert!(devices.met_rule(), "{rule}");
        devices.control("");
        assert_eq!(source.entry().expect("listed")["status"], "ready", "{rule}");
        server_answers_as_before(&source, &server, &before);
        assert_eq!(devices.used_mib(0), used, "{rule}");
    }
    world.rewarm().args(["pause", source.name()]).ok();
    world.rewarm().args(["wake", source.name()]).ok();
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

/// The helper that paused it has ended meanwhile: another one has to attach first, and until then nothing was asked of the driver.
#[test]
fn a_wake_whose_helper_cannot_attach_leaves_the_server_paused() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let replica = impatient(&world, &devices, &server);
    let before = answers(&replica, &server);
    world.rewarm().args(["pause", replica.name()]).ok();
    let wake = || world.rewarm().args(["wake", replica.name()]);
    let is_helper = |(_, command): &(i32, String)| command.contains("gpu-helper");
    let (helper, _) = residue::processes(world.id()).into_iter().find(is_helper).expect("it made the pause");
    kill(Pid::from_raw(helper), Signal::SIGKILL).expect("it is there");
    wake().fails(1).says(&[ENDED, PAUSED]);
    for (rule, text) in [
        ("init die", ENDED),
        ("init hang", LATE),
        ("init result 999", "999"),
        ("machine die", ENDED),
        ("machine hang", LATE),
    ] {
        devices.control(rule);
        wake().fails(1).says(&[text, PAUSED]);
        assert!(devices.met_rule(), "{rule}");
        devices.control("");
        assert_eq!(replica.entry().expect("listed")["status"], "paused", "{rule}");
    }
    wake().ok();
    server_answers_as_before(&replica, &server, &before);
    world.finish();
}

/// What the snapshot has to know of the devices is asked when their memory is in host memory already.
#[test]
fn a_snapshot_that_hears_nothing_of_the_devices_after_the_checkpoint_leaves_the_server_serving() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = impatient(&world, &devices, &server);
    let (before, used) = (answers(&source, &server), devices.used_mib(0));
    for (rule, text) in [("devices die", ENDED), ("devices hang", LATE), ("devices result 999", "999")] {
        devices.control("checkpoint wait 1500");
        let running = world.snapshot_call(&source, "v1", &[]).spawn();
        devices.await_rule(&world);
        devices.control(&format!("{rule}\n"));
        let output = running.wait();
        output.expect_code(1);
        output.says(&[text]);
        assert!(devices.met_rule(), "{rule}");
        devices.control("");
        server_answers_as_before(&source, &server, &before);
        assert_eq!(devices.used_mib(0), used, "{rule}");
    }
    world.snapshot(&source, "v1", &[]);
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

#[test]
fn a_restore_whose_driver_does_not_answer_leaves_nothing() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = super::start(&world, &devices, "device", &server);
    let (before, used) = (answers(&source, &server), devices.used_mib(0));
    world.snapshot(&source, "v1", &[]);
    let (traces, name) = (world.traces(), world.name("clone"));
    let restore = || {
        let call = world.restore_call("device", "v1", server.port, &["--name", &name]);
        devices.seen_by(call).env("REWARM_GPU_PATIENCE", PATIENCE)
    };
    for (rule, text) in
        [("init die", ENDED), ("init hang", LATE), ("restore hang", LATE), ("unlock hang", LATE)]
    {
        devices.control(rule);
        restore().fails(1).says(&[text]);
        assert!(devices.met_rule(), "{rule}");
        devices.control("");
        no_residue(&world, &traces);
        assert_eq!(devices.used_mib(0), used, "{rule}: the source's");
    }
    let clones = Replica::of_restore(&world, server.port, &restore().ok());
    server_answers_as_before(&clones[0], &server, &before);
    server_answers_as_before(&source, &server, &before);
    world.finish();
}
