//! `rewarm inspect`
//!
//! Shows every variant of a reference, and the verdict that a restore on this machine would begin with.

use rewarm_container::Spec;
use rewarm_fetcher::Fetcher;
use rewarm_restore::mappings::{self, Process};
use rewarm_restore::{Here, Machine, Reason, against, here};
use rewarm_store::{Manifest, Snapshot, Store};
use serde::Serialize;

use crate::args::{Global, Inspect};
use crate::failure::Cause;
use crate::render::{Output, bytes, count, table};
use crate::{env, programs, replicas};

#[derive(Serialize)]
struct Report {
    reference: String,
    variants: Vec<Variant>,
}

#[derive(Serialize)]
struct Variant {
    digest: String,
    verdict: Verdict,
    /// Whose signatures fit.
    signers: Vec<String>,
    manifest: Manifest,
    /// The processes, where they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    processes: Option<Vec<Process>>,
}

#[derive(Serialize)]
struct Verdict {
    /// Whether this machine can restore it.
    fits: bool,
    reasons: Vec<String>,
}

pub(crate) async fn run(args: &Inspect, global: &Global) -> Result<u8, Cause> {
    let store = Store::open(&args.reference.store).await?;
    let snapshots = store.resolve_all(&args.reference).await?;
    let here = Here {
        machine: machine(global).await?,
        program: replicas::program(),
        cdi: env::cdi(),
        kept_bytes: kept_bytes(global)?,
    };
    let mut variants = Vec::new();
    for snapshot in &snapshots {
        let processes = if args.mappings { Some(processes(snapshot).await?) } else { None };
        let (manifest, here) = (snapshot.manifest().clone(), here.clone());
        // It may ask the driver of this machine's devices.
        let verdict = tokio::task::spawn_blocking(move || verdict_on(&manifest, &here)).await;
        let verdict = verdict.expect("a verdict does not panic")?;
        variants.push(variant(snapshot, verdict, processes));
    }
    let report = Report { reference: args.reference.to_string(), variants };
    Output::new(global).answer(&report, text)?;
    Ok(0)
}

/// This machine; without a usable CRIU the verdict says so, instead of no verdict at all.
async fn machine(global: &Global) -> Result<Machine, Cause> {
    let explicit = global.criu.clone();
    let find = move || rewarm_criu::Binary::find(explicit.as_deref(), programs::criu_cache().as_deref());
    let found = tokio::task::spawn_blocking(find).await.expect("looking for a program does not panic");
    let version = found.map_or_else(|_| "none".to_owned(), |binary| binary.version.to_string());
    here(&version).map_err(Cause::Machine)
}

async fn processes(snapshot: &Snapshot) -> Result<Vec<Process>, Cause> {
    let boot = snapshot.boot().await?;
    mappings::processes(&boot).map_err(|cause| Cause::Parts(Box::new(cause)))
}

/// Memory that a fetcher keeps for later: a restore makes it give that up.
fn kept_bytes(global: &Global) -> Result<u64, Cause> {
    let status = Fetcher::status(&global.state)?;
    let streams = status.into_iter().flat_map(|status| status.streams);
    Ok(streams.filter(|stream| stream.holders == 0).map(|stream| stream.arrived_bytes).sum())
}

/// What a restore would begin with.
fn verdict_on(manifest: &Manifest, here: &Here) -> Result<Verdict, Cause> {
    let reasons = match serde_json::from_value::<Spec>(manifest.facts.spec.clone()) {
        Ok(spec) => {
            let reasons = against(manifest, &spec, here).map_err(Cause::Machine)?;
            reasons.iter().map(Reason::to_string).collect()
        }
        Err(error) => vec![format!("the recorded specification cannot be read: {error}")],
    };
    Ok(Verdict { fits: reasons.is_empty(), reasons })
}

fn variant(snapshot: &Snapshot, verdict: Verdict, processes: Option<Vec<Process>>) -> Variant {
    Variant {
        digest: snapshot.digest().to_string(),
        signers: snapshot.signers().iter().map(ToString::to_string).collect(),
        verdict,
        manifest: snapshot.manifest().clone(),
        processes,
    }
}

fn text(report: &Report) -> String {
    let shown: Vec<String> = report.variants.iter().map(describe).collect();
    format!("{}\n{}", report.reference, shown.join("\n"))
}

fn describe(variant: &Variant) -> String {
    let (manifest, facts) = (&variant.manifest, &variant.manifest.facts);
    let probe = facts.probe.as_ref().and_then(|probe| probe.get("exchanges")?.as_array().map(Vec::len));
    let list = |ports: &[u16]| ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
    let or_none = |text: String| if text.is_empty() { "none".to_owned() } else { text };
    let rows = [
        ("digest", variant.digest.clone()),
        ("created", manifest.created.clone()),
        ("command", facts.command.join(" ")),
        ("ports", or_none(list(&facts.ports))),
        (
            "memory",
            format!("{}, {} of it zero", bytes(facts.memory.logical_bytes), bytes(facts.memory.zero_bytes)),
        ),
        ("content", bytes(manifest.totals.content_bytes)),
        (
            "stored",
            format!(
                "{}, {} of it new",
                bytes(manifest.totals.stored_bytes),
                bytes(manifest.totals.new_bytes)
            ),
        ),
        ("made with", format!("kernel {}, CRIU {}, runc {}", facts.kernel, facts.criu, facts.runc)),
        ("processor", format!("{}, {}", facts.architecture, facts.cpu.model)),
        ("host files", facts.host_files.len().to_string()),
        ("probe", probe.map_or_else(|| "none".to_owned(), |answers| count(answers, "answer"))),
        ("hooks", or_none(hooks(manifest))),
        ("signed by", or_none(variant.signers.join(", "))),
    ];
    let rows = rows.into_iter().map(|(name, value)| vec![name.to_owned(), value]);
    let maps: String = variant.processes.iter().flatten().map(maps).collect();
    format!("{}{}{maps}", table(&["FACT", "VALUE"], rows), verdict(&variant.verdict))
}

fn maps(process: &Process) -> String {
    let rows = process.mappings.iter().map(|mapping| {
        vec![
            format!("{:x}-{:x}", mapping.start, mapping.end),
            mapping.permissions.clone(),
            bytes(mapping.end - mapping.start),
            bytes(mapping.content_bytes),
            bytes(mapping.zero_bytes),
            mapping.name.clone(),
        ]
    });
    let threads = count(process.threads, "thread");
    let mappings = table(&["MAPPING", "PERM", "LENGTH", "CONTENT", "ZERO", "NAME"], rows);
    format!("\nprocess {}: {}, {threads}\n{mappings}", process.pid, process.program)
}

fn hooks(manifest: &Manifest) -> String {
    let hooks = &manifest.facts.hooks;
    let named = |name, hook: &Option<String>| hook.as_ref().map(|hook| format!("{name} {hook}"));
    [named("pre", &hooks.pre), named("post", &hooks.post)]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join(", ")
}

fn verdict(verdict: &Verdict) -> String {
    if verdict.fits {
        return "this machine can restore it\n".to_owned();
    }
    let reasons: String = verdict.reasons.iter().map(|reason| format!("  - {reason}\n")).collect();
    format!("this machine cannot restore it:\n{reasons}")
}
