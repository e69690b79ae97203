//! `rewarm serve`: pools of real replicas behind a real gateway, as clients and operators see them.

mod capture;
mod changes;
mod crowd;
mod luck;
mod memory;
mod operators;
mod pool;
mod removed;
mod scaling;
mod sockets;
mod tls;
mod traces;

use std::time::{Duration, Instant};

use rewarm_integration_tests::World;
use rewarm_integration_tests::server::Server;

/// Whether there is another round: until as many were done as the variable says, else for a while.
fn goes_on(began: Instant, done: u32, variable: &str, time: Duration) -> bool {
    match std::env::var(variable).ok().and_then(|text| text.parse().ok()) {
        Some(rounds) => done < rounds,
        None => began.elapsed() < time,
    }
}

/// A world with the snapshot `pool@v1`, whose source is gone.
fn pool_world() -> Option<World> {
    let server = Server::pool();
    let world = crate::world_for(&server)?;
    snapshot(&world, "v1");
    Some(world)
}

/// Takes a snapshot of the server of pools.
fn snapshot(world: &World, tag: &str) {
    snapshot_with(world, tag, &[]);
}

/// The same, with further flags of `rewarm snapshot`.
fn snapshot_with(world: &World, tag: &str, flags: &[&str]) {
    let source = world.start("pool", &Server::pool());
    world.snapshot(&source, tag, &[&["--stop"], flags].concat());
    source.remove();
}

/// One pool over the snapshot `pool@v1`.
fn config(world: &World, port: u16, more: &str) -> String {
    format!("[serve]\nadmin = false\n{}", pool(world, "p", "v1", port, more))
}

/// One `[[pool]]` over a snapshot.
fn pool(world: &World, name: &str, tag: &str, port: u16, more: &str) -> String {
    let (name, snapshot) = (world.name(name), world.reference("pool", tag));
    format!("[[pool]]\nname = '{name}'\nsnapshot = '{snapshot}'\nlisten = '127.0.0.1:{port}'\n{more}")
}
