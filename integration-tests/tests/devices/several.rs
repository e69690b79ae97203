//! Servers of several processes that use CUDA, one of them on two GPUs.

use std::time::Duration;

use rewarm_gpu_sim::VERSION_ENV;
use rewarm_integration_tests::checks::{Answers, answers, no_residue, server_answers_as_before};
use rewarm_integration_tests::command::{Output, Rewarm};
use rewarm_integration_tests::devices::Devices;
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Replica, World, residue};

use super::world_with;

/// On each GPU, of which memory is taken in pieces of 2 MiB: weights of 8 and 4 MiB; weights of 4 MiB and the KV cache of the
/// process on the other one. Each has a KV cache of 2 MiB beside its weights but that one.
const USED: [u64; 2] = [8 + 4 + 2, 4 + 2 + 2];

/// The GPUs of the three regions, sorted: none is named for the process that uses both.
const GPUS: [Option<&str>; 3] = [
    None,
    Some("GPU-00000000-0000-0000-0000-0000000000d0"),
    Some("GPU-00000000-0000-0000-0000-0000000000d1"),
];

const PORTS: [u16; 3] = Devices::SEVERAL;

/// One replica, by the port of each of its processes.
struct Several<'w>([Replica<'w>; 3]);

impl<'w> Several<'w> {
    fn replica(&self) -> &Replica<'w> {
        &self.0[0]
    }

    fn answers(&self, server: &Server) -> [Answers; 3] {
        self.0.each_ref().map(|process| answers(process, server))
    }

    #[track_caller]
    fn answers_as_before(&self, server: &Server, before: &[Answers; 3]) {
        for (process, before) in self.0.iter().zip(before) {
            server_answers_as_before(process, server, before);
        }
    }
}

/// The two further ports, as flags.
fn further() -> Vec<String> {
    PORTS[1..].iter().flat_map(|port| ["--publish".to_owned(), format!("0:{port}")]).collect()
}

fn used(devices: &Devices) -> [u64; 2] {
    [0, 1].map(|index| devices.used_mib(index))
}

fn start<'w>(world: &'w World, call: impl FnOnce(Rewarm) -> Rewarm, server: &Server) -> Several<'w> {
    let (name, further) = (world.name(server.name), further());
    let flags: Vec<&str> = further.iter().map(String::as_str).collect();
    let output = call(world.run_call(&name, server, &flags)).ok();
    let source = Several(PORTS.map(|port| Replica::of_run(world, name.clone(), port, &output)));
    world.await_state("each process answers", Duration::from_secs(20), || {
        let is_ready = |process: &Replica<'_>| {
            process.ask("GET", "/health", None).is_ok_and(|response| response.status == 200)
        };
        source.0.iter().all(is_ready)
    });
    source
}

fn restore_call(world: &World, name: &str, flags: &[&str]) -> Rewarm {
    world.restore_call("several", "v1", PORTS[0], &["--name", name]).args(further()).args(flags)
}

fn restored<'w>(world: &'w World, output: &Output) -> Several<'w> {
    Several(PORTS.map(|port| Replica::of_restore(world, port, output).remove(0)))
}

/// The processes of a replica that use CUDA, in the order in which they were started.
fn processes(world: &World) -> Vec<i32> {
    let mut pids: Vec<i32> = residue::processes(world.id())
        .into_iter()
        .filter(|(_, command)| command.starts_with("/srv/gpu/workload"))
        .map(|(pid, _)| pid)
        .collect();
    pids.sort_unstable();
    pids
}

#[test]
fn each_process_comes_back_with_its_memory_on_its_devices() {
    let Some((world, devices)) = world_with(&[64, 64]) else { return };
    let server = devices.several();
    let seen_by = |call| devices.seen_by(call);
    let source = start(&world, seen_by, &server);
    let before = source.answers(&server);
    assert!(before[0] != before[1] && before[1] != before[2], "{before:?}");
    assert_eq!(used(&devices), USED);
    world.snapshot(source.replica(), "v1", &[]);
    source.answers_as_before(&server, &before);
    assert_eq!(used(&devices), USED, "the source has its device memory again");
    let inspected = world.rewarm_json().args(["inspect", &world.reference("several", "v1")]).ok().json();
    let manifest = &inspected["variants"][0]["manifest"];
    let carried = manifest["facts"]["device"]["processes"].as_array().expect("a list");
    let regions = manifest["regions"].as_array().expect("a list").iter();
    let regions: Vec<_> = regions.filter(|region| region["kind"] == "device").collect();
    assert_eq!((carried.len(), regions.len()), (3, 3), "{manifest}");
    for process in carried {
        let own = regions.iter().filter(|region| region["pid"] == process["pid"]).count();
        assert_eq!(own, 1, "one region for each process: {regions:?}");
    }
    let mut gpus: Vec<_> = regions.iter().map(|region| region["gpu"].as_str()).collect();
    gpus.sort_unstable();
    assert_eq!(gpus, GPUS, "{manifest}");
    for mode in ["lazy", "eager", "auto"] {
        let call = seen_by(restore_call(&world, &world.name(mode), &["--mode", mode]));
        let clone = restored(&world, &call.ok());
        clone.answers_as_before(&server, &before);
        assert_eq!(used(&devices), USED.map(|mib| 2 * mib), "{mode}: the clone has its own");
        source.answers_as_before(&server, &before);
        for replica in [source.replica(), clone.replica()] {
            world.rewarm().args(["pause", replica.name()]).ok();
            assert_eq!(used(&devices), USED, "{mode}: only the other one has some");
            world.rewarm().args(["wake", replica.name()]).ok();
        }
        clone.answers_as_before(&server, &before);
        source.answers_as_before(&server, &before);
        clone.replica().remove();
    }
    world.finish();
}

#[test]
fn the_memory_of_each_process_goes_to_the_store_and_back_without_a_copy() {
    let Some((world, devices)) = world_with(&[64, 64]) else { return };
    let server = devices.several();
    let seen_by = |call| devices.seen_by(call).env(VERSION_ENV, "13040");
    let source = start(&world, seen_by, &server);
    let before = source.answers(&server);
    world.snapshot(source.replica(), "v1", &["--gpu-direct"]);
    source.answers_as_before(&server, &before);
    assert_eq!(used(&devices), USED, "the source has its device memory again");
    let inspected = world.rewarm_json().args(["inspect", &world.reference("several", "v1")]).ok().json();
    let manifest = &inspected["variants"][0]["manifest"];
    let regions = manifest["regions"].as_array().expect("a list").iter();
    let regions: Vec<_> = regions.filter(|region| region["kind"] == "device").collect();
    assert_eq!(regions.len(), 4, "two of the process with two devices: {regions:?}");
    assert!(regions.iter().all(|region| region["direct"] == true), "{regions:?}");
    for mode in ["lazy", "eager", "auto"] {
        let call = seen_by(restore_call(&world, &world.name(mode), &["--mode", mode]));
        let clone = restored(&world, &call.ok());
        assert_eq!(used(&devices), USED.map(|mib| 2 * mib), "{mode}: the clone has its own");
        clone.answers_as_before(&server, &before);
        world.rewarm().args(["pause", clone.replica().name()]).ok();
        assert_eq!(used(&devices), USED, "{mode}");
        world.rewarm().args(["wake", clone.replica().name()]).ok();
        clone.answers_as_before(&server, &before);
        clone.replica().remove();
    }
    world.finish();
}

#[test]
fn a_step_that_fails_for_one_process_is_undone_for_all() {
    let Some((world, devices)) = world_with(&[64, 64]) else { return };
    let server = devices.several();
    for (version, flags) in [("13000", &[][..]), ("13040", &["--gpu-direct"])] {
        let seen_by = |call| devices.seen_by(call).env(VERSION_ENV, version);
        let source = start(&world, seen_by, &server);
        let name = source.replica().name();
        let before = source.answers(&server);
        let pids = processes(&world);
        assert_eq!(pids.len(), 3, "{pids:?}");
        for pid in &pids {
            for (step, text) in [("lock", "not ready (600)"), ("checkpoint", "not supported (801)")] {
                let code = if step == "lock" { 600 } else { 801 };
                let rule = format!("{step}@{pid} result {code}");
                devices.control(&rule);
                let texts = [text, &format!("process {pid}"), "the server runs on"];
                world.snapshot_call(source.replica(), "v1", flags).fails(1).says(&texts);
                world.rewarm().args(["pause", name]).fails(1).says(&texts);
                assert!(devices.met_rule(), "{rule}");
                devices.control("");
                source.answers_as_before(&server, &before);
                assert_eq!(used(&devices), USED, "{rule}");
            }
            // The way back of a pause.
            world.rewarm().args(["pause", name]).ok();
            devices.control(&format!("restore@{pid} result 2"));
            world.rewarm().args(["wake", name]).fails(1).says(&["out of memory (2)", "stays paused"]);
            devices.control("");
            assert_eq!(used(&devices), [0, 0], "{pid}: none is left behind on a device");
            world.rewarm().args(["wake", name]).ok();
            source.answers_as_before(&server, &before);
        }
        world.snapshot(source.replica(), "v1", flags);
        source.answers_as_before(&server, &before);
        // In a clone, whose numbers nobody knows before: the second that is asked for.
        let traces = world.traces();
        for step in ["restore", "unlock"] {
            devices.control(&format!("{step}*1 wait 0\n{step} result 401"));
            let call = restore_call(&world, &world.name("clone"), &[]);
            seen_by(call).fails(1).says(&["illegal state (401)"]);
            devices.control("");
            no_residue(&world, &traces);
            assert_eq!(used(&devices), USED, "{step}");
        }
        let clone = restored(&world, &seen_by(restore_call(&world, &world.name("clone"), &[])).ok());
        clone.answers_as_before(&server, &before);
        clone.replica().remove();
        source.replica().remove();
    }
    world.finish();
}

/// The driver shows two, and nothing of the server is on the other one.
#[test]
fn a_region_of_device_memory_names_the_only_device_that_was_used() {
    let Some((world, devices)) = world_with(&[64, 64]) else { return };
    let mut server = devices.server(4);
    server.command.extend(["--device", "1"].map(str::to_owned));
    let source = super::start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    assert_eq!(used(&devices), [0, 6]);
    world.snapshot(&source, "v1", &["--stop"]);
    let inspected = world.rewarm_json().args(["inspect", &world.reference("device", "v1")]).ok().json();
    let manifest = &inspected["variants"][0]["manifest"];
    let regions = manifest["regions"].as_array().expect("a list").iter();
    let regions: Vec<_> = regions.filter(|region| region["kind"] == "device").collect();
    assert_eq!(regions.len(), 1, "{manifest}");
    assert_eq!(regions[0]["gpu"], "GPU-00000000-0000-0000-0000-0000000000d1");
    assert_eq!(manifest["facts"]["device"]["devices"].as_array().map(Vec::len), Some(2), "{manifest}");
    let call = world.restore_call("device", "v1", server.port, &["--name", &world.name("clone")]);
    let clones = Replica::of_restore(&world, server.port, &devices.seen_by(call).ok());
    server_answers_as_before(&clones[0], &server, &before);
    assert_eq!(used(&devices), [0, 6]);
    world.finish();
}
