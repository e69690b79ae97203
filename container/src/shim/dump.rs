//! Dumps the server through runc, and freezes it for a command that asks.
//!
//! Both are leases: when the command that asked is gone, the dump is given up and the server goes on. The socket of the
//! page server is shut down for that, which CRIU takes as a failed dump and rolls back; it is killed only where it does
//! not end by itself.
//!
//! A server that uses CUDA has its device memory moved into its host memory first (see [`order`]). It is frozen from then
//! until the devices have it again, which is after the dump, or when the command that froze it lets go.

use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rewarm_gpu::carried::{self, Carried};
use rewarm_gpu::{Group, Process, order, ranges};
use rewarm_sys::mount;

use crate::error::{Context, Error};
use crate::record::Status;
use crate::shim::children::Outcome;
use crate::shim::pause::Tasks;
use crate::shim::protocol::DumpRequest;
use crate::shim::replica::{Asker, ConnectionId, Parts, Replica};
use crate::state::make_dir;

/// How long CRIU may take to roll back by itself.
const GRACE: Duration = Duration::from_secs(5);
/// How long work on the devices may take to finish before a dump is given up.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

impl Replica {
    /// Dumps the server, which goes on afterwards unless this connection froze it. Gives its device state, if it has one.
    pub(super) fn dump(
        &self,
        asker: Asker<'_>,
        request: &DumpRequest,
        socket: OwnedFd,
    ) -> Result<Option<Carried>, Error> {
        let (_busy, parts) = self.begin("dump", asker.id)?;
        self.make_room(asker.id)?;
        let result = self
            .suspend(parts)
            .and_then(|carried| self.dump_stopped(asker, parts, request, socket).map(|()| carried));
        self.settle(parts)?;
        result
    }

    fn dump_stopped(
        &self,
        asker: Asker<'_>,
        parts: &Parts,
        request: &DumpRequest,
        socket: OwnedFd,
    ) -> Result<(), Error> {
        let config = self.paths.criu_config();
        std::fs::write(&config, &request.config).context("write", config.display())?;
        let socket = UnixStream::from(socket);
        let copy = socket.try_clone().context("duplicate", "the page server's socket")?;
        let mut command = parts.runc.checkpoint(request, &self.paths);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        rewarm_sys::process::inherit(&mut command, vec![(copy.into(), DumpRequest::SOCKET)])
            .context("prepare", "the page server's socket")?;
        if let Some((uid, gid)) = request.real_ids {
            rewarm_sys::process::real_ids(&mut command, uid, gid);
        }
        let mut child = self.children.spawn(&mut command).context("start", "runc")?;
        drop(command);
        let timeout = Duration::from_millis(request.timeout_ms);
        let outcome = self
            .children
            .wait(&mut child, asker.socket, Instant::now() + timeout, || self.doomed())
            .context("wait for", "runc")?;
        let error = match outcome {
            Outcome::Ended(status) if status.success() => None,
            Outcome::Ended(status) => {
                let log = self.paths.seen_through(std::process::id()).dump_work().join("dump.log");
                Some(parts.runc.failure("checkpoint", status, Some(log)))
            }
            Outcome::Lost => Some(Error::Abandoned { operation: "dump" }),
            Outcome::Late => Some(Error::Deadline { operation: "dump", seconds: timeout.as_secs() }),
            Outcome::Doomed => Some(self.out_of_order("dump", Status::Exited, "running until its end")),
        };
        if matches!(error, Some(Error::Abandoned { .. } | Error::Deadline { .. } | Error::Order { .. })) {
            // The peer may be alive and just not reading; gone, it has been shut down already.
            let _ = socket.shutdown(Shutdown::Both);
            self.children.end(&mut child, GRACE).context("end", "runc")?;
        }
        error.map_or(Ok(()), Err)
    }

    /// Moves device memory into host memory and leaves the server frozen; does nothing to one without a driver.
    fn suspend(&self, parts: &Parts) -> Result<Option<Carried>, Error> {
        let tasks = Tasks(&parts.cgroup);
        if !tasks.processes().iter().any(|pid| ranges::loads_driver(*pid)) {
            return Ok(None);
        }
        let mut helper = self.helper.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // The driver's own threads have to run; what the lease froze is frozen again when all is done.
        parts.cgroup.thaw()?;
        let suspended = order::suspend(&mut helper, &tasks, LOCK_TIMEOUT)?;
        if suspended.processes.is_empty() {
            parts.cgroup.thaw()?;
            return Ok(None);
        }
        self.change(|inner| inner.suspended = Some(suspended.processes.clone()));
        carried::none_left(&tasks.processes())?;
        Ok(Some(Carried::of(&mut helper, &suspended)?))
    }

    /// Gives the devices what they had before the dump, and lets the server go on. If that fails, it is paused.
    fn resume(&self, parts: &Parts, processes: Vec<Process>) -> Result<(), Error> {
        let mut helper = self.helper.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match order::resume(&mut helper, &Tasks(&parts.cgroup), &processes, &[]) {
            Ok(_) => Ok(()),
            Err(failure) => {
                self.change(|inner| inner.paused = Some(processes));
                self.set_status(Status::Paused)?;
                Err(failure.into())
            }
        }
    }

    /// A fresh tmpfs for images and logs: a dump must not wait for a disk.
    fn make_room(&self, asker: ConnectionId) -> Result<(), Error> {
        self.release_dump()?;
        let dump = self.paths.dump();
        make_dir(&dump)?;
        let bytes = crate::bundle::memory_total()?;
        mount::tmpfs(&dump, bytes, "0700").context("mount a tmpfs on", dump.display())?;
        self.change(|inner| inner.dumped_by = Some(asker));
        make_dir(&self.paths.dump_images())?;
        make_dir(&self.paths.dump_work())
    }

    /// Gives the memory of the last dump's images back.
    pub(super) fn release_dump(&self) -> Result<(), Error> {
        if self.change(|inner| inner.dumped_by.take()).is_some() {
            let dump = self.paths.dump();
            mount::detach(&dump).context("unmount", dump.display())?;
        }
        Ok(())
    }

    /// After a dump, however it ended, the server is as frozen as the lease says and not more.
    fn settle(&self, parts: &Parts) -> Result<(), Error> {
        let frozen = self.lock().frozen_by.is_some();
        if !frozen && parts.cgroup.exists() {
            match self.change(|inner| inner.suspended.take()) {
                Some(processes) => self.resume(parts, processes)?,
                None => parts.cgroup.thaw()?,
            }
        }
        if frozen && parts.cgroup.exists() && !parts.cgroup.is_frozen()? {
            parts.cgroup.freeze()?;
        }
        Ok(())
    }

    pub(super) fn freeze(&self, asker: Asker<'_>) -> Result<(), Error> {
        let (_busy, parts) = self.begin("freeze", asker.id)?;
        parts.cgroup.freeze()?;
        self.change(|inner| inner.frozen_by = Some(asker.id));
        self.set_status(Status::Frozen)
    }

    pub(super) fn thaw(&self, asker: Asker<'_>) -> Result<(), Error> {
        let (_busy, parts) = self.begin("thaw", asker.id)?;
        let suspended = self.change(|inner| {
            inner.frozen_by = None;
            inner.suspended.take()
        });
        match suspended {
            Some(processes) => self.resume(parts, processes)?,
            None => parts.cgroup.thaw()?,
        }
        let committed = self.lock().committed;
        self.set_status(if committed { Status::Ready } else { Status::Starting })
    }

    /// A connection is gone: what it held is given back.
    pub(super) fn drop_leases(&self, asker: Asker<'_>) {
        let (frozen, dumped) = {
            let inner = self.lock();
            (inner.frozen_by == Some(asker.id), inner.dumped_by == Some(asker.id))
        };
        let results = [
            if frozen { self.thaw(asker) } else { Ok(()) },
            if dumped { self.release_dump() } else { Ok(()) },
        ];
        for error in results.into_iter().filter_map(Result::err) {
            tracing::warn!(%error, "give a lease back");
        }
    }
}
