//! The first stage: is there a snapshot that fits this machine? All reasons against it at once, before any data moves.

use std::io;
use std::path::PathBuf;

use rewarm_container::Spec;
use rewarm_fetcher::{Access, Fetcher, Found};
use rewarm_probe::{Engine, Hook, Recorded};
use rewarm_store::{Manifest, Reference, Target};

use crate::device::{self, Plan};
use crate::error::Cause;
use crate::machine::{HostView, here};
use crate::pipeline::blocking;
use crate::request::{Context, Request, spec};
use crate::verdict::{Machine, Reason, memory_reasons, reasons};

/// A snapshot that fits this machine.
pub(crate) struct Admitted {
    pub(crate) source: String,
    pub(crate) manifest: Manifest,
    pub(crate) access: Access,
    pub(crate) found: Found,
    pub(crate) spec: Spec,
    pub(crate) recorded: Option<Recorded>,
    pub(crate) engine: Option<Engine>,
    pub(crate) post: Option<Hook>,
    pub(crate) device: Option<Plan>,
}

/// Finds the snapshot and gives the verdict. Beside the cause of a refusal is the replica that the snapshot describes, if it
/// was found.
pub(crate) async fn admit(
    request: &Request,
    context: &Context,
) -> std::result::Result<Admitted, (Cause, Option<Box<Spec>>)> {
    let early = |cause: Cause| (cause, None);
    let access = Access::new(&request.source.store, context.env.clone());
    let (variants, machine) = variants(request, context, &access).await.map_err(early)?;
    let mut refusal = None;
    // The first variant that fits, the newest first; if none does, the newest says why.
    for found in variants {
        let manifest = found.snapshot.manifest();
        let mut spec = spec(request, manifest).map_err(early)?;
        let unprovided = device::provide(&mut spec, &context.cdi);
        let (facts, asked, known) = (manifest.facts.clone(), spec.clone(), machine.clone());
        let (count, fetcher) = (request.count, context.fetcher.clone());
        let (program, wish) = (context.program.clone(), request.gpu.clone());
        let needed = device::host_bytes(manifest);
        let verdict = blocking(move || {
            let short = memory(needed, asked.memory_bytes, count, &fetcher)?;
            let others = short.into_iter().chain(unprovided).collect();
            let plan = || device::plan(&facts, &program, &wish, count);
            Ok(verdict(reasons(&facts, &known, &HostView::new(&asked)), others, &asked, plan))
        });
        match verdict.await.map_err(early)? {
            Ok(device) => return admitted(request, access, found, spec, device).map_err(early),
            Err(reasons) => {
                refusal.get_or_insert((Cause::Incompatible { reasons }, Some(Box::new(spec))));
            }
        }
    }
    Err(refusal.expect("a tag has at least one variant"))
}

/// All reasons at once: those of the machine, others that were found before, mounts without a source, and devices; without any, how
/// devices are placed.
fn verdict(
    machine: Vec<Reason>,
    others: Vec<Reason>,
    spec: &Spec,
    plan: impl FnOnce() -> std::result::Result<Option<Plan>, Vec<Reason>>,
) -> std::result::Result<Option<Plan>, Vec<Reason>> {
    let mut reasons: Vec<Reason> = machine.into_iter().chain(others).chain(missing_sources(spec)).collect();
    let device = plan().unwrap_or_else(|more| {
        reasons.extend(more);
        None
    });
    if reasons.is_empty() { Ok(device) } else { Err(reasons) }
}

/// What a verdict is given with that restores nothing.
#[derive(Debug, Clone)]
pub struct Here {
    /// The machine.
    pub machine: Machine,
    /// The program whose hidden verb `gpu-helper` asks the driver.
    pub program: PathBuf,
    /// Folders of CDI files, which say what a container needs to use GPUs.
    pub cdi: Vec<PathBuf>,
    /// Bytes of memory that a fetcher keeps for later, and would give up for a restore.
    pub kept_bytes: u64,
}

/// Every reason for which a restore of one replica, without any wishes, would be refused here; none if it would not.
///
/// # Errors
/// This machine's free memory cannot be read.
pub fn against(manifest: &Manifest, stored: &Spec, here: &Here) -> io::Result<Vec<Reason>> {
    let (facts, mut spec) = (&manifest.facts, stored.clone());
    let unprovided = device::provide(&mut spec, &here.cdi);
    let free = rewarm_sys::machine::free_bytes()?.saturating_add(here.kept_bytes);
    let short = memory_reasons(device::host_bytes(manifest), spec.memory_bytes, 1, free);
    let others = short.into_iter().chain(unprovided).collect();
    let plan = || device::plan(facts, &here.program, &rewarm_gpu::Wish::default(), 1);
    Ok(verdict(reasons(facts, &here.machine, &HostView::new(&spec)), others, &spec, plan)
        .err()
        .unwrap_or_default())
}

/// What the reference names, the newest variant first, and the machine that one of them is to fit.
pub(crate) async fn variants(
    request: &Request,
    context: &Context,
    access: &Access,
) -> std::result::Result<(Vec<Found>, Machine), Cause> {
    let (fetcher, asked) = (context.fetcher.clone(), access.clone());
    let (reference, trust) = (request.source.clone(), request.trust.clone());
    let found = blocking(move || Ok(fetcher.find(&asked, &reference, trust)?)).await?;
    let machine = here(&context.criu_version.to_string()).map_err(Cause::io("look at this machine"))?;
    Ok((found, machine))
}

/// Why memory does not suffice. What the fetcher only keeps for later gives way first.
fn memory(
    needed: u64,
    limit: Option<u64>,
    count: u32,
    fetcher: &Fetcher,
) -> std::result::Result<Vec<Reason>, Cause> {
    let now = || {
        let free = rewarm_sys::machine::free_bytes().map_err(Cause::io("look at this machine"))?;
        Ok(memory_reasons(needed, limit, count, free))
    };
    let reasons: Vec<Reason> = now()?;
    match reasons.iter().find_map(|reason| match reason {
        Reason::MemoryFree { needed, .. } => Some(*needed),
        _ => None,
    }) {
        Some(needed) => {
            fetcher.trim(needed)?;
            now()
        }
        None => Ok(reasons),
    }
}

fn admitted(
    request: &Request,
    access: Access,
    found: Found,
    spec: Spec,
    device: Option<Plan>,
) -> std::result::Result<Admitted, Cause> {
    let manifest = found.snapshot.manifest().clone();
    let recorded = manifest.facts.probe.clone().map(Recorded::from_json).transpose()?;
    let post = manifest.facts.hooks.post.as_deref().map(str::parse::<Hook>).transpose()?;
    let engine = manifest.facts.hooks.engine.clone().map(serde_json::from_value::<Engine>).transpose();
    let engine =
        engine.map_err(|error| Cause::Inconsistent { what: format!("the steps of the engine: {error}") })?;
    let digest = Reference { target: Target::Digest(found.digest()), ..request.source.clone() };
    let source = digest.to_string();
    Ok(Admitted { source, manifest, access, found, spec, recorded, engine, post, device })
}

fn missing_sources(spec: &Spec) -> Vec<Reason> {
    let missing = spec.mounts.iter().filter(|mount| !mount.source.exists());
    missing.map(|mount| Reason::MountSource { path: mount.source.display().to_string() }).collect()
}
