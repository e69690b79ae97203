//! `rewarm doctor`: what NVML and the driver tell of devices.

use rewarm_integration_tests::devices::Devices;
use rewarm_integration_tests::{World, command::Output};
use serde_json::Value;

use super::world_with;

fn doctor(world: &World, devices: &Devices, flags: &[&str]) -> Output {
    devices.seen_by(world.rewarm_json().arg("doctor").args(flags)).run()
}

/// What is said about a need, if anything is.
fn need(output: &Output, name: &str) -> Option<Value> {
    let needs = output.json()["needs"].as_array().cloned().expect("needs");
    needs.into_iter().find(|need| need["name"] == name)
}

#[test]
fn doctor_tells_of_devices_and_asks_the_driver_where_it_is_told_to() {
    let Some((world, devices)) = world_with(&[64]) else { return };
    let told = |output: &Output, name: &str| {
        let need = need(output, name).unwrap_or_else(|| panic!("nothing of {name}: {output}"));
        (need["state"].as_str().unwrap_or_default().to_owned(), need.to_string())
    };
    let plain = doctor(&world, &devices, &[]);
    let (state, text) = told(&plain, "gpu");
    assert!(state == "ok" && text.contains("580.0 (simulated), 1 GPU: Simulated GPU"), "{text}");
    assert_eq!(need(&plain, "cuda driver"), None, "it is asked only where it is wanted");
    let (state, text) = told(&plain, "gpu persistence");
    assert!(state == "degraded" && text.contains("nvidia-smi -pm 1"), "{text}");
    let asked = doctor(&world, &devices, &["--gpu"]);
    let (state, text) = told(&asked, "cuda driver");
    assert!(state == "ok" && text.contains("checkpoint calls are there: GPU-00000000"), "{text}");
    devices.mark(0, "mig", true);
    let (state, text) = told(&doctor(&world, &devices, &[]), "gpu checkpoint");
    assert!(state == "degraded" && text.contains("(MIG)"), "{text}");
    let old = devices.seen_by(world.rewarm_json().args(["doctor", "--gpu"]));
    let old = old.env(rewarm_gpu_sim::VERSION_ENV, "12040").run();
    let (state, text) = told(&old, "cuda driver");
    assert!(state == "missing" && text.contains("at least 12.8 (R570) is needed"), "{text}");
    world.finish();
}
