//! What the shim's threads share: the state of its replica and the rules by which it changes.

use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rewarm_gpu::{Helper, Process};
use rewarm_sys::process::{self, Ended};

use std::sync::Arc;

use crate::cgroup::Cgroup;
use crate::error::Error;
use crate::namespaces::Network;
use crate::record::{Cause, Exit, ExitStatus, Memory, Record, Status, write_json};
use crate::runc::Runc;
use crate::shim::Paths;
use crate::shim::children::{Children, hung_up};
use rewarm_gpu::place::InFile;

use crate::shim::device::{Away, Suspension};
use crate::shim::logs::Pump;
use crate::shim::publish::{Open, Reserved};
use crate::shim::supervise::Resident;
use crate::spec::{Name, Spec};

/// How long the kernel may take to end killed processes.
pub(super) const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// A connection's number; the lease that made the replica has [`LEASE`].
pub(super) type ConnectionId = u64;
pub(super) const LEASE: ConnectionId = 0;
/// Stands for the shim where it does what a command was to do.
pub(super) const ITSELF: ConnectionId = u64::MAX;

/// How long the next command waits for a server that the shim lets go on after a command that was killed.
const GOES_ON: Duration = Duration::from_secs(10);

/// One replica and everything that belongs to it.
#[derive(Debug)]
pub(super) struct Replica {
    pub(super) name: Name,
    pub(super) paths: Paths,
    pub(super) runc_root: PathBuf,
    pub(super) children: Arc<Children>,
    /// Set by prepare, once.
    pub(super) parts: OnceLock<Parts>,
    /// Makes the CUDA driver's calls; starts when it is first needed.
    pub(super) helper: Mutex<Helper>,
    inner: Mutex<Inner>,
    changed: Condvar,
}

/// What prepare laid out.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) spec: Spec,
    pub(super) network: Network,
    pub(super) cgroup: Cgroup,
    pub(super) runc: Runc,
    pub(super) ports: Mutex<Vec<Reserved>>,
}

#[derive(Debug, Default)]
pub(super) struct Inner {
    pub(super) record: Option<Record>,
    pub(super) committed: bool,
    /// Process number of the server's init, once it runs.
    pub(super) init: Option<u32>,
    pub(super) exit: Option<Exit>,
    /// Why it ends, where somebody else than the server decided it.
    pub(super) cause: Option<Cause>,
    /// Whatever is going on must end, and the server be killed.
    pub(super) doomed: bool,
    /// Nobody wants the replica, so its directory goes as well.
    pub(super) abandoned: bool,
    /// The operation that excludes others.
    pub(super) busy: Option<&'static str>,
    /// Whose operation that is.
    pub(super) busy_by: Option<ConnectionId>,
    /// The other ends' sockets, until all that was theirs is given back.
    pub(super) clients: BTreeMap<ConnectionId, UnixStream>,
    pub(super) execs: usize,
    pub(super) frozen_by: Option<ConnectionId>,
    /// Who lets the server go on that was drained.
    pub(super) drained_by: Option<ConnectionId>,
    /// Those of its processes that were seen to use CUDA.
    pub(super) cuda: Vec<Process>,
    /// Set while it is paused: those of its processes whose device memory lies in their host memory.
    pub(super) paused: Option<Away>,
    /// Where device memory is that went past the processes of a server that is suspended or, after that failed, paused.
    pub(super) kept: Option<InFile>,
    /// The same for a dump, and after it as long as a command keeps it frozen.
    pub(super) suspended: Option<Suspension>,
    /// The driver was asked to restore its processes, in place or in this clone: it leaves its devices before it is killed.
    pub(super) restored_by_driver: bool,
    /// During a restore: what must be there before the server runs is, shared memory and device memory in host memory.
    pub(super) may_run: bool,
    pub(super) dumped_by: Option<ConnectionId>,
    /// The dump that goes on is to end.
    pub(super) dump_given_up: bool,
    /// Everything that had to be cleaned up is.
    pub(super) finished: bool,
    /// Connections that wait for an answer.
    pub(super) asking: usize,
    pub(super) pump: Option<Pump>,
    /// Published ports, once they are open.
    pub(super) open: Option<Open>,
    pub(super) residents: Vec<Arc<Resident>>,
}

/// Marks an operation that excludes others, until it is dropped.
pub(super) struct Busy<'a>(&'a Replica);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.change(|inner| (inner.busy, inner.busy_by) = (None, None));
    }
}

impl Replica {
    pub(super) fn new(name: Name, paths: Paths, runc_root: PathBuf, patience: Option<Duration>) -> Self {
        Self {
            name,
            paths,
            runc_root,
            children: Arc::default(),
            parts: OnceLock::new(),
            helper: Mutex::new(super::device::helper(patience)),
            inner: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        let value = change(&mut self.lock());
        self.changed.notify_all();
        value
    }

    /// Waits until `ready`, at most for `limit`; tells whether it came true.
    pub(super) fn wait_until(&self, limit: Option<Duration>, ready: impl Fn(&Inner) -> bool) -> bool {
        let deadline = limit.map(|limit| Instant::now() + limit);
        let mut inner = self.lock();
        loop {
            if ready(&inner) {
                return true;
            }
            inner = match deadline {
                None => self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    pub(super) fn parts(&self, request: &'static str) -> Result<&Parts, Error> {
        self.parts.get().ok_or_else(|| self.out_of_order(request, Status::Starting, "prepared"))
    }

    pub(super) fn out_of_order(
        &self,
        request: &'static str,
        status: Status,
        expected: &'static str,
    ) -> Error {
        Error::Order { request, name: self.name.clone(), status, expected }
    }

    pub(super) fn busy_with(&self, with: &str) -> Error {
        Error::Busy { name: self.name.clone(), with: with.into() }
    }

    /// Begins an operation that needs a prepared replica without a server.
    pub(super) fn begin_start(&self, what: &'static str) -> Result<(Busy<'_>, &Parts), Error> {
        let parts = self.parts(what)?;
        let mut inner = self.lock();
        if let Some(busy) = inner.busy {
            return Err(self.busy_with(busy));
        }
        if inner.init.is_some() || inner.doomed || inner.pump.is_some() {
            let status = inner.record.as_ref().map_or(Status::Starting, |record| record.status);
            return Err(self.out_of_order(what, status, "prepared and not started"));
        }
        inner.busy = Some(what);
        Ok((Busy(self), parts))
    }

    /// Begins an operation that needs a server that nobody else freezes or dumps.
    pub(super) fn begin(
        &self,
        what: &'static str,
        connection: ConnectionId,
    ) -> Result<(Busy<'_>, &Parts), Error> {
        self.begin_with(what, connection, false)
    }

    /// Begins an operation that needs a server that is paused.
    pub(super) fn begin_paused(
        &self,
        what: &'static str,
        connection: ConnectionId,
    ) -> Result<(Busy<'_>, &Parts), Error> {
        self.begin_with(what, connection, true)
    }

    fn begin_with(
        &self,
        what: &'static str,
        connection: ConnectionId,
        paused: bool,
    ) -> Result<(Busy<'_>, &Parts), Error> {
        let parts = self.parts(what)?;
        self.await_given_back(connection, true);
        let mut inner = self.lock();
        self.require_running(what, &inner)?;
        if let Some(busy) = inner.busy {
            return Err(self.busy_with(busy));
        }
        // What is held is given back all the same.
        if !matches!(what, "thaw" | "end")
            && inner.record.as_ref().is_some_and(|record| record.status == Status::Stranded)
        {
            return Err(self.not_so(what, &inner, paused));
        }
        if inner.frozen_by.is_some_and(|owner| owner != connection) {
            return Err(self.busy_with("another command has frozen it"));
        }
        if inner.suspended.as_ref().is_some_and(|suspended| suspended.by != connection) {
            return Err(self.busy_with("another command dumps it"));
        }
        if let Some(owner) = inner.drained_by.filter(|owner| *owner != connection) {
            return Err(self.busy_with(if owner == ITSELF {
                "it goes on after a command that was killed"
            } else {
                "another command has drained it"
            }));
        }
        if inner.paused.is_some() != paused {
            return Err(self.not_so(what, &inner, paused));
        }
        if inner.execs > 0 {
            // A process that was put into the container from outside does not belong to the tree that CRIU sees.
            return Err(self.busy_with("a command runs inside"));
        }
        (inner.busy, inner.busy_by) = (Some(what), Some(connection));
        Ok((Busy(self), parts))
    }

    /// Waits while something is held for a command that was killed: who comes right after that one is not refused for what has yet to
    /// be given back. With `hooks` also while the shim does in such a command's place what lets the server go on.
    pub(super) fn await_given_back(&self, asker: ConnectionId, hooks: bool) {
        let free = |inner: &Inner| {
            let suspended = inner.suspended.as_ref().map(|suspended| suspended.by);
            let holders = [inner.busy_by, inner.frozen_by, suspended, inner.drained_by.filter(|_| hooks)];
            let is_gone = |socket: &UnixStream| hung_up(socket).unwrap_or(false);
            let left = |holder| holder == ITSELF || inner.clients.get(&holder).is_some_and(is_gone);
            let held = holders.into_iter().flatten().any(|holder| holder != asker && left(holder));
            !held || inner.doomed || inner.exit.is_some()
        };
        self.wait_until(Some(GOES_ON), free);
    }

    pub(super) fn require_running(&self, what: &'static str, inner: &Inner) -> Result<u32, Error> {
        let status = match (&inner.exit, &inner.record) {
            (Some(_), _) => Status::Exited,
            (None, Some(record)) => record.status,
            (None, None) => Status::Starting,
        };
        match inner.init {
            Some(pid) if inner.exit.is_none() && !inner.doomed => Ok(pid),
            _ => Err(self.out_of_order(what, status, "running")),
        }
    }

    /// The refusal of what needs a replica that is paused, or awake.
    pub(super) fn not_so(&self, what: &'static str, inner: &Inner, paused: bool) -> Error {
        let status = inner.record.as_ref().map_or(Status::Starting, |record| record.status);
        self.out_of_order(what, status, if paused { "paused" } else { "awake" })
    }

    /// Writes the record down with a new status; what is stranded can only end.
    pub(super) fn set_status(&self, status: Status) -> Result<(), Error> {
        let mut inner = self.lock();
        let Some(record) = &mut inner.record else { return Ok(()) };
        if record.status == Status::Stranded && !status.is_end() {
            return Ok(());
        }
        record.status = status;
        write_json(&self.paths.record(), record)
    }

    /// Writes down how far its memory is. What is complete stays complete.
    pub(super) fn set_memory(&self, memory: Memory) -> Result<(), Error> {
        let mut inner = self.lock();
        let Some(record) = &mut inner.record else { return Ok(()) };
        if matches!(record.memory, Some(Memory::Present { .. })) {
            return Ok(());
        }
        record.memory = Some(memory);
        let written = write_json(&self.paths.record(), record);
        drop(inner);
        self.changed.notify_all();
        written
    }

    pub(super) fn doomed(&self) -> bool {
        let inner = self.lock();
        inner.doomed || inner.exit.is_some()
    }

    /// Kills the server and whatever is being done with it.
    pub(super) fn doom(&self, cause: Cause) {
        self.change(|inner| {
            inner.cause.get_or_insert(cause);
            inner.doomed = true;
        });
        self.kill_processes();
    }

    pub(super) fn kill_processes(&self) {
        if let Some(parts) = self.parts.get()
            && let Err(error) = parts.cgroup.kill(KILL_DEADLINE)
        {
            tracing::error!(error = %error, "kill");
        }
    }

    /// Watches the server's init, which has become a child of the shim, until it ends.
    pub(super) fn adopt_init(self: &Arc<Self>, pid: u32) {
        self.children.adopt(pid);
        self.change(|inner| {
            inner.init = Some(pid);
            if let Some(record) = &mut inner.record {
                record.pid = Some(pid);
            }
        });
        let replica = self.clone();
        std::thread::spawn(move || {
            let status = match process::wait(pid) {
                Ok(Ended::Code(code)) => ExitStatus::Code(code),
                Ok(Ended::Signal(signal)) => ExitStatus::Signal(signal),
                Err(error) => {
                    tracing::warn!(%error, pid, "the end of the server was not seen");
                    ExitStatus::Unknown
                }
            };
            replica.children.release(pid);
            replica.ended(status);
        });
    }

    fn ended(&self, status: ExitStatus) {
        let out_of_memory = self.parts.get().is_some_and(|parts| parts.cgroup.oom_kills() > 0);
        tracing::info!(%status, out_of_memory, "the server has ended");
        self.change(|inner| {
            let natural = if out_of_memory { Cause::OutOfMemory } else { Cause::Ended };
            let cause = inner.cause.clone().unwrap_or(natural);
            inner.exit = Some(Exit { status, cause, ended: Timestamp::now() });
        });
    }
}

/// What a request knows about where it came from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asker<'a> {
    pub(super) id: ConnectionId,
    pub(super) socket: &'a UnixStream,
}
