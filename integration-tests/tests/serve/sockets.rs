//! Requests as their sockets show them: what is counted beside what is open, and what an answer says of itself.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use rewarm_integration_tests::http;
use rewarm_integration_tests::pool::free_port;
use rewarm_integration_tests::server::{PORT, Server};

use super::{config, pool_world};

/// How long a busy machine may take for what is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// A request whose answer is not read to its end.
struct Asked(TcpStream);

impl Asked {
    fn send(port: u16, path: &str, headers: &str) -> Self {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        write!(stream, "GET {path} HTTP/1.1\r\nhost: a\r\n{headers}\r\n").expect("it reads");
        Self(stream)
    }

    /// The head of its answer, in lower case.
    fn head(&self) -> String {
        let mut lines = BufReader::with_capacity(1, &self.0).lines().map(|line| line.expect("a line"));
        lines.by_ref().take_while(|line| !line.is_empty()).map(|line| line.to_lowercase() + "\n").collect()
    }
}

/// Connections that are open of the server in this process's network namespace.
fn open_connections(pid: i64) -> usize {
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).expect("it lives");
    let local = format!(":{PORT:04X}");
    let open = |line: &&str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // 01 is ESTABLISHED.
        fields[1].ends_with(&local) && fields[3] == "01"
    };
    table.lines().skip(1).filter(open).count()
}

#[test]
fn requests_in_flight_are_the_connections_that_are_open() {
    let Some(world) = pool_world() else { return };
    let (port, admin) = (free_port(), free_port());
    let one = "concurrency = 8\nmin_replicas = 1\nmax_replicas = 1\n";
    let file = config(&world, port, one).replace("admin = false", &format!("admin = '127.0.0.1:{admin}'"));
    let serving = world.serve(&file);
    serving.await_replicas(&["ready"]);
    let pid = world.rewarm_json().arg("ps").ok().json()["replicas"][0]["pid"].as_i64().expect("a number");
    let counted = || {
        let status = http::get(admin, "/admin/status?decisions=0&starts=0").expect("an answer").json();
        status["pools"][0]["in_flight"].as_u64().expect("a number") as usize
    };
    let both_are = |count: usize, when: &str| {
        world.await_state(&format!("{count} in flight and open, {when}"), PATIENCE, || {
            counted() == count && open_connections(pid) == count
        });
    };
    both_are(0, "before the first request");
    // None of these can end by itself, and no connection can be kept for another request.
    let upgrade = "connection: upgrade\r\nupgrade: anything\r\n";
    let mut asked = Vec::new();
    for (path, headers) in [
        ("/stream?n=100000&ms=50", ""),
        ("/upgrade", upgrade),
        ("/hang", ""),
        ("/stream?n=100000&ms=50", ""),
        ("/upgrade", upgrade),
        ("/hang", ""),
    ] {
        asked.push(Asked::send(port, path, headers));
        both_are(asked.len(), path);
    }
    asked.remove(1).0.shutdown(Shutdown::Both).expect("it was open");
    both_are(asked.len(), "one has been shut down");
    while let Some(client) = asked.pop() {
        drop(client);
        both_are(asked.len(), "one more has left");
    }
    serving.end();
    world.finish();
}

/// In a network that others use too, nothing about the gateway's connections says whose they are. They are no obstacle all the same.
#[test]
fn a_replica_in_the_network_of_the_host_can_be_snapshotted_while_the_gateway_asks_it() {
    let mut server = Server::pool();
    server.listen_on(free_port());
    let Some(world) = crate::world_for(&server) else { return };
    let source = world.start_with("pool", &server, &["--net", "host"]);
    world.snapshot(&source, "v1", &["--stop"]);
    source.remove();
    let port = free_port();
    let serving = world.serve(&config(&world, port, "concurrency = 8\nmin_replicas = 1\nmax_replicas = 1\n"));
    serving.await_replicas(&["ready"]);
    let mut asked = Asked::send(port, "/stream?n=1000000&ms=2", "");
    assert!(asked.head().starts_with("http/1.1 200"));
    let name = serving.replicas()[0].0.clone();
    world.rewarm_json().args(["snapshot", &name, &world.reference("pool", "v2")]).ok();
    // It goes on: more comes than can have been on the way.
    let mut more = vec![0; 4096];
    asked.0.read_exact(&mut more).expect("the connection is open");
    drop(asked);
    assert_eq!(http::get(port, "/check").expect("an answer").status, 200);
    serving.end();
    world.finish();
}

#[test]
fn an_answer_says_who_gave_it_and_whether_it_was_held() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let hold = "target_wait = '1ms'\npolicy = { kind = 'rewarm', keep_last = 600.0 }\n";
    let serving = world.serve(&config(&world, port, hold));
    let first = Asked::send(port, "/who", "x-request-id: mine\r\n").head();
    let replicas = serving.replicas();
    assert!(first.contains(&format!("x-rewarm-replica: {}\n", replicas[0].0)), "{first}, of {replicas:?}");
    assert!(first.contains("x-request-id: mine\n"), "{first}");
    let held = first.lines().find_map(|line| line.strip_prefix("x-rewarm-held-ms: "));
    assert!(held.expect("it was held").parse::<f64>().expect("a number") > 0.0, "{first}");
    let second = Asked::send(port, "/who", "").head();
    assert!(second.starts_with("http/1.1 200") && !second.contains("x-rewarm-held-ms"), "{second}");
    serving.end();
    world.finish();
}
