//! What the pager asks of the kernel about one address space: a userfaultfd, or what tests put in its place.

use std::fmt::Debug;
use std::io;

use nix::errno::Errno;
use rewarm_sys::uffd::{Event, Progress, Uffd};

/// The calls of [`Uffd`] that filling needs; what they promise stands there.
pub(super) trait Userfault: Debug + Send + Sync + Sized + 'static {
    fn read(&self, out: &mut Vec<Event<Self>>) -> io::Result<usize>;
    fn copy(&self, target: u64, source: &[u8]) -> Progress;
    fn zero(&self, start: u64, length: u64) -> Progress;
    fn wake(&self, start: u64, length: u64) -> Result<(), Errno>;
    fn unregister(&self, start: u64, length: u64) -> Result<(), Errno>;

    /// Called where another thread may come first and the caller holds no lock: a test decides here who goes on.
    /// True if somebody else was given the turn, so that there is no need to wait for him.
    fn turn() -> bool {
        false
    }
}

impl Userfault for Uffd {
    fn read(&self, out: &mut Vec<Event>) -> io::Result<usize> {
        Uffd::read(self, out)
    }

    fn copy(&self, target: u64, source: &[u8]) -> Progress {
        Uffd::copy(self, target, source)
    }

    fn zero(&self, start: u64, length: u64) -> Progress {
        Uffd::zero(self, start, length)
    }

    fn wake(&self, start: u64, length: u64) -> Result<(), Errno> {
        Uffd::wake(self, start, length)
    }

    fn unregister(&self, start: u64, length: u64) -> Result<(), Errno> {
        Uffd::unregister(self, start, length)
    }
}
