//! Snapshots that are given up while the devices have nothing of the server: between the driver's checkpoint and its restore.

use std::time::Duration;

use rewarm_gpu_sim::VERSION_ENV;
use rewarm_integration_tests::checks::{answers, no_residue, server_answers_as_before, visible};
use rewarm_integration_tests::command::Rewarm;
use rewarm_integration_tests::devices::Devices;
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Replica, World};
use rewarm_report::Stage;

use super::luck::kill_shim;
use super::world_with;

/// Keeps a socket for Multipath TCP: only CRIU sees that it cannot carry it.
const MULTIPATH: &str =
    "import signal, socket; kept = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262); signal.pause()";

/// Each way of device memory, with and without an end of the server.
const WAYS: [&[&str]; 4] = [&[], &["--stop"], &["--gpu-direct"], &["--gpu-direct", "--stop"]];

/// Every call is followed and noted.
const NOTED: &str = "lock wait 0\ncheckpoint wait 0\nrestore wait 0\nunlock wait 0";

/// More than the snapshot's deadline and what the shim allows beside it.
const PAST_THE_DEADLINE: Duration = Duration::from_secs(6);

/// A driver that knows both ways.
fn seen_by(devices: &Devices, call: Rewarm) -> Rewarm {
    devices.seen_by(call).env(VERSION_ENV, "13040")
}

/// A server whose shim has its helper, which it has from the first use on.
fn with_helper<'w>(world: &'w World, devices: &Devices, server: &Server) -> Replica<'w> {
    let name = world.name("device");
    let output = seen_by(devices, world.run_call(&name, server, &[])).ok();
    let source = Replica::of_run(world, name, server.port, &output);
    for verb in ["pause", "wake"] {
        world.rewarm().args([verb, source.name()]).ok();
    }
    source
}

#[test]
fn a_server_that_criu_refuses_gets_its_devices_back() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let mut server = devices.server(16);
    let workload = server.command.join(" ");
    let command = format!("/usr/bin/python3 -c '{MULTIPATH}' & exec {workload}");
    server.command = ["sh", "-c", &command].map(str::to_owned).into();
    let source = with_helper(&world, &devices, &server);
    let (before, used) = (answers(&source, &server), devices.used_mib(0));
    let traces = world.traces();
    for way in WAYS {
        devices.control(NOTED);
        let output = world.snapshot_call(&source, "v1", way).fails(1);
        output.says(&[
            "criu could not dump the server",
            "Unsupported proto 262",
            "the server goes on serving",
        ]);
        assert_eq!(devices.met(), NOTED.lines().collect::<Vec<_>>(), "{way:?}");
        devices.control("");
        server_answers_as_before(&source, &server, &before);
        assert_eq!(devices.used_mib(0), used, "{way:?}");
        assert_eq!(source.entry().expect("it is listed")["status"], "ready");
        no_residue(&world, &traces);
        assert!(!visible(&world).to_string().contains(source.name()), "a snapshot is visible");
    }
    world.finish();
}

#[test]
fn a_server_that_is_frozen_for_too_long_gets_its_devices_back() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = with_helper(&world, &devices, &server);
    let (before, used) = (answers(&source, &server), devices.used_mib(0));
    let traces = world.traces();
    for way in WAYS {
        devices.control(NOTED);
        let flags = [&["--freeze-timeout", "1s"], way].concat();
        let mut running = world.snapshot_call(&source, "v1", &flags).pause_at(Stage::Delta).spawn();
        running.await_stderr("paused at delta");
        assert_eq!(devices.used_mib(0), 0, "{way:?}: it is on no device while it is dumped");
        // It is not the command that lets it go on, which still waits. One that is to be stopped was frozen by the command.
        let has_all = || devices.used_mib(0) == used && devices.met().len() == NOTED.lines().count();
        if way.contains(&"--stop") {
            std::thread::sleep(PAST_THE_DEADLINE);
        } else {
            world.await_state("it has its devices again", Duration::from_secs(20), has_all);
        }
        running.go_on();
        let output = running.wait();
        output.expect_code(1);
        output.says(&["the server goes on serving"]);
        assert_eq!(devices.met(), NOTED.lines().collect::<Vec<_>>(), "{way:?}");
        devices.control("");
        server_answers_as_before(&source, &server, &before);
        assert_eq!(devices.used_mib(0), used, "{way:?}");
        assert_eq!(source.entry().expect("it is listed")["status"], "ready");
        no_residue(&world, &traces);
        assert!(!visible(&world).to_string().contains(source.name()), "a snapshot is visible");
    }
    world.snapshot(&source, "v1", &[]);
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

/// Its server is frozen and on no device then, and nobody is left who could put it back.
#[test]
fn a_shim_killed_while_its_server_is_dumped_leaves_nothing() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    for way in WAYS {
        let traces = world.traces();
        let name = world.name("device");
        let output = seen_by(&devices, world.run_call(&name, &server, &[])).ok();
        let source = Replica::of_run(&world, name, server.port, &output);
        let mut running = world.snapshot_call(&source, "v1", way).pause_at(Stage::Delta).spawn();
        running.await_stderr("paused at delta");
        assert_eq!(devices.used_mib(0), 0, "{way:?}: it is on no device while it is dumped");
        kill_shim(&source);
        running.go_on();
        let output = running.wait();
        assert!(matches!(output.code, Some(1 | 6)), "{way:?}: {output}");
        // The next command finds what is left, and takes it away.
        world.await_state("the replica is gone", Duration::from_secs(20), || {
            source.entry().is_none_or(|entry| entry["status"] == "crashed")
        });
        assert_eq!(devices.used_mib(0), 0, "{way:?}");
        let _ = world.rewarm().args(["rm", source.name()]).run();
        no_residue(&world, &traces);
        assert!(!visible(&world).to_string().contains(source.name()), "a snapshot is visible");
    }
    world.finish();
}
