//! Ports and networks of replicas.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use rewarm_integration_tests::checks::{answers, server_answers_as_before};
use rewarm_integration_tests::garage::free_port;
use rewarm_integration_tests::http;
use rewarm_integration_tests::server::Server;

use crate::world_for;

#[test]
fn a_published_port_is_the_one_that_was_asked_for() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let (first, second) = (free_port(), free_port());
    let name = world.name("plain");
    let publish = format!("127.0.0.1:{first}:8000");
    let call =
        world.rewarm_json().args(["run", &name, "--publish", &publish, "--ready", &server.ready, "--"]);
    call.args(&server.command).ok();
    assert_eq!(http::get(first, "/check").expect("an answer").status, 200);
    let reference = world.reference("plain", "v1");
    world.rewarm_json().args(["snapshot", &name, &reference]).ok();
    // The port of the source is taken; the clone asks for another.
    let publish = format!("{second}:8000");
    world
        .rewarm_json()
        .args(["restore", &reference, "--name", &world.name("clone"), "--publish", &publish])
        .ok();
    assert_eq!(http::get(second, "/check").expect("an answer").status, 200);
    assert_eq!(http::get(first, "/check").expect("an answer").status, 200);
    world.rewarm().args(["stop", &name, "--timeout", "2s"]).ok();
    assert!(TcpStream::connect(("127.0.0.1", first)).is_err(), "the port stays open after the end");
    // It is free at once for the next.
    drop(TcpListener::bind(("127.0.0.1", first)).expect("the port is free"));
    world.finish();
}

#[test]
fn with_several_clones_the_port_must_be_left_to_the_kernel() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    world.snapshot(&source, "v1", &[]);
    let reference = world.reference("plain", "v1");
    let publish = format!("{}:8000", free_port());
    let call = world.rewarm().args(["restore", &reference, "--name", &world.name("clone"), "--count", "2"]);
    call.args(["--publish", &publish]).fails(2);
    world.finish();
}

#[test]
fn a_private_replica_sees_loopback_only() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let replica = world.start("plain", &server);
    assert_eq!(replica.sh("ls /sys/class/net"), "lo");
    // A server of the host on loopback is another loopback.
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let script = format!("import socket; socket.create_connection(('127.0.0.1', {port}), 2)");
    replica.exec(&["python3", "-c", &script]).fails(1).says(&["ConnectionRefusedError"]);
    world.finish();
}

/// A host's network is shared: the server's port is the machine's own.
#[test]
fn a_replica_in_the_network_of_the_host_comes_back_there() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let port = free_port();
    let mut command = server.command.clone();
    command[3] = port.to_string();
    let name = world.name("plain");
    let ready = format!("http://127.0.0.1:{port}/healthz");
    let call = world.rewarm_json().args([
        "run",
        &name,
        "--net",
        "host",
        "--port",
        &port.to_string(),
        "--ready",
        &ready,
        "--",
    ]);
    call.args(&command).ok();
    let before = http::get(port, "/check").expect("an answer");
    let reference = world.reference("plain", "v1");
    world.rewarm_json().args(["snapshot", &name, &reference, "--stop"]).ok();
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "the server still listens");
    world.rewarm_json().args(["restore", &reference]).ok();
    assert_eq!(http::get(port, "/check").expect("an answer"), before);
    world.finish();
}

/// An idle connection through a published port is Rewarm's own: it stays open on the source, and is closed in a clone.
#[test]
fn a_connection_through_a_published_port_survives_on_the_source() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    let mut idle = TcpStream::connect(("127.0.0.1", source.port())).expect("the port is open");
    let ask = |stream: &mut TcpStream| {
        stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n").expect("open");
        let mut buffer = [0; 4096];
        let count = stream.read(&mut buffer).expect("an answer");
        assert!(String::from_utf8_lossy(&buffer[..count]).starts_with("HTTP/1.1 200"), "{count} bytes");
    };
    ask(&mut idle);
    world.snapshot(&source, "v1", &[]);
    ask(&mut idle);
    let clones = world.restore("plain", "v1", server.port, &["--name", &world.name("clone"), "--count", "2"]);
    for clone in &clones {
        server_answers_as_before(clone, &server, &before);
        let open = clone.sh("awk '$4 == \"01\"' /proc/net/tcp | wc -l");
        assert_eq!(open, "0", "{}: a connection of the source is open", clone.name());
    }
    ask(&mut idle);
    world.finish();
}
