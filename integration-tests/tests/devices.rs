//! Servers with device memory, against the simulated driver.

mod content;
mod direct;
mod engine;
mod given;
mod given_up;
mod held;
mod kinds;
mod look;
mod luck;
mod pause;
mod refused;
mod said;
mod several;
mod silent;
mod snapshot;
mod soak;
mod verdict;

use std::path::Path;

use rewarm_integration_tests::devices::Devices;
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{World, needs};

use crate::world;

/// A world with a GPU of each of these sizes in MiB.
fn world_with(sizes: &[u64]) -> Option<(World, Devices)> {
    let world = world(needs::REPLICA)?;
    let workload = Path::new(env!("CARGO_BIN_EXE_gpu-workload"));
    let devices = Devices::new(workload, sizes);
    Some((world, devices))
}

/// Starts `server` as the replica `short` so that its shim finds the GPUs.
fn start<'w>(
    world: &'w World,
    devices: &Devices,
    short: &str,
    server: &Server,
) -> rewarm_integration_tests::replica::Replica<'w> {
    let name = world.name(short);
    let output = devices.seen_by(world.run_call(&name, server, &[])).ok();
    rewarm_integration_tests::replica::Replica::of_run(world, name, server.port, &output)
}
