//! Pausing a replica between the steps of its engine, and what a wake does by the pause's word.

use std::sync::Arc;
use std::time::Duration;

use rewarm_container::dial::Inside;
use rewarm_container::shim::{Client, Paused};
use rewarm_container::{Record, Status};
use rewarm_probe::{Engine, Resume, engine};

use crate::failure::Cause;

/// A pause that failed.
pub(crate) struct Failed {
    /// Why.
    pub(crate) cause: Cause,
    /// What keeps the server from going on as before, in words.
    pub(crate) left: Vec<String>,
}

/// Asks the shim, in a thread that may wait for it.
async fn asked<T: Send + 'static>(
    client: &Arc<Client>,
    question: impl FnOnce(&Client) -> Result<T, rewarm_container::Error> + Send + 'static,
) -> Result<T, rewarm_container::Error> {
    let client = client.clone();
    let asked = tokio::task::spawn_blocking(move || question(&client));
    asked.await.expect("calls to the shim do not panic")
}

/// Takes the engine's steps before, and pauses; those after it are left to the wake. Whoever is killed from here on leaves it to the shim
/// to let the server go on. Where the pause fails, the steps after are taken at once.
///
/// # Errors
/// Why it is not paused.
pub(crate) async fn pause(
    client: &Arc<Client>,
    engine: &Engine,
    hook_timeout: Duration,
    lock_timeout: Duration,
) -> Result<Paused, Failed> {
    let early = |error: rewarm_container::Error| Failed { cause: error.into(), left: Vec::new() };
    let Record { spec, .. } = asked(client, Client::status).await.map_err(early)?;
    let (inside, port) = (Inside::new(client.clone()), spec.ports.first().copied());
    let resume = Resume::new(Some(engine), None, hook_timeout);
    let told = resume.clone();
    asked(client, move |client| client.drain(told)).await.map_err(early)?;
    let cause = match engine::take(&engine.before, &inside, port).await {
        Ok(()) => match asked(client, move |client| client.pause(lock_timeout)).await {
            Ok(paused) => return Ok(paused),
            Err(error) => error.into(),
        },
        Err(error) => error.into(),
    };
    // One that is stranded would answer nothing.
    let able = asked(client, Client::status).await.is_ok_and(|record| record.status == Status::Ready);
    let failures = if able { resume.take(&inside, port).await } else { Vec::new() };
    let whole = able && failures.is_empty();
    let mut left: Vec<String> =
        failures.iter().map(|failure| format!("the server is to go on, but {failure}")).collect();
    if let Err(error) = asked(client, move |client| client.resumed(whole)).await {
        left.push(format!("what became of its engine is not written down: {error}"));
    }
    Err(Failed { cause, left })
}

/// Does what a pause has left to the wake, if it has left anything, and gives what failed.
///
/// # Errors
/// The shim is gone.
pub(crate) async fn go_on(client: &Arc<Client>) -> Result<Vec<rewarm_probe::Error>, rewarm_container::Error> {
    let Record { spec, drained, .. } = asked(client, Client::status).await?;
    let Some(resume) = drained else { return Ok(Vec::new()) };
    let failures = resume.take(&Inside::new(client.clone()), spec.ports.first().copied()).await;
    let whole = failures.is_empty();
    asked(client, move |client| client.resumed(whole)).await?;
    Ok(failures)
}
