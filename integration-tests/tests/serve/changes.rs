//! Several pools, a configuration that is read again, and a tag that moves on.

use std::time::Duration;

use nix::sys::signal::Signal;
use rewarm_integration_tests::http;
use rewarm_integration_tests::load::Load;
use rewarm_integration_tests::pool::free_port;

use super::{config, pool, pool_world, snapshot};

fn who(port: u16, path: &str, body: Option<&str>) -> String {
    let method = if body.is_some() { "POST" } else { "GET" };
    let answer = http::request(port, method, path, body).expect("an answer");
    format!("{} {}", answer.status, answer.text())
}

#[test]
fn of_several_pools_at_one_address_each_gets_its_requests() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let one = "policy = { kind = 'fixed', replicas = 1 }\n";
    let pools = [
        ("path", "match = { path_prefix = '/sleep' }"),
        ("model", "match = { model = 'llama' }"),
        ("rest", ""),
    ]
    .map(|(name, matching)| pool(&world, name, "v1", port, &format!("{matching}\n{one}")));
    let serving = world.serve(&format!("[serve]\nadmin = false\n{}", pools.concat()));
    for (path, body, name) in [
        ("/sleep?ms=1", None, "path"),
        ("/who", None, "rest"),
        ("/echo", Some(r#"{"messages": [], "model": "llama"}"#), "model"),
        ("/echo", Some(r#"{"messages": [], "model": "other"}"#), "rest"),
    ] {
        let answered = who(port, path, body);
        assert!(answered.contains(&world.name(name)), "{path} {body:?}: {answered}, expected {name}");
        assert_eq!(answered.contains("\"bytes\": 34"), body.is_some(), "{answered}");
    }
    serving.end();
    world.finish();
}

/// Requests that are answered at once, and others of which some are in flight at every moment. Nothing is to be tried twice: what is
/// cut off before its first byte would be answered by another replica.
fn loads(port: u16) -> [Load; 2] {
    ["/check", "/stream?n=20&ms=50"].map(|path| Load::start(port, path))
}

fn all_was_answered(loads: [Load; 2]) {
    for seen in loads.map(Load::stop) {
        assert_eq!(seen.failures, [] as [String; 0]);
        assert!(seen.answers > 1, "{seen:?}");
    }
}

#[test]
fn a_file_that_is_read_again_changes_pools_without_losing_a_request() {
    let Some(world) = pool_world() else { return };
    let (port, other) = (free_port(), free_port());
    // Both replicas have requests when one of them goes.
    let spread = "retry = false\nrouting = 'least-in-flight'\n";
    let file = |replicas: u32, more: &str| {
        let policy = format!("policy = {{ kind = 'fixed', replicas = {replicas} }}\n");
        config(&world, port, &format!("{spread}{policy}{more}"))
    };
    let serving = world.serve(&file(1, ""));
    serving.await_replicas(&["ready"]);
    let loads = loads(port);
    world.configure(&file(2, "bogus = 1\n"));
    serving.running().signal(Signal::SIGHUP);
    serving.running().await_stderr("unknown key \"bogus\"");
    world.configure(&(file(2, "") + &pool(&world, "q", "v1", other, "")));
    serving.running().signal(Signal::SIGHUP);
    serving.await_replicas(&["ready", "ready"]);
    world.await_state("the new address", Duration::from_secs(30), || {
        http::get(other, "/check").is_ok_and(|answer| answer.status == 200)
    });
    // Until those that were asked before the second replica was there are answered.
    std::thread::sleep(Duration::from_secs(2));
    world.configure(&file(1, ""));
    serving.running().signal(Signal::SIGHUP);
    world.await_state("the address is gone", Duration::from_secs(30), || http::get(other, "/check").is_err());
    serving.await_replicas(&["ready"]);
    // What a running gateway cannot take over is said.
    world.configure(&file(1, "").replace("[serve]", "[serve]\nmemory = '3GiB'"));
    serving.running().signal(Signal::SIGHUP);
    serving.running().await_stderr("holds from the next start on key=\"memory\"");
    all_was_answered(loads);
    serving.end();
    world.finish();
}

#[test]
fn a_file_with_a_pool_that_cannot_be_restored_changes_nothing() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let serving = world.serve(&config(&world, port, "min_replicas = 1\n"));
    serving.await_replicas(&["ready"]);
    let before = serving.replicas();
    let good = pool(&world, "q", "v1", free_port(), "");
    let digest = world.reference("pool", &format!("blake3:{}", "0".repeat(64)));
    for (bad, problem) in [
        (good.replace(&world.reference("pool", "v1"), "nonsense"), "is nonsense"),
        (
            good.replace(&world.reference("pool", "v1"), &digest) + "capture = true\n",
            "snapshot names a digest",
        ),
    ] {
        // What else it says is good, and would be seen.
        world.configure(&(config(&world, port, "min_replicas = 2\n") + &bad));
        serving.running().signal(Signal::SIGHUP);
        serving.running().await_stderr(problem);
        assert!(who(port, "/who", None).contains(&before[0].0));
    }
    assert!(serving.running().stderr().contains("the configuration is not good; the old one holds"));
    assert_eq!(serving.replicas(), before);
    serving.end();
    world.finish();
}

#[test]
fn a_tag_that_moves_on_is_followed_without_losing_a_request() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let serving = world.serve(&config(&world, port, "retry = false\nmin_replicas = 2\nfollow = '200ms'\n"));
    serving.await_replicas(&["ready", "ready"]);
    let before = serving.replicas();
    let loads = loads(port);
    snapshot(&world, "v1");
    world.await_state("all replicas are new ones", Duration::from_secs(60), || {
        let replicas = serving.replicas();
        replicas.len() == 2 && replicas.iter().all(|replica| !before.contains(replica))
    });
    all_was_answered(loads);
    serving.end();
    world.finish();
}
