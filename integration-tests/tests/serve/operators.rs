//! What operators see of real pools and do with them: admin API, metrics, KEDA scaler.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rewarm_integration_tests::http::{self, Response};
use rewarm_integration_tests::pool::free_port;
use rewarm_serve::keda::proto::ScaledObjectRef;
use rewarm_serve::keda::proto::external_scaler_client::ExternalScalerClient;
use serde_json::Value;
use tonic::transport::Endpoint;

use super::{pool, pool_world};

/// How long a busy machine may take for what is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

fn get(admin: u16, path: &str) -> Value {
    let answer = http::get(admin, path).expect("an answer");
    assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    answer.json()
}

fn scale(admin: u16, pool: &str, replicas: &str) -> Response {
    let body = format!(r#"{{"replicas": {replicas}}}"#);
    http::request(admin, "POST", &format!("/admin/pools/{pool}/scale"), Some(&body)).expect("an answer")
}

/// Waits until so many replicas of the pool serve and none is on its way.
fn await_serving(admin: u16, pool: &str, count: usize) {
    let began = Instant::now();
    loop {
        let found = get(admin, &format!("/admin/pools/{pool}"));
        let replicas = found["replicas"].as_array().expect("a list");
        let serves = |replica: &&Value| ["ready", "busy"].iter().any(|state| replica["state"] == *state);
        if replicas.len() == count && replicas.iter().filter(serves).count() == count {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "expected {count} that serve: {found}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn pools_are_seen_and_scaled_through_the_admin_api() {
    let Some(world) = pool_world() else { return };
    let (port, admin) = (free_port(), free_port());
    let name = world.name("p");
    let head = format!("[serve]\nadmin = '127.0.0.1:{admin}'\n");
    // Replicas are kept where a start is later than requests may wait.
    let keeping = "target_wait = '1ms'\npolicy = { kind = 'rewarm', keep_last = 600.0 }\n";
    let pools = pool(&world, "p", "v1", port, keeping);
    let serving = world.serve(&format!("{head}{pools}"));
    await_serving(admin, &name, 0);
    assert_eq!(http::get(port, "/check").expect("an answer").status, 200);
    await_serving(admin, &name, 1);

    let status = get(admin, "/admin/status");
    let start = &status["pools"][0]["starts"][0];
    assert_eq!((&start["tier"], &start["outcome"]), (&"restore".into(), &"ready".into()), "{status}");
    let stages = start["stages"].as_array().expect("a list");
    assert!(stages.iter().any(|stage| stage["stage"] == "fetch"), "{start}");
    let decisions = get(admin, &format!("/admin/decisions?pool={name}"));
    let reasons: Vec<&str> = decisions
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|decision| decision["reason"].as_str())
        .collect();
    assert!(reasons.iter().any(|reason| reason.contains("request")), "{reasons:?}");

    let answer = scale(admin, &name, "2");
    assert_eq!(answer.status, 200, "{}", answer.text());
    await_serving(admin, &name, 2);
    let metrics = http::get(admin, "/metrics").expect("an answer").text();
    for line in [
        format!("rewarm_replicas{{pool=\"{name}\",state=\"ready\"}} 2"),
        format!("rewarm_replicas_desired{{pool=\"{name}\"}} 2"),
        format!("rewarm_pool_fixed{{pool=\"{name}\"}} 1"),
        format!("rewarm_requests_total{{pool=\"{name}\"}} 1"),
        format!("rewarm_starts_total{{pool=\"{name}\",tier=\"restore\",outcome=\"ready\"}} 2"),
        format!("rewarm_start_stage_seconds_count{{pool=\"{name}\",stage=\"fetch\"}} 2"),
    ] {
        assert!(metrics.lines().any(|found| found.starts_with(&line)), "no {line} in\n{metrics}");
    }
    assert_eq!(scale(admin, &name, "0").status, 200);
    await_serving(admin, &name, 0);
    assert_eq!(scale(admin, "nobody", "1").status, 404);

    // A token that is put into the file holds from the next SIGHUP on.
    let token = world.files().join("token");
    std::fs::write(&token, "correct-horse").expect("our own folder");
    world.configure(&format!("{head}admin_token = '{}'\n{pools}", token.display()));
    serving.running().signal(Signal::SIGHUP);
    let began = Instant::now();
    while http::get(admin, "/admin/status").expect("an answer").status != 401 {
        assert!(began.elapsed() < PATIENCE, "still without a token");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(http::get(admin, "/").expect("an answer").status, 200, "the page itself");
    serving.end();
    world.finish();
}

#[test]
fn keda_is_told_of_the_first_held_request() {
    let Some(world) = pool_world() else { return };
    let (port, keda) = (free_port(), free_port());
    let pools = pool(&world, "p", "v1", port, "");
    let serving = world.serve(&format!("[serve]\nadmin = false\nkeda = '127.0.0.1:{keda}'\n{pools}"));
    let runtime = tokio::runtime::Runtime::new().expect("threads");
    runtime.block_on(async {
        let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{keda}")).expect("a URL");
        let mut client = ExternalScalerClient::new(endpoint.connect().await.expect("connected"));
        let metadata = [("pool".to_owned(), world.name("p"))].into();
        let asked =
            ScaledObjectRef { name: "p".to_owned(), namespace: String::new(), scaler_metadata: metadata };
        let mut active = client.stream_is_active(asked).await.expect("a stream").into_inner();
        let first = active.message().await.expect("no error").expect("a message");
        assert!(!first.result, "nobody asks yet");
        let asking =
            tokio::task::spawn_blocking(move || http::get(port, "/check").expect("an answer").status);
        let told = tokio::time::timeout(PATIENCE, active.message()).await.expect("it is told");
        assert!(told.expect("no error").expect("a message").result);
        assert_eq!(asking.await.expect("no panic"), 200);
    });
    serving.end();
    world.finish();
}
