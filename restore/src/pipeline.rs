//! The stages of a restore, in order. Open this file first.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::{self, join_all};
use rewarm_container::{Name, Net, Origin, Publish, Spec, State};
use rewarm_fetcher::{Access, Fetcher, Found, Stream};
use rewarm_probe::{Engine, Hook, Ready, Recorded};
use rewarm_report::{Clock, Stage};
use rewarm_store::{Boot, Manifest, Reference, RegionKind, Store, Target, Trust, WorkingSet};
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::begun::{Begun, Ground, unless_interrupted};
use crate::blueprint::Blueprint;
use crate::device::{self, Plan};
use crate::error::{Cause, Error, Result};
use crate::fetch::{self, Fetching};
use crate::lazy::Lazy;
use crate::machine::{HostView, here};
use crate::mode::{Known, Mode};
use crate::recording::{self, Recorder};
use crate::replica::Replica;
use crate::verdict::{Reason, memory_reasons, reasons};

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

/// A ready replica waits for the rest of its snapshot if that arrives within this time: what nobody notices is worth never
/// having to be killed for a store that fails. Longer would hold back answers that could be given.
const WAIT_FOR_REST: Duration = Duration::from_millis(50);

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
    fn ground(&self) -> Ground {
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

/// A snapshot that fits this machine.
struct Admitted {
    source: String,
    manifest: Manifest,
    access: Access,
    found: Found,
    spec: Spec,
    recorded: Option<Recorded>,
    engine: Option<Engine>,
    post: Option<Hook>,
    device: Option<Plan>,
}

/// Restores replicas side by side; each lives or fails for itself. Where the fetcher is lost before any of them serves,
/// all of it is tried once more, with another one. `interrupted` completes when the caller wants all of them given up, with
/// the reason.
///
/// # Errors
/// What concerns all of them: the snapshot is missing or does not fit, or the restore is interrupted. What concerns one
/// is in [`Outcome::replicas`].
pub async fn run(
    request: Request,
    context: Context,
    interrupted: impl Future<Output = &'static str>,
) -> Result<Outcome> {
    let begun = Begun::default();
    let (ground, name) = (context.ground(), request.source.to_string());
    unless_interrupted(stages(&request, &context, &begun), interrupted, &begun, &ground, &name).await
}

async fn stages(request: &Request, context: &Context, begun: &Begun) -> Result<Outcome> {
    let lost = |error: &Error| error.cause.lost();
    match attempt(request, context, begun, Attempt::First).await {
        Ok(outcome) if outcome.replicas.iter().all(|replica| replica.as_ref().is_err_and(lost)) => {}
        Err(error) if lost(&error) => {}
        other => return other,
    }
    context.clock.progress().warning("the fetcher was lost; trying once more with another one");
    attempt(request, context, begun, Attempt::Last).await
}

/// Whether a failure is the last word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Attempt {
    /// A lost fetcher is no reason to start cold yet.
    First,
    Last,
}

async fn attempt(request: &Request, context: &Context, begun: &Begun, attempt: Attempt) -> Result<Outcome> {
    let clock = context.clock.clone();
    let admitted = clock.stage(Stage::Admit, admit(request, context)).await;
    let admitted = match admitted {
        Ok(admitted) => Arc::new(admitted),
        Err((cause, _)) if attempt == Attempt::First && cause.lost() => return Err(early(request, cause)),
        Err((cause, spec)) => return refused(request, context, begun, cause, spec).await,
    };
    let names = names(request, &admitted.manifest.name).map_err(|error| early(request, error))?;
    let (laid_out, opened) = tokio::join!(
        clock.stage(Stage::Sandbox, sandboxes(&names, &admitted, context, begun)),
        open(&admitted, context),
    );
    let alive: Vec<Arc<Replica>> = laid_out.iter().flatten().cloned().collect();
    let mode = mode(request, &admitted, &opened);
    let is_folder = request.source.store.folder().is_some();
    let fetched = clock.stage(Stage::Fetch, fetch(opened, alive, &admitted, mode, is_folder, context)).await;
    let rest = Rest::start(fetched);
    let finishing = names.iter().zip(laid_out).enumerate().map(|(number, (name, replica))| {
        let (admitted, rest) = (&admitted, &rest);
        async move {
            let result = match replica {
                Ok(replica) => finish(&replica, request, context, admitted, rest, number).await,
                Err(cause) => Err((Stage::Sandbox, cause)),
            };
            match result {
                Ok(restored) => Ok(restored),
                Err((stage, cause)) if attempt == Attempt::First && cause.lost() => {
                    Err(Error { name: name.to_string(), stage, cause })
                }
                Err((stage, cause)) => {
                    fall_back(name, request, context, begun, Some(&admitted.spec), (stage, cause)).await
                }
            }
        }
    });
    Ok(Outcome { source: Some(admitted.source.clone()), replicas: join_all(finishing).await })
}

/// When memory is filled. A snapshot whose device memory lies among the pages of its processes (as the first version of the
/// format has it) is filled as a whole before the driver is called: a page that is not there would be an error and not a
/// fault.
fn mode(
    request: &Request,
    admitted: &Admitted,
    opened: &std::result::Result<(Arc<Stream>, Boot), Cause>,
) -> Mode {
    let apart = opened.as_ref().is_ok_and(|(_, boot)| {
        boot.regions().iter().any(|region| matches!(region.kind, RegionKind::Device { .. }))
    });
    if admitted.device.is_some() && !apart { Mode::Eager } else { request.mode }
}

/// How long the failure of a fetch may take to be told after what follows from it.
const WHY_WITHIN: Duration = Duration::from_secs(2);

/// The content that follows while replicas are restored, and how its fetch ended.
struct Rest {
    fetching: Option<Arc<Fetching>>,
    /// Why not even what CRIU insists on has arrived: nothing must be begun with it.
    failed: Option<Arc<Cause>>,
    done: futures::future::Shared<futures::future::BoxFuture<'static, std::result::Result<(), Arc<Cause>>>>,
}

impl Rest {
    fn start(fetched: std::result::Result<Option<Fetching>, Cause>) -> Self {
        let begun = fetched.map(|fetching| fetching.map(Arc::new)).map_err(Arc::new);
        let fetching = begun.as_ref().ok().cloned().flatten();
        let failed = begun.as_ref().err().cloned();
        let (end, ended) = oneshot::channel();
        // A thread of its own: it must go on whoever waits for it, and a runtime that can make no more threads would queue it
        // in front of the calls that restores wait for.
        let work = move || {
            let _ = end.send(match begun {
                Ok(Some(fetching)) => fetching.all().map_err(Arc::new),
                Ok(None) => Ok(()),
                Err(cause) => Err(cause),
            });
        };
        let done = match std::thread::Builder::new().name("restore-fetch".to_owned()).spawn(work) {
            Ok(_) => ended.map(|ended| ended.expect("fetching does not panic")).boxed(),
            Err(error) => {
                let doing = "start a thread, for which memory or the limit of processes is short";
                future::ready(Err(Arc::new(Cause::io(doing)(error)))).boxed()
            }
        };
        Self { fetching, failed, done: done.shared() }
    }

    /// Waits until everything has arrived, unless the mode or the time that it would take says otherwise.
    async fn enough(&self, mode: Mode) -> std::result::Result<(), (Stage, Cause)> {
        let soon = |fetching: &Arc<Fetching>| fetching.remaining() <= WAIT_FOR_REST;
        match mode {
            Mode::Lazy => Ok(()),
            Mode::Auto if !self.fetching.as_ref().is_none_or(soon) => Ok(()),
            Mode::Auto | Mode::Eager => self.all().await,
        }
    }

    /// Waits until everything has arrived.
    async fn all(&self) -> std::result::Result<(), (Stage, Cause)> {
        self.done.clone().await.map_err(|cause| (Stage::Fetch, cause.shared()))
    }

    /// Where the fetcher is lost, that is why; what followed from it is not.
    fn or_lost(&self, (stage, cause): (Stage, Cause)) -> (Stage, Cause) {
        let lost = self.fetching.as_ref().and_then(|fetching| fetching.stream.lost());
        lost.map_or((stage, cause), |error| (Stage::Fetch, error.into()))
    }

    /// Why a step failed, where the content says it better: a stream that was found damaged is gone, and whoever asks for it
    /// hears only that.
    async fn or_why(&self, failure: (Stage, Cause)) -> (Stage, Cause) {
        if matches!(failure.1, Cause::Fetcher(_))
            && !failure.1.lost()
            && let Ok(why) = tokio::time::timeout(WHY_WITHIN, self.failure()).await
        {
            return why;
        }
        self.or_lost(failure)
    }

    /// Completes only if something did not arrive.
    async fn failure(&self) -> (Stage, Cause) {
        match self.all().await {
            Err(failure) => failure,
            Ok(()) => std::future::pending().await,
        }
    }
}

/// From a replica that is laid out to one that serves.
async fn finish(
    replica: &Replica,
    request: &Request,
    context: &Context,
    admitted: &Arc<Admitted>,
    rest: &Rest,
    number: usize,
) -> std::result::Result<Restored, (Stage, Cause)> {
    let clock = &context.clock;
    let steps = async {
        if let Some(cause) = &rest.failed {
            return Err((Stage::Fetch, cause.shared()));
        }
        let fetching = rest.fetching.as_ref().expect("somebody is alive, so it has begun").clone();
        let lazy = fetching.lazy.clone();
        let restored = restore(replica, context, admitted, lazy.clone(), number);
        let (pid, recorder) = at(clock, Stage::Skeleton, restored).await?;
        let engine = admitted.engine.as_ref();
        let wakes = replica.wake(engine, admitted.post.as_ref(), request.hook_timeout);
        at(clock, Stage::Identity, wakes).await?;
        let recorded = admitted.recorded.as_ref().filter(|_| !request.no_probe);
        let answers = at(clock, Stage::Replay, replica.replay(recorded)).await?;
        at(clock, Stage::Ready, ready(replica, request, &admitted.spec)).await?;
        let touched = blocking(move || Ok(recorder.stop())).await.map_err(|cause| (Stage::Ready, cause))?;
        rest.enough(request.mode).await?;
        commit(replica).await.map_err(|cause| (Stage::Ready, cause))?;
        let ready_after = clock.elapsed();
        // All of them touch the same: one recording is enough.
        if number == 0
            && let Err(cause) = remember(request, &fetching, &lazy.by_region(&touched)).await
        {
            let why = cause.shared();
            clock.progress().warning(&format!("what was touched first could not be written down: {why}"));
        }
        Ok(replica.restored(pid, ready_after, answers))
    };
    let result = tokio::select! {
        // What the store did says more than what its consequences look like.
        biased;
        failure = rest.failure() => Err(failure),
        result = steps => match result {
            Ok(restored) => Ok(restored),
            Err(failure) => Err(rest.or_why(failure).await),
        },
    };
    if let Err((stage, cause)) = &result {
        replica.give_up(&format!("restore failed at stage {stage}: {cause}")).await;
    }
    result
}

async fn restore(
    replica: &Replica,
    context: &Context,
    admitted: &Admitted,
    lazy: Arc<Lazy>,
    number: usize,
) -> std::result::Result<(u32, Recorder), Cause> {
    let (client, record) = (replica.client.clone(), replica.record.clone());
    let (criu, facts) = (context.criu.clone(), admitted.manifest.facts.clone());
    let device = admitted.device.as_ref().map(|plan| plan.of(number));
    blocking(move || Replica::over(client, record).restore(criu, &facts, &lazy, device)).await
}

/// Keeps what was touched for later restores, if it says anything new. A folder is written by this process: the fetcher
/// can only read it.
async fn remember(
    request: &Request,
    fetching: &Arc<Fetching>,
    touched: &[(u32, u64, u64)],
) -> std::result::Result<(), Cause> {
    let stream = fetching.stream.clone();
    let Some(set) = recording::next(stream.working_set(), touched) else { return Ok(()) };
    let url = &request.source.store;
    let is_folder = url.folder().is_some();
    if is_folder {
        let store = Store::open(url).await.map_err(Cause::Recording)?;
        store.put_working_set(&stream.digest(), &set).await.map_err(Cause::Recording)?;
    }
    blocking(move || Ok(stream.remember(set, !is_folder)?)).await
}

/// Waits until the replica is ready.
async fn ready(replica: &Replica, request: &Request, spec: &Spec) -> std::result::Result<(), Cause> {
    let recorded = spec.ready.as_deref().map(str::parse::<Ready>).transpose()?;
    replica.ready(request.ready.as_ref().or(recorded.as_ref()), request.ready_timeout).await
}

/// Lets the replica live on its own: its published ports open here and not before.
async fn commit(replica: &Replica) -> std::result::Result<(), Cause> {
    let client = replica.client.clone();
    blocking(move || client.commit().map_err(Cause::from)).await
}

async fn admit(
    request: &Request,
    context: &Context,
) -> std::result::Result<Admitted, (Cause, Option<Box<Spec>>)> {
    let early = |cause: Cause| (cause, None);
    let access = Access::new(&request.source.store, context.env.clone());
    let (fetcher, asked) = (context.fetcher.clone(), access.clone());
    let (reference, trust) = (request.source.clone(), request.trust.clone());
    let variants = blocking(move || Ok(fetcher.find(&asked, &reference, trust)?)).await.map_err(early)?;
    let machine = here(&context.criu_version.to_string())
        .map_err(|error| early(Cause::io("look at this machine")(error)))?;
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
            let mut reasons = reasons(&facts, &known, &HostView::new(&asked));
            reasons.extend(memory(needed, asked.memory_bytes, count, &fetcher)?);
            reasons.extend(missing_sources(&asked));
            reasons.extend(unprovided);
            let device = device::plan(&facts, &program, &wish, count).unwrap_or_else(|more| {
                reasons.extend(more);
                None
            });
            Ok((reasons, device))
        });
        let (reasons, device) = verdict.await.map_err(early)?;
        if reasons.is_empty() {
            return admitted(request, access, found, spec, device).map_err(early);
        }
        refusal.get_or_insert((Cause::Incompatible { reasons }, Some(Box::new(spec))));
    }
    Err(refusal.expect("a tag has at least one variant"))
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

/// The replica that the snapshot describes, with what the user wants otherwise.
pub(crate) fn spec(request: &Request, manifest: &Manifest) -> std::result::Result<Spec, Cause> {
    let stored: Spec = serde_json::from_value(manifest.facts.spec.clone())
        .map_err(|error| Cause::Inconsistent { what: format!("the replica's description: {error}") })?;
    Ok(overridden(request, stored))
}

fn overridden(request: &Request, spec: Spec) -> Spec {
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

fn names(request: &Request, snapshot: &str) -> std::result::Result<Vec<Name>, rewarm_container::Error> {
    let base = match &request.name {
        Some(name) => Ok(name.clone()),
        None => snapshot.parse(),
    };
    base.and_then(|base: Name| match request.count {
        1 => Ok(vec![base]),
        count => (1..=count).map(|number| format!("{base}-{number}").parse()).collect(),
    })
}

/// A failure that concerns all replicas, before any of them has a name.
fn early(request: &Request, cause: impl Into<Cause>) -> Error {
    Error { name: request.source.to_string(), stage: Stage::Admit, cause: cause.into() }
}

async fn sandboxes(
    names: &[Name],
    admitted: &Arc<Admitted>,
    context: &Context,
    begun: &Begun,
) -> Vec<std::result::Result<Arc<Replica>, Cause>> {
    let generation = admitted.manifest.facts.spec["generation"].as_u64().unwrap_or(0) + 1;
    let each = names.iter().map(|name| {
        let (name, spec, ground, begun) =
            (name.clone(), admitted.spec.clone(), context.ground(), begun.clone());
        let origin = Origin::Restored { source: admitted.source.clone() };
        let devices = admitted.device.is_some();
        let prepare = move || Replica::prepare(&begun, &ground, &name, spec, origin, generation, devices);
        blocking(move || prepare().map(Arc::new))
    });
    join_all(each).await
}

/// Opens the snapshot's stream and reads its boot object.
async fn open(
    admitted: &Arc<Admitted>,
    context: &Context,
) -> std::result::Result<(Arc<Stream>, Boot), Cause> {
    let (fetcher, asked, patience) = (context.fetcher.clone(), admitted.clone(), context.patience);
    let stream = blocking(move || Ok(fetcher.open(&asked.access, &asked.found, patience)?)).await?;
    let boot = stream.boot(&admitted.found).await?;
    Ok((Arc::new(stream), boot))
}

async fn fetch(
    opened: std::result::Result<(Arc<Stream>, Boot), Cause>,
    replicas: Vec<Arc<Replica>>,
    admitted: &Admitted,
    mode: Mode,
    is_folder: bool,
    context: &Context,
) -> std::result::Result<Option<Fetching>, Cause> {
    let (stream, boot) = opened?;
    if replicas.is_empty() {
        return Ok(None);
    }
    let mut blueprint = Blueprint::of(&boot)?;
    if let Some(device) = &admitted.device {
        blueprint = blueprint.with_copies(&device.carried);
    }
    let progress = context.clock.progress().clone();
    let when = mode.when(Known {
        content: stream.layout().content_bytes(),
        arrived: stream.reader().arrived_bytes(),
        working_set: stream.working_set().map(WorkingSet::bytes),
        rate: stream.usual_rate(),
        is_folder,
    });
    blocking(move || fetch::begin(&replicas, &blueprint, stream, when, &progress).map(Some)).await
}

/// The snapshot cannot be used at all: all replicas start cold, or none.
async fn refused(
    request: &Request,
    context: &Context,
    begun: &Begun,
    cause: Cause,
    spec: Option<Box<Spec>>,
) -> Result<Outcome> {
    let known = spec.as_deref();
    let command =
        request.cold_fallback.as_ref().is_some_and(|command| !command.is_empty() || known.is_some());
    if !command {
        return Err(early(request, cause));
    }
    let names = names(request, request.source.name.as_str()).map_err(|error| early(request, error))?;
    let mut replicas = Vec::new();
    for name in &names {
        let failure = (Stage::Admit, cause.shared());
        replicas.push(fall_back(name, request, context, begun, known, failure).await);
    }
    Ok(Outcome { source: None, replicas })
}

/// Starts a replica cold if the user wants that, and says why; otherwise gives the failure.
async fn fall_back(
    name: &Name,
    request: &Request,
    context: &Context,
    begun: &Begun,
    spec: Option<&Spec>,
    (stage, cause): (Stage, Cause),
) -> Result<Restored> {
    let Some(command) = &request.cold_fallback else {
        return Err(Error { name: name.to_string(), stage, cause });
    };
    let why = format!("stage {stage}: {}", cause.shared());
    context.clock.progress().warning(&format!("starting {name} cold: {why}"));
    let mut spec = spec.cloned().unwrap_or_else(|| overridden(request, Spec::default()));
    if !command.is_empty() {
        spec.command.clone_from(command);
    }
    let ready = request.ready.clone();
    let ground = context.ground();
    let started = crate::cold::start(name, spec, ready, request.ready_timeout, &ground, begun).await?;
    Ok(Restored { cold: Some(why), ..started })
}

async fn at<T>(
    clock: &Clock,
    stage: Stage,
    work: impl Future<Output = std::result::Result<T, Cause>>,
) -> std::result::Result<T, (Stage, Cause)> {
    clock.stage(stage, work).await.map_err(|cause| (stage, cause))
}

/// Runs what may block where it may.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::result::Result<T, Cause> + Send + 'static,
) -> std::result::Result<T, Cause> {
    tokio::task::spawn_blocking(work).await.expect("calls to the shim do not panic")
}
