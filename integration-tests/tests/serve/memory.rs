//! Pools whose replicas and decoded snapshots do not fit into memory together: real restores, and what stands in the book and on the
//! machine meanwhile.

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rewarm_integration_tests::pool::{Serving, free_port};
use rewarm_integration_tests::{World, http};
use serde_json::Value;

use super::{pool, pool_world};

/// How long a busy machine may take for what is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// What is counted for one replica, in MiB, and what there is: room for two.
const REPLICA: u64 = 100;
const MEMORY: u64 = 250;
/// What decoded snapshots may take beside that.
const CACHE: u64 = 50;

fn status(admin: u16) -> Value {
    let answer = http::get(admin, "/admin/status").expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.json()
}

/// Bytes that the book has; never more than there are.
fn used(status: &Value) -> u64 {
    let memory = &status["memory"];
    assert_eq!(
        (&memory["host_limit"], &memory["cache_limit"]),
        (&(MEMORY << 20).into(), &(CACHE << 20).into()),
        "{memory}"
    );
    let used = memory["host_used"].as_u64().expect("a number");
    assert!(used <= MEMORY << 20, "overdrawn: {status}");
    used
}

/// Waits until the pools are so.
fn until(admin: u16, what: &str, mut so: impl FnMut(&Value) -> bool) -> Value {
    let began = Instant::now();
    loop {
        let status = status(admin);
        used(&status);
        if so(&status) {
            return status;
        }
        assert!(began.elapsed() < PATIENCE, "{what}: {status}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Looks at book and machine until it is over, and says how often it did and how full the book was at most.
fn watch(serving: &Serving<'_>, admin: u16, over: &AtomicBool) -> (usize, u64) {
    let (mut looks, mut most) = (0, 0);
    while !over.load(Ordering::Relaxed) {
        most = most.max(used(&status(admin)));
        // Each that lives takes its part, whatever the book says.
        let living = serving.replicas();
        assert!(living.len() as u64 <= MEMORY / REPLICA, "{living:?}");
        looks += 1;
    }
    (looks, most)
}

/// What the fetcher holds, and what it may hold.
fn cache(world: &World) -> Value {
    world.rewarm_json().arg("cache").ok().json()
}

/// Of each snapshot that is restored again and again the decoded form would stay, as it does without a limit.
#[test]
fn decoded_snapshots_stay_within_their_part_of_the_memory() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    for (part, kept) in [("false", 0), ("'50MiB'", 1)] {
        let file = format!(
            "[serve]\nadmin = false\nmemory = '1GiB'\ncache = {part}\n{}",
            pool(
                &world,
                "p",
                "v1",
                port,
                "cold = false\npolicy = { kind = 'rewarm', keep_last = 0.0, keep = 0.1 }\n"
            )
        );
        let serving = world.serve(&file);
        for _ in 0..3 {
            let answer = http::get(port, "/check").expect("an answer");
            assert_eq!(answer.status, 200, "{}", answer.text());
            serving.await_replicas(&[]);
        }
        let limit = if kept == 0 { 0 } else { CACHE << 20 };
        world.await_state("what nobody reads is gone", PATIENCE, || {
            let held = cache(&world);
            // A fetcher of which nothing is to be kept ends when nobody has needed it for a moment.
            if kept == 0 && held["running"] == false {
                return true;
            }
            assert_eq!((&held["bounded"], &held["limit_bytes"]), (&true.into(), &limit.into()), "{held}");
            let streams = held["streams"].as_array().expect("a list");
            let stays: u64 = streams.iter().filter_map(|stream| stream["bytes"].as_u64()).sum();
            streams.len() == kept && stays <= limit && streams.iter().all(|stream| stream["holders"] == 0)
        });
        serving.end();
    }
    world.finish();
}

/// What the first replica of a pool at zero will need is decoded before anybody asks for one, where there is room for it.
#[test]
fn a_snapshot_is_on_the_machine_before_it_is_needed() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let file = |serve: &str, more: &str| {
        format!("[serve]\nadmin = false\n{serve}{}", pool(&world, "p", "v1", port, more))
    };
    let streams = || cache(&world)["streams"].as_array().cloned().unwrap_or_default();
    let serving = world.serve(&file("", "prefetch = false\n"));
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(streams(), [] as [Value; 0]);
    serving.end();
    let serving = world.serve(&file("", ""));
    serving.running().await_stderr("the snapshot is on this machine");
    world.await_state("nobody holds it", PATIENCE, || streams().iter().all(|stream| stream["holders"] == 0));
    let before = streams();
    assert_eq!((before.len(), &before[0]["complete"]), (1, &true.into()), "{before:?}");
    // A fetcher that nobody needs would have ended by then.
    std::thread::sleep(Duration::from_secs(2));
    let answer = http::get(port, "/check").expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.text());
    for key in ["digest", "read_bytes", "checked_bytes"] {
        assert_eq!(streams()[0][key], before[0][key], "{key}: it was made anew");
    }
    // What other work has taken the place of comes back.
    let complete = || streams().iter().any(|stream| stream["complete"] == true);
    world.await_state("no replica holds it", PATIENCE, || {
        world.rewarm().args(["cache", "--clear"]).ok();
        !complete()
    });
    world.await_state("the snapshot is here again", PATIENCE, complete);
    serving.end();
    // So does what a store did not give at first.
    world.rewarm().args(["cache", "--clear"]).ok();
    let (packs, away) = (world.store_folder().join("packs"), world.store_folder().join("away"));
    std::fs::rename(&packs, &away).expect("our own folder");
    let serving = world.serve(&file("", ""));
    serving.running().await_stderr("the snapshot was not brought here; it is tried again");
    std::fs::rename(&away, &packs).expect("our own folder");
    serving.running().await_stderr("the snapshot is on this machine");
    serving.end();
    world.rewarm().args(["cache", "--clear"]).ok();
    let serving = world.serve(&file("memory = '1GiB'\ncache = '1MiB'\n", ""));
    serving.running().await_stderr("there is no room to keep the snapshot decoded");
    assert_eq!(streams(), [] as [Value; 0]);
    serving.end();
    world.finish();
}

#[test]
fn replicas_that_do_not_fit_together_take_each_others_room_and_no_request_is_lost() {
    let Some(world) = pool_world() else { return };
    let (first, second, admin) = (free_port(), free_port(), free_port());
    let more = format!(
        "replica_memory = '{REPLICA}MiB'\nconcurrency = 1\nmax_replicas = 2\nwarm = 1\nfollow = '0s'\n\
         queue = {{ max = 100, deadline = '60s' }}\npolicy = {{ kind = 'rewarm', keep_last = 0.1, keep = 0.1 }}\n"
    );
    let pools = [pool(&world, "p", "v1", first, &more), pool(&world, "q", "v1", second, &more)];
    let head = format!(
        "[serve]\nadmin = '127.0.0.1:{admin}'\nmemory = '{}MiB'\ncache = '{CACHE}MiB'\n",
        MEMORY + CACHE
    );
    let serving = world.serve(&format!("{head}{}{}", pools[0], pools[1]));
    let warm = |pool: &Value| pool["replicas"][0]["state"] == "warm";
    let both = |status: &Value| status["pools"].as_array().expect("a list").iter().all(warm);
    until(admin, "each pool has a replica that waits", both);

    // Two requests at once to one pool: the second takes the room of what waits in the other one.
    let held: Vec<TcpStream> = (0..2)
        .map(|_| {
            let mut client = TcpStream::connect(("127.0.0.1", first)).expect("it listens");
            client.write_all(b"GET /hang HTTP/1.1\r\nhost: localhost\r\n\r\n").expect("it is sent");
            client
        })
        .collect();
    until(admin, "one pool has all of the room", |status| {
        status["pools"][0]["in_flight"] == 2
            && status["pools"][1]["replicas"].as_array().is_some_and(Vec::is_empty)
    });
    // There is nothing to take for a request to the other one. It waits, and is told why.
    let asked = std::thread::spawn(move || http::get(second, "/check").expect("an answer"));
    let waits = until(admin, "a start waits", |status| !status["pools"][1]["obstacle"].is_null());
    let obstacle =
        "a start waits for memory: host memory: 104857600 bytes wanted, 52428800 of 262144000 free";
    assert_eq!(waits["pools"][1]["obstacle"], obstacle);
    let decisions = waits["pools"][1]["decisions"].as_array().expect("a list");
    assert!(decisions.iter().any(|decision| decision["steps"][0] == obstacle), "{decisions:?}");
    assert!(!asked.is_finished());
    drop(held);
    assert_eq!(asked.join().expect("no panic").status, 200);
    until(admin, "nothing waits for memory", |status| status["pools"][1]["obstacle"].is_null());

    // Requests to both, more than there is room for at any time.
    let over = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = [first, second, first, second, first]
        .into_iter()
        .map(|port| {
            std::thread::spawn(move || {
                for _ in 0..15 {
                    let answer = http::get(port, "/sleep?ms=50").expect("an answer that is whole");
                    assert_eq!(answer.status, 200, "{}", answer.text());
                    std::thread::sleep(Duration::from_millis(150));
                }
            })
        })
        .collect();
    let (looks, most) = std::thread::scope(|scope| {
        let watching = scope.spawn(|| watch(&serving, admin, &over));
        let answered = clients.into_iter().map(std::thread::JoinHandle::join).filter(Result::is_ok).count();
        over.store(true, Ordering::Relaxed);
        assert_eq!(answered, 5, "every answer was good");
        watching.join().expect("never too much")
    });
    assert!(looks > 5 && most == (2 * REPLICA) << 20, "{looks} looks, at most {most} bytes");
    let totals = status(admin);
    for pool in totals["pools"].as_array().expect("a list") {
        let totals = &pool["totals"];
        assert_eq!(
            (&totals["refused_full"], &totals["refused_late"], &totals["cut_off"], &totals["died"]),
            (&0.into(), &0.into(), &0.into(), &0.into()),
            "{totals}"
        );
    }
    // What was given up comes back when nobody needs its room.
    until(admin, "each pool has a replica that waits", both);
    serving.end();
    world.finish();
}

/// What replicas take is known by their snapshot alone here, and neither a gateway nor a `serve` that is killed takes that with it.
#[test]
fn what_replicas_take_counts_as_before_when_a_program_is_killed() {
    let Some(world) = pool_world() else { return };
    let (port, admin) = (free_port(), free_port());
    let pool = pool(&world, "p", "v1", port, "min_replicas = 1\nwarm = 1\n");
    let file = format!("[serve]\nadmin = '127.0.0.1:{admin}'\nmemory = '1GiB'\n{pool}");
    let look = |port| http::get(port, "/admin/status").ok().map(|answer| answer.json());
    let host_used = |status: &Value| status["memory"]["host_used"].as_u64().expect("a number");
    let serving = world.serve(&file);
    serving.await_replicas(&["paused", "ready"]);
    let before = host_used(&look(admin).expect("an answer"));
    assert!(before > 0, "it is counted");
    // From the first answer on, with nobody having asked the pool for anything.
    let first = || {
        let began = Instant::now();
        loop {
            if let Some(status) = look(admin) {
                return status;
            }
            assert!(began.elapsed() < PATIENCE, "nobody answers");
        }
    };
    serving.kill();
    let serving = world.serve(&file);
    assert_eq!(host_used(&first()), before, "after serve was killed");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(serving.gateway()), nix::sys::signal::Signal::SIGKILL)
        .expect("our own process");
    serving.running().await_stderr("another one is started");
    assert_eq!(host_used(&first()), before, "after the gateway was killed");
    assert_eq!(serving.replicas().len(), 2, "{:?}", serving.replicas());
    serving.end();
    world.finish();
}
