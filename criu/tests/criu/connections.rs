//! Connections inside a replica survive, chosen ones come back closed.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use rewarm_criu::admission::{self, Peer};
use rewarm_criu::config::Config;
use rewarm_criu::image::files::{Protocol, SocketState};
use rewarm_criu::patch;

use crate::needs;
use crate::world::World;

/// A connection between two sockets of the process itself, a server with one accepted connection from outside, a client
/// and a UDP socket connected to outside. A thread waits in a read, as servers do.
const SOCKETS: &str = "
import select, socket, threading
inner_listener = socket.create_server(('127.0.0.1', 0))
inner_client = socket.create_connection(inner_listener.getsockname())
inner_server, _ = inner_listener.accept()
inner_client.sendall(b'queued')
listener = socket.create_server(('127.0.0.1', 0))
outcome = []
def wait():
    try: outcome.append(accepted.recv(10))
    except OSError as error: outcome.append(error)
def accept():
    global accepted, poll
    accepted, _ = listener.accept()
    poll = select.epoll()
    poll.register(accepted, select.EPOLLIN | select.EPOLLRDHUP)
    threading.Thread(target=wait, daemon=True).start()
";

#[test]
fn chosen_connections_come_back_closed_and_the_others_survive() {
    let Some(criu) = needs::criu() else { return };
    let mut world = World::start(criu);
    world.run(SOCKETS);
    let port: u16 = world.run("listener.getsockname()[1]").parse().expect("a port");
    let mut caller = TcpStream::connect(("127.0.0.1", port)).expect("the server listens");
    world.run("accept()");
    // Two peers outside: a TCP server, and a UDP service at an address that a fresh network namespace cannot reach.
    let outside = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let outside_address = outside.local_addr().expect("an address");
    let udp = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    world.run(&format!("client = socket.create_connection(('127.0.0.1', {}))", outside_address.port()));
    let udp_port = udp.local_addr().expect("an address").port();
    world.run(&format!(
        "statsd = socket.socket(type=socket.SOCK_DGRAM); statsd.connect(('127.0.0.1', {udp_port}))"
    ));
    world.dump();

    let images = world.images();
    let connections = admission::connections(&images).expect("connections");
    let tcp: Vec<_> = connections.iter().filter(|connection| connection.protocol == Protocol::Tcp).collect();
    assert_eq!(tcp.len(), 4, "{connections:#?}");
    let inside: Vec<_> =
        tcp.iter().filter(|connection| matches!(connection.peer, Peer::Inside { .. })).collect();
    assert_eq!(inside.len(), 2, "{connections:#?}");
    assert_eq!(inside[0].local, inside[1].remote);
    let outside: Vec<_> = tcp.iter().filter(|connection| connection.peer == Peer::Outside).collect();
    let caller_address: SocketAddr = caller.local_addr().expect("an address");
    assert!(outside.iter().any(|connection| connection.remote == caller_address), "{connections:#?}");
    assert!(outside.iter().any(|connection| connection.remote == outside_address), "{connections:#?}");
    assert!(
        outside
            .iter()
            .all(|connection| connection.owners.len() == 1 && connection.owners[0].pid == world.pid())
    );
    assert_eq!(admission::listeners(&images).expect("listeners").len(), 3);
    let statsd = connections.iter().find(|connection| connection.protocol == Protocol::Udp).expect("UDP");
    assert_eq!(statsd.remote.port(), udp_port);

    let mut ids: Vec<u32> = outside.iter().map(|connection| connection.id).collect();
    ids.push(statsd.id);
    assert!(patch::close_connections(&images, &[ids[0], 0xdead]).is_err(), "an unknown id is accepted");
    assert_eq!(patch::close_connections(&images, &ids).expect("patched"), 3);
    let left = admission::connections(&images).expect("connections");
    assert!(left.iter().all(|connection| connection.state == SocketState::Established), "{left:#?}");
    assert_eq!(left.len(), 2);
    world.restore();

    assert_eq!(world.run("inner_server.recv(100)"), "b'queued'");
    assert_eq!(world.run("inner_server.sendall(b'back'), inner_client.recv(100)"), "(None, b'back')");
    // Whoever waited in a read of a closed connection sees its end, and so does one who polls.
    world.run("import time\nwhile not outcome: time.sleep(0.01)");
    assert_eq!(world.run("outcome"), "[b'']");
    assert_eq!(world.run("[bool(events & select.EPOLLRDHUP) for _, events in poll.poll(1)]"), "[True]");
    assert_eq!(world.run("client.recv(10)"), "b''");
    world.run(
        "def write():\n try: return client.send(b'x')\n except OSError as error: return type(error).__name__",
    );
    assert_eq!(world.run("write()"), "'BrokenPipeError'");
    world.run("def ask():\n try: return statsd.send(b'x')\n except OSError as error: return error.errno");
    // EDESTADDRREQ.
    assert_eq!(world.run("ask()"), "89", "the UDP socket is still connected");
    // It can be connected anew, as a client does that finds its peer gone.
    world.run(&format!("statsd.connect(('127.0.0.1', {udp_port})); statsd.send(b'again')"));
    let mut datagram = [0; 10];
    assert_eq!(udp.recv(&mut datagram).expect("a datagram"), 5);
    // The old peers are not talked to by the restored process.
    caller.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
    let _ = caller.write_all(b"hello");
    let mut byte = [0];
    assert!(!matches!(caller.read(&mut byte), Ok(1)), "a closed connection answers");
    // The server takes new connections at the old port.
    let next = TcpStream::connect(("127.0.0.1", port));
    assert!(next.is_ok(), "{next:?}");
    assert_eq!(world.run("listener.accept()[1][0]"), "'127.0.0.1'");
}

#[test]
fn a_connection_that_nobody_has_accepted_is_left_out() {
    let Some(criu) = needs::criu() else { return };
    let world = World::start(criu);
    world.run("import socket; listener = socket.create_server(('127.0.0.1', 0))");
    let port: u16 = world.run("listener.getsockname()[1]").parse().expect("a port");
    let mut caller = TcpStream::connect(("127.0.0.1", port)).expect("the server listens");

    let refused =
        world.criu("dump", &Config::dump_to_images(), None, |command| command).fails().expect("a cause");
    assert!(refused.contains("In-flight connection"), "{refused}");
    world.clear_images();

    // The source accepts it after a dump, a clone does not know it.
    let config = Config::dump_to_images().skip_in_flight().leave_running();
    world.criu("dump", &config, None, |command| command).succeeds();
    world.run("accepted, _ = listener.accept(); accepted.sendall(b'late')");
    let mut answer = [0; 4];
    caller.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    caller.read_exact(&mut answer).expect("the source answers");
    assert_eq!(&answer, b"late");
    world.run("accepted.close()");
    world.kill();
    world.restore();
    world.run("listener.settimeout(0.2)\ndef poll():\n try: return listener.accept()\n except OSError as error: return type(error).__name__");
    assert_eq!(world.run("poll()"), "'TimeoutError'");
    TcpStream::connect(("127.0.0.1", port)).expect("the clone listens");
    assert_eq!(world.run("poll()[1][0]"), "'127.0.0.1'");
}
