//! The end of a replica: who may bring it about, and what is cleaned up in which order.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use crate::error::{Context, Error};
use crate::record::{Cause, Exit, ExitStatus, Record, Status, write_json};
use crate::removal::{remove_tree, unmount_below};
use crate::shim::children::{hung_up, signal};
use crate::shim::publish;
use crate::shim::replica::{Asker, Inner, KILL_DEADLINE, LEASE, Replica};
use crate::state::strip;

/// How long an operation may take to notice that it must end: CRIU's time to roll back, twice.
const BUSY_DEADLINE: Duration = Duration::from_secs(15);
/// How often it is looked whether who waits for the end is still there.
const LOOK_FOR_ASKER: Duration = Duration::from_secs(2);
/// How long the log pipes may stay open after the last process was killed.
const LOG_DEADLINE: Duration = Duration::from_secs(1);

impl Replica {
    /// Only the connection that made the replica may do this.
    pub(super) fn require_lease(&self, request: &'static str, asker: Asker<'_>) -> Result<(), Error> {
        let inner = self.lock();
        let status = inner.record.as_ref().map_or(Status::Starting, |record| record.status);
        if asker.id == LEASE && !inner.committed {
            return Ok(());
        }
        Err(self.out_of_order(request, status, "being made by this command"))
    }

    /// From here on the replica lives without any command.
    pub(super) fn commit(self: &Arc<Self>) -> Result<(), Error> {
        let parts = self.parts("commit")?;
        {
            let mut inner = self.lock();
            self.require_running("commit", &inner)?;
            inner.committed = true;
        }
        let ports =
            std::mem::take(&mut *parts.ports.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        let namespace = parts.network.namespace().context("duplicate", "the network namespace")?;
        let open = publish::open(ports, namespace)?;
        self.change(|inner| inner.open = Some(open));
        if parts.spec.gpu.is_some() {
            // Else its first pause or snapshot would wait for that.
            self.attach();
        }
        self.set_status(Status::Ready)
    }

    pub(super) fn lease_lost(self: &Arc<Self>) {
        if !self.lock().committed {
            self.let_devices_go(LEASE);
        }
        let abandoned = self.change(|inner| {
            if !inner.committed {
                inner.abandoned = true;
            }
            inner.abandoned
        });
        if abandoned {
            self.doom(Cause::Killed("the command that made it is gone".into()));
        }
    }

    /// Ends the server by a signal that it may handle.
    pub(super) fn stop(self: &Arc<Self>, asker: Asker<'_>, timeout: Duration) -> Result<Exit, Error> {
        self.await_given_back(asker.id, false);
        let init = {
            let mut inner = self.lock();
            if let Some(owner) = inner.frozen_by
                && owner != asker.id
            {
                return Err(self.busy_with("another command has frozen it"));
            }
            if let Some(busy @ "dump") = inner.busy {
                return Err(self.busy_with(busy));
            }
            inner.cause.get_or_insert(Cause::Stopped);
            inner.abandoned |= !inner.committed;
            inner.init.filter(|_| inner.exit.is_none())
        };
        self.set_status(Status::Stopping)?;
        if let (Some(pid), Some(parts)) = (init, self.parts.get()) {
            let frozen = self.change(|inner| inner.frozen_by.take());
            if frozen.is_some() {
                parts.cgroup.thaw()?;
            }
            self.await_restored();
            let able = self.thaw_to_stop()?;
            // The first process of a namespace gets only those signals from outside that it handles.
            if able && handles_term(pid) {
                signal(pid.cast_signed(), nix::libc::SIGTERM);
                self.wait_until(Some(timeout), |inner| inner.exit.is_some());
            }
            if able && self.lock().exit.is_none() {
                self.let_devices_go(asker.id);
            }
        }
        self.doom(Cause::Stopped);
        Ok(self.wait_finished())
    }

    pub(super) fn kill(self: &Arc<Self>, asker: Asker<'_>, reason: String) -> Exit {
        let cause = Cause::Killed(reason);
        self.change(|inner| {
            inner.cause.get_or_insert_with(|| cause.clone());
        });
        self.let_devices_go(asker.id);
        self.change(|inner| inner.abandoned |= !inner.committed);
        self.doom(cause);
        self.wait_finished()
    }

    /// Waits until the server has ended and everything is cleaned up.
    pub(super) fn wait_finished(&self) -> Exit {
        self.wait_until(None, |inner| inner.finished);
        exit_of(&self.lock())
    }

    /// The same for somebody who only wants to know: who has hung up meanwhile leaves nothing behind. A `serve` that is killed and
    /// started again asks each time.
    pub(super) fn await_end(&self, asker: Asker<'_>) -> Result<Exit, Error> {
        while !self.wait_until(Some(LOOK_FOR_ASKER), |inner| inner.finished) {
            if hung_up(asker.socket).context("look at", "the connection of who waits")? {
                return Err(Error::Abandoned { operation: "wait" });
            }
        }
        Ok(exit_of(&self.lock()))
    }

    pub(super) fn status(&self) -> Result<Record, Error> {
        let inner = self.lock();
        let record = inner.record.clone();
        let mut record = record.ok_or_else(|| self.out_of_order("status", Status::Starting, "prepared"))?;
        if let Some(exit) = &inner.exit {
            let crashed = matches!(exit.cause, Cause::Resident(_) | Cause::Crashed);
            record.status = if crashed { Status::Crashed } else { Status::Exited };
        }
        Ok(record)
    }

    /// The main thread's part: waits for the end and cleans up.
    pub(super) fn live(&self) {
        self.wait_until(None, |inner| inner.exit.is_some() || inner.doomed || inner.abandoned);
        self.change(|inner| inner.doomed = true);
        if !self.wait_until(Some(BUSY_DEADLINE), |inner| inner.busy.is_none()) {
            tracing::error!("an operation does not end");
        }
        self.kill_processes();
        self.wait_until(Some(KILL_DEADLINE), |inner| inner.init.is_none() || inner.exit.is_some());
        if let Some(pump) = self.change(|inner| inner.pump.take()) {
            pump.finish(LOG_DEADLINE);
        }
        for resident in self.change(|inner| std::mem::take(&mut inner.residents)) {
            resident.kill();
        }
        // Who is told that the replica has ended finds its ports closed and free.
        drop(self.change(|inner| inner.open.take()));
        if let Some(parts) = self.parts.get() {
            parts.ports.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clear();
        }
        // The server is dead, so a call that still waits for it ends; the helper ends with it or when this process does.
        if let Ok(mut helper) = self.helper.try_lock() {
            *helper = super::device::helper(None);
        }
        for error in self.clean_up() {
            tracing::error!(error = %error, "clean up");
        }
        if self.lock().abandoned {
            self.vanish();
            return;
        }
        let exit = exit_of(&self.lock());
        let status = if matches!(exit.cause, Cause::Resident(_)) { Status::Crashed } else { Status::Exited };
        // In this order: who finds the status without the exit would take it for the end of a shim that died.
        let results = [write_json(&self.paths.exit(), &exit), self.set_status(status)];
        for error in results.into_iter().filter_map(Result::err) {
            tracing::error!(error = %error, "write the exit down");
        }
        if self.lock().committed {
            if let Err(error) = strip(&self.paths) {
                tracing::error!(error = %error, "clean up");
            }
            self.finish();
        } else {
            // The command reads the logs and CRIU's words before it lets go.
            self.change(|inner| inner.finished = true);
            self.wait_until(None, |inner| inner.abandoned);
            self.vanish();
        }
    }

    /// Takes everything away that the kernel does not take away by itself.
    fn clean_up(&self) -> Vec<Error> {
        // Mounts first: what is removed afterwards must not be seen through one of them. runc leaves the root file system
        // bound below its own state when it is killed in the middle of a restore.
        let mut results = vec![unmount_below(self.paths.dir())];
        if let Some(parts) = self.parts.get() {
            results.push(unmount_below(&parts.runc.state()));
            results.push(parts.cgroup.remove());
            results.push(remove_tree(&parts.runc.state()));
        }
        results.into_iter().filter_map(Result::err).collect()
    }

    fn vanish(&self) {
        if let Err(error) = remove_tree(self.paths.dir()) {
            tracing::error!(error = %error, "clean up");
        }
        self.finish();
    }

    fn finish(&self) {
        self.change(|inner| inner.finished = true);
        self.last_answers();
    }
}

fn exit_of(inner: &Inner) -> Exit {
    inner.exit.clone().unwrap_or_else(|| Exit {
        status: ExitStatus::Unknown,
        cause: inner.cause.clone().unwrap_or(Cause::Ended),
        ended: Timestamp::now(),
    })
}

/// Whether a process handles SIGTERM, as the kernel tells it.
fn handles_term(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let mask = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // Unreadable means that it has ended or that nothing is known: the signal does no harm.
    mask.is_none_or(|mask| mask & (1 << (nix::libc::SIGTERM - 1)) != 0)
}
