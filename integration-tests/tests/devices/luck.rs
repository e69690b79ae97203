//! Bad luck with device memory: commands that are killed between any two steps, several at once, damage in the store.

use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::Signal;
use rewarm_integration_tests::checks::{answers, no_residue, server_answers_as_before, visible};
use rewarm_integration_tests::devices::Devices;
use rewarm_integration_tests::replica::names;
use rewarm_integration_tests::{Replica, Rewarm, World};
use rewarm_report::{Operation, Stage};

use super::{start, world_with};

pub(super) fn stages(operation: Operation) -> impl Iterator<Item = Stage> {
    Stage::ALL.iter().copied().filter(move |stage| stage.operation() == operation)
}

/// A probe, which with hooks leaves no stage that is passed over because it has nothing to do.
pub(super) fn probe_file(world: &World) -> String {
    let probe = world.files().join("probe.toml");
    let question = "port = 8000\n\n[[request]]\npath = \"/health\"\ncompare = \"body\"\n";
    std::fs::write(&probe, question).expect("our own folder");
    probe.display().to_string()
}

/// Each way of device memory, with and without an end of the server.
const WAYS: [&[&str]; 4] = [&[], &["--stop"], &["--gpu-direct"], &["--gpu-direct", "--stop"]];

const STEPS: [&str; 4] = ["lock", "checkpoint", "restore", "unlock"];

/// A call whose replica finds a driver that knows both ways.
fn both_ways(devices: &Devices, call: Rewarm) -> Rewarm {
    devices.seen_by(call).env(rewarm_gpu_sim::VERSION_ENV, "13040")
}

#[test]
fn a_snapshot_killed_between_any_two_steps_leaves_the_server_serving() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let name = world.name("device");
    let output = both_ways(&devices, world.run_call(&name, &server, &[])).ok();
    let source = Replica::of_run(&world, name, server.port, &output);
    let before = answers(&source, &server);
    let used = devices.used_mib(0);
    let probe = probe_file(&world);
    // The shim has its helper from the first use on.
    world.rewarm().args(["pause", source.name()]).ok();
    world.rewarm().args(["wake", source.name()]).ok();
    let (traces, list) = (world.traces(), visible(&world));
    let survived = |when: &str| {
        // The shim may still be at it: the server answers as soon as it is done.
        server_answers_as_before(&source, &server, &before);
        assert_eq!(devices.used_mib(0), used, "{when}");
        no_residue(&world, &traces);
        assert_eq!(visible(&world), list, "{when}: a reader sees something new");
    };
    for way in WAYS {
        let flags: Vec<&str> =
            ["--probe", &probe, "--pre", "true", "--post", "true"].iter().chain(way).copied().collect();
        for stage in stages(Operation::Snapshot) {
            let running = world.snapshot_call(&source, "v1", &flags).pause_at(stage).spawn();
            running.await_stderr(&format!("paused at {stage}"));
            running.signal(Signal::SIGKILL);
            let _ = running.wait();
            survived(&format!("{way:?}, {stage}"));
        }
        // Within the driver. A server that is to be stopped gets its devices back only when the command is gone.
        let steps = if way.contains(&"--stop") { &["lock", "checkpoint"][..] } else { &STEPS };
        let complete = way.contains(&"--gpu-direct").then_some("complete");
        for step in steps.iter().copied().chain(complete) {
            devices.control(&format!("{step} wait 1500"));
            let running = world.snapshot_call(&source, "v1", &flags).spawn();
            devices.await_rule(&world);
            running.signal(Signal::SIGKILL);
            let _ = running.wait();
            survived(&format!("{way:?}, {step}"));
            devices.control("");
        }
    }
    world.collect_what_the_killed_left();
    world.finish();
}

#[test]
fn a_restore_killed_between_any_two_steps_leaves_nothing() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let name = world.name("device");
    let output = both_ways(&devices, world.run_call(&name, &server, &[])).ok();
    let source = Replica::of_run(&world, name, server.port, &output);
    let before = answers(&source, &server);
    let (probe, clone) = (probe_file(&world), world.name("clone"));
    for (tag, way, steps) in [
        ("v1", &[][..], &["restore", "unlock"][..]),
        ("v2", &["--gpu-direct"], &["restore", "complete", "unlock"]),
    ] {
        world.snapshot(&source, tag, &[&["--probe", &probe, "--post", "true"], way].concat());
        let (traces, used) = (world.traces(), devices.used_mib(0));
        let call = || world.restore_call("device", tag, server.port, &["--name", &clone]);
        let restore = || both_ways(&devices, call());
        for stage in stages(Operation::Restore) {
            let running = restore().pause_at(stage).spawn();
            running.await_stderr(&format!("paused at {stage}"));
            running.signal(Signal::SIGKILL);
            let _ = running.wait();
            no_residue(&world, &traces);
            assert_eq!(devices.used_mib(0), used, "{way:?}, {stage}");
        }
        // Within the driver, which then gets what it restored back before that is killed.
        for step in steps {
            let rules = [&format!("{step} wait 3000"), "lock wait 1", "checkpoint wait 1"];
            devices.control(&rules.join("\n"));
            let running = restore().spawn();
            devices.await_rule(&world);
            running.signal(Signal::SIGKILL);
            let _ = running.wait();
            no_residue(&world, &traces);
            assert_eq!(devices.used_mib(0), used, "{way:?}, {step}");
            // Whose device memory was to come from the command itself is in the middle of a restore for good.
            let met = if !way.is_empty() && *step == "restore" { &rules[..1] } else { &rules[..] };
            assert_eq!(devices.met(), met, "{way:?}, {step}");
            devices.control("");
        }
        let clones = Replica::of_restore(&world, server.port, &restore().ok());
        server_answers_as_before(&clones[0], &server, &before);
        clones[0].remove();
    }
    world.finish();
}

#[test]
fn two_snapshots_and_pauses_at_once_exclude_each_other() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    devices.control("checkpoint wait 4000");
    let first = world.snapshot_call(&source, "v1", &[]).spawn();
    devices.await_rule(&world);
    world.rewarm().args(["pause", source.name()]).fails(1).says(&["is busy"]);
    let second = world.snapshot_call(&source, "v2", &[]).run();
    assert!(second.code == Some(1) && second.stderr.contains("is busy"), "{second}");
    assert_eq!(first.wait().code, Some(0));
    devices.control("");
    server_answers_as_before(&source, &server, &before);
    world.rewarm().args(["pause", source.name()]).ok();
    world.rewarm().args(["pause", source.name()]).fails(1).says(&["is paused"]);
    world.snapshot_call(&source, "v3", &[]).fails(3).says(&["paused"]);
    world.rewarm().args(["wake", source.name()]).ok();
    world.rewarm().args(["wake", source.name()]).fails(1).says(&["needs a replica that is paused"]);
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

/// Changes one bit of the weights of the workload where they lie in packs. Gives what was there before.
pub(super) fn damage_device_memory(world: &World) -> Vec<(PathBuf, Vec<u8>)> {
    let packs = std::fs::read_dir(world.store_folder().join("packs")).expect("packs").flatten();
    // The workload's weights begin with this word, times and again from its seed.
    let first = 1_u64.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    let damaged: Vec<_> = packs
        .filter_map(|pack| {
            let mut bytes = std::fs::read(pack.path()).expect("a pack");
            let at = bytes.windows(8).position(|window| window == first.to_le_bytes())?;
            let intact = bytes.clone();
            bytes[at] ^= 1;
            std::fs::write(pack.path(), bytes).expect("our own folder");
            Some((pack.path(), intact))
        })
        .collect();
    assert!(!damaged.is_empty(), "the weights lie in a pack");
    damaged
}

#[test]
fn damaged_device_memory_is_found_before_the_driver_sees_it() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    // Stored as it is, so that device memory can be found in the pack by its content.
    world.snapshot(&source, "v1", &["--compression", "none"]);
    let traces = world.traces();
    let damaged = damage_device_memory(&world);
    // Any step of the driver would be another error.
    devices.control("restore result 999");
    let restore = || {
        let call = world.restore_call("device", "v1", server.port, &["--name", &world.name("clone")]);
        devices.seen_by(call)
    };
    restore().fails(5);
    no_residue(&world, &traces);
    devices.control("");
    for (path, intact) in damaged {
        std::fs::write(path, intact).expect("our own folder");
    }
    let clones = Replica::of_restore(&world, server.port, &restore().ok());
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

#[test]
fn another_build_of_the_drivers_library_is_refused() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    let inspected = world.rewarm_json().args(["inspect", &world.reference("device", "v1")]).ok().json();
    let library = &inspected["variants"][0]["manifest"]["facts"]["device"]["library"];
    let kept = library["build_id"].as_str().expect("a build id").to_owned();
    devices.other_build();
    let call = world.restore_call("device", "v1", server.port, &["--name", &world.name("clone")]);
    let output = devices.seen_by(call).fails(3);
    output.says(&["libcuda.so.1 is another build", &format!("{kept} at the snapshot")]);
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

pub(super) fn kill_shim(replica: &Replica<'_>) {
    let shim = replica.entry().and_then(|entry| entry["shim_pid"].as_i64()).expect("it is listed");
    let shim = nix::unistd::Pid::from_raw(i32::try_from(shim).expect("a process"));
    nix::sys::signal::kill(shim, Signal::SIGKILL).expect("it runs");
}

#[test]
fn a_shim_killed_in_any_step_of_the_driver_leaves_nothing_on_the_device() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    for (verb, step) in [
        ("pause", "lock"),
        ("pause", "checkpoint"),
        ("wake", "restore"),
        ("wake", "unlock"),
        ("snapshot", "lock"),
        ("snapshot", "checkpoint"),
        ("snapshot", "restore"),
        ("snapshot", "unlock"),
    ] {
        let traces = world.traces();
        let source = start(&world, &devices, "device", &server);
        if verb == "wake" {
            world.rewarm().args(["pause", source.name()]).ok();
        }
        devices.control(&format!("{step} wait 2000"));
        let running = match verb {
            "snapshot" => world.snapshot_call(&source, "v1", &[]).spawn(),
            verb => world.rewarm().args([verb, source.name()]).spawn(),
        };
        devices.await_rule(&world);
        kill_shim(&source);
        let output = running.wait();
        assert!(matches!(output.code, Some(1 | 6)), "{verb}, {step}: {output}");
        devices.control("");
        // The next command finds what is left, and takes it away.
        world.await_state("the replica is told as crashed", Duration::from_secs(20), || {
            source.entry().is_some_and(|entry| entry["status"] == "crashed")
        });
        world.await_state("the device is free", Duration::from_secs(20), || devices.used_mib(0) == 0);
        let _ = world.rewarm().args(["rm", source.name()]).run();
        no_residue(&world, &traces);
    }
    world.finish();
}

/// A clone is given back to the driver before it is killed; whoever dies meanwhile, it ends, and the device is free.
#[test]
fn a_stop_killed_in_any_step_of_the_driver_leaves_nothing_on_the_device() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    world.snapshot(&source, "v1", &[]);
    source.remove();
    let traces = world.traces();
    for step in ["lock", "checkpoint"] {
        for killed in ["command", "shim"] {
            let call = world.restore_call("device", "v1", server.port, &["--name", &world.name("clone")]);
            let clones = Replica::of_restore(&world, server.port, &devices.seen_by(call).ok());
            devices.control(&format!("{step} wait 1500"));
            // It handles no signal, so that it is killed after this time.
            let running = world.rewarm().args(["stop", clones[0].name(), "--timeout", "300ms"]).spawn();
            devices.await_rule(&world);
            match killed {
                "shim" => kill_shim(&clones[0]),
                _ => running.signal(Signal::SIGKILL),
            }
            let _ = running.wait();
            world.await_state("the replica has ended", Duration::from_secs(20), || {
                let status = clones[0].entry().map(|entry| entry["status"].clone());
                status.is_some_and(|status| status == if killed == "shim" { "crashed" } else { "exited" })
            });
            world.await_state("the device is free", Duration::from_secs(20), || devices.used_mib(0) == 0);
            devices.control("");
            world.rewarm().args(["rm", clones[0].name()]).ok();
            no_residue(&world, &traces);
        }
    }
    world.finish();
}

#[test]
fn a_shim_killed_while_the_driver_restores_a_clone_leaves_nothing() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    let (traces, used) = (world.traces(), devices.used_mib(0));
    let clone = world.name("clone");
    let restore = || devices.seen_by(world.restore_call("device", "v1", server.port, &["--name", &clone]));
    for step in ["restore", "unlock"] {
        devices.control(&format!("{step} wait 2000"));
        let running = restore().spawn();
        devices.await_rule(&world);
        let unfinished = Replica::in_the_making(&world, clone.clone());
        let pid = unfinished.entry().and_then(|entry| entry["pid"].as_u64()).expect("it is restored");
        // The command would end the clone: first the kernel has to.
        running.signal(Signal::SIGSTOP);
        kill_shim(&unfinished);
        world.await_state("the kernel ends the clone", Duration::from_secs(10), || {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            !status.contains("State:") || status.contains("State:\tZ")
        });
        running.signal(Signal::SIGCONT);
        running.wait().expect_code(1);
        devices.control("");
        let listed = world.rewarm_json().arg("ps").ok();
        assert_eq!(names(&listed), [source.name()], "{step}: {listed}");
        no_residue(&world, &traces);
        assert_eq!(devices.used_mib(0), used, "{step}");
    }
    let clones = Replica::of_restore(&world, server.port, &restore().ok());
    server_answers_as_before(&clones[0], &server, &before);
    server_answers_as_before(&source, &server, &before);
    world.finish();
}

#[test]
fn a_command_killed_in_any_step_of_a_pause_or_wake_changes_nothing_of_it() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    for (verb, step, becomes) in [
        ("pause", "lock", "paused"),
        ("wake", "restore", "ready"),
        ("pause", "checkpoint", "paused"),
        ("wake", "unlock", "ready"),
    ] {
        devices.control(&format!("{step} wait 1000"));
        let running = world.rewarm().args([verb, source.name()]).spawn();
        devices.await_rule(&world);
        running.signal(Signal::SIGKILL);
        let _ = running.wait();
        devices.control("");
        world.await_state("the replica is as it was asked for", Duration::from_secs(20), || {
            source.entry().is_some_and(|entry| entry["status"] == becomes)
        });
        if becomes == "ready" {
            server_answers_as_before(&source, &server, &before);
        } else {
            assert_eq!(devices.used_mib(0), 0);
        }
    }
    world.finish();
}

#[test]
fn a_machine_with_one_device_fewer_is_refused() {
    let Some((world, devices)) = world_with(&[64, 64]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    let restore = || {
        let call = world.restore_call("device", "v1", server.port, &["--name", &world.name("clone")]);
        devices.seen_by(call)
    };
    devices.hide(1, true);
    restore().fails(3).says(&["2 GPUs at the checkpoint, 1 here"]);
    devices.hide(1, false);
    let clones = Replica::of_restore(&world, server.port, &restore().ok());
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

/// Nothing was on a device when the snapshot was looked at, and all of it is when it is dumped.
#[test]
fn a_server_that_begins_to_use_its_device_during_a_snapshot_is_carried_whole() {
    let Some((world, devices)) = world_with(&[128]) else { return };
    let steps = world.files().join("engine.toml");
    std::fs::write(&steps, "[[before]]\nname = 'begin'\npost = '/begin'\n").expect("our own folder");
    let steps = steps.display().to_string();
    for (name, flags) in [("plain", &[][..]), ("direct", &["--gpu-direct"])] {
        let mut server = devices.server(16);
        server.name = name;
        server.command.push("--late".to_owned());
        let seen_by = |call| devices.seen_by(call).env(rewarm_gpu_sim::VERSION_ENV, "13040");
        let source = world.name(name);
        let output = seen_by(world.run_call(&source, &server, &[])).ok();
        let source = Replica::of_run(&world, source, server.port, &output);
        assert_eq!(devices.used_mib(0), 0);
        world.snapshot(&source, "v1", &[flags, &["--engine", &steps]].concat());
        let used = devices.used_mib(0);
        assert!(used >= 16, "{used} MiB are used");
        let before = answers(&source, &server);
        source.remove();
        let call = world.restore_call(name, "v1", server.port, &[]);
        let clones = Replica::of_restore(&world, server.port, &seen_by(call).ok());
        assert_eq!(devices.used_mib(0), used);
        server_answers_as_before(&clones[0], &server, &before);
        clones[0].remove();
    }
    world.finish();
}

#[test]
fn a_restored_server_lets_its_devices_go_before_it_is_killed() {
    let Some((world, devices)) = world_with(&[128]) else { return };
    let server = devices.server(16);
    let source = start(&world, &devices, "device", &server);
    // It fails in clones only.
    let hook = format!("grep -q '\"{}\"' /run/rewarm/identity.json", source.name());
    world.snapshot(&source, "v1", &[]);
    world.snapshot(&source, "v2", &["--post", &hook]);
    let restore = |tag: &str| {
        let call = world.restore_call("device", tag, server.port, &["--name", &world.name("clone")]);
        devices.seen_by(call)
    };
    // It handles no signal. What the driver does does not keep it alive: it refuses, ends its caller, or never answers.
    let rules =
        ["checkpoint wait 1", "checkpoint result 801", "lock result 600", "lock die", "checkpoint hang"];
    for rule in rules {
        let clones = Replica::of_restore(&world, server.port, &restore("v1").ok());
        devices.control(rule);
        let stop = world.rewarm().args(["stop", clones[0].name(), "--timeout", "300ms"]);
        let output = stop.timeout(Duration::from_secs(200)).ok();
        assert!(output.to_string().contains("SIGKILL"), "{output}");
        assert!(devices.met_rule(), "{rule}");
        assert_eq!(devices.used_mib(0), 18, "{rule}: the source's");
        devices.control("");
        clones[0].remove();
    }
    // One that a restore gives up after it ran.
    devices.control("checkpoint wait 1");
    restore("v2").fails(1);
    assert!(devices.met_rule());
    assert_eq!(devices.used_mib(0), 18, "the source's");
    // And one that it gives up within the driver, after that restored it.
    devices.control("unlock result 401\ncheckpoint wait 1");
    restore("v1").fails(1).says(&["illegal state (401)"]);
    assert_eq!(devices.met(), ["unlock result 401", "checkpoint wait 1"]);
    assert_eq!(devices.used_mib(0), 18, "the source's");
    // And one whose command is interrupted while the driver restores it.
    let rules = ["restore wait 2000", "lock wait 1", "checkpoint wait 1"];
    devices.control(&rules.join("\n"));
    let running = restore("v1").spawn();
    devices.await_rule(&world);
    running.signal(Signal::SIGINT);
    assert_ne!(running.wait().code, Some(0));
    assert_eq!(devices.met(), rules);
    assert_eq!(devices.used_mib(0), 18, "the source's");
    devices.control("");
    source.remove();
    world.finish();
}

/// A server that was never a clone is restored in its place by a wake and by a snapshot, also by one that fails.
#[test]
fn a_server_lets_its_devices_go_before_it_is_killed_once_the_driver_restored_it_in_place() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let server = devices.server(16);
    let noted = "lock wait 1\ncheckpoint wait 1";
    let steps: Vec<&str> = noted.lines().collect();
    for (verb, met) in [("", &[][..]), ("wake", &steps), ("snapshot", &steps), ("failed snapshot", &steps)] {
        let source = start(&world, &devices, "device", &server);
        match verb {
            "wake" => {
                world.rewarm().args(["pause", source.name()]).ok();
                world.rewarm().args(["wake", source.name()]).ok();
            }
            "snapshot" => drop(world.snapshot(&source, "v1", &[])),
            "failed snapshot" => {
                devices.control("checkpoint then-result 801");
                world.snapshot_call(&source, "v1", &[]).fails(1).says(&["the server runs on"]);
            }
            _ => {}
        }
        devices.control(noted);
        let output = world.rewarm().args(["stop", source.name(), "--timeout", "300ms"]).ok();
        assert!(output.to_string().contains("SIGKILL"), "{output}");
        assert_eq!(devices.met(), met, "{verb}: what was never restored is killed at once");
        devices.control("");
        assert_eq!(devices.used_mib(0), 0, "{verb}");
        world.rewarm().args(["rm", source.name()]).ok();
    }
    // One that is being woken is awake first.
    let source = start(&world, &devices, "device", &server);
    world.rewarm().args(["pause", source.name()]).ok();
    let rules = ["restore wait 2000", "lock wait 1", "checkpoint wait 1"];
    devices.control(&rules.join("\n"));
    let waking = world.rewarm().args(["wake", source.name()]).spawn();
    devices.await_rule(&world);
    let output = world.rewarm().args(["stop", source.name(), "--timeout", "300ms"]).ok();
    assert!(output.to_string().contains("SIGKILL"), "{output}");
    let _ = waking.wait();
    assert_eq!(devices.met(), rules);
    devices.control("");
    assert_eq!(devices.used_mib(0), 0);
    world.finish();
}
