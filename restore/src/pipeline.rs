//! The stages of a restore, in order. Open this file first.

use std::sync::Arc;

use futures::future::join_all;
use rewarm_container::{Name, Origin, Spec};
use rewarm_fetcher::Stream;
use rewarm_probe::Ready;
use rewarm_report::{Clock, Stage};
use rewarm_store::{Boot, RegionKind, Store, WorkingSet};

use crate::admit::{Admitted, admit};
use crate::begun::{Begun, unless_interrupted};
use crate::blueprint::Blueprint;
use crate::cold::{fall_back, refused};
use crate::error::{Cause, Error, Result};
use crate::fetch::{self, Fetching};
use crate::lazy::Lazy;
use crate::mode::{Known, Mode};
use crate::recording::{self, Recorder};
use crate::replica::Replica;
use crate::request::{Context, Outcome, Request, Restored, early, names};
use crate::rest::Rest;

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
