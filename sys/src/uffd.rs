//! userfaultfd: the holder of the descriptor answers page faults of another address space and hears of its changes.
//!
//! Answers for the calls and for keeping their errno; it decides nothing. What the errnos mean to a caller:
//!
//! | call | errno | meaning |
//! |---|---|---|
//! | copy, zero | `EAGAIN` | an event waits to be read, or was read but its thread has not gone on yet: read events, try again |
//! | copy, zero | `EEXIST` | the first page is already there: go on one page further |
//! | copy, zero | `ENOENT` | the range is not registered, or not inside one mapping |
//! | copy, zero | `ESRCH` | the address space is gone |
//!
//! A copy that stops in the middle reports the bytes done and then fails at the page that stopped it.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use crate::abi;

/// Messages taken from the kernel by one read.
const MESSAGES_PER_READ: usize = 32;

/// One message of a userfaultfd. Addresses and lengths are in bytes. `U` is what stands for a child's userfaultfd.
#[derive(Debug)]
pub enum Event<U = Uffd> {
    /// A thread waits for a page.
    Fault {
        /// The address that was touched, not rounded.
        address: u64,
        /// Whether the touch was a write.
        write: bool,
    },
    /// The address space was duplicated by fork; the child waits for nothing and is registered in the same places.
    Fork {
        /// The child's own userfaultfd.
        uffd: U,
    },
    /// Pages moved, with what was missing among them.
    Remap {
        /// Old address.
        from: u64,
        /// New address.
        to: u64,
        /// Length before the move.
        length: u64,
    },
    /// The content of the range is being given up (MADV_DONTNEED, MADV_REMOVE): it reads as zeros from then on.
    Remove {
        /// First byte.
        start: u64,
        /// First byte after the range.
        end: u64,
    },
    /// The range is not mapped any more.
    Unmap {
        /// First byte.
        start: u64,
        /// First byte after the range.
        end: u64,
    },
}

/// How far a copy or a zeroing came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done, a multiple of the page size.
    pub bytes: u64,
    /// Why it did not come further; `None` means that all is done.
    pub stopped: Option<Errno>,
}

/// A userfaultfd. Dropping the last duplicate unregisters everything: missing pages then read as zeros without a sign.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl From<OwnedFd> for Uffd {
    fn from(fd: OwnedFd) -> Uffd {
        Uffd(fd)
    }
}

impl From<Uffd> for OwnedFd {
    fn from(uffd: Uffd) -> OwnedFd {
        uffd.0
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Uffd {
    /// Makes a userfaultfd for the calling process that reports fork, remap, remove and unmap, as CRIU's tasks do.
    ///
    /// # Errors
    /// `EPERM` without CAP_SYS_PTRACE, `ENOSYS` or `EINVAL` where the kernel lacks it.
    pub fn create() -> io::Result<Uffd> {
        // SAFETY: the call takes flags only and returns a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = RawFd::try_from(fd).expect("the kernel returns descriptors as int");
        // SAFETY: the descriptor was just made and has no other owner.
        let uffd = Uffd(unsafe { OwnedFd::from_raw_fd(fd) });
        let mut api = abi::UffdioApi {
            api: abi::UFFD_API,
            features: abi::UFFD_FEATURE_EVENT_FORK
                | abi::UFFD_FEATURE_EVENT_REMAP
                | abi::UFFD_FEATURE_EVENT_REMOVE
                | abi::UFFD_FEATURE_EVENT_UNMAP,
            ioctls: 0,
        };
        // SAFETY: `UffdioApi` is the structure that this request reads and writes.
        unsafe { uffd.ioctl(abi::UFFDIO_API, &mut api) }?;
        Ok(uffd)
    }

    /// A second descriptor of the same userfaultfd, close-on-exec.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn duplicate(&self) -> io::Result<Uffd> {
        Ok(Uffd(self.0.try_clone()?))
    }

    /// Registers a range of the caller's own memory for missing pages.
    ///
    /// # Safety
    /// Missing pages of the range get the content that a holder of the descriptor chooses: no Rust object may live
    /// in the range, and it may only be read through raw pointers.
    ///
    /// # Errors
    /// The kernel's refusal, such as `EINVAL` for a range that is not page-aligned or not anonymous.
    pub unsafe fn register(&self, start: u64, length: u64) -> io::Result<()> {
        let mut register = abi::UffdioRegister {
            range: abi::UffdioRange { start, len: length },
            mode: abi::UFFDIO_REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: `UffdioRegister` is the structure that this request reads and writes.
        Ok(unsafe { self.ioctl(abi::UFFDIO_REGISTER, &mut register) }?)
    }

    /// Gives the range back to the kernel and wakes who waits in it; its missing pages are zero pages from then on.
    ///
    /// # Errors
    /// `EINVAL` when no mapping lies in the range, `ENOMEM` when the address space is gone.
    pub fn unregister(&self, start: u64, length: u64) -> Result<(), Errno> {
        let mut range = abi::UffdioRange { start, len: length };
        // SAFETY: `UffdioRange` is the structure that this request reads.
        unsafe { self.ioctl(abi::UFFDIO_UNREGISTER, &mut range) }
    }

    /// Wakes the threads that wait in the range; each touches its page again. The range need not be mapped.
    ///
    /// # Errors
    /// `EINVAL` for a range that is not page-aligned.
    pub fn wake(&self, start: u64, length: u64) -> Result<(), Errno> {
        let mut range = abi::UffdioRange { start, len: length };
        // SAFETY: `UffdioRange` is the structure that this request reads.
        unsafe { self.ioctl(abi::UFFDIO_WAKE, &mut range) }
    }

    /// Copies `source` (whole pages) to the missing pages at `target` and wakes who waits there.
    #[must_use]
    pub fn copy(&self, target: u64, source: &[u8]) -> Progress {
        let mut copy = abi::UffdioCopy {
            dst: target,
            src: source.as_ptr().addr() as u64,
            len: source.len() as u64,
            mode: 0,
            copy: 0,
        };
        // SAFETY: `UffdioCopy` is the structure that this request reads and writes; `source` is borrowed until it
        // returns.
        let result = unsafe { self.ioctl(abi::UFFDIO_COPY, &mut copy) };
        progress(result, copy.copy, copy.len)
    }

    /// Puts zero pages where pages are missing in the range and wakes who waits there.
    #[must_use]
    pub fn zero(&self, start: u64, length: u64) -> Progress {
        let mut zero =
            abi::UffdioZeropage { range: abi::UffdioRange { start, len: length }, mode: 0, zeropage: 0 };
        // SAFETY: `UffdioZeropage` is the structure that this request reads and writes.
        let result = unsafe { self.ioctl(abi::UFFDIO_ZEROPAGE, &mut zero) };
        progress(result, zero.zeropage, length)
    }

    /// Takes the messages that wait, at most 32, and appends them to `out`. Returns 0 when none waits.
    ///
    /// The kernel hands out faults before events, whatever came first.
    ///
    /// # Errors
    /// A failing read; `InvalidData` for a message that this interface does not know.
    pub fn read(&self, out: &mut Vec<Event>) -> io::Result<usize> {
        let mut messages = [abi::UffdMsg::default(); MESSAGES_PER_READ];
        // SAFETY: the buffer is writable memory of the length given, and any bytes make a valid `UffdMsg`.
        let got =
            unsafe { libc::read(self.0.as_raw_fd(), messages.as_mut_ptr().cast(), size_of_val(&messages)) };
        if got < 0 {
            return match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
                error => Err(error),
            };
        }
        let count = got.unsigned_abs() / size_of::<abi::UffdMsg>();
        for message in &messages[..count] {
            out.push(event(message)?);
        }
        Ok(count)
    }

    /// # Safety
    /// `T` is the structure that `request` names.
    unsafe fn ioctl<T>(&self, request: u64, argument: &mut T) -> Result<(), Errno> {
        // SAFETY: the descriptor is open, and by this function's contract the argument is what the request expects.
        let result =
            unsafe { libc::ioctl(self.0.as_raw_fd(), request as libc::Ioctl, std::ptr::from_mut(argument)) };
        if result < 0 { Err(Errno::last()) } else { Ok(()) }
    }
}

fn progress(result: Result<(), Errno>, done: i64, wanted: u64) -> Progress {
    let bytes = match result {
        Ok(()) => wanted,
        // The field holds a negative errno or was not written when nothing was done.
        Err(_) => u64::try_from(done).unwrap_or(0),
    };
    Progress { bytes, stopped: result.err() }
}

fn event(message: &abi::UffdMsg) -> io::Result<Event> {
    let [first, second, third] = message.words;
    Ok(match message.event {
        abi::UFFD_EVENT_PAGEFAULT => {
            Event::Fault { address: second, write: first & abi::UFFD_PAGEFAULT_FLAG_WRITE != 0 }
        }
        abi::UFFD_EVENT_FORK => {
            let fd = RawFd::try_from(first & u64::from(u32::MAX))
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            // SAFETY: the kernel has just put this descriptor into our table for us to own.
            Event::Fork { uffd: Uffd(unsafe { OwnedFd::from_raw_fd(fd) }) }
        }
        abi::UFFD_EVENT_REMAP => Event::Remap { from: first, to: second, length: third },
        abi::UFFD_EVENT_REMOVE => Event::Remove { start: first, end: second },
        abi::UFFD_EVENT_UNMAP => Event::Unmap { start: first, end: second },
        other => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("userfaultfd message {other:#x} is not known"),
            ));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_in_the_middle_keeps_bytes_and_errno() {
        assert_eq!(progress(Ok(()), 8192, 8192), Progress { bytes: 8192, stopped: None });
        let partial = progress(Err(Errno::EAGAIN), 4096, 8192);
        assert_eq!(partial, Progress { bytes: 4096, stopped: Some(Errno::EAGAIN) });
        let nothing = progress(Err(Errno::EEXIST), -17, 8192);
        assert_eq!(nothing, Progress { bytes: 0, stopped: Some(Errno::EEXIST) });
    }

    #[test]
    fn unknown_messages_are_refused() {
        let message = abi::UffdMsg { event: 0x77, ..abi::UffdMsg::default() };
        assert!(event(&message).is_err());
    }
}
