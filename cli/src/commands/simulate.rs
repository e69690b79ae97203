//! `rewarm simulate`

use std::path::Path;
use std::str::FromStr;

use rewarm_autoscaler::config::Config;
use rewarm_autoscaler::plot::{Panel, pareto};
use rewarm_autoscaler::simulate::{Outcome, Scenario, StartSamples, simulate};
use rewarm_autoscaler::trace::Trace;
use serde::Serialize;

use crate::args::{Global, Simulate};
use crate::failure::Cause;
use crate::render::{Output, count, table};

#[derive(Serialize)]
struct Replayed {
    trace: String,
    #[serde(skip)]
    requests: usize,
    policies: Vec<Outcome>,
}

pub(crate) fn run(args: &Simulate, global: &Global) -> Result<u8, Cause> {
    let mut config = match &args.config {
        Some(path) => Config::read(path)?,
        None => Config::default(),
    };
    override_by_flags(&mut config.scenario, args)?;
    let policies = config.select(&args.policy)?;
    // All traces are read before any is replayed: a mistake in the last one shows at once.
    let mut traces = Vec::with_capacity(args.traces.len());
    for path in &args.traces {
        traces.push((path, Trace::read(path, &config.service)?));
    }
    let output = Output::new(global);
    let mut all = Vec::with_capacity(traces.len());
    for (path, trace) in &traces {
        let policies = policies.iter().map(|policy| simulate(trace, &config.scenario, policy)).collect();
        let replayed =
            Replayed { trace: path.display().to_string(), requests: trace.requests.len(), policies };
        output.answer(&replayed, text)?;
        all.push(replayed);
    }
    if let Some(path) = &args.plot {
        let titles: Vec<&str> = traces.iter().map(|(path, _)| title(path)).collect();
        let panels: Vec<Panel<'_>> = titles
            .iter()
            .zip(&all)
            .map(|(title, replayed)| Panel { title, outcomes: &replayed.policies })
            .collect();
        pareto(path, &panels)?;
    }
    Ok(0)
}

/// What the command line says counts, whatever the file says.
fn override_by_flags(scenario: &mut Scenario, args: &Simulate) -> Result<(), Cause> {
    let samples = |text: &String| StartSamples::from_str(text);
    if let Some(text) = &args.restore {
        scenario.restore = if text == "none" { None } else { Some(samples(text)?) };
    }
    if let Some(text) = &args.wake {
        scenario.wake = samples(text)?;
    }
    if let Some(text) = &args.cold {
        scenario.cold = samples(text)?;
    }
    scenario.warm = args.warm.unwrap_or(scenario.warm);
    scenario.limits.concurrency = args.concurrency.unwrap_or(scenario.limits.concurrency);
    scenario.limits.max = args.max.unwrap_or(scenario.limits.max);
    scenario.limits.target_wait = args.target_wait.unwrap_or(scenario.limits.target_wait);
    if scenario.limits.min > scenario.limits.max {
        let (min, max) = (scenario.limits.min, scenario.limits.max);
        let problem = format!("min is {min}, expected at most max, which is {max}");
        return Err(Cause::Usage { problem });
    }
    Ok(())
}

fn title(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or("trace")
}

fn text(replayed: &Replayed) -> String {
    let header = [
        "POLICY",
        "IN TIME",
        "REPLICA-S",
        "P50",
        "P99",
        "P99.9",
        "WAKES",
        "RESTORES",
        "COLD",
        "HELD",
        "DROPS",
    ];
    let rows = replayed.policies.iter().map(|policy| {
        vec![
            policy.name.clone(),
            format!("{:.2} %", policy.within_target * 100.0),
            format!("{:.3}", policy.replica_seconds_per_request),
            format!("{:.0} ms", policy.wait_ms.p50),
            format!("{:.0} ms", policy.wait_ms.p99),
            format!("{:.0} ms", policy.wait_ms.p999),
            policy.starts.wake.to_string(),
            policy.starts.restore.to_string(),
            policy.starts.cold.to_string(),
            policy.held_max.to_string(),
            policy.drops.to_string(),
        ]
    });
    format!("{}, {}\n{}", replayed.trace, count(replayed.requests, "request"), table(&header, rows))
}
