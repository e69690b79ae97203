//! `rewarm serve`: pools of real replicas behind a real gateway, as clients and operators see them.

mod capture;
mod changes;
mod operators;
mod pool;
mod scaling;

use rewarm_integration_tests::World;
use rewarm_integration_tests::server::Server;

/// A world with the snapshot `pool@v1`, whose source is gone.
fn pool_world() -> Option<World> {
    let server = Server::pool();
    let world = crate::world_for(&server)?;
    snapshot(&world, "v1");
    Some(world)
}

/// Takes a snapshot of the server of pools.
fn snapshot(world: &World, tag: &str) {
    let source = world.start("pool", &Server::pool());
    world.snapshot(&source, tag, &["--stop"]);
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
