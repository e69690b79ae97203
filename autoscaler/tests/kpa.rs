//! `kpa` decides as Knative's own code does, in every recorded case.
//!
//! The series are in `tests/kpa/`; the environment variable `REWARM_KPA_SERIES` names another folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rewarm_autoscaler::moment::Moment;
use rewarm_autoscaler::policy::kpa::scaler::{Scaler, Settings, Wanted};
use rewarm_autoscaler::policy::kpa::windows::Aggregation;
use serde::Deserialize;

#[derive(Deserialize)]
struct Head {
    config: SeriesConfig,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SeriesConfig {
    target: f64,
    total: f64,
    stable_window: f64,
    panic_window: f64,
    panic_threshold: f64,
    max_scale_up_rate: f64,
    max_scale_down_rate: f64,
    scale_down_delay: f64,
    activation_scale: u32,
    target_burst_capacity: f64,
    reachable: bool,
    min_scale: u32,
    max_scale: u32,
    aggregation: Aggregation,
    scraped: bool,
    initial_ready: u32,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    t: f64,
    ready: u32,
    at: Vec<f64>,
    reports: Vec<f64>,
    stable: Option<f64>,
    panic: Option<f64>,
    desired: Option<u32>,
    ebc: Option<i32>,
    valid: bool,
    panicking: bool,
    max_panic: u32,
    bounded: Option<u32>,
}

/// Decisions in the series of this repository; docs/autoscaling.md has the number, too.
const RECORDED: usize = 9012;

fn folder() -> PathBuf {
    std::env::var_os("REWARM_KPA_SERIES")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kpa"), PathBuf::from)
}

fn series() -> Vec<PathBuf> {
    let folder = folder();
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("readable").path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
    files.sort();
    assert!(!files.is_empty(), "no *.jsonl in {}", folder.display());
    files
}

fn settings(config: &SeriesConfig) -> Settings {
    assert_eq!(
        config.scraped,
        config.target_burst_capacity != -1.0,
        "only a burst capacity of -1 turns scraping off"
    );
    Settings {
        target: config.target,
        total: config.total,
        stable_window_s: config.stable_window as u32,
        panic_window_s: config.panic_window as u32,
        panic_threshold: config.panic_threshold,
        max_scale_up_rate: config.max_scale_up_rate,
        max_scale_down_rate: config.max_scale_down_rate,
        scale_down_delay: Duration::from_secs_f64(config.scale_down_delay),
        activation_scale: config.activation_scale,
        target_burst_capacity: config.target_burst_capacity,
        reachable: config.reachable,
        min_scale: config.min_scale,
        max_scale: config.max_scale,
        aggregation: config.aggregation,
    }
}

/// Replays one series; how many decisions were compared, and every difference.
fn replay(path: &Path) -> (usize, Vec<String>) {
    let text = fs::read_to_string(path).expect("readable");
    let mut lines = text.lines();
    let head: Head = serde_json::from_str(lines.next().expect("a first line")).expect("a configuration");
    let tolerance = match head.config.aggregation {
        Aggregation::Linear => 1e-6,
        Aggregation::WeightedExponential => 1e-9,
    };
    let mut scaler = Scaler::new(settings(&head.config), head.config.initial_ready);
    let (mut compared, mut wrong) = (0, Vec::new());
    for line in lines.filter(|line| !line.is_empty()) {
        let expected: Line = serde_json::from_str(line).expect("a decision");
        assert_eq!(expected.at.len(), expected.reports.len(), "{line}");
        for (at, value) in expected.at.iter().zip(&expected.reports) {
            scaler.record(Moment::from_seconds(*at), *value);
        }
        let decided = scaler.decide(Moment::from_seconds(expected.t), expected.ready);
        compared += 1;
        if let Some(difference) = difference(&scaler, decided, &expected, tolerance) {
            wrong.push(format!("{} at {} s: {difference}", path.display(), expected.t));
        }
    }
    (compared, wrong)
}

fn difference(scaler: &Scaler, decided: Option<Wanted>, expected: &Line, tolerance: f64) -> Option<String> {
    let state = (scaler.panicking(), scaler.panic_replicas_max());
    if state != (expected.panicking, expected.max_panic) {
        return Some(format!(
            "panicking, maxPanic {state:?}, expected {:?}",
            (expected.panicking, expected.max_panic)
        ));
    }
    let Some(decided) = decided else {
        return expected.valid.then(|| "invalid, expected a decision".to_owned());
    };
    let seen = (Some(decided.desired), Some(decided.excess_burst_capacity), Some(decided.bounded), true);
    let wanted = (expected.desired, expected.ebc, expected.bounded, expected.valid);
    if seen != wanted {
        return Some(format!("desired, ebc, bounded, valid {seen:?}, expected {wanted:?}"));
    }
    let close =
        |seen: f64, wanted: Option<f64>| wanted.is_some_and(|wanted| (seen - wanted).abs() <= tolerance);
    let averages = close(decided.stable, expected.stable) && close(decided.panic, expected.panic);
    (!averages).then(|| {
        format!(
            "averages {:?}, expected {:?}",
            (decided.stable, decided.panic),
            (expected.stable, expected.panic)
        )
    })
}

#[test]
fn every_recorded_decision_of_knative_is_ours() {
    let (mut compared, mut wrong) = (0, Vec::new());
    for path in series() {
        let (count, differences) = replay(&path);
        assert!(count > 0, "{} has no decision", path.display());
        compared += count;
        wrong.extend(differences);
    }
    if std::env::var_os("REWARM_KPA_SERIES").is_none() {
        assert_eq!(compared, RECORDED, "a series in {} is gone or new", folder().display());
    }
    let shown: Vec<&str> = wrong.iter().take(20).map(String::as_str).collect();
    assert!(wrong.is_empty(), "{} of {compared} decisions differ:\n{}", wrong.len(), shown.join("\n"));
}
