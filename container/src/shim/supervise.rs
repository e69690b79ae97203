//! The shim's side of a resident: see [`crate::shim::resident`].

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rewarm_sys::pidfd::PidFd;

use crate::error::{Context, Error};
use crate::record::{Cause, Memory};
use crate::shim::protocol::{self, ResidentRequest};
use crate::shim::replica::Replica;
use crate::shim::resident::{CONTROL_FD, FIRST_FD, FromShim, ToShim};

/// How long the last words of a resident that has ended may wait for the thread that reads them.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// A child without which the replica must not live.
#[derive(Debug)]
pub(super) struct Resident {
    name: String,
    process: PidFd,
    control: UnixStream,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ready: bool,
    done: bool,
    ended: bool,
    /// Duplicates that keep the server stopped when the resident dies; dropped when it is done or the server is dead.
    held: Vec<OwnedFd>,
}

impl Resident {
    /// Starts it with a control socket and its descriptors, and a thread that listens to it.
    pub(super) fn start(
        replica: &Arc<Replica>,
        request: &ResidentRequest,
        fds: Vec<OwnedFd>,
    ) -> Result<Arc<Self>, Error> {
        let own = std::path::Path::new("/proc/self/exe");
        let mut command = Command::new(request.program.as_deref().unwrap_or(own));
        // Its messages go to the shim's own log.
        command.args(&request.args).current_dir("/").stdin(Stdio::null());
        let (control, theirs) = UnixStream::pair().context("make", "a control socket")?;
        let numbered = std::iter::once((theirs.into(), CONTROL_FD)).chain(fds.into_iter().zip(FIRST_FD..));
        rewarm_sys::process::inherit(&mut command, numbered.collect())
            .context("prepare the descriptors of", &request.name)?;
        let mut child = replica.children.spawn(&mut command).context("start", &request.name)?;
        drop(command);
        let process = PidFd::open(child.id()).context("watch", &request.name)?;
        let resident = Arc::new(Self {
            name: request.name.clone(),
            process,
            control,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let (listening, owner) = (resident.clone(), replica.clone());
        std::thread::spawn(move || {
            let reason = listening.listen(&owner);
            // The server dies first: the duplicates keep it from running on with pages missing until it is dead.
            if let Some(reason) = reason {
                owner.doom(Cause::Resident(reason));
                listening.kill();
            }
            let status = child.wait();
            owner.children.release(child.id());
            tracing::debug!(name = listening.name, ?status, "resident has ended");
            listening.change(|state| {
                state.ended = true;
                state.held.clear();
            });
        });
        Ok(resident)
    }

    /// Follows its messages to the end; gives the reason if the replica must die.
    fn listen(&self, replica: &Replica) -> Option<String> {
        loop {
            match protocol::receive(&self.control) {
                Ok(Some((ToShim::Ready, _))) => self.change(|state| state.ready = true),
                Ok(Some((ToShim::Hold, fds))) => self.change(|state| state.held.extend(fds)),
                Ok(Some((ToShim::MayRun, _))) => replica.change(|inner| inner.may_run = true),
                Ok(Some((ToShim::Done, _))) => {
                    self.change(|state| {
                        state.done = true;
                        state.held.clear();
                    });
                    if let Err(error) = replica.set_memory(Memory::Present { since: Timestamp::now() }) {
                        tracing::warn!(error = %error, "write down that memory is complete");
                    }
                }
                Ok(Some((ToShim::Failed(reason), _))) => {
                    return Some(format!("the {} failed: {reason}", self.name));
                }
                // It may end with our last word unread, which the kernel tells as a reset.
                Ok(None) | Err(_) if self.lock().done => return None,
                Ok(None) => return Some(format!("the {} ended before it was done", self.name)),
                Err(error) => return Some(format!("the {} sent nonsense: {error}", self.name)),
            }
        }
    }

    /// Waits until it is ready.
    pub(super) fn wait_ready(&self, limit: Duration, doomed: impl Fn() -> bool) -> Result<(), Error> {
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        while !state.ready {
            if state.ended || doomed() {
                return Err(Error::Program {
                    program: self.name.clone(),
                    status: "an end".into(),
                    cause: "it ended before it was ready; see shim.log".into(),
                    output: Vec::new(),
                    log: None,
                });
            }
            if Instant::now() > deadline {
                return Err(Error::Deadline {
                    operation: "the start of a resident",
                    seconds: limit.as_secs(),
                });
            }
            let step = Duration::from_millis(20);
            state = self.changed.wait_timeout(state, step).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Tells it that the server runs.
    pub(super) fn restored(&self, pid: u32) -> Result<(), Error> {
        let init = PidFd::open(pid).context("watch", "the restored server")?;
        match protocol::send(&self.control, &FromShim::Restored { pid }, &[init.as_fd()]) {
            // It was done sooner than runc, and has ended.
            Err(_) if self.is_done() => Ok(()),
            other => other.context("tell", &self.name),
        }
    }

    /// Whether it said that it is done. Its last words may still wait to be read: until they are, nobody knows.
    fn is_done(&self) -> bool {
        let state = self.lock();
        let undecided = |state: &mut State| !state.done && !state.ended;
        let waited = self.changed.wait_timeout_while(state, LAST_WORDS, undecided);
        waited.unwrap_or_else(PoisonError::into_inner).0.done
    }

    /// Kills it, if it still runs.
    pub(super) fn kill(&self) {
        let _ = self.process.signal(nix::sys::signal::Signal::SIGKILL);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }
}
