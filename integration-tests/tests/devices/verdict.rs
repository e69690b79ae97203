//! What keeps a restore of device state from beginning, told before data move and before the driver is called.

use rewarm_gpu_sim::{RELEASE_ENV, VERSION_ENV};
use rewarm_integration_tests::Replica;
use rewarm_integration_tests::checks::{answers, no_residue, server_answers_as_before};
use rewarm_integration_tests::command::Rewarm;

use super::{start, world_with};

/// A call to which the file `named` is what lies at `path`.
fn with_file(call: Rewarm, path: &str, named: &str) -> Rewarm {
    let script = format!("mount --bind '{named}' '{path}' && exec \"$0\" \"$@\"");
    call.under("unshare", &["--mount", "sh", "-c", &script])
}

#[test]
fn every_reason_against_a_restore_is_told_at_once() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let traces = world.traces();
    let call = |flags: &[&str]| {
        let call = world.restore_call("device", "v1", server.port, &["--name", &world.name("clone")]);
        devices.seen_by(call.args(flags))
    };
    let clones = Replica::of_restore(&world, server.port, &call(&[]).ok());
    server_answers_as_before(&clones[0], &server, &before);
    clones[0].remove();
    // Content that is asked for would be missing, and a call of the driver would be seen.
    let (packs, away) = (world.store_folder().join("packs"), world.store_folder().join("away"));
    std::fs::rename(&packs, &away).expect("our own folder");
    devices.control("any result 999");
    devices.mark(0, "mig", true);
    devices.replace(0, 0xe0, "Simulated GPU of another kind");
    devices.other_build();
    let gvisor = world.files().join("version");
    std::fs::write(&gvisor, "Linux version 4.4.0 #1 SMP\n").expect("our own folder");
    let elsewhere = |call: Rewarm| {
        let call = call.env(VERSION_ENV, "13010").env(RELEASE_ENV, "610.1 (simulated)");
        with_file(call, "/proc/version", &gvisor.display().to_string())
    };
    let texts = [
        "libcuda.so.1 is another build",
        "device state of a driver for CUDA 13.0, the driver here is for CUDA 13.1",
        "device state of driver 580.0 (simulated), the driver here is 610.1 (simulated)",
        "this machine runs on gVisor",
        "(Simulated GPU of another kind) is cut into instances (MIG)",
        "nothing here takes the place of GPU-00000000-0000-0000-0000-0000000000d0",
    ];
    let output = elsewhere(call(&["--memory", "8MiB"])).fails(3);
    output.says(&texts).says(&["the memory limit of 8388608 bytes is below"]);
    // And to those who only look.
    let inspect = world.rewarm().args(["inspect", &world.reference("device", "v1")]);
    let inspected = elsewhere(devices.seen_by(inspect)).ok();
    texts
        .iter()
        .for_each(|text| assert!(inspected.stdout.contains(text), "{text:?} is missing in {inspected}"));
    assert!(!devices.met_rule(), "the driver was called: {:?}", devices.met());
    no_residue(&world, &traces);
    std::fs::rename(&away, &packs).expect("our own folder");
    world.finish();
}

/// The copies lie in host memory until the driver takes them.
#[test]
fn a_restore_without_room_for_the_copies_in_host_memory_is_refused_before_the_driver_is_called() {
    const COPIES: u64 = (64 + 2) << 20;
    let Some((world, devices)) = world_with(&[128]) else { return };
    let server = devices.server(64);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let traces = world.traces();
    let call = |flags: &[&str]| {
        let call = world.restore_call("device", "v1", server.port, &["--name", &world.name("clone")]);
        devices.seen_by(call.args(flags))
    };
    // The fetcher that this starts sees the machine as it is.
    let clones = Replica::of_restore(&world, server.port, &call(&[]).ok());
    server_answers_as_before(&clones[0], &server, &before);
    clones[0].remove();
    let inspected = world.rewarm_json().args(["inspect", &world.reference("device", "v1")]).ok().json();
    let memory = &inspected["variants"][0]["manifest"]["facts"]["memory"];
    let device = &inspected["variants"][0]["manifest"]["regions"];
    let device = device.as_array().expect("a list").iter().find(|region| region["kind"] == "device");
    // Zeros of the copies are not stored, and take host memory all the same.
    let [logical, zero] =
        ["logical_bytes", "zero_bytes"].map(|name| memory[name].as_u64().expect("a number"));
    let needed =
        logical - zero + COPIES - device.expect("its device memory")["bytes"].as_u64().expect("a number");
    assert!(needed > logical, "{memory}");
    // All but the copies has room there several times.
    let room = COPIES - (4 << 20);
    assert!(needed >= COPIES && (needed - COPIES) * 4 < room, "{memory}");
    devices.control("any result 999");
    let limit = room.to_string();
    call(&["--memory", &limit])
        .fails(3)
        .says(&[&format!("the memory limit of {limit} bytes is below the {needed} bytes of the snapshot")]);
    let meminfo = std::fs::read_to_string("/proc/meminfo").expect("it is always there");
    let mut lines: Vec<String> = meminfo.lines().map(str::to_owned).collect();
    let free = lines.iter_mut().find(|line| line.starts_with("MemAvailable:")).expect("it is always there");
    *free = format!("MemAvailable: {} kB", room >> 10);
    let forged = world.files().join("meminfo");
    std::fs::write(&forged, lines.join("\n") + "\n").expect("our own folder");
    with_file(call(&[]), "/proc/meminfo", &forged.display().to_string())
        .fails(3)
        .says(&[&format!("1 replicas need {needed} bytes of memory, {room} are free")]);
    assert!(!devices.met_rule(), "the driver was called: {:?}", devices.met());
    devices.control("");
    no_residue(&world, &traces);
    let clones = Replica::of_restore(&world, server.port, &call(&[]).ok());
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}
