//! `rewarm restore`

use std::collections::BTreeMap;
use std::time::Duration;

use rewarm_fetcher::{DiskSettings, Fetcher, Settings};
use rewarm_report::{Clock, Timing};
use rewarm_restore::{Context, Mode, Outcome, Request, Restored};
use serde::Serialize;

use crate::args::{self, Global, Restore};
use crate::config::Config;
use crate::failure::{Cause, Told};
use crate::render::{self, Output, count, seconds};
use crate::replicas::{self, Published};
use crate::signals::Interrupts;
use crate::{env, programs};

/// How long the fetcher stays when nobody needs it.
const FETCHER_IDLE: Duration = Duration::from_secs(300);
/// How long a store may bring nothing.
const STORE_PATIENCE: Duration = Duration::from_secs(60);

#[derive(Serialize)]
struct Report {
    /// The snapshot with its digest; absent where it was not found and a fallback was started.
    source: Option<String>,
    /// `cold` if nothing was restored.
    started: &'static str,
    replicas: Vec<Replica>,
    stages: Vec<Timing>,
    total_ms: f64,
}

/// One replica: what it is, or why it is not.
#[derive(Serialize)]
#[serde(untagged)]
enum Replica {
    Serving(Serving),
    Failed { error: Told },
}

#[derive(Serialize)]
struct Serving {
    name: String,
    started: &'static str,
    /// Why it was started cold.
    #[serde(skip_serializing_if = "Option::is_none")]
    cold_because: Option<String>,
    uuid: String,
    pid: u32,
    publish: Vec<Published>,
    /// Milliseconds from the command to ready.
    ready_ms: f64,
    /// Recorded answers that were asked for again and were equal.
    answers_equal: usize,
}

pub(crate) async fn run(args: &Restore, global: &Global) -> Result<u8, Cause> {
    let mut interrupts = Interrupts::watch()?;
    programs::fit_for_containers()?;
    let output = Output::new(global);
    let request = request(args, global)?;
    let clock = Clock::start(output.progress()).pausing_at(env::pause_at());
    let context = context(global, clock.clone(), None).await?;
    let outcome = rewarm_restore::run(request, context, interrupts.next()).await?;
    conclude(outcome, &clock, output)
}

fn request(args: &Restore, global: &Global) -> Result<Request, Cause> {
    let fixed = args.publish.iter().find(|publish| publish.host_port != 0);
    if let (Some(publish), 2..) = (fixed, args.count) {
        let problem = format!(
            "--publish {publish} with --count {}: only one replica can have host port {}, expected host port 0",
            args.count, publish.host_port
        );
        return Err(Cause::Usage { problem });
    }
    Ok(Request {
        trust: Config::load(global)?.demand(&args.source.store, args.require_signature.as_deref())?,
        source: args.source.clone(),
        name: args.name.clone(),
        count: u32::from(args.count),
        publish: args.publish.clone(),
        memory_bytes: args.memory,
        cpus: args.cpus,
        env: args.env.iter().map(|(key, value)| format!("{key}={value}")).collect(),
        labels: BTreeMap::new(),
        net: args.net.clone(),
        ready: args.ready.clone(),
        ready_timeout: args.ready_timeout,
        mode: match args.mode {
            args::Mode::Auto => Mode::Auto,
            args::Mode::Lazy => Mode::Lazy,
            args::Mode::Eager => Mode::Eager,
        },
        gpu: args.gpu.clone().unwrap_or_default(),
        no_probe: args.no_probe,
        hook_timeout: args.hook_timeout,
        cold_fallback: args.cold_fallback.then(|| args.command.clone()),
    })
}

/// `bound_bytes`: what decoded snapshots may take altogether, where that is bounded.
pub(crate) async fn context(
    global: &Global,
    clock: Clock,
    bound_bytes: Option<u64>,
) -> Result<Context, Cause> {
    let state = replicas::open(global)?;
    let criu = programs::criu(global).await?;
    Ok(Context {
        state,
        criu: criu.path,
        criu_version: criu.version,
        program: replicas::program(),
        cdi: env::cdi(),
        fetcher: Fetcher::new(Settings { bound_bytes, ..settings(global)? }),
        env: env::all(),
        patience: env::store_patience().map_err(usage)?.unwrap_or(STORE_PATIENCE),
        clock,
    })
}

fn usage(problem: String) -> Cause {
    Cause::Usage { problem }
}

/// How the fetcher is started where none runs.
fn settings(global: &Global) -> Result<Settings, Cause> {
    let limit_bytes = env::cache_disk().map_err(usage)?;
    let disk = env::packs_dir().map(|folder| DiskSettings { folder, limit_bytes });
    Ok(Settings {
        state: global.state.clone(),
        program: replicas::program(),
        limit_bytes: env::cache_memory().map_err(usage)?,
        bound_bytes: None,
        disk: disk.filter(|disk| disk.limit_bytes != Some(0)),
        idle: env::fetcher_idle().map_err(usage)?.unwrap_or(FETCHER_IDLE),
    })
}

/// One replica that failed is the command's failure. Of several, those that serve are told as well, and the exit code is
/// 1 unless none serves.
fn conclude(outcome: Outcome, clock: &Clock, output: Output) -> Result<u8, Cause> {
    let Outcome { source, replicas } = outcome;
    let serving = replicas.iter().filter(|replica| replica.is_ok()).count();
    let cold = replicas.iter().flatten().filter(|restored| restored.cold.is_some()).count();
    let mut failures = Vec::new();
    let mut shown = Vec::new();
    for replica in replicas {
        match replica {
            Ok(restored) => shown.push(Replica::Serving(Serving::from(&restored))),
            Err(error) => {
                let cause = Cause::from(error);
                shown.push(Replica::Failed { error: cause.told() });
                failures.push(cause);
            }
        }
    }
    if serving == 0 && !failures.is_empty() {
        return Err(failures.swap_remove(0));
    }
    let started = if cold > 0 && cold == serving { "cold" } else { "restored" };
    let (stages, total_ms) = (clock.timings(), clock.elapsed().as_secs_f64() * 1000.0);
    let report = Report { source, started, replicas: shown, stages, total_ms };
    output.answer(&report, text)?;
    match failures.len() {
        0 => Ok(0),
        failed => Err(Cause::SomeFailed { failed, of: failed + serving, causes: failures }),
    }
}

impl From<&Restored> for Serving {
    fn from(restored: &Restored) -> Self {
        Self {
            name: restored.name.to_string(),
            started: if restored.cold.is_some() { "cold" } else { "restored" },
            cold_because: restored.cold.clone(),
            uuid: restored.uuid.to_string(),
            pid: restored.pid,
            publish: restored.published.iter().map(Published::from).collect(),
            ready_ms: restored.ready_after.as_secs_f64() * 1000.0,
            answers_equal: restored.answers,
        }
    }
}

fn text(report: &Report) -> String {
    let lines: String = report.replicas.iter().map(line).collect();
    format!("{lines}\n{}", render::stages(&report.stages))
}

fn line(replica: &Replica) -> String {
    let Replica::Serving(replica) = replica else { return String::new() };
    let ports: String = replica.publish.iter().map(|publish| format!(", {}", publish.describe())).collect();
    let how = match &replica.cold_because {
        Some(reason) => format!("was started cold ({reason}) and "),
        None => String::new(),
    };
    let answers = match (replica.answers_equal, &replica.cold_because) {
        (_, Some(_)) => String::new(),
        (0, None) => ", no answers compared".to_owned(),
        (number, None) => format!(", {} equal", count(number, "answer")),
    };
    format!("{} {how}is ready after {}{answers}{ports}\n", replica.name, seconds(replica.ready_ms))
}
