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

#[test]
fn a_file_that_is_read_again_changes_pools_without_losing_a_request() {
    let Some(world) = pool_world() else { return };
    let (port, other) = (free_port(), free_port());
    let serving = world.serve(&config(&world, port, "min_replicas = 1\n"));
    serving.await_replicas(&["ready"]);
    let load = Load::start(port, "/check");
    world.configure(&config(&world, port, "min_replicas = 2\nbogus = 1\n"));
    serving.running().signal(Signal::SIGHUP);
    serving.running().await_stderr("unknown key \"bogus\"");
    let both = config(&world, port, "min_replicas = 2\n") + &pool(&world, "q", "v1", other, "");
    world.configure(&both);
    serving.running().signal(Signal::SIGHUP);
    serving.await_replicas(&["ready", "ready"]);
    world.await_state("the new address", Duration::from_secs(30), || {
        http::get(other, "/check").is_ok_and(|answer| answer.status == 200)
    });
    world.configure(&config(&world, port, "min_replicas = 1\n"));
    serving.running().signal(Signal::SIGHUP);
    world.await_state("the address is gone", Duration::from_secs(30), || http::get(other, "/check").is_err());
    world.await_state("its replica is gone", Duration::from_secs(30), || {
        serving.replicas().iter().all(|(name, _)| !name.starts_with(&world.name("q")))
    });
    let seen = load.stop();
    assert_eq!(seen.failures, [] as [String; 0]);
    assert!(seen.answers > 10, "{seen:?}");
    serving.end();
    world.finish();
}

#[test]
fn a_tag_that_moves_on_is_followed_without_losing_a_request() {
    let Some(world) = pool_world() else { return };
    let port = free_port();
    let serving = world.serve(&config(&world, port, "min_replicas = 2\nfollow = '200ms'\n"));
    serving.await_replicas(&["ready", "ready"]);
    let before = serving.replicas();
    let load = Load::start(port, "/check");
    snapshot(&world, "v1");
    world.await_state("all replicas are new ones", Duration::from_secs(60), || {
        let replicas = serving.replicas();
        replicas.len() == 2 && replicas.iter().all(|replica| !before.contains(replica))
    });
    let seen = load.stop();
    assert_eq!(seen.failures, [] as [String; 0]);
    assert!(seen.answers > 10, "{seen:?}");
    serving.end();
    world.finish();
}
