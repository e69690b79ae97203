//! A process named by a descriptor: its number cannot be given to another process behind our back.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

/// A process. Closing it does nothing to the process.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// Opens the process that has this number at the moment.
    ///
    /// # Errors
    /// `ESRCH` if there is none.
    pub fn open(pid: u32) -> io::Result<Self> {
        // SAFETY: plain call; the result is checked.
        let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        let raw = i32::try_from(raw).expect("a file descriptor fits in an int");
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(raw) }))
    }

    /// Takes over a descriptor that came from elsewhere.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `ESRCH` if the process has ended and was reaped.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let info = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: a null siginfo is allowed and means the one that kill(2) would send.
        let result = unsafe {
            libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), signal as libc::c_int, info, 0)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Waits until the process has ended (reaped or not): true; or for `timeout`: false.
    ///
    /// # Errors
    /// Those of `poll(2)`.
    pub fn ended_within(&self, timeout: Duration) -> io::Result<bool> {
        let millis = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, millis) {
            Ok(count) => Ok(count > 0),
            Err(nix::errno::Errno::EINTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_seen_alive_then_ended() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let pidfd = PidFd::open(child.id()).expect("open");
        assert!(!pidfd.ended_within(Duration::from_millis(10)).expect("poll"));
        pidfd.signal(Signal::SIGKILL).expect("signal");
        assert!(pidfd.ended_within(Duration::from_secs(5)).expect("poll"));
        child.wait().expect("reap");
        let error = pidfd.signal(Signal::SIGKILL).expect_err("reaped");
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
    }
}
