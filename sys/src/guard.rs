//! A process that shares its parent's table of descriptors and outlives it.
//!
//! A userfaultfd that its owner has read from a fork event exists nowhere else until the owner has sent a duplicate
//! away. If the owner dies in between, the child's missing pages read as zeros. The guard closes that gap: it is made
//! with CLONE_FILES, so whatever the owner had open stays open as long as the guard lives. When the owner dies, the
//! guard ends the owner's side of the sockets that it was given, so that their peers hear of the death although the
//! sockets are still open, and waits until the peers have closed theirs; only then does it end too.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sys::signal::Signal;

use crate::pidfd::PidFd;

/// Sockets that a guard can hang up.
pub const SOCKETS_MAX: usize = 4;

/// The guard of the calling process. Dropping it ends the guard.
#[derive(Debug)]
pub struct Guard {
    process: PidFd,
    pid: libc::pid_t,
    /// The guard waits at these numbers of the shared table, so they stay open as long as it lives.
    _open: (PidFd, Vec<OwnedFd>),
}

impl Guard {
    /// Starts a guard of the calling process, which hangs up `sockets` when the process dies. Their other ends must be
    /// in other processes, or nobody hears it and the guard never ends.
    ///
    /// Call it before there is anything to guard, and best before there are threads. A process that has a guard and
    /// wants a peer to see the end of a socket has to shut the socket down or drop the guard.
    ///
    /// # Errors
    /// When the process or a descriptor cannot be made.
    ///
    /// # Panics
    /// For more than [`SOCKETS_MAX`] sockets.
    pub fn start(sockets: &[BorrowedFd<'_>]) -> io::Result<Guard> {
        assert!(sockets.len() <= SOCKETS_MAX, "{} sockets, at most {SOCKETS_MAX}", sockets.len());
        let owner = PidFd::open(std::process::id())?;
        // Numbers of their own: the caller may close its sockets while the guard still needs them.
        let sockets = sockets.iter().map(BorrowedFd::try_clone_to_owned).collect::<io::Result<Vec<_>>>()?;
        let owner_fd = owner.as_fd().as_raw_fd();
        let mut numbers = [-1; SOCKETS_MAX];
        for (number, socket) in numbers.iter_mut().zip(&sockets) {
            *number = socket.as_raw_fd();
        }
        // A raw clone and not fork(3): handlers that others registered for fork have no business in the guard.
        let flags = libc::CLONE_FILES | libc::SIGCHLD;
        // SAFETY: without CLONE_VM this is a fork: the child runs on a copy of this stack. It calls only `stand`,
        // which neither allocates nor takes locks, so threads that hold locks at this moment do not matter.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags), 0, 0, 0, 0) };
        match pid {
            0 => stand(owner_fd, numbers),
            1.. => {
                let pid = libc::pid_t::try_from(pid).expect("pids are int");
                let process = PidFd::open(pid.unsigned_abs())?;
                Ok(Guard { process, pid, _open: (owner, sockets) })
            }
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Pid of the guard.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.process.signal(Signal::SIGKILL);
        let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(self.pid), None);
    }
}

/// The guard's life. Only calls that are safe after a fork of a process with threads.
fn stand(owner: RawFd, sockets: [RawFd; SOCKETS_MAX]) -> ! {
    // SAFETY: plain system calls on open descriptors and numbers; none allocates or locks.
    unsafe {
        // Signals to the owner's group are not for the guard, whose task begins when the owner is dead.
        libc::setsid();
        wait_for(owner, libc::POLLIN);
        for socket in sockets.into_iter().filter(|socket| *socket >= 0) {
            libc::shutdown(socket, libc::SHUT_WR);
        }
        // Hang-up is reported without being asked for, once both sides have ended.
        for socket in sockets.into_iter().filter(|socket| *socket >= 0) {
            wait_for(socket, 0);
        }
        libc::_exit(0)
    }
}

/// Waits until poll reports something.
fn wait_for(fd: RawFd, events: libc::c_short) {
    let mut fds = libc::pollfd { fd, events, revents: 0 };
    // SAFETY: one valid entry.
    while unsafe { libc::poll(&raw mut fds, 1, -1) } < 1 {}
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_guard_goes_when_it_is_dropped_and_hangs_nothing_up() {
        let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
        let guard = Guard::start(&[ours.as_fd()]).expect("a guard");
        let process = PidFd::open(guard.pid().unsigned_abs()).expect("alive");
        assert!(!process.ended_within(Duration::from_millis(20)).expect("polled"));
        drop(guard);
        assert!(process.ended_within(Duration::from_secs(5)).expect("polled"));
        theirs.set_nonblocking(true).expect("set");
        let open = theirs.read(&mut [0]).expect_err("nothing was said and nothing hung up");
        assert_eq!(open.kind(), io::ErrorKind::WouldBlock);
    }
}
