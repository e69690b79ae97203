//! Who lets a server go on that was drained: the command that drained it, the one that wakes it, or else the shim.
//!
//! What it goes on by is written down before the first step is taken that drains it. A command that is killed leaves no server
//! that waits for ever.

use std::sync::Arc;

use rewarm_probe::Resume;

use crate::dial::Inside;
use crate::error::{Context, Error, remote};
use crate::record::{Status, write_json};
use crate::shim::client::Client;
use crate::shim::replica::{Asker, ConnectionId, ITSELF, Inner, Replica};

impl Replica {
    /// The asker begins to drain the server, which goes on by `resume`.
    pub(super) fn drain(&self, asker: Asker<'_>, resume: Resume) -> Result<(), Error> {
        let (_busy, _) = self.begin("drain", asker.id)?;
        self.set_drained(Some(resume), Some(asker.id))
    }

    /// The owner has let the server go on. What failed in part stays written down and is nobody's, until the next wake.
    pub(super) fn resumed(&self, owner: ConnectionId, whole: bool) -> Result<(), Error> {
        let kept = {
            let inner = self.lock();
            if inner.drained_by != Some(owner) {
                return Err(self.busy_with("another command has drained it"));
            }
            drained(&inner).filter(|_| !whole)
        };
        self.set_drained(kept, None)
    }

    /// Makes what a server goes on by the asker's, if there is any.
    pub(super) fn take_over(&self, asker: Asker<'_>) {
        self.change(|inner| {
            if drained(inner).is_some() {
                inner.drained_by = Some(asker.id);
            }
        });
    }

    /// Whether it is awake, and still waits for what it goes on by.
    pub(super) fn waits_drained(&self) -> bool {
        let inner = self.lock();
        inner.paused.is_none() && drained(&inner).is_some()
    }

    /// A connection is gone: the server that it drained goes on, unless it is paused, and so is left to the next wake.
    pub(super) fn go_on(&self, asker: Asker<'_>) {
        let resume = self.change(|inner| {
            inner.drained_by.take_if(|owner| *owner == asker.id)?;
            let stranded = inner.record.as_ref().is_some_and(|record| record.status == Status::Stranded);
            let stands = inner.paused.is_some() || inner.exit.is_some() || inner.doomed || stranded;
            let resume = drained(inner).filter(|_| !stands)?;
            inner.drained_by = Some(ITSELF);
            Some(resume)
        });
        let Some(resume) = resume else { return };
        tracing::warn!("the command that drained the server is gone; the server goes on");
        let failures = self.take(&resume).unwrap_or_else(|error| vec![chain(&error)]);
        for failure in &failures {
            tracing::error!(failure, "what lets the server go on");
        }
        if let Err(error) = self.resumed(ITSELF, failures.is_empty()) {
            tracing::error!(%error, "write down that the server goes on");
        }
    }

    /// Gives what failed.
    fn take(&self, resume: &Resume) -> Result<Vec<String>, Error> {
        let port = self.parts("go on")?.spec.ports.first().copied();
        let inside = Inside::new(Arc::new(Client::to_itself(&self.name, &self.paths)?));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("start", "a runtime")?;
        let failures = runtime.block_on(resume.take(&inside, port));
        Ok(failures.iter().map(|failure| chain(failure)).collect())
    }

    fn set_drained(&self, resume: Option<Resume>, owner: Option<ConnectionId>) -> Result<(), Error> {
        self.change(|inner| {
            inner.drained_by = owner;
            let Some(record) = &mut inner.record else { return Ok(()) };
            record.drained = resume;
            write_json(&self.paths.record(), record)
        })
    }
}

fn drained(inner: &Inner) -> Option<Resume> {
    inner.record.as_ref()?.drained.clone()
}

/// An error and its causes in one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    remote(error).chain().join(": ")
}
