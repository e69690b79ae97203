//! What is asked of a restore, what it works with, and what came of it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use rewarm_container::{Name, Net, Publish, Spec, State};
use rewarm_fetcher::Fetcher;
use rewarm_probe::Ready;
use rewarm_report::{Clock, Stage};
use rewarm_store::{Manifest, Reference, Trust};
use uuid::Uuid;

use crate::begun::Ground;
use crate::error::{Cause, Error, Result};
use crate::mode::Mode;

/// What a user asks for. What is absent comes from the snapshot.
#[derive(Debug, Clone)]
pub struct Request {
    /// Which snapshot.
    pub source: Reference,
    /// Whose signature the snapshot must have, if it must have one.
    pub trust: Option<Trust>,
    /// Name of the replica.
    pub name: Option<Name>,
    /// How many replicas.
    pub count: u32,
    /// Ports of the host in front of them.
    pub publish: Vec<Publish>,
    /// Limit of memory in bytes.
    pub memory_bytes: Option<u64>,
    /// Limit of CPU time, in CPUs.
    pub cpus: Option<f64>,
    /// Environment as `K=V`, for a cold start and for commands that are run inside.
    pub env: Vec<String>,
    /// Labels beside those of the snapshot.
    pub labels: BTreeMap<String, String>,
    /// The network.
    pub net: Option<Net>,
    /// The ready check.
    pub ready: Option<Ready>,
    /// How long to wait for it.
    pub ready_timeout: Duration,
    /// When memory is filled.
    pub mode: Mode,
    /// Which devices take the places of those of the snapshot.
    pub gpu: rewarm_gpu::Wish,
    /// Do not compare answers.
    pub no_probe: bool,
    /// How long a hook may take.
    pub hook_timeout: Duration,
    /// What to start cold if the restore fails: the command of the snapshot or another one.
    pub cold_fallback: Option<Vec<String>>,
}

/// What the pipeline works with.
#[derive(Clone)]
pub struct Context {
    /// The replicas of this machine.
    pub state: State,
    /// The CRIU program.
    pub criu: PathBuf,
    /// Its version.
    pub criu_version: rewarm_criu::binary::Version,
    /// The program whose hidden verb `shim` owns a replica.
    pub program: PathBuf,
    /// Folders of CDI files, which say what a container needs to use GPUs.
    pub cdi: Vec<PathBuf>,
    /// Reads the store.
    pub fetcher: Fetcher,
    /// The environment, of which the fetcher gets what concerns stores.
    pub env: Vec<(String, String)>,
    /// How long a store may bring nothing before what is fetched from it is given up.
    pub patience: Duration,
    /// Measures the stages.
    pub clock: Clock,
}

impl Context {
    pub(crate) fn ground(&self) -> Ground {
        Ground { state: self.state.clone(), program: self.program.clone(), clock: self.clock.clone() }
    }
}

/// A replica that serves.
#[derive(Debug, Clone)]
pub struct Restored {
    /// Its name.
    pub name: Name,
    /// Its identity.
    pub uuid: Uuid,
    /// Process number of its init, as the host sees it.
    pub pid: u32,
    /// Process number of its shim.
    pub shim_pid: u32,
    /// Published ports, with those that the kernel chose.
    pub published: Vec<Publish>,
    /// From the start of the operation until it was ready.
    pub ready_after: Duration,
    /// Answers that were compared and equal.
    pub answers: usize,
    /// Why it was started cold, if it was.
    pub cold: Option<String>,
}

/// What became of each replica.
#[derive(Debug)]
pub struct Outcome {
    /// The snapshot's reference with its digest, if it was found.
    pub source: Option<String>,
    /// The replicas, in the order of their numbers.
    pub replicas: Vec<Result<Restored>>,
}

/// What the replicas are called: the snapshot's name, or the one that is asked for, with a number where there are several.
pub(crate) fn names(
    request: &Request,
    snapshot: &str,
) -> std::result::Result<Vec<Name>, rewarm_container::Error> {
    let base = match &request.name {
        Some(name) => Ok(name.clone()),
        None => snapshot.parse(),
    };
    base.and_then(|base: Name| match request.count {
        1 => Ok(vec![base]),
        count => (1..=count).map(|number| format!("{base}-{number}").parse()).collect(),
    })
}

/// The replica that the snapshot describes, with what the user wants otherwise.
pub(crate) fn spec(request: &Request, manifest: &Manifest) -> std::result::Result<Spec, Cause> {
    let stored: Spec = serde_json::from_value(manifest.facts.spec.clone())
        .map_err(|error| Cause::Inconsistent { what: format!("the replica's description: {error}") })?;
    Ok(overridden(request, stored))
}

/// The same for a description that is there already.
pub(crate) fn overridden(request: &Request, spec: Spec) -> Spec {
    Spec {
        name: None,
        publish: request.publish.clone(),
        memory_bytes: request.memory_bytes.or(spec.memory_bytes),
        cpus: request.cpus.or(spec.cpus),
        net: request.net.clone().unwrap_or(spec.net),
        env: spec.env.into_iter().chain(request.env.clone()).collect(),
        labels: spec.labels.into_iter().chain(request.labels.clone()).collect(),
        ..spec
    }
}

/// A failure that concerns all replicas, before any of them has a name.
pub(crate) fn early(request: &Request, cause: impl Into<Cause>) -> Error {
    Error { name: request.source.to_string(), stage: Stage::Admit, cause: cause.into() }
}
