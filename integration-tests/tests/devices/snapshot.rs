//! Snapshots of servers with device memory, under the real CRIU.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rewarm_gpu_sim::{RELEASE_ENV, VERSION_ENV};
use rewarm_integration_tests::checks::{answers, no_residue, server_answers_as_before};
use rewarm_integration_tests::devices::Devices;
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Replica, World};
use rewarm_report::Stage;

use super::{start, world_with};
use crate::world_for;

/// Weights and KV cache, in whole pieces of 2 MiB.
const DEVICE_MIB: u64 = 16 + 2;

#[test]
fn a_server_with_device_memory_comes_back_with_the_same_answers() {
    let Some((world, devices)) = world_with(&[128]) else { return };
    comes_back(world, &devices);
}

#[test]
fn a_server_with_device_memory_comes_back_with_the_same_answers_where_there_is_cgroup_v2_only() {
    let Some((world, devices)) = world_with(&[128]) else { return };
    comes_back(world.on_cgroup_v2(), &devices);
}

fn comes_back(world: World, devices: &Devices) {
    for server in [devices.server(16), devices.python_server()] {
        let source = start(&world, devices, server.name, &server);
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

/// Nobody sees it before the driver does.
#[test]
fn managed_or_shared_memory_fails_a_snapshot_and_a_pause_and_the_server_serves() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    for path in ["/managed?4", "/share"] {
        let source = start(&world, &devices, "device", &server);
        let before = answers(&source, &server);
        assert_eq!(source.ask("POST", path, None).expect("it answers").status, 200);
        let texts = ["not supported (801); the server runs on", "managed memory and CUDA IPC"];
        world.snapshot_call(&source, "v1", &[]).fails(1).says(&texts);
        world.rewarm().args(["pause", source.name()]).fails(1).says(&texts);
        server_answers_as_before(&source, &server, &before);
        source.remove();
    }
    world.finish();
}

/// The dump is done, and the devices do not take it back: paused, until they do.
#[test]
fn a_snapshot_whose_server_does_not_get_its_devices_back_leaves_it_paused() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let (before, used) = (answers(&source, &server), devices.used_mib(0));
    for (rule, text) in
        [("restore result 2", "out of memory (2)"), ("unlock*1 result 401", "illegal state (401)")]
    {
        devices.control(rule);
        let output = world.snapshot_call(&source, "v1", &[]).fails(6);
        output.says(&[text, "the server stays paused and can be woken again"]);
        assert!(devices.met_rule(), "{rule}");
        devices.control("");
        assert_eq!(source.entry().expect("listed")["status"], "paused", "{rule}");
        assert_eq!(devices.used_mib(0), 0, "{rule}");
        world.rewarm().args(["wake", source.name()]).ok();
        server_answers_as_before(&source, &server, &before);
        assert_eq!(devices.used_mib(0), used, "{rule}");
    }
    world.snapshot(&source, "v2", &[]);
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

/// Its memory was free for as long as the server stood still, and another one took it.
#[test]
fn a_device_that_fills_up_during_a_snapshot_is_noticed_before_the_driver_is_called() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    devices.control("restore result 999");
    // Within the freeze.
    let mut running = world.snapshot_call(&source, "v1", &[]).pause_at(Stage::Delta).spawn();
    running.await_stderr("paused at delta");
    assert_eq!(devices.used_mib(0), 0);
    let neighbour = devices.neighbour(0, 56);
    running.go_on();
    let output = running.wait();
    output.expect_code(6);
    output.says(&[
        "(Simulated GPU) needs 18874368 bytes of device memory free and has",
        "the driver was not called; the server stays paused and can be woken again",
    ]);
    assert!(!devices.met_rule(), "the driver was called: {:?}", devices.met());
    devices.control("");
    assert_eq!(source.entry().expect("listed")["status"], "paused");
    std::fs::remove_file(neighbour).expect("remove");
    world.rewarm().args(["wake", source.name()]).ok();
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
    let output = restore().env("REWARM_SIM_RELEASE", "610.1").fails(3);
    output.says(&["device state of driver 580.0 (simulated), the driver here is 610.1"]);
    let neighbour = devices.neighbour(0, 40);
    restore().fails(3).says(&["needs 18874368 bytes, and it has ", " bytes free"]);
    std::fs::remove_file(neighbour).expect("remove");
    devices.mark(0, "mig", true);
    restore().fails(3).says(&["(Simulated GPU) is cut into instances (MIG)"]);
    devices.mark(0, "mig", false);
    // In the driver: too little memory, a failure, a helper that dies.
    for (rule, text) in [
        ("restore oom", "out of memory (2)"),
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

/// Others may take device memory between the verdict and the driver's call.
#[test]
fn a_device_that_fills_up_during_a_restore_is_noticed_before_the_driver_is_called() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let traces = world.traces();
    devices.control("restore result 999");
    let call = world.restore_call("device", "v1", server.port, &["--name", &world.name("clone")]);
    let mut running = devices.seen_by(call).pause_at(Stage::Skeleton).spawn();
    running.await_stderr("paused at skeleton");
    let neighbour = devices.neighbour(0, 56);
    running.go_on();
    let output = running.wait();
    output.expect_code(1);
    output.says(&[
        "bring device memory back: GPU-00000000-0000-0000-0000-0000000000d0 (Simulated GPU) needs 18874368 bytes",
        "the driver was not called",
    ]);
    assert!(!devices.met_rule(), "the driver was called: {:?}", devices.met());
    devices.control("");
    std::fs::remove_file(neighbour).expect("remove");
    no_residue(&world, &traces);
    world.finish();
}

#[test]
fn the_driver_is_attached_to_while_content_is_on_its_way() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    devices.control("init wait 1500");
    let call = world.restore_call("device", "v1", server.port, &["--name", &world.name("clone")]);
    let mut running = devices.seen_by(call).pause_at(Stage::Fetch).spawn();
    running.await_stderr("paused at fetch");
    devices.await_rule(&world);
    running.go_on();
    let output = running.wait();
    output.expect_code(0);
    assert_eq!(devices.met(), ["init wait 1500"], "once, by the helper that makes the calls");
    let clones = Replica::of_restore(&world, server.port, &output);
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

#[test]
fn device_memory_comes_first_and_the_rest_while_the_server_runs() {
    let Some((world, devices)) = world_with(&[128]) else { return };
    let server = devices.server(32);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    let inspected = world.rewarm_json().args(["inspect", &world.reference("device", "v1")]).ok().json();
    let manifest = &inspected["variants"][0]["manifest"];
    assert_eq!(manifest["format"], 2, "{manifest}");
    let regions = manifest["regions"].as_array().expect("a list");
    let device = regions.iter().find(|region| region["kind"] == "device").expect("its device memory");
    assert_eq!(device["gpu"], "GPU-00000000-0000-0000-0000-0000000000d0");
    let bytes = device["bytes"].as_u64().expect("a number");
    // A quarter of the weights is zeros, and so is most of the KV cache.
    assert!((24 << 20..26 << 20).contains(&bytes), "{device}");
    assert_eq!(manifest["facts"]["device"]["used"]["GPU-00000000-0000-0000-0000-0000000000d0"], 34 << 20);
    for mode in ["lazy", "eager", "auto"] {
        let call =
            world.restore_call("device", "v1", server.port, &["--name", &world.name(mode), "--mode", mode]);
        let clones = Replica::of_restore(&world, server.port, &devices.seen_by(call).ok());
        server_answers_as_before(&clones[0], &server, &before);
        clones[0].remove();
    }
    world.finish();
}

/// Content comes fast here and all of it soon, so nothing is held back to learn what is touched.
#[test]
fn other_memory_arrives_while_the_driver_restores() {
    const BALLAST_MIB: u64 = 96;
    let Some((world, devices)) = world_with(&[64]) else { return };
    let mut server = devices.server(16);
    server.command.extend(["--ballast".to_owned(), BALLAST_MIB.to_string()]);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    let ballast = source.json("/ballast");
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let rules = ["restore wait 5000", "unlock wait 0"];
    devices.control(&rules.join("\n"));
    let name = world.name("clone");
    let call = world.restore_call("device", "v1", server.port, &["--name", &name]);
    let running = devices.seen_by(call).spawn();
    devices.await_rule(&world);
    let clone = Replica::in_the_making(&world, name);
    world.await_state("its memory arrives", Duration::from_secs(20), || {
        let entry = clone.entry().expect("it is listed");
        assert_eq!(devices.met(), &rules[..1], "the driver has ended before: {entry}");
        let pid = entry["pid"].as_u64().expect("it is restored");
        anonymous_mib(pid) >= BALLAST_MIB + DEVICE_MIB
    });
    let output = running.wait();
    output.expect_code(0);
    assert_eq!(devices.met(), rules);
    let clones = Replica::of_restore(&world, server.port, &output);
    server_answers_as_before(&clones[0], &server, &before);
    assert_eq!(clones[0].json("/ballast"), ballast);
    world.finish();
}

/// Lazily, and nothing is known of what is touched first: all other memory is still missing then.
#[test]
fn copies_are_whole_in_huge_pages_and_out_of_the_userfaultfd_when_the_driver_is_called() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let inspected = world.rewarm_json().args(["inspect", &world.reference("device", "v1")]).ok().json();
    let processes = &inspected["variants"][0]["manifest"]["facts"]["device"]["processes"];
    let copies = processes[0]["copies"].as_array().expect("a list");
    let number = |range: &serde_json::Value, end: &str| range[end].as_u64().expect("a number");
    let copies: Vec<_> = copies.iter().map(|range| number(range, "start")..number(range, "end")).collect();
    assert_eq!(copies.iter().map(|range| range.end - range.start).sum::<u64>(), DEVICE_MIB << 20);
    devices.control("restore wait 3000");
    let name = world.name("clone");
    let call = world.restore_call("device", "v1", server.port, &["--name", &name, "--mode", "lazy"]);
    let running = devices.seen_by(call).spawn();
    devices.await_rule(&world);
    let entry = Replica::in_the_making(&world, name).entry().expect("it is listed");
    let all = mappings(entry["pid"].as_u64().expect("it is restored"));
    let (of_copies, others): (Vec<&Mapping>, Vec<_>) =
        all.iter().partition(|map| copies.iter().any(|copy| copy.contains(&map.start)));
    let sum = |kib: fn(&Mapping) -> u64| of_copies.iter().map(|map| kib(map)).sum::<u64>();
    assert_eq!(sum(|map| map.size), DEVICE_MIB << 10, "{of_copies:?}");
    assert_eq!(sum(|map| map.present), DEVICE_MIB << 10, "{of_copies:?}");
    // One at least is tried; more where the machine is quick to give them.
    assert!(sum(|map| map.huge) >= 2 << 10, "no huge page: {of_copies:?}");
    assert!(of_copies.iter().all(|map| !map.registered), "{of_copies:?}");
    assert!(others.iter().any(|map| map.registered), "nothing is missing: {others:?}");
    let output = running.wait();
    output.expect_code(0);
    let clones = Replica::of_restore(&world, server.port, &output);
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

/// A mapping with what of it is present, and in huge pages, in KiB; and whether a userfaultfd is told of what is missing.
#[derive(Debug, Default)]
struct Mapping {
    start: u64,
    size: u64,
    present: u64,
    huge: u64,
    registered: bool,
}

fn mappings(pid: u64) -> Vec<Mapping> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("it lives");
    let mut all: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let (name, rest) = line.split_once(' ').expect("two words");
        let kib = || rest.trim().trim_end_matches(" kB").parse().expect("a number");
        let Some(last) = all.last_mut().filter(|_| name.ends_with(':')) else {
            let start = name.split('-').next().expect("an address");
            let start = u64::from_str_radix(start, 16).expect("hexadecimal");
            all.push(Mapping { start, ..Mapping::default() });
            continue;
        };
        match name {
            "Size:" => last.size = kib(),
            "Rss:" => last.present = kib(),
            "AnonHugePages:" => last.huge = kib(),
            "VmFlags:" => last.registered = rest.split_whitespace().any(|flag| flag == "um"),
            _ => {}
        }
    }
    all
}

/// MiB of private memory that a process has.
fn anonymous_mib(pid: u64) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = status.lines().find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB"));
    kib.and_then(|kib| kib.trim().parse::<u64>().ok()).unwrap_or(0) >> 10
}

/// What CRIU alone, which is told of plugins only by its environment, logs of errors with plugins when it dumps a process.
/// Whether the dump succeeds is left out: the process is no container, so what other tests do to the namespaces of the
/// machine, and what this one inherited, can fail it.
fn errors_with_plugins(plugins: &Path) -> Vec<String> {
    let images = tempfile::tempdir().expect("a folder");
    let mut sleeping = Command::new("sleep");
    sleeping.arg("60").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut sleeping = sleeping.spawn().expect("a program of every machine");
    let mut dump = Command::new(rewarm_integration_tests::needs::criu().expect("it is needed"));
    dump.args(["dump", "--leave-running", "--shell-job", "-v4", "-o", "log", "-t"]);
    dump.arg(sleeping.id().to_string()).arg("-D").arg(images.path());
    dump.env("CRIU_LIBS_DIR", plugins).output().expect("it starts");
    sleeping.kill().expect("it was left running");
    sleeping.wait().expect("it ends");
    let log = std::fs::read_to_string(images.path().join("log")).expect("a log");
    assert!(log.contains("Dumping processes"), "it went on to where plugins are loaded: {log}");
    log.lines().filter(|line| line.contains("Error") && line.contains("plugin")).map(str::to_owned).collect()
}

#[test]
fn no_plugin_of_criu_is_loaded() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    // CRIU fails at a plugin that it cannot load.
    let plugins = tempfile::tempdir().expect("a folder");
    assert_eq!(errors_with_plugins(plugins.path()), Vec::<String>::new());
    std::fs::write(plugins.path().join("cuda_plugin.so"), "no library").expect("write");
    let errors = errors_with_plugins(plugins.path());
    assert!(errors.iter().any(|line| line.contains("cuda_plugin.so")), "{errors:?}");
    let name = world.name("plain");
    let output = world.run_call(&name, &server, &[]).env("CRIU_LIBS_DIR", plugins.path()).ok();
    let source = Replica::of_run(&world, name, server.port, &output);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    let call = world.restore_call("plain", "v1", server.port, &["--name", &world.name("clone")]);
    let clones = Replica::of_restore(&world, server.port, &call.env("CRIU_LIBS_DIR", plugins.path()).ok());
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

#[test]
fn auto_takes_a_device_with_enough_free_memory_and_a_name_takes_that_one() {
    let Some((world, devices)) = world_with(&[64, 64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &["--stop"]);
    world.rewarm().args(["rm", source.name()]).ok();
    let restore = |flags: &[&str]| devices.seen_by(world.restore_call("device", "v1", server.port, flags));
    let neighbour = devices.neighbour(0, 56);
    restore(&[]).fails(3).says(&["bytes free"]);
    let clones = Replica::of_restore(&world, server.port, &restore(&["--gpu", "auto"]).ok());
    server_answers_as_before(&clones[0], &server, &before);
    assert_eq!((devices.used_mib(0), devices.used_mib(1)), (56, 18));
    clones[0].remove();
    std::fs::remove_file(neighbour).expect("remove");
    let second = "GPU-00000000-0000-0000-0000-0000000000d1";
    let clones = Replica::of_restore(&world, server.port, &restore(&["--gpu", second]).ok());
    server_answers_as_before(&clones[0], &server, &before);
    assert_eq!((devices.used_mib(0), devices.used_mib(1)), (0, 18));
    clones[0].remove();
    // Three of them find room on two devices of three places each.
    let clones = Replica::of_restore(&world, server.port, &restore(&["--gpu", "auto", "--count", "4"]).ok());
    assert_eq!(devices.used_mib(0) + devices.used_mib(1), 4 * 18);
    for clone in &clones {
        server_answers_as_before(clone, &server, &before);
        clone.remove();
    }
    restore(&["--gpu", "GPU-9"]).fails(2).says(&["is no GPU"]);
    world.finish();
}

#[test]
fn what_the_driver_cannot_checkpoint_is_refused_before_anything_is_locked() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let replica = start(&world, &devices, "device", &server);
    let before = answers(&replica, &server);
    // A lock would be seen.
    devices.control("lock die");
    for (mark, text) in [("mig", "is cut into instances (MIG)"), ("vgpu", "is a vGPU")] {
        devices.mark(0, mark, true);
        world.rewarm().args(["pause", replica.name()]).fails(3).says(&[text]);
        world.snapshot_call(&replica, "v1", &[]).fails(3).says(&[text]);
        devices.mark(0, mark, false);
        server_answers_as_before(&replica, &server, &before);
    }
    devices.control("");
    world.rewarm().args(["pause", replica.name()]).ok();
    world.rewarm().args(["wake", replica.name()]).ok();
    server_answers_as_before(&replica, &server, &before);
    replica.remove();
    let name = world.name("old");
    let old = devices.seen_by(world.run_call(&name, &server, &[])).env(VERSION_ENV, "12040").ok();
    let old = Replica::of_run(&world, name, server.port, &old);
    let before = answers(&old, &server);
    let pid = old.entry().and_then(|entry| entry["pid"].as_u64()).expect("it is listed");
    let process = format!("process {pid} has the CUDA driver's library loaded");
    let texts = [&*process, "supports CUDA 12.4, at least 12.8 (R570) is needed"];
    world.rewarm().args(["pause", old.name()]).fails(3).says(&texts);
    world.snapshot_call(&old, "v1", &[]).fails(3).says(&texts);
    server_answers_as_before(&old, &server, &before);
    world.finish();
}

#[test]
fn a_tag_keeps_a_variant_for_each_release_of_the_driver() {
    let Some((world, devices)) = world_with(&[128]) else { return };
    let mut known = Vec::new();
    for (release, seed) in [("580.1 (simulated)", "1"), ("610.1 (simulated)", "2")] {
        let mut server = devices.server(16);
        server.command.extend(["--seed", seed].map(str::to_owned));
        let name = world.name(&format!("seed-{seed}"));
        let call = devices.seen_by(world.run_call(&name, &server, &[])).env(RELEASE_ENV, release);
        let source = Replica::of_run(&world, name, server.port, &call.ok());
        let before = answers(&source, &server);
        let reference = world.reference("device", "v1");
        world.rewarm_json().args(["snapshot", source.name(), &reference]).ok();
        source.remove();
        known.push((release, server, before));
    }
    let inspected = world.rewarm_json().args(["inspect", &world.reference("device", "v1")]).ok().json();
    assert_eq!(inspected["variants"].as_array().map(Vec::len), Some(2), "{inspected}");
    // The older one too is found where it fits.
    for (release, server, before) in &known {
        let call = devices.seen_by(world.restore_call("device", "v1", server.port, &[]));
        let clones = Replica::of_restore(&world, server.port, &call.env(RELEASE_ENV, release).ok());
        server_answers_as_before(&clones[0], server, before);
        clones[0].remove();
    }
    let call = devices.seen_by(world.restore_call("device", "v1", known[0].1.port, &[]));
    call.env(RELEASE_ENV, "570.1").fails(3).says(&["the driver here is 570.1"]);
    world.finish();
}
