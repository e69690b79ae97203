//! Bad luck while pools serve: a gateway that is killed, a store that is away, servers that answer otherwise than before, or
//! not at all.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rewarm_integration_tests::http;
use rewarm_integration_tests::needs::Need;
use rewarm_integration_tests::pool::{Serving, descriptors, free_port};
use rewarm_integration_tests::server::Server;

use super::{config, goes_on, pool_world, snapshot};

/// How long gateways are killed, where `make soak` does not say how often.
const TIME: Duration = Duration::from_secs(15);
/// How long a store is away, where `make soak` does not say for how many seconds: several looks at the tag fail meanwhile.
const AWAY: Duration = Duration::from_secs(12);
/// Descriptors that `serve` may have for a moment, while it does something: fewer than one for each of the kills between two counts.
const SPARE: usize = 2;
/// How long a busy machine may take for what is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Kills the gateway, and waits until there is another one.
fn kill_gateway(serving: &Serving<'_>) {
    let pid = serving.gateway();
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it lives");
    let began = Instant::now();
    while serving.gateway() == pid {
        assert!(began.elapsed() < PATIENCE, "no other gateway; serve said:\n{}", serving.running().stderr());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A number once it has been the same for a second: what a program opens when it begins may come later than its first answer.
fn settled(number: impl Fn() -> usize) -> usize {
    let (began, mut same) = (Instant::now(), Vec::new());
    while same.len() < 10 {
        assert!(began.elapsed() < PATIENCE, "{same:?} does not settle");
        let now = number();
        same.retain(|before| *before == now);
        same.push(now);
        std::thread::sleep(Duration::from_millis(100));
    }
    same[0]
}

#[test]
fn programs_killed_again_and_again_lose_no_replica_and_leak_nothing() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let config = config(&world, port, "min_replicas = 1\nwarm = 1\n");
    let mut serving = world.serve(&config);
    serving.await_replicas(&["paused", "ready"]);
    let (before, who) = (serving.replicas(), http::get(port, "/who").expect("an answer").text());
    // They outlive every kill.
    let shims = settled(|| serving.descriptors_of_shims());
    let mut open = None;
    let (began, mut rounds) = (Instant::now(), 0);
    while goes_on(began, rounds, "REWARM_SOAK_RESTARTS", TIME) {
        // A gateway that ends again and again by itself would end `serve`.
        if rounds % 4 == 3 {
            serving.kill();
            serving = world.serve(&config);
            open = None;
        } else {
            kill_gateway(&serving);
        }
        world.await_state("it answers", PATIENCE, || {
            http::get(port, "/who").is_ok_and(|answer| answer.status == 200 && answer.text() == who)
        });
        let now = || descriptors(serving.running().pid());
        let most = *open.get_or_insert_with(|| settled(now));
        world.await_state("no more descriptors than before", PATIENCE, || now() <= most + SPARE);
        rounds += 1;
    }
    assert!(rounds > 4, "{rounds} rounds");
    assert_eq!(serving.replicas(), before, "after {rounds} rounds");
    world.await_state("no more descriptors of shims than before", PATIENCE, || {
        serving.descriptors_of_shims() <= shims + SPARE
    });
    serving.end();
    world.finish();
}

#[test]
fn a_gateway_that_is_killed_with_requests_held_tells_their_clients_at_once() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let serving = world.serve(&config(&world, port, "concurrency = 1\nmin_replicas = 1\nmax_replicas = 1\n"));
    serving.await_replicas(&["ready"]);
    let who = http::get(port, "/who").expect("an answer").text();
    let clients = [(); 4].map(|()| std::thread::spawn(move || http::get(port, "/sleep?ms=20000").is_err()));
    std::thread::sleep(Duration::from_millis(700));
    let began = Instant::now();
    kill_gateway(&serving);
    assert_eq!(clients.map(|client| client.join().expect("no panic")), [true; 4], "nobody was answered");
    assert!(began.elapsed() < Duration::from_secs(15), "they were told after {:?}", began.elapsed());
    // The replica goes on with what it was asked, and whoever asks now is answered by it.
    world.await_state("it answers", PATIENCE, || {
        http::get(port, "/who").is_ok_and(|answer| answer.status == 200 && answer.text() == who)
    });
    serving.end();
    world.finish();
}

#[test]
fn a_restored_server_that_answers_otherwise_than_recorded_gets_no_request() {
    let server = Server::pool();
    let Some(world) = crate::world_for(&server) else { return };
    let probe = world.files().join("probe.toml");
    std::fs::write(&probe, "port = 8000\n[[request]]\npath = '/same'\ncompare = 'status'\n")
        .expect("our own folder");
    let source = world.start("pool", &server);
    world.snapshot(&source, "v1", &["--stop", "--probe", &probe.to_string_lossy()]);
    source.remove();
    let port = free_port();
    let serving = world.serve(&config(&world, port, "min_replicas = 1\n"));
    for _ in 0..3 {
        // The restored one would say 500.
        let answer = http::get(port, "/same").expect("an answer");
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    let list = world.rewarm_json().arg("ps").ok();
    let started: Vec<_> = list.json()["replicas"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|one| one["started"].clone())
        .collect();
    assert_eq!(started, ["cold"]);
    serving.running().await_stderr("differs");
    serving.end();
    world.finish();
}

#[test]
fn a_store_that_is_away_stops_neither_running_nor_warm_replicas() {
    let mut needs = Server::pool().all_needs();
    needs.push(Need::Garage);
    let Some(world) = crate::world(&needs) else { return };
    let (world, way) = world.on_garage().behind();
    snapshot(&world, "v1");
    let port = free_port();
    let hasty = "policy = { kind = 'rewarm', keep_last = 0.1, keep = 0.1 }\n";
    let file = format!(
        "concurrency = 1\nmin_replicas = 1\nmax_replicas = 2\nwarm = 1\ntarget_wait = '10ms'\nfollow = '200ms'\n{hasty}"
    );
    let serving = world.serve(&config(&world, port, &file));
    serving.await_replicas(&["paused", "ready"]);
    let before = serving.replicas();
    world.await_state("memory is complete", PATIENCE, || {
        let list = world.rewarm_json().arg("ps").ok().json();
        list["replicas"].as_array().expect("a list").iter().all(|one| one["memory"] == "present")
    });
    way.fail_every(1);
    let away = Instant::now();
    let over = Arc::new(AtomicBool::new(false));
    let clients = [(); 2].map(|()| {
        let over = over.clone();
        std::thread::spawn(move || {
            let mut names = std::collections::BTreeSet::new();
            while !over.load(Ordering::Relaxed) {
                let answer = http::get(port, "/sleep?ms=300").expect("an answer");
                assert_eq!(answer.status, 200, "{}", answer.text());
                names.insert(answer.json()["name"].as_str().expect("a name").to_owned());
            }
            names
        })
    });
    while goes_on(away, away.elapsed().as_secs() as u32, "REWARM_SOAK_AWAY_SECONDS", AWAY) {
        std::thread::sleep(Duration::from_millis(100));
    }
    over.store(true, Ordering::Relaxed);
    let names: std::collections::BTreeSet<_> =
        clients.into_iter().flat_map(|client| client.join().expect("every answer was good")).collect();
    assert!(before.iter().all(|(name, _)| names.contains(name)), "{names:?}, expected all of {before:?}");
    assert!(way.failed() > 0, "nobody asked the store");
    way.fail_every(0);
    // With the store back, a replica that dies is restored again.
    assert_eq!(http::get(port, "/die").expect("an answer").status, 502);
    assert_eq!(http::get(port, "/check").expect("an answer").status, 200);
    serving.end();
    world.finish();
}

#[test]
fn a_replica_that_never_answers_is_replaced() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let file = "concurrency = 4\nmin_replicas = 1\nmax_replicas = 1\nanswer_timeout = '1s'\n";
    let serving = world.serve(&config(&world, port, file));
    let first = http::get(port, "/who").expect("an answer").json()["name"].clone();
    for _ in 0..3 {
        let answer = http::get(port, "/hang").expect("an answer");
        assert_eq!((answer.status, &answer.json()["error"]["type"]), (504, &"replica_late".into()));
    }
    let second = http::get(port, "/who").expect("an answer");
    assert_eq!(second.status, 200, "{}", second.text());
    assert_ne!(second.json()["name"], first, "three in a row");
    serving.end();
    world.finish();
}

/// While a replica starts, a no is waited for; afterwards nobody asks, and clients are answered.
#[test]
fn a_ready_check_that_flaps_fails_no_start_and_ends_no_replica() {
    let server = Server::unsure();
    let Some(world) = crate::world_for(&server) else { return };
    let source = world.start("pool", &server);
    world.snapshot(&source, "v1", &["--stop"]);
    source.remove();
    let (port, admin) = (free_port(), free_port());
    let file = config(&world, port, "concurrency = 1\nmin_replicas = 2\nmax_replicas = 2\n")
        .replace("admin = false", &format!("admin = '127.0.0.1:{admin}'"));
    let (packs, away) = (world.store_folder().join("packs"), world.store_folder().join("away"));
    for tier in ["restore", "cold"] {
        let serving = world.serve(&file);
        serving.await_replicas(&["ready", "ready"]);
        let before = serving.replicas();
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(3) {
            let answer = http::get(port, "/check").expect("an answer");
            assert_eq!(answer.status, 200, "{}", answer.text());
            // What others ask changes its mind, and nobody minds.
            let _ = http::get(port, "/healthz").expect("an answer");
        }
        let pool =
            http::get(admin, "/admin/status?starts=100").expect("an answer").json()["pools"][0].clone();
        let starts = pool["starts"].as_array().expect("a list");
        let ready =
            starts.iter().filter(|start| start["tier"] == tier && start["outcome"] == "ready").count();
        assert_eq!((ready, &pool["totals"]["died"]), (2, &0.into()), "{tier}: {pool:#}");
        assert_eq!(serving.replicas(), before, "{tier}");
        serving.end();
        // What is not there any more is started cold.
        world.rewarm().args(["cache", "--clear"]).ok();
        if tier == "restore" {
            std::fs::rename(&packs, &away).expect("our own folder");
        }
    }
    std::fs::rename(&away, &packs).expect("our own folder");
    world.finish();
}

#[test]
fn restored_servers_that_refuse_again_and_again_are_not_restored_without_end() {
    let server = Server::flapping();
    let Some(world) = crate::world_for(&server) else { return };
    let source = world.start("pool", &server);
    world.snapshot(&source, "v1", &["--stop"]);
    source.remove();
    let (port, admin) = (free_port(), free_port());
    let file = config(&world, port, "min_replicas = 1\n")
        .replace("admin = false", &format!("admin = '127.0.0.1:{admin}'"));
    let serving = world.serve(&file);
    let check = || {
        let answer = http::get(port, "/check").expect("an answer");
        assert_eq!(answer.status, 200, "{}", answer.text());
    };
    let status = || http::get(admin, "/admin/status?starts=100").expect("an answer").json();
    let starts = |tier: &str| {
        let pool = &status()["pools"][0];
        let starts = pool["starts"].as_array().expect("a list");
        starts.iter().filter(|start| start["tier"] == tier).count()
    };
    // Each of them answers once; what it refuses then goes to the next one.
    world.await_state("a cold start in their place", PATIENCE, || {
        check();
        starts("cold") > 0
    });
    let restores = starts("restore");
    assert!(restores >= 3, "{restores} restores");
    for _ in 0..10 {
        check();
    }
    assert_eq!((starts("restore"), starts("cold")), (restores, 1), "{:#?}", status());
    assert_eq!(status()["pools"][0]["totals"]["cut_off"], 0, "{:#?}", status());
    serving.running().await_stderr("its server cannot be reached");
    serving.end();
    world.finish();
}
