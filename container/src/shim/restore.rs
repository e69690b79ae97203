//! Restores the server through runc.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rewarm_sys::mount;

use crate::error::{Context, Error};
use crate::record::{Cause, Memory, Status};
use crate::rootfs;
use crate::shim::children::{Outcome, descendants};
use crate::shim::logs::Pump;
use crate::shim::protocol::RestoreRequest;
use crate::shim::replica::{Asker, Parts, Replica};
use crate::shim::start::read_pid;
use crate::shim::supervise::Resident;

impl Replica {
    /// Restores from the images that lie in the images directory.
    pub(super) fn restore(
        self: &Arc<Self>,
        asker: Asker<'_>,
        request: &RestoreRequest,
        fds: Vec<OwnedFd>,
    ) -> Result<u32, Error> {
        let (_busy, parts) = self.begin_start("restore")?;
        let result = self.try_restore(asker, request, fds, parts);
        if result.is_err() {
            self.kill_processes();
            for resident in self.change(|inner| std::mem::take(&mut inner.residents)) {
                resident.kill();
            }
        }
        result
    }

    fn try_restore(
        self: &Arc<Self>,
        asker: Asker<'_>,
        request: &RestoreRequest,
        fds: Vec<OwnedFd>,
        parts: &Parts,
    ) -> Result<u32, Error> {
        let timeout = Duration::from_millis(request.timeout_ms);
        let deadline = Instant::now() + timeout;
        let mut fds = fds.into_iter();
        if request.images_attached {
            let images = self.paths.images();
            let root = fds.next().ok_or_else(|| missing(0))?;
            mount::attach(root, &images).context("attach the images at", images.display())?;
        }
        let config = self.paths.criu_config();
        std::fs::write(&config, &request.config).context("write", config.display())?;
        rootfs::mount_over(&parts.spec.rootfs, &self.paths)?;
        if request.lazy_pages {
            self.set_memory(Memory::Filling)?;
        }
        for wanted in &request.residents {
            let own: Vec<OwnedFd> = fds.by_ref().take(wanted.fds).collect();
            if own.len() < wanted.fds {
                return Err(missing(wanted.fds - own.len()));
            }
            let resident = Resident::start(self, wanted, own)?;
            self.change(|inner| inner.residents.push(resident.clone()));
            resident.wait_ready(Duration::from_millis(wanted.ready_timeout_ms), || self.doomed())?;
        }
        let pid_file = self.paths.dir().join("init.pid");
        let mut command = parts.runc.restore(request, &self.paths, &pid_file);
        let pump = Pump::attach(&mut command, &self.paths, parts.spec.log_bytes)?;
        self.change(|inner| inner.pump = Some(pump));
        // A restored init that ends at once must be found by number when runc has returned.
        let pause = self.children.pause();
        let mut child = self.children.spawn(&mut command).context("start", "runc")?;
        drop(command);
        let outcome = self
            .children
            .wait(&mut child, asker.socket, deadline, || self.lock().doomed)
            .context("wait for", "runc")?;
        let log = self.paths.seen_through(std::process::id()).work().join("restore.log");
        let error = match outcome {
            Outcome::Ended(status) if status.success() => None,
            Outcome::Ended(status) => Some(parts.runc.failure("restore", status, Some(log))),
            Outcome::Late => Some(Error::Deadline { operation: "restore", seconds: timeout.as_secs() }),
            Outcome::Lost => Some(Error::Abandoned { operation: "restore" }),
            Outcome::Doomed => Some(self.doomed_error(log)),
        };
        if let Some(error) = error {
            if !matches!(error, Error::Program { .. }) {
                self.kill_all(&mut child)?;
            }
            return Err(error);
        }
        let pid = read_pid(&pid_file)?;
        self.adopt_init(pid);
        drop(pause);
        self.set_status(Status::Starting)?;
        if !request.lazy_pages {
            self.set_memory(Memory::Present { since: Timestamp::now() })?;
        }
        let residents = self.lock().residents.clone();
        for resident in residents {
            resident.restored(pid)?;
        }
        Ok(pid)
    }

    /// runc and CRIU wait for ever for a pager that is gone, and each leaves the other behind when it is killed alone.
    fn kill_all(&self, child: &mut Child) -> Result<(), Error> {
        let below = descendants(child.id());
        for process in &below {
            // Ended meanwhile: what was wanted.
            let _ = process.signal(nix::sys::signal::Signal::SIGKILL);
        }
        self.children.end(child, Duration::ZERO).context("end", "runc")?;
        self.kill_processes();
        Ok(())
    }

    /// A resident that fails may do so because CRIU did: then CRIU's log knows better.
    fn doomed_error(&self, log: PathBuf) -> Error {
        match self.lock().cause.clone() {
            Some(Cause::Resident(reason)) => Error::Resident { operation: "restore", reason, log },
            _ => Error::Abandoned { operation: "restore" },
        }
    }
}

fn missing(count: usize) -> Error {
    Error::Malformed {
        what: "restore",
        value: format!("{count} descriptors are missing"),
        expected: "the images' mount, if attached, and all that the residents get",
    }
}
