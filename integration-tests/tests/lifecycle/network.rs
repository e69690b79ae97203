//! Ports and networks of replicas.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};

use rewarm_integration_tests::checks::{answers, server_answers_as_before};
use rewarm_integration_tests::garage::free_port;
use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Replica, http, needs};

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

/// As with Docker: without an address a published port is open on every IPv4 address of the machine, with one on it alone.
#[test]
fn a_port_without_an_address_is_open_on_all_of_them() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    // The whole of 127/8 is this machine.
    let another = |port: u16| TcpStream::connect(("127.0.0.2", port));
    let open = world.start("open", &server);
    assert_eq!(open.entry().expect("ps shows it")["publish"][0]["address"], "0.0.0.0");
    drop(another(open.port()).expect("open on another address"));
    let name = world.name("local");
    let call =
        world.rewarm_json().args(["run", &name, "--publish", "127.0.0.1:0:8000", "--ready", &server.ready]);
    let local = Replica::of_run(&world, name, server.port, &call.arg("--").args(&server.command).ok());
    assert_eq!(local.json("/healthz")["ready"], true);
    assert!(another(local.port()).is_err(), "a port that was published on one address is open on another");
    world.finish();
}

/// A port that takes connections is ready, there and in a clone.
#[test]
fn a_server_may_be_ready_as_soon_as_its_port_is_open() {
    let mut server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    server.ready = "tcp:8000".to_owned();
    // Whoever does not wait for the port finds it closed.
    server.command[2] = server.command[2].replacen(
        "server = http.server",
        "import time; time.sleep(1)\nserver = http.server",
        1,
    );
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    world.snapshot(&source, "v1", &[]);
    for flags in
        [&["--name", &world.name("recorded")][..], &["--name", &world.name("given"), "--ready", "tcp:8000"]]
    {
        let clones = world.restore("plain", "v1", server.port, flags);
        server_answers_as_before(&clones[0], &server, &before);
    }
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

/// Asks over a connection that stays open.
fn ask(stream: &mut TcpStream) {
    stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n").expect("open");
    // Head and body may come in pieces; the body is the last of it.
    let mut answer = String::new();
    let mut buffer = [0; 4096];
    while !answer.contains('}') {
        let count = stream.read(&mut buffer).expect("an answer");
        assert_ne!(count, 0, "the connection was closed after {answer:?}");
        answer += &String::from_utf8_lossy(&buffer[..count]);
    }
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

/// Prints how many of the server's connections are established.
const ESTABLISHED: &str = r#"
import glob, os
held = {os.readlink(fd) for fd in glob.glob("/proc/1/fd/*") if os.path.lexists(fd)}
lines = [line.split() for line in open("/proc/1/net/tcp").readlines()[1:]]
print(sum(line[3] == "01" and f"socket:[{line[9]}]" in held for line in lines))
"#;

fn established(replica: &Replica<'_>) -> String {
    replica.exec(&["python3", "-c", ESTABLISHED]).ok().stdout.trim().to_owned()
}

/// An idle connection through a published port is Rewarm's own: it stays open on the source, and is closed in a clone.
#[test]
fn a_connection_through_a_published_port_survives_on_the_source() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let source = world.start("plain", &server);
    let before = answers(&source, &server);
    let mut idle = TcpStream::connect(("127.0.0.1", source.port())).expect("the port is open");
    ask(&mut idle);
    world.snapshot(&source, "v1", &[]);
    ask(&mut idle);
    let clones = world.restore("plain", "v1", server.port, &["--name", &world.name("clone"), "--count", "2"]);
    for clone in &clones {
        server_answers_as_before(clone, &server, &before);
        assert_eq!(established(clone), "0", "{}: a connection of the source is open", clone.name());
    }
    ask(&mut idle);
    world.finish();
}

/// The plain server on a port that nobody has, with a second one on which it accepts and says nothing.
fn in_a_shared_network() -> (Server, u16) {
    let (mut server, silent) = (Server::plain(), free_port());
    server.port = free_port();
    server.command[3] = server.port.to_string();
    server.ready = format!("http://127.0.0.1:{}/healthz", server.port);
    let accept = format!(
        "import socket, threading\nsilent = socket.create_server(('127.0.0.1', {silent}))\nkept = []\n\
         def accept():\n    while True: kept.append(silent.accept())\n\
         threading.Thread(target=accept, daemon=True).start()\n"
    );
    server.command[2] = accept + &server.command[2];
    (server, silent)
}

/// The same in a network that others use too, where a connection does not tell by itself whose it is. What the other side has
/// ended is no connection any more; one that somebody else holds is refused as ever.
fn own_connections_survive(net: &str) {
    let (server, silent) = in_a_shared_network();
    let Some(world) = world_for(&server) else { return };
    let flags = ["--net", net];
    let source = world.start_with("plain", &server, &flags);
    let before = answers(&source, &server);
    let mut idle = TcpStream::connect(("127.0.0.1", source.port())).expect("the port is open");
    ask(&mut idle);
    let connect = "import socket, sys; c = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); \
                   print('connected', flush=True); sys.stdin.read()";
    let somebody = |port: u16| {
        let namespace = net.strip_prefix("ns:").unwrap_or("/proc/self/ns/net");
        let mut child = Command::new("nsenter")
            .args([&format!("--net={namespace}"), "python3", "-c", connect, &port.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start nsenter");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("text");
        assert_eq!(line.trim(), "connected");
        child
    };
    let mut other = somebody(silent);
    let refused = world.snapshot_call(&source, "v1", &["--pre", "touch /srv/drained"]).fails(3);
    refused.says(&["stage preflight", &format!("127.0.0.1:{silent}")]);
    assert!(!refused.stderr.contains(&format!(":{} ", server.port)), "Rewarm's own is refused: {refused}");
    source.exec(&["test", "-e", "/srv/drained"]).fails(1);
    // Its end stays with the server, which never looks: closed by the other side, it is nobody's.
    drop(other.stdin.take());
    other.wait().expect("our own child");
    let probe = world.files().join("probe.toml");
    let text = format!("port = {}\n[[request]]\npath = \"/check\"\ncompare = \"body\"\n", server.port);
    std::fs::write(&probe, text).expect("our own folder");
    world.snapshot(&source, "v1", &["--probe", &probe.to_string_lossy()]);
    ask(&mut idle);
    assert_eq!(established(&source), "1", "what is looked for in clones");
    source.remove();
    let clones = world.restore("plain", "v1", server.port, &flags);
    assert_eq!(established(&clones[0]), "0", "a connection of the source is open");
    server_answers_as_before(&clones[0], &server, &before);
    world.finish();
}

#[test]
fn own_connections_survive_in_the_network_of_the_host() {
    own_connections_survive("host");
}

#[test]
fn own_connections_survive_in_a_namespace_given_by_path() {
    if !needs::met(needs::REPLICA) {
        return;
    }
    let (mut owner, namespace) = namespace();
    own_connections_survive(&namespace);
    drop(owner.stdin.take());
    owner.wait().expect("our own child");
}

/// A network namespace with its loopback up, and the process that keeps it.
fn namespace() -> (Child, String) {
    let script = "import fcntl, socket, struct, sys\n\
                  fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh22x', b'lo', 1))\n\
                  print('up', flush=True)\nsys.stdin.read()";
    let mut owner = Command::new("unshare")
        .args(["--net", "python3", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start unshare");
    let mut line = String::new();
    BufReader::new(owner.stdout.take().expect("piped")).read_line(&mut line).expect("text");
    assert_eq!(line.trim(), "up");
    let path = format!("ns:/proc/{}/ns/net", owner.id());
    (owner, path)
}

/// A namespace that somebody else made, such as a pod's: it is used as it is, and left as it is.
#[test]
fn a_network_namespace_given_by_path() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let (mut owner, namespace) = namespace();
    let source = world.start_with("plain", &server, &["--net", &namespace]);
    let before = answers(&source, &server);
    let inner = source.sh("readlink /proc/1/ns/net");
    let wanted = std::fs::read_link(format!("/proc/{}/ns/net", owner.id())).expect("it runs");
    assert_eq!(inner, wanted.to_string_lossy());
    world.snapshot(&source, "v1", &["--stop"]);
    let clones = world.restore("plain", "v1", server.port, &["--net", &namespace]);
    server_answers_as_before(&clones[0], &server, &before);
    assert_eq!(clones[0].sh("readlink /proc/1/ns/net"), inner);
    clones[0].remove();
    // From somebody else's network into one of its own.
    let clones = world.restore("plain", "v1", server.port, &["--net", "private"]);
    server_answers_as_before(&clones[0], &server, &before);
    assert_ne!(clones[0].sh("readlink /proc/1/ns/net"), inner);
    drop(owner.stdin.take());
    owner.wait().expect("our own child");
    world.finish();
}

#[test]
fn without_a_network_a_server_is_reached_by_exec_only() {
    let server = Server::plain();
    let Some(world) = world_for(&server) else { return };
    let name = world.name("plain");
    let ready = "cmd:test -e /proc/1/exe";
    world
        .rewarm()
        .args(["run", &name, "--net", "none", "--ready", ready, "--", "sh", "-c", "echo up; exec sleep 600"])
        .ok();
    let exec = |script: &str| world.rewarm().args(["exec", &name, "--", "sh", "-c", script]).ok().stdout;
    assert_eq!(exec("cat /sys/class/net/lo/operstate").trim(), "down");
    let reference = world.reference("plain", "v1");
    world.rewarm().args(["snapshot", &name, &reference, "--stop"]).ok();
    world.rewarm().args(["restore", &reference]).ok();
    assert_eq!(exec("cat /sys/class/net/lo/operstate").trim(), "down");
    world.finish();
}
