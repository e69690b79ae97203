//! Where device state goes when processes are checkpointed, and where it comes from when they are restored.
//!
//! The order of steps (`order.rs`) does not care: it asks a [`DeviceStateSink`] for each checkpoint and a
//! [`DeviceStateSource`] for each restore. There are two ways:
//!
//! - [`InProcess`]: the driver copies device memory into the process's own memory and back. Every driver can.
//! - [`InFile`] and [`Stream`]: custom storage, by which device memory goes past the process ([`crate::custom`]): to a file that
//!   the caller keeps until the server has its devices back, and from the content of a snapshot as it arrives.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use crate::client::{CallError, Helper, Kept};
use crate::custom::Part;
use crate::order::Process;
use crate::ranges::{self, Range};
use crate::topology::Pair;

/// Takes the device state of processes that are checkpointed.
pub trait DeviceStateSink {
    /// The process is locked and held, and will be checkpointed next.
    ///
    /// # Errors
    /// The kernel's; nothing has been touched.
    fn begin(&mut self, pid: i32) -> io::Result<()>;

    /// Checkpoints it; it has `bytes` of device memory at most. Gives the time within the driver.
    ///
    /// # Errors
    /// [`CallError`].
    fn checkpoint(
        &mut self,
        helper: &mut Helper,
        process: &Process,
        bytes: u64,
    ) -> Result<Duration, CallError>;

    /// It is checkpointed: writes down where its device state is.
    ///
    /// # Errors
    /// The kernel's, or that nothing came of a checkpoint that was lost on the way.
    fn end(&mut self, process: &mut Process) -> io::Result<()>;
}

/// Gives the device state of processes that are restored.
pub trait DeviceStateSource {
    /// Restores a process. `pairs` is empty where every device stays. Gives the time within the driver.
    ///
    /// # Errors
    /// [`CallError`].
    fn restore(
        &mut self,
        helper: &mut Helper,
        process: &Process,
        pairs: &[Pair],
    ) -> Result<Duration, CallError>;
}

/// Both, for a server that goes on afterwards.
pub trait DeviceState: DeviceStateSink + DeviceStateSource {}

impl<T: DeviceStateSink + DeviceStateSource> DeviceState for T {}

/// The process's own memory.
#[derive(Debug, Default)]
pub struct InProcess {
    /// Its memory before the checkpoint: the driver does not tell where it puts its copies.
    before: BTreeMap<i32, Vec<Range>>,
}

impl DeviceStateSink for InProcess {
    fn begin(&mut self, pid: i32) -> io::Result<()> {
        self.before.insert(pid, ranges::private_memory(pid)?);
        Ok(())
    }

    fn checkpoint(
        &mut self,
        helper: &mut Helper,
        process: &Process,
        bytes: u64,
    ) -> Result<Duration, CallError> {
        helper.checkpoint(process.pid, bytes)
    }

    fn end(&mut self, process: &mut Process) -> io::Result<()> {
        let after = ranges::private_memory(process.pid)?;
        let before = self.before.remove(&process.pid).unwrap_or_default();
        process.copies = ranges::added(&before, &after);
        Ok(())
    }
}

impl DeviceStateSource for InProcess {
    fn restore(
        &mut self,
        helper: &mut Helper,
        process: &Process,
        pairs: &[Pair],
    ) -> Result<Duration, CallError> {
        helper.restore(process.pid, process.bytes(), pairs)
    }
}

/// A file that holds the device memory of all processes of a server, one behind the other.
#[derive(Debug)]
pub struct InFile {
    file: OwnedFd,
    /// Where the next process's begins.
    end: u64,
    stored: BTreeMap<i32, Vec<Part>>,
}

impl InFile {
    /// An empty file. It should have its space already: a checkpoint that runs out of it cannot be undone.
    #[must_use]
    pub fn new(file: OwnedFd) -> Self {
        Self { file, end: 0, stored: BTreeMap::new() }
    }
}

impl DeviceStateSink for InFile {
    fn begin(&mut self, _: i32) -> io::Result<()> {
        Ok(())
    }

    fn checkpoint(
        &mut self,
        helper: &mut Helper,
        process: &Process,
        bytes: u64,
    ) -> Result<Duration, CallError> {
        // Once more, after a restore that was given up: at the same place, since nothing has run in between.
        let offset = self.stored.get(&process.pid).and_then(|parts| parts.first()).map(|part| part.offset);
        let offset = offset.unwrap_or(self.end);
        let (time, parts) = helper.store(process.pid, bytes, self.file.as_fd(), offset)?;
        let end = offset + parts.iter().map(|part| part.bytes).sum::<u64>();
        self.end = self.end.max(end);
        self.stored.insert(process.pid, parts);
        Ok(time)
    }

    fn end(&mut self, process: &mut Process) -> io::Result<()> {
        let lost = || io::Error::other("where its device memory was written was lost with the GPU helper");
        process.direct = self.stored.get(&process.pid).cloned().ok_or_else(lost)?;
        Ok(())
    }
}

impl DeviceStateSource for InFile {
    fn restore(
        &mut self,
        helper: &mut Helper,
        process: &Process,
        pairs: &[Pair],
    ) -> Result<Duration, CallError> {
        let parts = self.stored.get(&process.pid).unwrap_or(&process.direct);
        helper.load(process.pid, parts, Kept::File(self.file.as_fd()), pairs)
    }
}

/// The content of a snapshot, which comes through a socket: process after process, part after part.
#[derive(Debug)]
pub struct Stream {
    socket: OwnedFd,
    patience: Duration,
}

impl Stream {
    /// `patience`: how long all of it may take beside the moving.
    #[must_use]
    pub fn new(socket: OwnedFd, patience: Duration) -> Self {
        Self { socket, patience }
    }
}

impl DeviceStateSource for Stream {
    fn restore(
        &mut self,
        helper: &mut Helper,
        process: &Process,
        pairs: &[Pair],
    ) -> Result<Duration, CallError> {
        let from = Kept::Stream { socket: self.socket.as_fd(), patience: self.patience };
        helper.load(process.pid, &process.direct, from, pairs)
    }
}
