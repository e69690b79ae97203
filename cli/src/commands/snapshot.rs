//! `rewarm snapshot`

use std::time::Duration;

use rewarm_container::State;
use rewarm_probe::Probe;
use rewarm_report::{Clock, Timing};
use rewarm_snapshot::{Context, Outcome, Request};
use rewarm_store::{SigningKey, Target};
use serde::Serialize;

use crate::args::{Global, Snapshot};
use crate::config::{self, Config};
use crate::failure::Cause;
use crate::render::{self, Output, bytes, count, seconds};
use crate::signals::Interrupts;
use crate::{env, programs, replicas};

/// A server that is held longer has lost its users anyway.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(300);
/// Nobody waits for a server that is to be stopped, but for ever is too long.
const FREEZE_TIMEOUT_STOPPED: Duration = Duration::from_secs(3600);

#[derive(Serialize)]
struct Report {
    reference: String,
    digest: String,
    #[serde(flatten)]
    totals: rewarm_store::Totals,
    new_content_bytes: u64,
    /// Part of the content that no older snapshot brought.
    new_percent: f64,
    frozen_ms: f64,
    received_bytes: u64,
    probe_answers: usize,
    warnings: Vec<String>,
    stages: Vec<Timing>,
    total_ms: f64,
}

pub(crate) async fn run(args: &Snapshot, global: &Global) -> Result<u8, Cause> {
    let mut interrupts = Interrupts::watch()?;
    programs::fit_for_containers()?;
    let output = Output::new(global);
    let request = request(args, global)?;
    let clock = Clock::start(output.progress()).pausing_at(env::pause_at());
    let context = context(global, replicas::open(global)?, clock.clone()).await?;
    let outcome = rewarm_snapshot::run(request, context, interrupts.next()).await?;
    output.answer(&report(&outcome, &clock), text)?;
    Ok(0)
}

fn request(args: &Snapshot, global: &Global) -> Result<Request, Cause> {
    if let Target::Digest(digest) = &args.destination.target {
        let problem =
            format!("DEST names the digest {digest}, expected a tag: a digest follows from what is stored");
        return Err(Cause::Usage { problem });
    }
    let sign = args.sign.as_deref().map(|key| config::key_folder().signing_key(key)).transpose()?;
    demanded(&Config::load(global)?, args, sign.as_ref())?;
    Ok(Request {
        sign,
        name: args.name.clone(),
        destination: args.destination.clone(),
        stop: args.stop,
        probe: args.probe.as_deref().map(Probe::load).transpose()?,
        engine: args.engine.clone(),
        pre: args.pre.clone(),
        post: args.post.clone(),
        hook_timeout: args.hook_timeout,
        compression: args.compression,
        rate: args.rate,
        tcp_close: args.tcp_close,
        freeze_timeout: args.freeze_timeout.unwrap_or(if args.stop {
            FREEZE_TIMEOUT_STOPPED
        } else {
            FREEZE_TIMEOUT
        }),
        freeze_memory: args.freeze_memory,
        gpu_direct: args.gpu_direct,
    })
}

/// A snapshot that nobody could restore is not taken.
fn demanded(config: &Config, args: &Snapshot, sign: Option<&SigningKey>) -> Result<(), Cause> {
    let Some(trust) = config.trust(&args.destination.store)? else { return Ok(()) };
    if sign.is_some_and(|key| trust.keys().contains(&key.public())) {
        return Ok(());
    }
    let given = match sign {
        Some(key) => format!("--sign gives {}", key.public()),
        None => "there is no --sign".to_owned(),
    };
    let expected = trust.keys().iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ");
    let problem = format!(
        "{} demands signed snapshots in {}: {given}, expected {expected}",
        config.path().display(),
        args.destination.store
    );
    Err(Cause::Usage { problem })
}

async fn context(global: &Global, state: State, clock: Clock) -> Result<Context, Cause> {
    let programs = programs::find(global).await?;
    Ok(Context {
        state,
        criu: programs.criu.path,
        criu_version: programs.criu.version,
        runc_version: programs.runc_version,
        clock,
    })
}

fn report(outcome: &Outcome, clock: &Clock) -> Report {
    let published = &outcome.published;
    let (new, all) = (published.new_content_bytes, published.totals.content_bytes);
    Report {
        new_content_bytes: new,
        new_percent: if all == 0 { 0.0 } else { new as f64 * 100.0 / all as f64 },
        reference: outcome.reference.to_string(),
        digest: outcome.published.digest.to_string(),
        totals: outcome.published.totals,
        frozen_ms: outcome.frozen.as_secs_f64() * 1000.0,
        received_bytes: outcome.received_bytes,
        probe_answers: outcome.probe_answers,
        warnings: outcome.warnings.clone(),
        stages: clock.timings(),
        total_ms: clock.elapsed().as_secs_f64() * 1000.0,
    }
}

fn text(report: &Report) -> String {
    let probe = match report.probe_answers {
        0 => "no probe: restored replicas will not be asked anything".to_owned(),
        number => format!("{} recorded", count(number, "answer")),
    };
    format!(
        "{reference}\n{digest}\n{content} of memory and files, {stored} in the store\nnew: {new} of {content} ({percent:.1} %), {new_stored} in the store\nfrozen {frozen}, all in all {total}; {probe}\n\n{stages}",
        reference = report.reference,
        digest = report.digest,
        content = bytes(report.totals.content_bytes),
        stored = bytes(report.totals.stored_bytes),
        new = bytes(report.new_content_bytes),
        percent = report.new_percent,
        new_stored = bytes(report.totals.new_bytes),
        frozen = seconds(report.frozen_ms),
        total = seconds(report.total_ms),
        stages = render::stages(&report.stages),
    )
}
