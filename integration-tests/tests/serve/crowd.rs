//! Many requests at once: how many can be held, and which replica gets which.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rewarm_integration_tests::http;
use rewarm_integration_tests::pool::free_port;

use super::{config, pool_world};

/// Requests that are held at once.
const HELD: usize = 10_000;
/// What `serve` may take with them, both processes together.
const MEMORY_MAX: u64 = 300 << 20;
/// Opens connections, asks over each, and says when all have been sent; ends with its standard input.
const HOLDER: &str = r#"
import resource, socket, sys
port, count = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
held = []
for _ in range(count):
    held.append(socket.create_connection(("127.0.0.1", port), timeout=60))
    held[-1].sendall(b"GET /check HTTP/1.1\r\nhost: held.example\r\n\r\n")
print("sent", flush=True)
sys.stdin.read()
"#;

/// The same in HTTP/2, a thousand requests on each connection, each with a body of 16 KiB that nobody reads.
const UPLOADER: &str = r#"
import socket, sys
port, count = map(int, sys.argv[1:])
def frame(kind, flags, stream, content):
    return len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + content
def literal(index, text):
    return bytes([index, len(text)]) + text.encode()
HEAD = b"\x83\x86" + literal(4, "/check") + literal(1, "held.example")
held = []
for _ in range(0, count, 1000):
    held.append(socket.create_connection(("127.0.0.1", port), timeout=60))
    held[-1].sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
    incoming, kind = held[-1].makefile("rb"), None
    # Its settings, then how much it takes of all bodies together.
    while kind != 8:
        begin = incoming.read(9)
        kind = begin[3]
        incoming.read(int.from_bytes(begin[:3], "big"))
    for stream in range(1, 2000, 2):
        held[-1].sendall(frame(1, 4, stream, HEAD) + frame(0, 1, stream, bytes(16384)))
print("sent", flush=True)
sys.stdin.read()
"#;

/// Clients in a process of their own. Dropping it ends them.
struct Holder(Child);

impl Holder {
    fn start(program: &str, port: u16) -> Self {
        let arguments = ["-c", program, &port.to_string(), &HELD.to_string()];
        let mut command = Command::new("/usr/bin/python3");
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        Self(command.spawn().expect("Python"))
    }

    /// Waits until all requests have been sent.
    fn await_sent(&mut self) {
        let mut said = String::new();
        let from = self.0.stdout.take().expect("a pipe");
        BufReader::new(from).read_line(&mut said).expect("a line");
        assert_eq!(said, "sent\n");
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It may have ended by itself, which the test has seen then.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn resident_bytes(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it lives");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

#[test]
fn ten_thousand_requests_are_held_in_little_memory_and_forgotten_with_their_clients() {
    held_in_little_memory(HOLDER);
}

#[test]
fn ten_thousand_uploads_over_http2_are_held_in_little_memory_and_forgotten_with_their_clients() {
    held_in_little_memory(UPLOADER);
}

fn held_in_little_memory(clients: &str) {
    let Some(world) = pool_world() else { return };
    let (port, admin) = (free_port(), free_port());
    let limits = format!(
        "concurrency = 1\nmin_replicas = 1\nmax_replicas = 1\nqueue = {{ max = {HELD}, deadline = '10m' }}\n"
    );
    let file =
        config(&world, port, &limits).replace("admin = false", &format!("admin = '127.0.0.1:{admin}'"));
    let serving = world.serve(&file);
    serving.await_replicas(&["ready"]);
    let held = || {
        let status = http::get(admin, "/admin/status?decisions=0&starts=0").expect("an answer").json();
        status["pools"][0]["held"].as_u64().expect("a number") as usize
    };
    let mut busy = http::Connection::open(port).expect("it listens");
    let busy = std::thread::spawn(move || busy.get("/sleep?ms=25000").map(|answer| answer.status));
    let mut holder = Holder::start(clients, port);
    holder.await_sent();
    world.await_state("most are held", Duration::from_secs(60), || held() > HELD * 9 / 10);
    let memory = resident_bytes(serving.gateway()) + resident_bytes(serving.running().pid());
    assert!(memory < MEMORY_MAX, "{} MiB with {} held requests", memory >> 20, held());
    drop(holder);
    world.await_state("none is held", Duration::from_secs(60), || held() == 0);
    assert_eq!(busy.join().expect("no panic").expect("an answer"), 200);
    assert_eq!(http::get(port, "/check").expect("an answer").status, 200);
    serving.end();
    world.finish();
}

/// Which replicas answer two requests that overlap.
fn of_two_at_once(port: u16) -> BTreeSet<String> {
    let clients = [(); 2].map(|()| {
        std::thread::spawn(move || {
            http::get(port, "/sleep?ms=1500").expect("an answer").json()["name"].to_string()
        })
    });
    clients.map(|client| client.join().expect("no panic")).into()
}

#[test]
fn requests_go_to_the_busiest_replica_or_to_the_idlest_as_the_file_says() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let two =
        "concurrency = 4\nmin_replicas = 2\nmax_replicas = 2\npolicy = { kind = 'fixed', replicas = 2 }\n";
    for (routing, replicas) in [("busiest", 1), ("least-in-flight", 2)] {
        let serving = world.serve(&config(&world, port, &format!("{two}routing = '{routing}'\n")));
        serving.await_replicas(&["ready", "ready"]);
        assert_eq!(of_two_at_once(port).len(), replicas, "{routing}");
        serving.end();
    }
    world.finish();
}

#[test]
fn requests_of_one_session_go_to_one_replica_while_it_has_a_free_slot() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let file = "concurrency = 1\nmin_replicas = 3\nmax_replicas = 3\naffinity = 'x-session'\npolicy = { kind = 'fixed', replicas = 3 }\n";
    let serving = world.serve(&config(&world, port, file));
    serving.await_replicas(&["ready"; 3]);
    let who = |path: &str, session: u32| {
        let answer = http::get_with(port, path, &format!("x-session: {session}")).expect("an answer");
        answer.json()["name"].as_str().expect("a name").to_owned()
    };
    let homes: Vec<String> = (0..24).map(|session| who("/who", session)).collect();
    assert_eq!(homes.iter().collect::<BTreeSet<_>>().len(), 3, "each replica has sessions: {homes:?}");
    for (session, home) in homes.iter().enumerate() {
        assert_eq!(who("/who", session as u32), *home, "session {session}");
    }
    // With its own replica taken, a session is answered by another one and not held.
    let busy = std::thread::spawn(move || {
        http::get_with(port, "/sleep?ms=3000", "x-session: 0").expect("an answer")
    });
    std::thread::sleep(Duration::from_millis(500));
    let elsewhere = who("/who", 0);
    assert_eq!(busy.join().expect("no panic").json()["name"], homes[0]);
    assert_ne!(elsewhere, homes[0]);
    serving.end();
    world.finish();
}
