//! Scaling up and down under load: nothing that is in flight is ever cut off.
//!
//! Nothing is tried twice here: what a drain cut off before its first byte would be answered by another replica, and nobody would see it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::signal::Signal;
use rewarm_integration_tests::fuzz::Random;
use rewarm_integration_tests::http;
use rewarm_integration_tests::pool::{descriptors, free_port};

use super::{goes_on, pool, pool_world};

/// How long the number of replicas changes, where `make soak` does not say how often.
const TIME: Duration = Duration::from_secs(15);
/// The most replicas.
const REPLICAS: u64 = 4;
/// How long a busy machine may take for what is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a client that has left HTTP talks: while several changes are made.
const TALK: Duration = Duration::from_secs(2);
/// Descriptors that differ by chance: five or six for each replica that waits at the end and not at the beginning. One for each of
/// those that came and went meanwhile would be far more.
const SPARE: usize = 16;

/// Asks for what takes a while, and for what does not.
fn get(port: u16, number: usize) {
    let path = match number % 3 {
        0 => "/stream?n=5&ms=30",
        1 => "/sleep?ms=70",
        _ => "/check",
    };
    let answer = http::get(port, path).expect("an answer that is whole");
    assert_eq!(answer.status, 200, "{}", answer.text());
}

/// What must not be sent twice.
fn post(port: u16) {
    let body = "x".repeat(100_000);
    let answer = http::request(port, "POST", "/echo", Some(&body)).expect("an answer that is whole");
    assert_eq!((answer.status, &answer.json()["bytes"]), (200, &body.len().into()), "{}", answer.text());
}

/// Leaves HTTP, talks for a while and goes.
fn talk(port: u16, over: &AtomicBool) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    stream
        .write_all(b"GET /upgrade HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: anything\r\n\r\n")
        .expect("it reads");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("the head of an answer");
        head.extend(byte);
    }
    assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
    let began = Instant::now();
    while began.elapsed() < TALK && !over.load(Ordering::Relaxed) {
        stream.write_all(b"anybody").expect("it reads");
        let mut said = [0; 7];
        stream.read_exact(&mut said).expect("an answer");
        assert_eq!(said, *b"ANYBODY");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
#[expect(clippy::print_stdout, reason = "what fails can be had again")]
fn random_scaling_under_load_cuts_nothing_off() {
    let Some(world) = pool_world() else { return };
    let (port, admin) = (free_port(), free_port());
    let file = |replicas: u64| {
        let policy = format!("policy = {{ kind = 'fixed', replicas = {replicas} }}\n");
        let more = format!("concurrency = 2\nmax_replicas = {REPLICAS}\nwarm = 2\nretry = false\n{policy}");
        format!("[serve]\nadmin = '127.0.0.1:{admin}'\n{}", pool(&world, "p", "v1", port, &more))
    };
    let serving = world.serve(&file(1));
    // How many wait beside the one that serves depends on what came before.
    let settled = || {
        let statuses: Vec<String> = serving.replicas().into_iter().map(|(_, status)| status).collect();
        let ready = statuses.iter().filter(|status| *status == "ready").count();
        ready == 1 && statuses.iter().filter(|status| *status == "paused").count() == statuses.len() - 1
    };
    world.await_state("one serves and the others wait", PATIENCE, settled);
    let open = || descriptors(serving.running().pid()) + descriptors(serving.gateway());
    let before = open();
    let (over, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..8)
        .map(|number| {
            let (over, answers) = (over.clone(), answers.clone());
            std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    match number {
                        6 => post(port),
                        7 => talk(port, &over),
                        _ => get(port, number),
                    }
                    answers.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let began = Instant::now();
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
    println!("the numbers of replicas follow from seed {seed}");
    let mut random = Random::new(seed);
    let (mut moves, mut replicas) = (0_u32, 1);
    while goes_on(began, moves, "REWARM_SOAK_SCALINGS", TIME) {
        // Another number each time.
        replicas = 1 + (replicas + random.below(REPLICAS - 1)) % REPLICAS;
        moves += 1;
        world.configure(&file(replicas));
        serving.running().signal(Signal::SIGHUP);
        std::thread::sleep(Duration::from_millis(400));
    }
    over.store(true, Ordering::Relaxed);
    clients.into_iter().for_each(|client| client.join().expect("every answer was good"));
    assert!(answers.load(Ordering::Relaxed) > 50 && moves > 5);
    let status = http::get(admin, "/admin/status?decisions=0&starts=0").expect("an answer").json();
    let totals = &status["pools"][0]["totals"];
    for total in ["killed_in_flight", "cut_off", "retried"] {
        assert_eq!(totals[total], 0, "{total}: {status}");
    }
    let starts = totals["starts"].as_array().expect("a list");
    let starts: u64 = starts.iter().filter(|sum| sum[1] == "ready").filter_map(|sum| sum[2].as_u64()).sum();
    let decisions = totals["decisions"].as_u64().expect("a number");
    // Half of the changes are upwards, by one, two or three; some meet a replica that is not drained yet.
    let enough = starts >= u64::from(moves) / 5 && decisions >= u64::from(moves) / 2;
    assert!(enough, "{moves} changes, {decisions} decisions, {starts} starts: {status}");
    world.configure(&file(1));
    serving.running().signal(Signal::SIGHUP);
    world.await_state("one serves and the others wait", PATIENCE, settled);
    world.await_state("no more descriptors than before", PATIENCE, || open() <= before + SPARE);
    serving.end();
    world.finish();
}
