//! Captures for `rewarm serve`: a snapshot that fits this machine, made of a replica that nobody has used.

use std::pin::pin;
use std::time::Duration;

use rewarm_container::shim::Client;
use rewarm_container::{Name, Origin, State};
use rewarm_probe::limits::HOOK_TIMEOUT;
use rewarm_probe::{Engine, Hook};
use rewarm_restore::{Ground, Seen, cold};
use rewarm_serve::config::{Cold, PoolConfig};
use rewarm_serve::replicas::GivenUp;
use rewarm_snapshot::Request;
use rewarm_store::Target;

use super::{POOL, Pools, not_wanted, reference, told};
use crate::config::Config;
use crate::failure::Cause;

/// The label of a replica that is captured. Its value is the replica's own name: what is restored from the snapshot has the
/// label too, and another name.
const CAPTURED: &str = "rewarm.captured";
/// Nobody uses the server that is frozen.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(3600);
/// How long what an earlier `serve` left may take to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Whether what a pool captures could be published.
pub(super) fn check(pool: &PoolConfig, config: &Config) -> Result<(), Cause> {
    let wrong =
        |what: &str| Cause::Usage { problem: format!("capture of pool {} is true: {what}", pool.name) };
    let reference = reference(pool).map_err(|problem| Cause::Usage { problem })?;
    if matches!(reference.target, Target::Digest(_)) {
        return Err(wrong("snapshot names a digest, expected a tag that can have another variant"));
    }
    if config.trust(&reference.store)?.is_some() {
        let told = format!("{} demands signed snapshots in {}", config.path().display(), reference.store);
        return Err(wrong(&format!("{told}, and serve has no key")));
    }
    Ok(())
}

impl Pools {
    /// See [`rewarm_serve::replicas::Replicas::capture`].
    pub(super) async fn captured(
        &self,
        pool: &PoolConfig,
        name: Name,
        given_up: GivenUp,
    ) -> Result<(), String> {
        let mut given_up = pin!(not_wanted(given_up));
        let seen = self.look(pool).await?;
        let request = request(pool, &name, &seen)?;
        let mut spec = seen.spec;
        if let Cold::Command(command) = &pool.cold {
            spec.command.clone_from(command);
        }
        spec.labels.remove(POOL);
        spec.labels.insert(CAPTURED.to_owned(), name.to_string());
        let (context, clock) = self.context();
        let ground = Ground { state: context.state.clone(), program: context.program, clock: clock.clone() };
        cold::run(&name, spec, None, pool.start_timeout, &ground, given_up.as_mut())
            .await
            .map_err(|error| told(&error))?;
        let context = rewarm_snapshot::Context {
            state: context.state,
            criu: context.criu,
            criu_version: context.criu_version,
            runc_version: self.runc_version.clone(),
            clock,
        };
        let outcome = rewarm_snapshot::run(request, context, given_up.as_mut()).await;
        let ended = self.end(name.as_str(), STOP_TIMEOUT).await;
        let outcome = outcome.map_err(|error| told(&error))?;
        tracing::info!(pool = pool.name, digest = %outcome.published.digest, "a variant was published");
        ended
    }
}

/// The snapshot to be made: as the one that does not fit, of this machine.
fn request(pool: &PoolConfig, name: &Name, seen: &Seen) -> Result<Request, String> {
    let hook = |text: &Option<String>| text.as_deref().map(str::parse::<Hook>).transpose();
    let engine = seen.hooks.engine.clone().map(serde_json::from_value::<Engine>).transpose();
    let questions = seen.recorded.as_ref().map(rewarm_probe::Recorded::questions).transpose();
    Ok(Request {
        name: name.clone(),
        destination: reference(pool)?,
        stop: true,
        probe: questions.map_err(|error| told(&error))?,
        engine: engine.map_err(|error| format!("the steps of the snapshot's engine: {error}"))?,
        pre: hook(&seen.hooks.pre).map_err(|error| told(&error))?,
        post: hook(&seen.hooks.post).map_err(|error| told(&error))?,
        hook_timeout: HOOK_TIMEOUT,
        sign: None,
        compression: rewarm_store::Compression::default(),
        rate: None,
        tcp_close: false,
        freeze_timeout: FREEZE_TIMEOUT,
        freeze_memory: None,
        gpu_direct: false,
    })
}

/// Ends what was being captured when its `serve` was killed.
pub(super) fn sweep(state: &State) -> Result<(), rewarm_container::Error> {
    for entry in state.list()? {
        let left = entry.exit.is_none()
            && entry.record.as_ref().is_some_and(|record| {
                matches!(record.origin, Origin::Cold)
                    && record.spec.labels.get(CAPTURED).is_some_and(|name| name == entry.name.as_str())
            });
        if left {
            tracing::warn!(replica = %entry.name, "what an earlier serve captured is ended");
            // It may be ending by itself, which its folder shows.
            let _ = Client::connect(state, &entry.name).and_then(|client| client.stop(STOP_TIMEOUT));
            super::remove(state, &entry.name)?;
        }
    }
    Ok(())
}
