//! `rewarm run --gpu`: devices and libraries that a replica is given, by a forged CDI file.

use std::time::Duration;

use rewarm_gpu_sim::NODES_ENV;
use rewarm_integration_tests::Replica;
use rewarm_integration_tests::checks::{answers, server_answers_as_before};
use rewarm_integration_tests::command::Rewarm;
use rewarm_integration_tests::devices::Devices;
use rewarm_integration_tests::server::Server;
use tempfile::TempDir;

use super::world_with;

/// Real device files, in place of a GPU's.
const NODES: [&str; 2] = ["/dev/loop-control", "/dev/fuse"];

/// A CDI file that gives those devices and the driver's library, and a server that needs it.
fn cdi(devices: &Devices) -> (TempDir, Server) {
    let cdi = tempfile::tempdir().expect("a folder");
    let library = devices.libraries().join("libcuda.so.1");
    let text = serde_json::json!({
        "cdiVersion": "0.5.0", "kind": "nvidia.com/gpu",
        "devices": [{"name": "0", "containerEdits": {"deviceNodes": [{"path": NODES[0]}]}}],
        "containerEdits": {
            "deviceNodes": [{"path": NODES[1]}],
            "mounts": [{"hostPath": library, "containerPath": "/usr/lib/x86_64-linux-gnu/libcuda.so.1"}],
            "env": ["REWARM_GIVEN=by-cdi"],
        },
    });
    std::fs::write(cdi.path().join("nvidia.json"), text.to_string()).expect("write");
    let mut server = devices.server(16);
    server.command[2] = "libcuda.so.1".into();
    server.env.retain(|(name, _)| name != NODES_ENV);
    server.env.push((NODES_ENV.to_owned(), NODES.join(":")));
    (cdi, server)
}

#[test]
fn a_replica_gets_devices_and_libraries_by_the_cdi_file_of_the_machine() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let (cdi, server) = cdi(&devices);
    let given = |call: Rewarm| devices.seen_by(call).env("REWARM_CDI", cdi.path());
    let name = world.name("given");
    let output = given(world.run_call(&name, &server, &["--gpu", "0"])).ok();
    let source = Replica::of_run(&world, name.clone(), server.port, &output);
    let before = answers(&source, &server);
    let env = world.rewarm().args(["exec", &name, "--", "sh", "-c", "echo $REWARM_GIVEN; ls /dev"]).ok();
    assert!(env.stdout.contains("by-cdi") && env.stdout.contains("loop-control"), "{env}");
    // The devices are open, and CRIU refuses an open device: the driver has let them go for the dump.
    world.snapshot(&source, "v1", &[]);
    server_answers_as_before(&source, &server, &before);
    let restore = || world.restore_call("given", "v1", server.port, &["--name", &world.name("clone")]);
    let clones = Replica::of_restore(&world, server.port, &given(restore()).ok());
    server_answers_as_before(&clones[0], &server, &before);
    clones[0].remove();
    // A machine that has none says so before data move.
    let empty = tempfile::tempdir().expect("a folder");
    let output = devices.seen_by(restore()).env("REWARM_CDI", empty.path()).fails(3);
    output.says(&["this machine has no GPU", "there is no CDI file in"]);
    let output = world.run_call(&world.name("none"), &server, &["--gpu", "3"]);
    given(output).fails(3).says(&["there is no GPU 3", "nvidia.json has 0"]);
    world.finish();
}

/// It was forked without exec, and the driver does not know it.
#[test]
fn a_child_that_keeps_a_device_open_is_refused_before_anything_is_locked() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let (cdi, server) = cdi(&devices);
    let name = world.name("given");
    let call = devices.seen_by(world.run_call(&name, &server, &["--gpu", "0"]));
    let source = Replica::of_run(&world, name, server.port, &call.env("REWARM_CDI", cdi.path()).ok());
    let before = answers(&source, &server);
    let processes = || source.sh("ls -d /proc/[0-9]* | wc -l").trim().parse::<u32>().expect("a number");
    let alone = processes();
    let answer = source.ask("POST", "/fork", None).expect("it answers");
    assert_eq!(answer.status, 200, "{}", answer.text());
    world.await_state("the child lives", Duration::from_secs(20), || processes() > alone);
    // A lock would be seen.
    devices.control("lock die");
    let output = world.snapshot_call(&source, "v1", &[]).fails(3);
    output.says(&["holds /dev/loop-control and does not use CUDA itself"]);
    assert!(!devices.met_rule(), "the driver was called: {:?}", devices.met());
    devices.control("");
    server_answers_as_before(&source, &server, &before);
    world.finish();
}
