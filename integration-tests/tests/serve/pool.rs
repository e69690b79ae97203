//! One pool: from zero, back to zero, and what becomes of its replicas.

use rewarm_integration_tests::http;
use rewarm_integration_tests::pool::free_port;
use rewarm_integration_tests::server::Server;

use crate::world_for;

/// A pool over the snapshot `pool@v1`.
fn config(world: &rewarm_integration_tests::World, port: u16, more: &str) -> String {
    let snapshot = world.reference("pool", "v1");
    format!(
        "[serve]\nadmin = false\n[[pool]]\nname = '{}'\nsnapshot = '{snapshot}'\nlisten = '127.0.0.1:{port}'\n{more}",
        world.name("p")
    )
}

#[test]
fn a_request_to_a_pool_at_zero_is_held_until_a_replica_is_restored() {
    let server = Server::pool();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("pool", &server);
    world.snapshot(&source, "v1", &["--stop"]);
    source.remove();
    let port = free_port();
    let serving =
        world.serve(&config(&world, port, "policy = { kind = 'rewarm', keep_last = 0.1, keep = 0.1 }"));
    assert_eq!(serving.replicas(), []);
    let answer = http::get(port, "/check").expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.text());
    serving.await_replicas(&[]);
    let again = http::get(port, "/check").expect("an answer");
    assert_eq!(again.text(), answer.text());
    serving.end();
    world.finish();
}
