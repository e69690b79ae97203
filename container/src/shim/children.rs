//! The processes that the shim waits for, and the orphans that it is given as a subreaper.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rewarm_sys::pidfd::PidFd;

/// How often a wait looks at what has no descriptor (a deadline, a doom).
const STEP_MS: u16 = 20;

/// Whether the other end of a connection is gone.
pub(super) fn hung_up(connection: &UnixStream) -> io::Result<bool> {
    let mut fds = [PollFd::new(connection.as_fd(), PollFlags::empty())];
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(_) => Ok(fds[0].revents().is_some_and(|events| !events.is_empty())),
        Err(nix::errno::Errno::EINTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// All children that somebody waits for by number. Others are reaped as they end.
#[derive(Debug, Default)]
pub(super) struct Children {
    owned: Mutex<BTreeSet<u32>>,
    paused: AtomicUsize,
}

/// Why a wait for a child came to its end.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The child ended.
    Ended(ExitStatus),
    /// The command that asked is gone.
    Lost,
    /// The deadline passed.
    Late,
    /// The replica must die.
    Doomed,
}

impl Children {
    /// Starts a child that will be waited for.
    pub(super) fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        // Held across the start: the reaper must not see the child before it is listed.
        let mut owned = self.lock();
        let child = command.spawn()?;
        owned.insert(child.id());
        Ok(child)
    }

    /// Claims a process that became a child of the shim when its parent ended.
    pub(super) fn adopt(&self, pid: u32) {
        self.lock().insert(pid);
    }

    /// The child was waited for.
    pub(super) fn release(&self, pid: u32) {
        self.lock().remove(&pid);
    }

    /// Nothing is reaped while the value lives: a restored init that ends at once must still be found.
    pub(super) fn pause(&self) -> impl Drop + '_ {
        struct Pause<'a>(&'a AtomicUsize);
        impl Drop for Pause<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
        self.paused.fetch_add(1, Ordering::SeqCst);
        Pause(&self.paused)
    }

    /// Reaps for ever. SIGCHLD must be blocked in all threads.
    pub(super) fn reap(self: Arc<Self>) {
        loop {
            // The timeout makes up for a signal that was taken while the reaping was paused.
            rewarm_sys::process::child_ended(Duration::from_millis(250));
            let owned = self.lock();
            if self.paused.load(Ordering::SeqCst) == 0 {
                rewarm_sys::process::reap_orphans(|pid| owned.contains(&pid));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.owned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a child that [`Children::spawn`] started, until the deadline, the loss of the lease or the doom.
    pub(super) fn wait(
        &self,
        child: &mut Child,
        lease: &UnixStream,
        deadline: Instant,
        doomed: impl Fn() -> bool,
    ) -> io::Result<Outcome> {
        let pidfd = PidFd::open(child.id())?;
        loop {
            let mut fds = [
                PollFd::new(pidfd.as_fd(), PollFlags::POLLIN),
                // A hang-up is always told.
                PollFd::new(lease.as_fd(), PollFlags::empty()),
            ];
            match poll(&mut fds, PollTimeout::from(STEP_MS)) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let told = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
            if told(&fds[0]) {
                let status = child.wait()?;
                self.release(child.id());
                return Ok(Outcome::Ended(status));
            }
            if told(&fds[1]) {
                return Ok(Outcome::Lost);
            }
            if doomed() {
                return Ok(Outcome::Doomed);
            }
            if Instant::now() > deadline {
                return Ok(Outcome::Late);
            }
        }
    }

    /// Gives a child `grace` to end by itself, then kills it, gives its own children (CRIU) as long to end in order, then
    /// kills them too.
    pub(super) fn end(&self, child: &mut Child, grace: Duration) -> io::Result<ExitStatus> {
        let pidfd = PidFd::open(child.id())?;
        let gone = |pidfd: &PidFd, limit: Duration| {
            let deadline = Instant::now() + limit;
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                if pidfd.ended_within(left).unwrap_or(true) {
                    return true;
                }
                if left.is_zero() {
                    return false;
                }
            }
        };
        if !gone(&pidfd, grace) {
            let descendants = descendants(child.id());
            child.kill()?;
            for descendant in descendants {
                if !gone(&descendant, Duration::from_secs(2)) {
                    // Ended meanwhile: what was wanted.
                    let _ = descendant.signal(Signal::SIGKILL);
                }
            }
        }
        let status = child.wait()?;
        self.release(child.id());
        Ok(status)
    }
}

/// All that descend from a process and are in its own pid namespace's view, nearest first.
pub(super) fn descendants(pid: u32) -> Vec<PidFd> {
    let mut numbers = vec![pid];
    let mut at = 0;
    while at < numbers.len() && numbers.len() < 4096 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", numbers[at])).into_iter().flatten().flatten();
        for task in tasks {
            let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            numbers.extend(children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
        }
        at += 1;
    }
    numbers.iter().skip(1).filter_map(|number| PidFd::open(*number).ok()).collect()
}

/// Sends a signal to a process, or with a negative number to its group. One that is gone is no error.
pub(super) fn signal(pid: i32, signal: i32) {
    if let Ok(signal) = Signal::try_from(signal) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}
