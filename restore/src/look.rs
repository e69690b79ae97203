//! What a snapshot is, without restoring it: for a caller that plans.

use rewarm_container::Spec;
use rewarm_fetcher::Access;
use rewarm_gpu::carried::Carried;
use rewarm_probe::Recorded;
use rewarm_report::Stage;
use rewarm_store::{Hooks, Reference, Target};

use crate::admit::variants;
use crate::error::{Cause, Error, Result};
use crate::machine::HostView;
use crate::pipeline::blocking;
use crate::request::{Context, Request, spec};
use crate::verdict::reasons;

/// A snapshot in its store.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    /// Its reference with its digest.
    pub source: String,
    /// The replica that it describes, with what the request wants otherwise.
    pub spec: Spec,
    /// Host memory that a replica's pages take, in bytes.
    pub host_bytes: u64,
    /// Device memory that a replica takes, in bytes.
    pub device_bytes: u64,
    /// Whether it fits this machine, free memory and devices aside.
    pub fits: bool,
    /// The questions that its replicas are asked, with the answers.
    pub recorded: Option<Recorded>,
    /// What is done before a dump and after it.
    pub hooks: Hooks,
}

/// Looks at the variant that a restore would take: the newest that fits this machine, else the newest.
///
/// # Errors
/// There is no such snapshot, it is not signed as it must be, or the store does not answer.
pub async fn look(request: &Request, context: &Context) -> Result<Seen> {
    let failed = |cause: Cause| Error { name: request.source.to_string(), stage: Stage::Admit, cause };
    let access = Access::new(&request.source.store, context.env.clone());
    let (variants, machine) = variants(request, context, &access).await.map_err(failed)?;
    let mut newest = None;
    for found in variants {
        let manifest = found.snapshot.manifest();
        let spec = spec(request, manifest).map_err(failed)?;
        let (facts, known, view) = (manifest.facts.clone(), machine.clone(), HostView::new(&spec));
        let fits = blocking(move || Ok(reasons(&facts, &known, &view).is_empty())).await.map_err(failed)?;
        let device =
            manifest.facts.device.clone().and_then(|value| serde_json::from_value::<Carried>(value).ok());
        let recorded = manifest.facts.probe.clone().map(Recorded::from_json).transpose();
        let recorded = recorded.map_err(|error| failed(error.into()))?;
        let digest = Reference { target: Target::Digest(found.digest()), ..request.source.clone() };
        let seen = Seen {
            source: digest.to_string(),
            spec,
            host_bytes: manifest.facts.memory.logical_bytes,
            device_bytes: device.map_or(0, |carried| carried.bytes()),
            fits,
            recorded,
            hooks: manifest.facts.hooks.clone(),
        };
        if fits {
            return Ok(seen);
        }
        newest.get_or_insert(seen);
    }
    Ok(newest.expect("a tag has at least one variant"))
}
