//! A cold start: the server's own command, waited for until it is ready. What `run` does, and what a restore falls back to.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rewarm_container::shim::Paths;
use rewarm_container::{Name, Origin, Spec};
use rewarm_probe::Ready;
use rewarm_report::Stage;

use crate::begun::{Begun, Ground, unless_interrupted};
use crate::error::{Cause, Error, Result};
use crate::pipeline::blocking;
use crate::replica::Replica;
use crate::request::{Context, Outcome, Request, Restored, early, names, overridden};

/// runc makes a container in a fraction of a second; a machine under load is given time.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How much of the end of each log an error quotes.
const QUOTED_BYTES_MAX: u64 = 16 << 10;
const QUOTED_LINES_MAX: usize = 20;

/// Starts a server and waits until it is ready; then it lives without this process. `ready` comes before the spec's own
/// check. `interrupted` completes when the caller wants it given up, with the reason.
///
/// # Errors
/// If it cannot be laid out or started, ends, is not ready in time, or is interrupted. Nothing of it is left then; the
/// error has the last lines of its output.
pub async fn run(
    name: &Name,
    spec: Spec,
    ready: Option<Ready>,
    timeout: Duration,
    ground: &Ground,
    interrupted: impl Future<Output = &'static str>,
) -> Result<Restored> {
    let begun = Begun::default();
    let starting = start(name, spec, ready, timeout, ground, &begun);
    unless_interrupted(starting, interrupted, &begun, ground, name.as_str()).await
}

/// [`run`] as a part of something larger that gives up what was begun.
pub(crate) async fn start(
    name: &Name,
    spec: Spec,
    ready: Option<Ready>,
    timeout: Duration,
    ground: &Ground,
    begun: &Begun,
) -> Result<Restored> {
    let clock = &ground.clock;
    let failed = |stage| move |cause| Error { name: name.to_string(), stage, cause };
    let recorded = spec.ready.as_deref().map(str::parse::<Ready>).transpose();
    let ready = ready.or(recorded.map_err(|error| failed(Stage::Sandbox)(error.into()))?);
    let (asked, place, list) = (name.clone(), ground.clone(), begun.clone());
    let laid_out = blocking(move || Replica::prepare(&list, &place, &asked, spec, Origin::Cold, 0, false));
    let replica = Arc::new(clock.stage(Stage::Sandbox, laid_out).await.map_err(failed(Stage::Sandbox))?);
    let result = clock.stage(Stage::Ready, serve(&replica, ready.as_ref(), timeout)).await;
    match result {
        Ok(pid) => Ok(replica.restored(pid, clock.elapsed(), 0)),
        Err(cause) => {
            let output = last_lines(replica.client.paths());
            replica.give_up(&format!("it did not become ready: {cause}")).await;
            Err(failed(Stage::Ready)(Cause::NotStarted { source: Box::new(cause), output }))
        }
    }
}

/// The snapshot cannot be used at all: all replicas start cold, or none.
pub(crate) async fn refused(
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
pub(crate) async fn fall_back(
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
    let started = start(name, spec, ready, request.ready_timeout, &ground, begun).await?;
    Ok(Restored { cold: Some(why), ..started })
}

async fn serve(
    replica: &Replica,
    ready: Option<&Ready>,
    timeout: Duration,
) -> std::result::Result<u32, Cause> {
    let client = replica.client.clone();
    let pid = blocking(move || Ok(client.start(START_TIMEOUT)?)).await?;
    replica.ready(ready, timeout).await?;
    let client = replica.client.clone();
    blocking(move || Ok(client.commit()?)).await?;
    Ok(pid)
}

/// The last lines that a server wrote, stdout before stderr; empty if it wrote nothing.
fn last_lines(paths: &Paths) -> String {
    let quoted =
        [("stdout", paths.stdout()), ("stderr", paths.stderr())].into_iter().filter_map(|(stream, path)| {
            let text = tail(&path).ok()?;
            (!text.is_empty()).then(|| format!("last lines of {stream}:\n{text}"))
        });
    quoted.collect::<Vec<_>>().join("\n")
}

fn tail(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(QUOTED_BYTES_MAX)))?;
    let mut bytes = Vec::new();
    file.take(QUOTED_BYTES_MAX).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(QUOTED_LINES_MAX);
    Ok(lines[from..].iter().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n"))
}
