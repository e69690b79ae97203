//! `rewarm snapshot`

use std::time::Duration;

use rewarm_container::State;
use rewarm_probe::{Probe, limits::HOOK_TIMEOUT};
use rewarm_report::{Clock, Timing};
use rewarm_snapshot::{Context, Outcome, Request};
use rewarm_store::Target;
use serde::Serialize;

use crate::args::{Global, Snapshot};
use crate::failure::Cause;
use crate::render::{self, Output, bytes, count, seconds};
use crate::signals::Interrupts;
use crate::{env, programs, replicas};

/// A server that is held longer has lost its users anyway.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(300);

#[derive(Serialize)]
struct Report {
    reference: String,
    digest: String,
    #[serde(flatten)]
    totals: rewarm_store::Totals,
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
    let request = request(args)?;
    let clock = Clock::start(output.progress()).pausing_at(env::pause_at());
    let context = context(global, replicas::open(global)?, clock.clone()).await?;
    let outcome = rewarm_snapshot::run(request, context, interrupts.next()).await?;
    output.answer(&report(&outcome, &clock), text)?;
    Ok(0)
}

fn request(args: &Snapshot) -> Result<Request, Cause> {
    if let Target::Digest(digest) = &args.destination.target {
        let problem =
            format!("DEST names the digest {digest}, expected a tag: a digest follows from what is stored");
        return Err(Cause::Usage { problem });
    }
    Ok(Request {
        name: args.name.clone(),
        destination: args.destination.clone(),
        stop: args.stop,
        probe: args.probe.as_deref().map(Probe::load).transpose()?,
        pre: args.pre.clone(),
        post: args.post.clone(),
        hook_timeout: HOOK_TIMEOUT,
        compression: args.compression,
        tcp_close: args.tcp_close,
        freeze_timeout: FREEZE_TIMEOUT,
    })
}

async fn context(global: &Global, state: State, clock: Clock) -> Result<Context, Cause> {
    let programs = programs::find(global).await?;
    Ok(Context {
        state,
        criu: programs.criu.path,
        criu_version: programs.criu.version.to_string(),
        runc_version: programs.runc_version,
        clock,
    })
}

fn report(outcome: &Outcome, clock: &Clock) -> Report {
    Report {
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
        "{reference}\n{digest}\n{memory} of memory and files, {stored} in the store, {new} of it new\nfrozen {frozen}, all in all {total}; {probe}\n\n{stages}",
        reference = report.reference,
        digest = report.digest,
        memory = bytes(report.totals.content_bytes),
        stored = bytes(report.totals.stored_bytes),
        new = bytes(report.totals.new_bytes),
        frozen = seconds(report.frozen_ms),
        total = seconds(report.total_ms),
        stages = render::stages(&report.stages),
    )
}
