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
    let other = call(&["--memory", "8MiB"]).env(VERSION_ENV, "13010").env(RELEASE_ENV, "610.1 (simulated)");
    let output = with_file(other, "/proc/version", &gvisor.display().to_string()).fails(3);
    output.says(&[
        "libcuda.so.1 is another build",
        "the memory limit of 8388608 bytes is below",
        "device state of a driver for CUDA 13.0, the driver here is for CUDA 13.1",
        "device state of driver 580.0 (simulated), the driver here is 610.1 (simulated)",
        "this machine runs on gVisor",
        "(Simulated GPU of another kind) is cut into instances (MIG)",
        "nothing here takes the place of GPU-00000000-0000-0000-0000-0000000000d0",
    ]);
    assert!(!devices.met_rule(), "the driver was called: {:?}", devices.met());
    no_residue(&world, &traces);
    world.finish();
}
