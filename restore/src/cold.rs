//! A cold start: the server's own command, waited for until it is ready. What `run` does, and what a restore falls back to.

use std::sync::Arc;
use std::time::Duration;

use rewarm_container::{Name, Origin, Spec};
use rewarm_probe::Ready;
use rewarm_report::Stage;

use crate::error::{Cause, Error, Result};
use crate::pipeline::{Context, Restored, blocking};
use crate::replica::Replica;

/// How long runc may take to start a process.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Lines of the server's output that an error carries.
const LOG_LINES: usize = 20;

/// Starts a server and waits until it is ready; then it lives without this process. `ready` comes before the spec's own check.
///
/// # Errors
/// If it cannot be laid out or started, ends, or is not ready in time. Nothing of it is left then; the error has the last lines of its output.
pub async fn start(
    name: &Name,
    spec: Spec,
    ready: Option<Ready>,
    timeout: Duration,
    context: &Context,
) -> Result<Restored> {
    let clock = &context.clock;
    let failed = |stage| move |cause| Error { name: name.to_string(), stage, cause };
    let recorded = spec.ready.as_deref().map(str::parse::<Ready>).transpose();
    let ready = ready.or(recorded.map_err(|error| failed(Stage::Admit)(error.into()))?);
    let (asked, inner) = (name.clone(), context.clone());
    let laid_out = blocking(move || Replica::prepare(&inner, &asked, spec, Origin::Cold, 0));
    let replica = Arc::new(clock.stage(Stage::Sandbox, laid_out).await.map_err(failed(Stage::Sandbox))?);
    let result = clock.stage(Stage::Ready, serve(&replica, ready.as_ref(), timeout)).await;
    match result {
        Ok(pid) => Ok(Restored {
            name: name.clone(),
            uuid: replica.record.uuid,
            pid,
            published: replica.record.published.clone(),
            ready_after: clock.elapsed(),
            answers: 0,
            cold: None,
        }),
        Err(cause) => {
            let log = last_lines(&replica);
            replica.give_up(&format!("it did not become ready: {cause}")).await;
            Err(failed(Stage::Ready)(Cause::NotStarted { source: Box::new(cause), log }))
        }
    }
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

/// The end of what the server wrote, standard error last.
fn last_lines(replica: &Replica) -> Vec<String> {
    let paths = replica.client.paths();
    let mut lines = Vec::new();
    for path in [paths.stdout(), paths.stderr()] {
        let text = std::fs::read(path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let all: Vec<&str> = text.lines().collect();
        lines.extend(all[all.len().saturating_sub(LOG_LINES)..].iter().map(|line| (*line).to_owned()));
    }
    lines
}
