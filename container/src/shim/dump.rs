//! Dumps the server through runc, and freezes it for a command that asks.
//!
//! Both are leases: when the command that asked is gone, the dump is given up and the server goes on. The socket of the
//! page server is shut down for that, which CRIU takes as a failed dump and rolls back; it is killed only where it does
//! not end by itself.
//!
//! A server that uses CUDA has been suspended before ([`super::device`]). It is frozen from then until the devices have their
//! memory again, which is after the dump, or when the command that froze it lets go.

use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use rewarm_sys::mount;

use crate::error::{Context, Error};
use crate::record::Status;
use crate::shim::children::Outcome;
use crate::shim::protocol::DumpRequest;
use crate::shim::replica::{Asker, ConnectionId, Parts, Replica};
use crate::state::make_dir;

/// How long CRIU may take to roll back by itself.
const GRACE: Duration = Duration::from_secs(5);

impl Replica {
    /// Dumps the server, which goes on afterwards unless this connection froze it.
    pub(super) fn dump(&self, asker: Asker<'_>, request: &DumpRequest, socket: OwnedFd) -> Result<(), Error> {
        let (_busy, parts) = self.begin("dump", asker.id)?;
        self.make_room(asker.id)?;
        let result = self.dump_stopped(asker, parts, request, socket);
        self.change(|inner| inner.dump_given_up = false);
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
            .wait(&mut child, asker.socket, Instant::now() + timeout, || {
                self.doomed() || self.lock().dump_given_up
            })
            .context("wait for", "runc")?;
        let error = match outcome {
            Outcome::Ended(status) if status.success() => None,
            Outcome::Ended(status) => {
                let log = self.paths.seen_through(std::process::id()).dump_work().join("dump.log");
                Some(parts.runc.failure("checkpoint", status, Some(log)))
            }
            Outcome::Lost => Some(Error::Abandoned { operation: "dump" }),
            Outcome::Doomed if self.lock().dump_given_up => Some(Error::Abandoned { operation: "dump" }),
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

    /// Ends the dump that goes on. CRIU does not look at its socket while it waits for a process that does not stop, so hanging
    /// up is not enough.
    pub(super) fn give_up_dump(&self) {
        self.change(|inner| inner.dump_given_up = inner.busy == Some("dump"));
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
            match mount::detach(&dump) {
                // The server ended meanwhile, and its mounts went with it.
                Err(error)
                    if matches!(
                        error.raw_os_error().map(Errno::from_raw),
                        Some(Errno::EINVAL | Errno::ENOENT)
                    ) => {}
                detached => detached.context("unmount", dump.display())?,
            }
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
        self.change(|inner| inner.frozen_by = None);
        self.settle(parts)?;
        let committed = self.lock().committed;
        self.set_status(if committed { Status::Ready } else { Status::Starting })
    }

    /// A connection is gone: what it held is given back.
    pub(super) fn drop_leases(&self, asker: Asker<'_>) {
        let (held, dumped) = {
            let inner = self.lock();
            let suspended = inner.suspended.as_ref().is_some_and(|suspended| suspended.by == asker.id);
            (inner.frozen_by == Some(asker.id) || suspended, inner.dumped_by == Some(asker.id))
        };
        let results =
            [if held { self.thaw(asker) } else { Ok(()) }, if dumped { self.release_dump() } else { Ok(()) }];
        for error in results.into_iter().filter_map(Result::err) {
            tracing::warn!(%error, "give a lease back");
        }
    }
}
