//! The status page in a real Chromium, over scripted pools. `browser/status.mjs` is what the person does.
//!
//! `REWARM_SCREENSHOTS=docs` writes the pictures of the documentation anew.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use rewarm_autoscaler::pool::{State, Tier};
use rewarm_integration_tests::needs::{self, Need};
use rewarm_report::{Stage, Timing};
use rewarm_serve::admin::{self, Access};
use rewarm_serve::scripted::Scripted;
use rewarm_serve::status::{
    CircuitStatus, Command, DecisionStatus, Notice, PoolStatus, ReplicaStatus, StartOutcome,
    StartSecondsStatus, StartStatus, UnixMs, now,
};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// Longer than a busy machine ever needs; reached only where the browser hangs.
const PATIENCE: Duration = Duration::from_secs(300);
/// What the admin API wants.
const TOKEN: &str = "correct-horse";

#[tokio::test]
async fn a_person_sees_and_steers_the_pools_in_a_real_browser() {
    if !needs::met(&[Need::Chromium]) {
        return;
    }
    let pools = pools();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    let server = tokio::spawn(serve(pools.clone(), listener));

    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut node = tokio::process::Command::new("node");
    node.arg(own.join("browser/status.mjs"))
        .args([
            needs::playwright().parent().expect("its folder").to_owned(),
            needs::chromium().expect("it is there"),
        ])
        .args([format!("http://{address}/"), TOKEN.to_owned()])
        .args(std::env::var_os("REWARM_SCREENSHOTS").map(PathBuf::from).map(|to| own.join("..").join(to)))
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output =
        tokio::time::timeout(PATIENCE, node.output()).await.expect("the browser ends").expect("node starts");
    server.abort();
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && said.contains("done"), "{said}");

    let asked: Vec<String> = pools.commands().iter().map(|command| format!("{command:?}")).collect();
    let expected = [
        Command::Scale { pool: "llama".to_owned(), replicas: Some(6) },
        Command::Scale { pool: "llama".to_owned(), replicas: None },
        Command::Scale { pool: "llama".to_owned(), replicas: Some(99) },
        Command::Drain { pool: "llama".to_owned(), replica: "llama-5".to_owned() },
        Command::Pause { pool: "llama".to_owned() },
    ];
    assert_eq!(asked, expected.map(|command| format!("{command:?}")));
}

/// Does what the commands ask for: a scale is followed by its decision and a start, a pause by a restart of the server.
async fn serve(pools: Arc<Scripted>, mut listener: TcpListener) {
    let address = listener.local_addr().expect("an address");
    loop {
        let (stop, stopped) = oneshot::channel::<()>();
        let ended = async move {
            let _ = stopped.await;
        };
        let access = Access::new(Some(TOKEN.to_owned()));
        let answering = admin::serve(listener, access, pools.handle(), ended);
        let following = async {
            follow(&pools).await;
            let _ = stop.send(());
        };
        futures::future::join(answering, following).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        listener = TcpListener::bind(address).await.expect("the address is free again");
    }
}

/// Returns once there is one pause more.
async fn follow(pools: &Arc<Scripted>) {
    let mut done = pools.commands().len();
    loop {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let commands = pools.commands();
        for command in &commands[done..] {
            match command {
                Command::Scale { pool, replicas: Some(6) } => {
                    let name = "llama-10".to_owned();
                    pools.change_pool(pool, |pool| {
                        pool.replicas.push(replica(&name, State::Restoring, 0, Tier::Restore, 0))
                    });
                    let decision = decision(0, 5, 6, "set by hand", &["restore llama-10"]);
                    pools.change_pool(pool, |pool| pool.decisions.push(decision.clone()));
                    pools.tell(Notice::Decision { pool: pool.clone(), decision });
                    pools.tell(Notice::Replica { pool: pool.clone(), name, state: State::Restoring });
                }
                Command::Scale { pool, replicas: None } => {
                    let why = "a start waits for memory: host memory: 40 bytes wanted, 2 of 90 free";
                    pools.change_pool(pool, |pool| pool.obstacle = Some(why.to_owned()));
                }
                Command::Pause { .. } => return,
                _ => {}
            }
        }
        done = commands.len();
    }
}

/// A pool in the middle of a burst with every state there is, and one whose starts fail.
fn pools() -> Arc<Scripted> {
    let pools = Scripted::new(&["llama", "embeddings"], None);
    pools.change(|status| status.since = ago(7_400_000));
    pools.change_pool("llama", burst);
    pools.change_pool("embeddings", |pool| {
        pool.replicas = vec![replica("embeddings-1", State::Busy, 1, Tier::Restore, 60_000)];
        (pool.in_flight, pool.desired) = (1, 2);
        pool.circuit = Some(CircuitStatus {
            failures: 3,
            until: now() + 22_000,
            reason: "fetch pack 3f9a21 at 16 MiB: digest differs".to_owned(),
        });
    });
    pools
}

fn burst(pool: &mut PoolStatus) {
    use Tier::{Cold, Restore, Wake};
    (pool.in_flight, pool.held, pool.oldest_held_ms, pool.desired) = (26, 5, Some(312.0), 6);
    pool.replicas = vec![
        replica("llama-1", State::Busy, 8, Restore, 3_100_000),
        replica("llama-2", State::Busy, 8, Restore, 900_000),
        replica("llama-3", State::Busy, 8, Wake, 42_000),
        replica("llama-4", State::Draining, 2, Wake, 3_000),
        replica("llama-5", State::Ready, 0, Restore, 12_000),
        replica("llama-6", State::Restoring, 0, Restore, 280),
        replica("llama-7", State::Waking, 0, Wake, 12),
        replica("llama-8", State::Warm, 0, Restore, 400_000),
        replica("llama-9", State::Failed, 0, Restore, 1_500),
    ];
    let unfit = "no variant fits this machine: processor feature avx512f is missing";
    let late = "not ready within 3 s, which is three times what restores take";
    pool.starts = vec![
        start("llama-1", Cold, StartOutcome::Ready, 4100.0, Some(unfit)),
        start("llama-2", Restore, StartOutcome::Ready, 521.0, None),
        start("llama-3", Wake, StartOutcome::Ready, 34.0, None),
        start("llama-9", Restore, StartOutcome::TimedOut, 3000.0, Some(late)),
        start("llama-4", Restore, StartOutcome::Ready, 409.0, None),
        start("llama-5", Restore, StartOutcome::Ready, 372.0, None),
        start("llama-4", Wake, StartOutcome::Ready, 44.0, None),
        start("llama-8", Restore, StartOutcome::Ready, 446.0, None),
        start("llama-8", Wake, StartOutcome::Ready, 38.0, None),
    ];
    pool.decisions = vec![
        decision(153_000, 0, 1, "1 requests are held and no replica is there", &["wake llama-3"]),
        decision(
            136_000,
            1,
            3,
            "9 held requests would wait too long: 2.1 of them get a slot within 0.41 s, 2 more replicas are started",
            &["wake llama-4", "restore llama-5"],
        ),
        decision(
            88_000,
            3,
            2,
            "a replica was idle for 2.1 s, longer than the 2.0 s that it is kept",
            &["drain llama-4"],
        ),
        decision(
            51_000,
            2,
            3,
            "the last minute's load of 17.1 requests in flight needs 3 replicas",
            &["wake llama-7"],
        ),
        decision(
            17_000,
            4,
            6,
            "12 held requests would wait too long: 4.0 of them get a slot within 0.41 s, 2 more replicas are started",
            &["wake llama-7", "restore llama-6"],
        ),
    ];
}

fn ago(ms: u64) -> UnixMs {
    now() - ms
}

fn replica(name: &str, state: State, in_flight: u32, tier: Tier, age_ms: u64) -> ReplicaStatus {
    ReplicaStatus {
        name: name.to_owned(),
        state,
        in_flight,
        requests: 100,
        since: ago(age_ms),
        tier,
        source: None,
        host_bytes: 1 << 30,
    }
}

fn decision(age_ms: u64, active: u32, desired: u32, reason: &str, steps: &[&str]) -> DecisionStatus {
    DecisionStatus {
        at: ago(age_ms),
        wanted: desired,
        desired,
        active,
        warm: 2,
        in_flight: 8 * active,
        held: 5,
        oldest_held_ms: Some(212.0),
        start_seconds: StartSecondsStatus { wake: 0.034, restore: 0.41 },
        reason: reason.to_owned(),
        steps: steps.iter().map(|step| (*step).to_owned()).collect(),
    }
}

/// A restore has its stages in the usual proportions.
fn start(
    replica: &str,
    tier: Tier,
    outcome: StartOutcome,
    took_ms: f64,
    reason: Option<&str>,
) -> StartStatus {
    let parts = [
        (Stage::Admit, 0.0, 0.05),
        (Stage::Sandbox, 0.05, 0.16),
        (Stage::Fetch, 0.05, 0.37),
        (Stage::Skeleton, 0.43, 0.32),
        (Stage::Identity, 0.76, 0.04),
        (Stage::Replay, 0.80, 0.14),
        (Stage::Ready, 0.94, 0.06),
    ];
    let timing = |(stage, start, took): (Stage, f64, f64)| Timing {
        stage,
        start_ms: start * took_ms,
        took_ms: took * took_ms,
    };
    StartStatus {
        at: ago(200_000) - took_ms as u64,
        replica: replica.to_owned(),
        tier,
        outcome,
        took_ms,
        stages: if tier == Tier::Restore { parts.map(timing).to_vec() } else { Vec::new() },
        reason: reason.map(str::to_owned),
    }
}
