//! Snapshots of servers with device memory, under the real CRIU.

use rewarm_integration_tests::Replica;
use rewarm_integration_tests::checks::{answers, no_residue, server_answers_as_before};

use super::{start, world_with};

#[test]
fn a_server_with_device_memory_comes_back_with_the_same_answers() {
    let Some((world, devices)) = world_with(&[128]) else { return };
    for server in [devices.server(16), devices.python_server()] {
        let source = start(&world, &devices, server.name, &server);
        let before = answers(&source, &server);
        let used = devices.used_mib(0);
        world.snapshot(&source, "v1", &[]);
        server_answers_as_before(&source, &server, &before);
        assert_eq!(devices.used_mib(0), used, "the source has its device memory again");
        let call = world.restore_call(server.name, "v1", server.port, &["--name", &world.name("clone")]);
        let clones = Replica::of_restore(&world, server.port, &devices.seen_by(call).ok());
        server_answers_as_before(&clones[0], &server, &before);
        assert_eq!(devices.used_mib(0), 2 * used, "the clone has device memory of its own");
        // A restored server is paused and woken as any other.
        world.rewarm().args(["pause", clones[0].name()]).ok();
        world.rewarm().args(["wake", clones[0].name()]).ok();
        server_answers_as_before(&clones[0], &server, &before);
        clones[0].remove();
        world.snapshot(&source, "v2", &["--stop"]);
        assert_eq!(devices.used_mib(0), 0);
        world.rewarm().args(["rm", source.name()]).ok();
        let call = world.restore_call(server.name, "v2", server.port, &[]);
        let clones = Replica::of_restore(&world, server.port, &devices.seen_by(call).ok());
        server_answers_as_before(&clones[0], &server, &before);
        clones[0].remove();
    }
    world.finish();
}

#[test]
fn a_snapshot_that_fails_at_a_device_leaves_the_server_serving() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    for (rule, text) in [
        ("lock result 600", "not ready (600); the server runs on"),
        ("checkpoint result 801", "not supported (801); the server runs on"),
        ("checkpoint die", "the GPU helper ended during the call; the server runs on"),
    ] {
        devices.control(rule);
        for flags in [&[][..], &["--stop"]] {
            let output = world.snapshot_call(&source, "v1", flags).fails(1);
            output.says(&[text, "serving"]);
            server_answers_as_before(&source, &server, &before);
        }
        devices.control("");
    }
    world.snapshot(&source, "v1", &[]);
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

#[test]
fn a_restore_that_fails_at_a_device_leaves_nothing() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    let traces = world.traces();
    let used = devices.used_mib(0);
    let clone = world.name("clone");
    let restore = || devices.seen_by(world.restore_call("device", "v1", server.port, &["--name", &clone]));
    // Before data move: another driver, no driver.
    let output = restore().env("REWARM_SIM_VERSION", "13010").fails(3);
    output.says(&["driver for CUDA 13.0, the driver here is for CUDA 13.1"]);
    let output = restore().env("REWARM_LIBCUDA", "/no/such/libcuda.so.1").fails(3);
    output.says(&["cannot be loaded"]);
    // In the driver: too little memory, a failure, a helper that dies.
    let neighbour = devices.neighbour(0, 40);
    restore().fails(1).says(&["out of memory (2)"]);
    std::fs::remove_file(neighbour).expect("remove");
    for (rule, text) in [
        ("restore failed", "operating system (304)"),
        ("restore die", "the GPU helper ended"),
        ("unlock result 401", "illegal state (401)"),
    ] {
        devices.control(rule);
        restore().fails(1).says(&[text]);
        devices.control("");
        no_residue(&world, &traces);
        assert_eq!(devices.used_mib(0), used, "{rule}");
    }
    let clones = Replica::of_restore(&world, server.port, &restore().ok());
    server_answers_as_before(&clones[0], &server, &before);
    server_answers_as_before(&source, &server, &before);
    world.finish();
}
