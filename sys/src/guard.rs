//! A process that shares its parent's table of descriptors and outlives it.
//!
//! A userfaultfd that its owner has read from a fork event exists nowhere else until the owner has sent a duplicate
//! away. If the owner dies in between, the child's missing pages read as zeros. The guard closes that gap: it is made
//! with CLONE_FILES, so whatever the owner had open stays open as long as the guard lives. When the owner dies, the
//! guard says the farewell on a socket and waits until the other end is closed; only then does it end too.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::signal::Signal;

use crate::pidfd::PidFd;

/// The guard of the calling process. Dropping it ends the guard.
#[derive(Debug)]
pub struct Guard {
    process: PidFd,
    pid: libc::pid_t,
    /// The guard waits at these numbers of the shared table, so they stay open as long as it lives.
    _open: (PidFd, OwnedFd),
}

impl Guard {
    /// Starts a guard of the calling process. When the process dies, `farewell` is written to `socket`.
    ///
    /// Call it before there is anything to guard, and best before there are threads.
    ///
    /// # Errors
    /// When the process or a descriptor cannot be made.
    pub fn start(socket: &UnixStream, farewell: &[u8]) -> io::Result<Guard> {
        let owner = PidFd::open(std::process::id())?;
        // A number of its own: the caller may close its socket while the guard still needs it.
        let socket = OwnedFd::from(socket.try_clone()?);
        let (owner_fd, socket_fd) = (raw(&owner), socket.as_raw_fd());
        // A raw clone and not fork(3): handlers that others registered for fork have no business in the guard.
        let flags = libc::CLONE_FILES | libc::SIGCHLD;
        // SAFETY: without CLONE_VM this is a fork: the child runs on a copy of this stack. It calls only `stand`,
        // which neither allocates nor takes locks, so threads that hold locks at this moment do not matter.
        let pid = unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags), 0, 0, 0, 0) };
        match pid {
            0 => stand(owner_fd, socket_fd, farewell),
            1.. => {
                let pid = libc::pid_t::try_from(pid).expect("pids are int");
                let process = PidFd::open(pid.unsigned_abs())?;
                Ok(Guard { process, pid, _open: (owner, socket) })
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

fn raw(fd: &impl std::os::fd::AsFd) -> RawFd {
    let fd: BorrowedFd<'_> = fd.as_fd();
    fd.as_raw_fd()
}

/// The guard's life. Only calls that are safe after a fork of a process with threads.
fn stand(owner: RawFd, socket: RawFd, farewell: &[u8]) -> ! {
    // SAFETY: plain system calls on open descriptors and on the borrowed bytes; none allocates or locks.
    unsafe {
        // Signals to the owner's group are not for the guard, whose task begins when the owner is dead.
        libc::setsid();
        wait_for(owner, libc::POLLIN);
        let mut sent = 0;
        while sent < farewell.len() {
            let rest = &farewell[sent..];
            let more = libc::send(socket, rest.as_ptr().cast(), rest.len(), libc::MSG_NOSIGNAL);
            if more < 1 {
                break;
            }
            sent += more.unsigned_abs();
        }
        // Hang-up is reported without being asked for.
        wait_for(socket, 0);
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
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_guard_goes_when_it_is_dropped() {
        let (ours, mut theirs) = UnixStream::pair().expect("a socket pair");
        let guard = Guard::start(&ours, b"farewell").expect("a guard");
        let process = PidFd::open(guard.pid().unsigned_abs()).expect("alive");
        assert!(!process.ended_within(Duration::from_millis(20)).expect("polled"));
        drop(guard);
        assert!(process.ended_within(Duration::from_secs(5)).expect("polled"));
        drop(ours);
        let mut heard = Vec::new();
        theirs.read_to_end(&mut heard).expect("the end");
        assert!(heard.is_empty(), "no farewell from a guard that was dismissed: {heard:?}");
    }
}
