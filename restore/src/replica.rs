//! One replica from its name to its commit, restored or cold. Whoever gives it up kills it first, so that nothing is left.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::direct::{Feed, Feeding};
use rewarm_container::cgroup::Cgroup;
use rewarm_container::dial::Inside;
use rewarm_container::shim::{Client, DeviceRequest, Prepare, ResidentRequest, RestoreRequest};
use rewarm_container::{Memory, Name, Net, Origin, Record, Spec, Status};
use rewarm_criu::admission::check_bundle;
use rewarm_criu::config::Config;
use rewarm_criu::lazy_pages::Listener;
use rewarm_criu::patch;
use rewarm_probe::{Engine, Hook, Ready, Recorded, engine, wait_ready};
use rewarm_store::Facts;

use crate::begun::{Begun, Ground};
use crate::error::Cause;
use crate::lazy::Lazy;
use crate::recording::Recorder;
use crate::request::Restored;

/// Beside what the bytes need at a slow 100 MB/s.
const RESTORE_TIMEOUT: Duration = Duration::from_secs(120);

/// How often is looked whether memory is complete.
const FILLED_POLL: Duration = Duration::from_millis(3);

/// A replica that is being made.
pub(crate) struct Replica {
    pub(crate) client: Arc<Client>,
    pub(crate) record: Record,
    inside: Inside,
}

impl Replica {
    /// Takes the name, starts the shim and lays everything out; nothing runs yet. `devices`: the CUDA driver will be called.
    pub(crate) fn prepare(
        begun: &Begun,
        ground: &Ground,
        name: &Name,
        spec: Spec,
        origin: Origin,
        generation: u64,
        devices: bool,
    ) -> Result<Self, Cause> {
        let (client, _laying_out) = begun.begin(&ground.state, &ground.program, name)?;
        match client.prepare(Prepare { spec, origin, generation, devices }) {
            Ok(prepared) => Ok(Self { inside: Inside::new(client.clone()), client, record: prepared.record }),
            Err(error) => {
                let _ = client.kill("it could not be laid out");
                Err(error.into())
            }
        }
    }

    /// A replica that was laid out before.
    pub(crate) fn over(client: Arc<Client>, record: Record) -> Self {
        Self { inside: Inside::new(client.clone()), client, record }
    }

    /// Compares the images with the bundle, then lets CRIU restore them. Gives the process number of the init, and what
    /// records its working set. Where memory is filled before the server runs, it is complete and the server runs.
    pub(crate) fn restore(
        &self,
        criu: PathBuf,
        facts: &Facts,
        lazy: &Lazy,
        device: Option<DeviceRequest>,
    ) -> Result<(u32, Recorder), Cause> {
        let inside = self.client.inside();
        if let Some(passed) = facts.dumped_ms.and_then(since) {
            patch::forward_alarms(&inside.images(), passed)?;
        }
        let violations = check_bundle(&inside.images(), &inside.bundle().join("config.json"))?;
        if !violations.is_empty() {
            let violations = violations.iter().map(ToString::to_string).collect();
            return Err(Cause::Inadmissible { violations });
        }
        let feed = device.as_ref().map(|device| lazy.feed(&device.carried)).transpose()?.flatten();
        let bytes = facts.memory.logical_bytes + device.as_ref().map_or(0, |device| device.carried.bytes());
        let timeout = RESTORE_TIMEOUT + Duration::from_millis(bytes / 100_000);
        let waits = lazy.shared().next().is_some();
        let stopped = lazy.is_eager() || waits || device.is_some();
        let config = if stopped { Config::restore().leave_stopped() } else { Config::restore() };
        let request = RestoreRequest {
            criu,
            // No plugins: what CRIU's own does for CUDA is done by the shim, and the folder of logs holds none.
            config: config.plugins(&self.client.paths().work()).to_string(),
            tcp_established: true,
            file_locks: true,
            lazy_pages: true,
            images_attached: false,
            residents: vec![self.pager(device.is_some())?],
            timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
            waits,
            unblock: lazy.unblock().to_vec(),
            device,
        };
        // The pager has a lease of its own: this command may end while memory is still being filled.
        let lease = lazy.lease()?;
        let (recorder, line) = Recorder::new()?;
        let mut files = lazy.files().to_vec();
        // Bound here: CRIU finds the socket however long the pager takes to start beside it.
        let listener = Listener::bind(&self.client.paths().work())?;
        files.extend([lease.as_fd(), line.as_fd(), listener.as_fd()]);
        let feeding = feed.map(Feed::begin).transpose()?;
        files.extend(feeding.iter().map(|feeding| feeding.socket.as_fd()));
        let pid = self.client.restore(request, &files).map_err(|error| {
            if let Some(cause) = feeding.as_ref().and_then(Feeding::failure) {
                return cause;
            }
            // CRIU's log says more than runc, and is there only as long as the replica.
            match error.log().and_then(|log| rewarm_criu::Error::of_log("restore", log)) {
                Some(refused) => Cause::Criu(refused),
                None => Cause::Container(error),
            }
        })?;
        if lazy.is_eager() {
            self.wait_filled();
        }
        Ok((pid, recorder))
    }

    /// Waits until memory is complete, or the replica is lost, which is told by what comes next.
    fn wait_filled(&self) {
        let filling =
            |record: Record| record.status == Status::Starting && record.memory == Some(Memory::Filling);
        while self.client.status().is_ok_and(filling) {
            std::thread::sleep(FILLED_POLL);
        }
    }

    /// The process that fills the replica's memory: a child of its shim. `held`: it leaves a stopped server stopped, and the
    /// shim lets it go on when device memory is in its place.
    fn pager(&self, held: bool) -> Result<ResidentRequest, Cause> {
        let work = self.client.paths().work();
        let cgroup = Cgroup::open(&self.record.cgroup)?;
        let text = |path: &std::path::Path| path.display().to_string();
        let mut args = vec!["pager".to_owned(), text(&work), text(cgroup.processes_dir())];
        args.extend(held.then(|| "--held".to_owned()));
        Ok(ResidentRequest {
            name: "pager".to_owned(),
            program: None,
            args,
            fds: 6,
            ready_timeout_ms: 10_000,
        })
    }

    /// Takes the engine's steps that make it serve again, then runs the hook that gives a clone its own identity.
    pub(crate) async fn wake(
        &self,
        engine: Option<&Engine>,
        hook: Option<&Hook>,
        timeout: Duration,
    ) -> Result<(), Cause> {
        if let Some(engine) = engine {
            engine::take(&engine.after, &self.inside, self.port()).await?;
        }
        if let Some(hook) = hook {
            hook.run(&self.inside, self.port(), timeout).await?;
        }
        Ok(())
    }

    /// Asks the recorded questions again. Gives the number of answers that were compared.
    pub(crate) async fn replay(&self, recorded: Option<&Recorded>) -> Result<usize, Cause> {
        match recorded {
            Some(recorded) => Ok(rewarm_probe::replay(recorded, &self.inside).await?.equal),
            None => Ok(0),
        }
    }

    /// Waits for the ready check; without one, until the first port listens; without a port, not at all.
    pub(crate) async fn ready(&self, ready: Option<&Ready>, timeout: Duration) -> Result<(), Cause> {
        let port = self.port();
        // Without an interface no port can be dialled.
        let listens = port.filter(|_| self.record.spec.net != Net::None).map(Ready::tcp);
        let Some(ready) = ready.cloned().or(listens) else { return Ok(()) };
        wait_ready(&ready, &self.inside, port, timeout, ended(self.client.clone())).await?;
        Ok(())
    }

    /// What it is to the caller, once it serves.
    pub(crate) fn restored(&self, pid: u32, ready_after: Duration, answers: usize) -> Restored {
        Restored {
            name: self.record.name.clone(),
            uuid: self.record.uuid,
            pid,
            shim_pid: self.record.shim_pid,
            published: self.record.published.clone(),
            ready_after,
            answers,
            cold: None,
        }
    }

    /// Kills what runs and waits until nothing is left.
    pub(crate) async fn give_up(&self, reason: &str) {
        let (client, reason) = (self.client.clone(), reason.to_owned());
        // A shim that is gone has nothing left to kill; the next command sweeps.
        let _ = tokio::task::spawn_blocking(move || client.kill(&reason)).await;
    }

    fn port(&self) -> Option<u16> {
        self.record.spec.ports.first().copied()
    }
}

/// The time that has passed since a moment, in milliseconds after 1970; `None` if this machine's clock is before it.
#[expect(clippy::disallowed_methods, reason = "alarms are set to a time of day, on whichever machine")]
fn since(moment_ms: u64) -> Option<Duration> {
    SystemTime::now().duration_since(UNIX_EPOCH + Duration::from_millis(moment_ms)).ok()
}

/// Completes when the server has ended, with its status in words. The thread that waits ends with the process.
async fn ended(client: Arc<Client>) -> String {
    let (told, hear) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = told.send(client.wait());
    });
    match hear.await {
        Ok(Ok(exit)) => exit.to_string(),
        Ok(Err(error)) => format!("its shim is gone: {error}"),
        Err(_) => "its shim is gone".to_owned(),
    }
}
