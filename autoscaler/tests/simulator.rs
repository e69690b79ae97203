//! The simulator as a whole: every request is accounted for, equal inputs give equal outcomes, and the promises of the
//! policies hold on generated traces, or on real ones where `REWARM_TRACES` names their folder.

use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::*;
use rewarm_autoscaler::config::{Config, PolicyKind, PolicySpec};
use rewarm_autoscaler::queue::QueueLimits;
use rewarm_autoscaler::simulate::{Outcome, simulate};
use rewarm_autoscaler::trace::{ServiceTime, Trace};

fn outcome(trace: &Trace, config: &Config, policy: &str) -> Outcome {
    simulate(trace, &config.scenario, &PolicySpec::built_in(policy).expect("built in"))
}

/// Bursts from silence and a stream under them, always the same.
fn generated(seconds: u32) -> Trace {
    let mut random = fastrand::Rng::with_seed(42);
    let mut requests = Vec::new();
    let mut at = 0.0;
    while at < f64::from(seconds) {
        at += -random.f64().max(1e-9).ln() / 2.0;
        requests.push((at, 0.2 + random.f64() * 3.0));
        if random.u32(..120) == 0 {
            requests.extend((0..random.u32(10..60)).map(|index| (at + f64::from(index) * 0.03, 0.6)));
        }
    }
    Trace::new(requests)
}

#[test]
fn every_policy_on_a_generated_trace() {
    let trace = generated(600);
    let config = Config::default();
    let outcomes: Vec<Outcome> =
        PolicyKind::NAMES.iter().map(|policy| outcome(&trace, &config, policy)).collect();
    insta::assert_json_snapshot!("generated", outcomes);
}

#[test]
fn one_request_from_zero_costs_its_wake_and_its_answer() {
    let trace = Trace::new([(0.0, 2.0)]);
    let outcome = outcome(&trace, &Config::default(), "rewarm");
    assert_eq!((outcome.wait_ms.p50, outcome.replica_seconds_per_request), (500.0, 2.5));
    assert_eq!((outcome.starts.wake, outcome.starts.restore, outcome.starts.cold), (1, 0, 0));
    // Three of four stay paused the whole time, the fourth not at all: 2.5 s until the last answer.
    assert_eq!(outcome.paused_host_gib_s, 7.5);
}

#[test]
fn without_a_snapshot_every_start_is_cold() {
    let mut config = Config::default();
    config.scenario.restore = None;
    config.scenario.warm = 0;
    let outcome = outcome(&Trace::new([(0.0, 1.0), (200.0, 1.0)]), &config, "tracker");
    assert_eq!((outcome.starts.cold, outcome.wait_ms.p99), (2, 60_000.0));
}

#[test]
fn a_full_queue_and_a_passed_deadline_drop_requests() {
    let mut config = Config::default();
    config.scenario.queue = QueueLimits { max: 2, deadline: Duration::from_millis(400) };
    let trace = Trace::new([(0.0, 1.0), (0.1, 1.0), (0.2, 1.0)]);
    // The third finds the queue full; the first is given up 0.1 s before the replica serves; the second is answered.
    let outcome = outcome(&trace, &config, "rewarm");
    assert_eq!((outcome.drops, outcome.held_max), (2, 2));
    assert!((outcome.within_target - 1.0 / 3.0).abs() < 1e-9);
}

#[test]
fn a_fixed_pool_is_charged_until_the_last_answer() {
    let outcome = outcome(&Trace::new([(0.0, 1.0), (9.0, 1.0)]), &Config::default(), "fixed");
    assert_eq!(outcome.replica_seconds_per_request, 16.0 * 10.0 / 2.0);
}

#[test]
fn who_knows_when_answers_end_needs_less() {
    let trace = generated(1200);
    let mut config = Config::default();
    let blind = outcome(&trace, &config, "rewarm");
    config.scenario.clairvoyant = true;
    let sighted = outcome(&trace, &config, "rewarm");
    let costs = [sighted, blind].map(|outcome| outcome.replica_seconds_per_request);
    assert!(costs[0] < costs[1], "{costs:?}");
}

/// The goals for which the policy was made: nearly all in time, for less than Knative asks.
#[test]
fn rewarm_is_in_time_and_cheaper_than_kpa() {
    for (name, trace) in traces() {
        let config = Config::default();
        let (ours, kpa) = (outcome(&trace, &config, "rewarm"), outcome(&trace, &config, "kpa"));
        assert!(ours.within_target >= 0.99, "{name}: {ours:?}");
        let share = ours.replica_seconds_per_request / kpa.replica_seconds_per_request;
        let most = if name.contains("code") { 0.5 } else { 0.85 };
        assert!(share <= most, "{name}: {share:.3} of what kpa takes, at most {most}");
        assert_eq!((ours.drops, ours.killed_in_flight), (0, 0), "{name}");
    }
}

/// The CSV traces of the folder that `REWARM_TRACES` names, or a generated one.
fn traces() -> Vec<(String, Trace)> {
    let Some(folder) = std::env::var_os("REWARM_TRACES").map(PathBuf::from) else {
        return vec![("generated".to_owned(), generated(1800))];
    };
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let paths = entries.map(|entry| entry.expect("readable").path());
    let csv: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|end| end == "csv")).collect();
    assert!(!csv.is_empty(), "no *.csv in {}", folder.display());
    let read = |path: &PathBuf| Trace::read(path, &ServiceTime::default()).expect("a trace");
    csv.iter().map(|path| (path.display().to_string(), read(path))).collect()
}

fn excerpt(name: &str) -> Trace {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/traces").join(name);
    Trace::read(&path, &ServiceTime::default()).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn the_three_formats_are_read() {
    let seconds = |trace: &Trace| -> Vec<(f64, f64)> {
        trace.requests.iter().map(|r| (r.arrival.seconds(), r.service.as_secs_f64())).collect()
    };
    let azure = seconds(&excerpt("azure.csv"));
    assert_eq!(azure[0], (0.0, 0.05 + 4808.0 / 8000.0 + 10.0 * 0.02));
    assert!((azure[1].0 - 0.052).abs() < 1e-6, "{azure:?}");
    let mooncake = seconds(&excerpt("mooncake.jsonl"));
    assert_eq!((mooncake[0].0, mooncake[1].0), (0.0, 3.052));
    assert_eq!(seconds(&excerpt("seconds.csv")), [(0.0, 2.0), (0.5, 1.5)]);
}

fn any_policy() -> impl Strategy<Value = &'static str> {
    proptest::sample::select(PolicyKind::NAMES.as_slice())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever comes: each request is answered once or dropped, nothing is cut off, no replica does more than its slots
    /// allow, and a second replay gives the same.
    #[test]
    fn nothing_is_lost(
        gaps in proptest::collection::vec((0.0..4.0_f64, 0.0..6.0_f64), 1..120),
        policy in any_policy(),
        warm in 0..4_u32,
        concurrency in 1..5_u32,
        max in 1..7_u32,
        queue_max in 1..60_usize,
    ) {
        let mut config = Config::default();
        config.scenario.warm = warm;
        config.scenario.limits.concurrency = concurrency;
        config.scenario.limits.max = max;
        config.scenario.queue = QueueLimits { max: queue_max, deadline: Duration::from_secs(20) };
        let arrivals = gaps.iter().scan(0.0, |at, (gap, service)| {
            *at += gap * gap / 4.0;
            Some((*at, *service))
        });
        let trace = Trace::new(arrivals);
        let first = outcome(&trace, &config, policy);
        prop_assert_eq!(&first, &outcome(&trace, &config, policy));
        prop_assert_eq!(first.killed_in_flight, 0);
        prop_assert!(first.drops <= gaps.len() as u64 && first.held_max <= queue_max);
        prop_assert!(first.wait_ms.p999 <= 20_000.0);
        if first.drops == 0 {
            let work: f64 = gaps.iter().map(|(_, service)| service).sum();
            let least = work / f64::from(concurrency) / gaps.len() as f64;
            prop_assert!(first.replica_seconds_per_request >= least * 0.999_999, "{} < {least}", first.replica_seconds_per_request);
        }
    }
}
