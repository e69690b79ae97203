//! One pool: from zero and back, warm replicas, limits, and what becomes of replicas when `serve` ends.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rewarm_integration_tests::World;
use rewarm_integration_tests::http;
use rewarm_integration_tests::pool::free_port;
use rewarm_integration_tests::server::Server;

use super::{config, pool, pool_world, snapshot_with};

/// Lets replicas go as soon as they are idle.
const HASTY: &str = "policy = { kind = 'rewarm', keep_last = 0.1, keep = 0.1 }\n";

#[test]
fn a_request_to_a_pool_at_zero_is_held_until_a_replica_is_restored() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let serving = world.serve(&config(&world, port, HASTY));
    assert_eq!(serving.replicas(), []);
    let answer = http::get(port, "/check").expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.text());
    serving.await_replicas(&[]);
    let again = http::get(port, "/check").expect("an answer");
    assert_eq!(again.text(), answer.text());
    serving.end();
    world.finish();
}

#[test]
fn warm_replicas_wait_paused_and_are_woken() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let serving = world.serve(&config(&world, port, &format!("warm = 2\n{HASTY}")));
    serving.await_replicas(&["paused", "paused"]);
    let before = serving.replicas();
    let answer = http::get(port, "/who").expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.text());
    let name = answer.json()["name"].as_str().expect("a name").to_owned();
    assert!(before.iter().any(|(waiting, _)| *waiting == name), "{name} is none of {before:?}");
    serving.await_replicas(&["paused", "paused"]);
    assert_eq!(serving.replicas(), before, "nobody was restored");
    serving.end();
    world.finish();
}

#[test]
fn a_burst_is_answered_in_full_and_by_no_more_replicas_than_allowed() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let serving = world.serve(&config(&world, port, "concurrency = 4\nmax_replicas = 3\n"));
    let clients: Vec<_> = (0..24)
        .map(|_| std::thread::spawn(move || http::get(port, "/sleep?ms=200").expect("an answer")))
        .collect();
    let answers: Vec<_> = clients.into_iter().map(|client| client.join().expect("no panic")).collect();
    assert!(answers.iter().all(|answer| answer.status == 200), "{answers:?}");
    assert!(serving.replicas().len() <= 3, "{:?}", serving.replicas());
    serving.end();
    world.finish();
}

#[test]
fn requests_beyond_the_queue_and_its_deadline_are_refused() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let limits =
        "concurrency = 1\nmin_replicas = 1\nmax_replicas = 1\nqueue = { max = 1, deadline = '1s' }\n";
    let serving = world.serve(&config(&world, port, limits));
    assert_eq!(http::get(port, "/check").expect("an answer").status, 200);
    let ask = move || {
        let mut client = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
        let request = b"GET /sleep?ms=5000 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
        client.write_all(request).expect("it is sent");
        let mut answer = String::new();
        client.read_to_string(&mut answer).expect("an answer");
        answer.to_lowercase()
    };
    let clients: Vec<_> = (0..3).map(|_| std::thread::spawn(ask)).collect();
    let mut seen: Vec<(String, bool)> = clients
        .into_iter()
        .map(|client| client.join().expect("no panic"))
        .map(|answer| {
            let after = answer.lines().find_map(|line| line.strip_prefix("retry-after: "));
            let later =
                after.is_some_and(|seconds| seconds.trim().parse::<u64>().is_ok_and(|seconds| seconds > 0));
            (answer.split(' ').nth(1).unwrap_or_default().to_owned(), later)
        })
        .collect();
    seen.sort_unstable();
    let expected = [("200", false), ("429", true), ("503", true)];
    assert_eq!(seen, expected.map(|(status, later)| (status.to_owned(), later)));
    serving.end();
    world.finish();
}

/// A clone serves under its own identity: what its post hook does is done before its first answer.
#[test]
fn no_replica_answers_before_its_post_hook_has_run() {
    let server = Server::pool();
    let Some(world) = crate::world_for(&server) else { return };
    snapshot_with(&world, "v1", &["--post", "sleep 1; cp /run/rewarm/identity.json /tmp/hooked"]);
    let port = free_port();
    let serving = world.serve(&config(&world, port, "concurrency = 1\nmax_replicas = 2\n"));
    let clients: Vec<_> =
        (0..4).map(|_| std::thread::spawn(move || http::get(port, "/hooked").expect("an answer"))).collect();
    for client in clients {
        let answer = client.join().expect("no panic");
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    serving.end();
    world.finish();
}

/// What waits in a pool of an engine sleeps as its engine documents, and is awake before it answers.
#[test]
fn warm_replicas_of_an_engine_are_asleep() {
    let server = Server::engine("vllm");
    let Some(world) = crate::world_for(&server) else { return };
    let source = world.start("vllm", &server);
    world.snapshot(&source, "v1", &["--stop", "--engine", "vllm"]);
    let steps = |from: &http::Response| {
        let steps = from.json()["steps"].as_array().expect("a list").clone();
        steps.iter().filter(|step| *step == "POST /sleep" || *step == "POST /resume").count()
    };
    let (port, name, snapshot) = (free_port(), world.name("p"), world.reference("vllm", "v1"));
    let listen = format!("name = '{name}'\nsnapshot = '{snapshot}'\nlisten = '127.0.0.1:{port}'\n");
    let serving = world
        .serve(&format!("[serve]\nadmin = false\n[[pool]]\n{listen}max_replicas = 1\nwarm = 1\n{HASTY}"));
    // The clone has the steps of the snapshot behind it, and those of each time that it waited.
    for round in 1..=2 {
        serving.await_replicas(&["paused"]);
        let answer = http::get(port, "/steps").expect("an answer");
        assert_eq!((answer.status, steps(&answer)), (200, 2 * (1 + round)), "{}", answer.text());
    }
    serving.end();
    world.finish();
}

/// It is awake, and not what it was: it is ended, and the request goes to one that is restored.
#[test]
fn a_warm_replica_whose_engine_does_not_go_on_gets_no_request() {
    let server = Server::pool();
    let Some(world) = crate::world_for(&server) else { return };
    let engine = world.files().join("once.toml");
    // The steps after a restore go well, those after the first wake do not.
    let step = "echo after >> /tmp/steps; test $(wc -l < /tmp/steps) -lt 2";
    std::fs::write(&engine, format!("[[after]]\nname = 'once'\ncommand = '{step}'\n"))
        .expect("our own folder");
    snapshot_with(&world, "v1", &["--engine", &engine.to_string_lossy()]);
    let port = free_port();
    let serving = world.serve(&config(&world, port, &format!("max_replicas = 1\nwarm = 1\n{HASTY}")));
    serving.await_replicas(&["paused"]);
    let (warm, _) = serving.replicas().remove(0);
    let answer = http::get(port, "/who").expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_ne!(answer.json()["name"], warm.as_str());
    assert!(serving.replicas().iter().all(|(name, _)| *name != warm), "{:?}", serving.replicas());
    serving.end();
    world.finish();
}

/// Clones say of themselves what their source was: planners see as many servers as there are, each under its own name.
#[test]
fn what_servers_say_of_themselves_is_passed_on_under_their_own_names() {
    let Some(world) = pool_world() else { return };
    let (port, admin) = (free_port(), free_port());
    let head = format!("[serve]\nadmin = '127.0.0.1:{admin}'\n");
    let two = pool(&world, "p", "v1", port, "min_replicas = 2\nmax_replicas = 2\n");
    let serving = world.serve(&format!("{head}{two}"));
    serving.await_replicas(&["ready", "ready"]);
    let text = || http::get(admin, "/metrics/replicas").expect("an answer").text();
    let values = |text: &str| text.lines().filter(|line| line.starts_with("vllm:")).count();
    world.await_state("both are asked", Duration::from_secs(20), || values(&text()) == 2);
    let text = text();
    for (name, _) in serving.replicas() {
        let own = format!("replica=\"{name}\"");
        assert!(
            text.lines().any(|line| line.starts_with("vllm:num_requests_running{") && line.contains(&own)),
            "{text}"
        );
    }
    let source = world.name("pool");
    assert!(!text.contains(&format!("worker_id=\"{source}\"")), "{text}");
    assert_eq!(text.matches("# TYPE vllm:num_requests_running gauge").count(), 1, "{text}");
    serving.end();
    world.finish();
}

#[test]
fn a_killed_serve_loses_no_replica_and_the_next_one_finds_them() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let config = config(&world, port, "warm = 1\nmin_replicas = 1\n");
    let serving = world.serve(&config);
    serving.await_replicas(&["paused", "ready"]);
    let (before, who) = (serving.replicas(), http::get(port, "/who").expect("an answer").text());
    serving.kill();
    let serving = world.serve(&config);
    assert_eq!(serving.replicas(), before);
    assert_eq!(http::get(port, "/who").expect("an answer").text(), who);
    let two =
        [(); 2].map(|()| std::thread::spawn(move || http::get(port, "/who").expect("an answer").status));
    assert_eq!(two.map(|client| client.join().expect("no panic")), [200, 200]);
    serving.end();
    world.finish();
}

#[test]
fn replicas_stay_where_the_file_says_so() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let config =
        config(&world, port, "min_replicas = 1\n").replace("[serve]\n", "[serve]\non_exit = 'keep'\n");
    let serving = world.serve(&config);
    serving.await_replicas(&["ready"]);
    let before = serving.replicas();
    serving.end();
    let serving = world.serve(&config);
    assert_eq!(serving.replicas(), before);
    serving.end();
    world.finish();
}

#[test]
fn of_two_over_one_state_folder_the_second_refuses() {
    let Some(world) = pool_world() else { return };
    let serving = world.serve(&config(&world, free_port(), ""));
    let second = world.serve_call().fails(1);
    second.says(&["another rewarm serve works in", "--state"]);
    serving.end();
    world.finish();
}

#[test]
fn an_address_that_is_taken_is_told_and_nothing_is_left() {
    let Some(world) = pool_world() else { return };
    let taken = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let port = taken.local_addr().expect("its address").port();
    world.configure(&config(&world, port, "min_replicas = 1\n"));
    world.serve_call().fails(1).says(&[&format!("listen on 127.0.0.1:{port}"), "ss -ltnp"]);
    world.finish();
}

#[test]
fn a_server_that_dies_is_replaced_and_its_request_is_told() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let serving = world.serve(&config(&world, port, "min_replicas = 1\nretry = false\n"));
    let first = http::get(port, "/who").expect("an answer");
    let died = http::get(port, "/die").expect("an answer");
    assert_eq!(died.status, 502, "{}", died.text());
    assert_eq!(died.json()["error"]["type"], "replica_lost");
    // Until its end is known, and nothing is tried twice here, it would be asked again.
    let name = first.json()["name"].as_str().expect("a name").to_owned();
    world.await_state("the dead one is known", Duration::from_secs(60), || {
        serving.replicas().iter().all(|(other, status)| *other != name || status != "ready")
    });
    let second = http::get(port, "/who").expect("an answer");
    assert_eq!(second.status, 200, "{}", second.text());
    assert_ne!(first.json()["name"], second.json()["name"]);
    http::get(port, "/cut").expect_err("an answer that is cut short");
    assert_eq!(http::get(port, "/check").expect("an answer").status, 200);
    serving.end();
    world.finish();
}

#[test]
fn a_killed_shim_is_a_dead_replica() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let serving = world.serve(&config(&world, port, "min_replicas = 1\n"));
    serving.await_replicas(&["ready"]);
    let name = serving.replicas()[0].0.clone();
    let list = world.rewarm_json().arg("ps").ok();
    let shim = list.json()["replicas"][0]["shim_pid"].as_i64().expect("a process");
    let shim = nix::unistd::Pid::from_raw(i32::try_from(shim).expect("a process id"));
    nix::sys::signal::kill(shim, nix::sys::signal::Signal::SIGKILL).expect("our own process");
    world.await_state("another replica", Duration::from_secs(60), || {
        serving.replicas().iter().any(|(other, status)| *other != name && status == "ready")
    });
    assert_eq!(http::get(port, "/check").expect("an answer").status, 200);
    serving.end();
    world.finish();
}

/// Ends the replica that serves; the next request is answered all the same.
fn the_next_replica_is_cold(world: &World, port: u16) {
    assert_eq!(http::get(port, "/die").expect("an answer").status, 502);
    let answer = http::get(port, "/check").expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.text());
    let list = world.rewarm_json().arg("ps").ok();
    assert_eq!(list.json()["replicas"][0]["started"], "cold");
}

#[test]
fn a_pool_without_its_snapshot_starts_cold() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    // What the snapshot described is known to this one by a look that it takes at its start.
    // One that is idle would be gone before it is looked at.
    let serving = world.serve(&config(&world, port, "follow = '0s'\nmin_replicas = 1\n"));
    world.await_state("the snapshot was seen", Duration::from_secs(30), || {
        http::get(port, "/check").is_ok_and(|answer| answer.status == 200)
    });
    let list = world.rewarm_json().arg("ps").ok();
    assert_eq!(list.json()["replicas"][0]["started"], "restored");
    for entry in std::fs::read_dir(world.store_folder()).expect("the store").flatten() {
        std::fs::rename(entry.path(), world.files().join(entry.file_name())).expect("the same file system");
    }
    the_next_replica_is_cold(&world, port);
    serving.end();
    world.finish();
}

#[test]
fn a_snapshot_that_is_removed_while_its_pool_runs_costs_no_answer() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let serving = world.serve(&config(&world, port, "follow = '200ms'\nmin_replicas = 1\n"));
    let before = http::get(port, "/who").expect("an answer").text();
    world.rewarm().args(["rm", &world.reference("pool", "v1")]).ok();
    serving.running().await_stderr("the snapshot was not found");
    assert_eq!(http::get(port, "/who").expect("an answer").text(), before, "the replica that runs");
    the_next_replica_is_cold(&world, port);
    serving.end();
    world.finish();
}

#[test]
fn a_file_is_checked_without_starting_anything() {
    let Some(world) = pool_world() else { return };
    let good = config(&world, free_port(), "min_replicas = 1\n");
    world.configure(&good);
    let output = world.serve_call().arg("--check").ok();
    assert!(output.stdout.contains("is good"), "{output}");
    world.configure(&good.replace("[serve]", "[serve]\nmemory = '8GiB'"));
    let output = world.serve_call().arg("--check").ok();
    assert!(
        output.stdout.contains("memory: 6.0 GiB for replicas, 2.0 GiB for decoded snapshots"),
        "{output}"
    );
    world.configure(&good.replace("min_replicas", "min_replica"));
    world.serve_call().arg("--check").fails(2).says(&["min_replica", "min_replicas"]);
    let snapshot = world.reference("pool", "v1");
    let digest = world.reference("pool", &format!("blake3:{}", "0".repeat(64)));
    let absent = world.files().join("absent.pem");
    let tls = format!("[serve]\ntls = {{ cert = '{0}', key = '{0}' }}", absent.display());
    let token = format!("[serve]\nadmin_token = '{}'", absent.display());
    for (before, after, problem) in [
        (snapshot.clone(), "nonsense".to_owned(), "is nonsense"),
        (format!("{snapshot}'\n"), format!("{digest}'\ncapture = true\n"), "snapshot names a digest"),
        ("[serve]".to_owned(), tls, "read certificate"),
        ("[serve]".to_owned(), token, "read admin token"),
    ] {
        assert!(good.contains(&before), "{before} of {good}");
        world.configure(&good.replace(&before, &after));
        // What is checked is what a start would find.
        for output in [world.serve_call().arg("--check").fails(2), world.serve_call().fails(2)] {
            output.says(&[problem]);
        }
    }
    let list = world.rewarm_json().args(["ps", "--all"]).ok().json();
    assert_eq!(list["replicas"], serde_json::json!([]));
    world.finish();
}

#[test]
fn sigterm_lets_what_is_in_flight_be_answered() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let serving = world.serve(&config(&world, port, "min_replicas = 1\n"));
    assert_eq!(http::get(port, "/check").expect("an answer").status, 200);
    let began = Instant::now();
    let client = std::thread::spawn(move || http::get(port, "/sleep?ms=2000").expect("an answer").status);
    std::thread::sleep(Duration::from_millis(300));
    serving.end();
    assert!(began.elapsed() >= Duration::from_secs(2), "it left before the answer");
    assert_eq!(client.join().expect("no panic"), 200);
    world.finish();
}

#[test]
fn sigterm_lets_what_is_held_be_answered() {
    let Some(world) = pool_world() else { return };
    let (port, admin) = (free_port(), free_port());
    let held = |count: u64| {
        world.await_state("a request is held", Duration::from_secs(60), || {
            let status = http::get(admin, "/admin/status").expect("an answer").json();
            status["pools"][0]["held"] == count
        });
    };
    let ask = |path: &'static str| std::thread::spawn(move || http::get(port, path).expect("an answer"));
    // Behind a request of the only replica; then while the first one is restored.
    for (least, paths) in [(1, &["/sleep?ms=1500", "/check"][..]), (0, &["/check"])] {
        let more = format!("concurrency = 1\nmax_replicas = 1\nmin_replicas = {least}\n");
        let pools = pool(&world, "p", "v1", port, &more);
        let serving = world.serve(&format!("[serve]\nadmin = '127.0.0.1:{admin}'\n{pools}"));
        if least == 1 {
            serving.await_replicas(&["ready"]);
        }
        let mut asked = Vec::new();
        for path in paths {
            std::thread::sleep(Duration::from_millis(200));
            asked.push(ask(path));
        }
        held(1);
        serving.end();
        for asked in asked {
            let answer = asked.join().expect("no panic");
            assert_eq!(answer.status, 200, "{least} of {paths:?}: {}", answer.text());
        }
    }
    world.finish();
}

#[test]
fn sigterm_waits_for_what_is_in_flight_no_longer_than_the_file_says() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let config = config(&world, port, "min_replicas = 1\n").replace("[serve]\n", "[serve]\ndrain = '1s'\n");
    let serving = world.serve(&config);
    assert_eq!(http::get(port, "/check").expect("an answer").status, 200);
    let client = std::thread::spawn(move || http::get(port, "/hang").is_err());
    std::thread::sleep(Duration::from_millis(300));
    let output = serving.end();
    assert!(output.stderr.contains("requests are still in flight after 1 s"), "{output}");
    assert!(client.join().expect("no panic"), "it was cut off");
    world.finish();
}

/// What hangs is made by the machine's own runc, and all of it is ended.
#[test]
fn starts_that_hang_are_ended_and_counted_and_leave_nothing() {
    let Some(world) = pool_world() else { return };
    let (port, admin) = (free_port(), free_port());
    let hangs = "cold = ['/usr/bin/python3', '-c', 'import time; time.sleep(1000)']\n";
    let more = format!("port = 8000\nmin_replicas = 1\nmax_replicas = 1\nstart_timeout = '1s'\n{hangs}");
    let pools = pool(&world, "p", "absent", port, &more);
    let serving = world.serve(&format!("[serve]\nadmin = '127.0.0.1:{admin}'\n{pools}"));
    world.await_state("two cold starts took too long", Duration::from_secs(60), || {
        let status = http::get(admin, "/admin/status").expect("an answer").json();
        let starts = status["pools"][0]["starts"].as_array().expect("a list").clone();
        let late = |start: &&serde_json::Value| start["tier"] == "cold" && start["outcome"] == "timed_out";
        starts.iter().filter(late).count() >= 2
    });
    assert!(serving.replicas().len() <= 2, "{:?}", serving.replicas());
    serving.end();
    world.finish();
}

#[test]
fn the_gateway_has_no_rights_and_no_environment() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let serving = world.serve(&config(&world, port, ""));
    assert_eq!(http::get(port, "/check").expect("an answer").status, 200);
    let gateway = serving.gateway();
    let status = std::fs::read_to_string(format!("/proc/{gateway}/status")).expect("it lives");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(&format!("{name}:"))).expect("a field");
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    for (name, value) in [
        ("Uid", "60872 60872 60872 60872"),
        ("Gid", "60872 60872 60872 60872"),
        ("Groups", ""),
        ("CapInh", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("CapEff", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
        ("NoNewPrivs", "1"),
        // Huge pages would double what a held request takes.
        ("THP_enabled", "0"),
    ] {
        assert_eq!(field(name), value, "{name}");
    }
    // Credentials of stores are the parent's.
    let environment = std::fs::read_to_string(format!("/proc/{gateway}/environ")).expect("text");
    let names: Vec<&str> =
        environment.split_terminator('\0').filter_map(|entry| entry.split('=').next()).collect();
    assert!(names.iter().all(|name| ["NO_COLOR", "REWARM_LOG"].contains(name)), "{names:?}");
    serving.end();
    world.finish();
}
