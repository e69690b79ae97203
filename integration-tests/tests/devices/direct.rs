//! `--gpu-direct`: device memory that goes past the server's own, by the custom storage of CUDA 13.4.

use nix::sys::signal::Signal;
use rewarm_gpu_sim::VERSION_ENV;
use rewarm_integration_tests::checks::{answers, no_residue, server_answers_as_before, visible};
use rewarm_integration_tests::command::Rewarm;
use rewarm_integration_tests::devices::Devices;
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Replica, World};

use super::world_with;

const GPU: &str = "GPU-00000000-0000-0000-0000-0000000000d0";

/// A call whose replica finds a driver that has custom storage.
fn new_driver(devices: &Devices, call: Rewarm) -> Rewarm {
    devices.seen_by(call).env(VERSION_ENV, "13040")
}

fn start<'w>(world: &'w World, devices: &Devices, server: &Server) -> Replica<'w> {
    let name = world.name(server.name);
    let output = new_driver(devices, world.run_call(&name, server, &[])).ok();
    Replica::of_run(world, name, server.port, &output)
}

fn restore(world: &World, devices: &Devices, server: &Server, flags: &[&str]) -> Rewarm {
    new_driver(devices, world.restore_call(server.name, "v1", server.port, flags))
}

#[test]
fn device_memory_goes_to_the_store_and_back_without_a_copy_in_the_server() {
    let Some((world, devices)) = world_with(&[256, 256]) else { return };
    for server in [devices.server(32), devices.python_server()] {
        let source = start(&world, &devices, &server);
        let before = answers(&source, &server);
        let used = devices.used_mib(0);
        for stop in [&["--gpu-direct"][..], &["--gpu-direct", "--stop"]] {
            world.snapshot(&source, "v1", stop);
            if stop.len() == 1 {
                server_answers_as_before(&source, &server, &before);
                assert_eq!(devices.used_mib(0), used, "the source has its device memory again");
            }
        }
        assert_eq!(devices.used_mib(0), 0);
        world.rewarm().args(["rm", source.name()]).ok();
        let inspected =
            world.rewarm_json().args(["inspect", &world.reference(server.name, "v1")]).ok().json();
        let manifest = &inspected["variants"][0]["manifest"];
        let process = &manifest["facts"]["device"]["processes"][0];
        assert_eq!(process["copies"], serde_json::json!([]), "nothing lay in the server's own memory");
        assert_eq!(process["direct"][0]["gpu"], GPU);
        assert_eq!(process["direct"][0]["bytes"].as_u64(), Some(used << 20));
        let regions = manifest["regions"].as_array().expect("a list");
        let device = regions.iter().find(|region| region["kind"] == "device").expect("its device memory");
        assert_eq!((&device["direct"], &device["gpu"]), (&true.into(), &GPU.into()));
        // Zero pages have no bytes in the store.
        assert!(device["bytes"].as_u64().is_some_and(|bytes| bytes > 0 && bytes < used << 20), "{device}");
        for mode in ["lazy", "eager", "auto"] {
            let name = world.name(mode);
            let call = restore(&world, &devices, &server, &["--name", &name, "--mode", mode]);
            let clones = Replica::of_restore(&world, server.port, &call.ok());
            assert_eq!(devices.used_mib(0), used, "{mode}");
            server_answers_as_before(&clones[0], &server, &before);
            // What came past its memory goes into it at a pause, and back.
            world.rewarm().args(["pause", &name]).ok();
            assert_eq!(devices.used_mib(0), 0);
            world.rewarm().args(["wake", &name]).ok();
            server_answers_as_before(&clones[0], &server, &before);
            clones[0].remove();
        }
        let second = "GPU-00000000-0000-0000-0000-0000000000d1";
        let call = restore(&world, &devices, &server, &["--gpu", second, "--count", "2"]);
        let clones = Replica::of_restore(&world, server.port, &call.ok());
        assert_eq!((devices.used_mib(0), devices.used_mib(1)), (0, 2 * used));
        for clone in clones {
            server_answers_as_before(&clone, &server, &before);
            clone.remove();
        }
    }
    world.finish();
}

#[test]
fn a_snapshot_that_fails_or_is_killed_on_the_way_leaves_the_server_serving() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, &server);
    let before = answers(&source, &server);
    let used = devices.used_mib(0);
    for stop in [&["--gpu-direct"][..], &["--gpu-direct", "--stop"]] {
        for (rule, text) in [
            ("lock*1 result 600", "not ready (600); the server runs on"),
            ("checkpoint*1 result 801", "not supported (801); the server runs on"),
            ("checkpoint*1 die", "the GPU helper ended during the call; the server runs on"),
        ] {
            devices.control(rule);
            world.snapshot_call(&source, "v1", stop).fails(1).says(&[text, "serving"]);
            devices.control("");
            server_answers_as_before(&source, &server, &before);
            assert_eq!(devices.used_mib(0), used, "{rule}");
        }
        // The shim has its helper, which a fault has taken, from the first use on.
        world.rewarm().args(["pause", source.name()]).ok();
        world.rewarm().args(["wake", source.name()]).ok();
        let (traces, list) = (world.traces(), visible(&world));
        // A server that is to be stopped gets its devices back only when the command is gone.
        let steps = match stop {
            [_] => &["lock", "checkpoint", "complete", "restore", "unlock"][..],
            _ => &["lock", "checkpoint", "complete"],
        };
        for step in steps {
            devices.control(&format!("{step} wait 1500"));
            let running = world.snapshot_call(&source, "v1", stop).spawn();
            devices.await_rule(&world);
            running.signal(Signal::SIGKILL);
            let _ = running.wait();
            server_answers_as_before(&source, &server, &before);
            assert_eq!(devices.used_mib(0), used, "{step}");
            no_residue(&world, &traces);
            assert_eq!(visible(&world), list, "{step}: a reader sees something new");
            devices.control("");
        }
    }
    // The devices do not take it back: paused, until they do.
    devices.control("restore result 2");
    world.snapshot_call(&source, "v1", &["--gpu-direct"]).fails(6).says(&["out of memory (2)"]);
    devices.control("");
    assert_eq!(source.entry().expect("listed")["status"], "paused");
    world.rewarm().args(["wake", source.name()]).ok();
    server_answers_as_before(&source, &server, &before);
    world.snapshot(&source, "v1", &["--gpu-direct"]);
    server_answers_as_before(&source, &server, &before);
    // Between the copy and the driver's word that it is done nothing leads back: said, and the server can be stopped.
    devices.control("complete*1 die");
    world.snapshot_call(&source, "v2", &["--gpu-direct"]).fails(6).says(&["in the middle of a checkpoint"]);
    devices.control("");
    assert_eq!(source.entry().expect("listed")["status"], "stranded");
    let _ = source.stop();
    assert_eq!(devices.used_mib(0), 0);
    world.finish();
}

#[test]
fn a_restore_that_fails_or_is_killed_on_the_way_leaves_nothing() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, &server);
    let before = answers(&source, &server);
    // Stored as it is, so that it can be found in the pack by its content.
    world.snapshot(&source, "v1", &["--gpu-direct", "--compression", "none"]);
    let (traces, used) = (world.traces(), devices.used_mib(0));
    let name = world.name("clone");
    let call = || restore(&world, &devices, &server, &["--name", &name]);
    call()
        .env(VERSION_ENV, "13000")
        .fails(3)
        .says(&["driver for CUDA 13.4, the driver here is for CUDA 13.0"]);
    for (rule, text) in [
        ("restore result 2", "out of memory (2)"),
        ("restore die", "the GPU helper ended"),
        ("complete result 304", "operating system (304)"),
        ("complete die", "the GPU helper ended"),
        ("unlock result 401", "illegal state (401)"),
    ] {
        devices.control(rule);
        call().fails(1).says(&[text]);
        devices.control("");
        no_residue(&world, &traces);
        assert_eq!(devices.used_mib(0), used, "{rule}");
    }
    for step in ["restore", "complete", "unlock"] {
        devices.control(&format!("{step} wait 3000"));
        let running = call().spawn();
        devices.await_rule(&world);
        running.signal(Signal::SIGKILL);
        let _ = running.wait();
        no_residue(&world, &traces);
        assert_eq!(devices.used_mib(0), used, "{step}");
        devices.control("");
    }
    // Damage: the driver is never told that it is done, which would be another error.
    let intact = super::luck::damage_device_memory(&world);
    devices.control("complete result 999");
    call().fails(5);
    devices.control("");
    no_residue(&world, &traces);
    assert_eq!(devices.used_mib(0), used);
    for (path, bytes) in intact {
        std::fs::write(path, bytes).expect("our own folder");
    }
    let clones = Replica::of_restore(&world, server.port, &call().ok());
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

#[test]
fn a_driver_without_it_is_refused_before_anything_is_touched() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = super::start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    devices.control("lock die");
    let output = world.snapshot_call(&source, "v1", &["--gpu-direct"]).fails(3);
    output.says(&["from CUDA 13.4 (R615) on, the driver has 13.0; leave --gpu-direct out"]);
    devices.control("");
    server_answers_as_before(&source, &server, &before);
    world.finish();
}
