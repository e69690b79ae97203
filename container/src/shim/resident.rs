//! Children of the shim without which the replica must not live: the pager.
//!
//! The shim starts a resident beside runc, before CRIU can ask for it. It finds a control socket as descriptor [`CONTROL_FD`] and the descriptors that
//! the client gave from [`FIRST_FD`] up. Over the control socket it sends [`ToShim`] messages: `ready` (it serves CRIU; a restore without that word fails),
//! `hold` with descriptors (the shim keeps duplicates until `done`, so that a dead pager leaves its server stopped and not
//! reading zeros), `may_run` (what must be there before the server runs is), `done` (the replica no longer needs it), `failed` with a reason. The shim sends [`FromShim::Restored`]
//! with a pidfd of the server's init, by which a resident kills the server where the shim itself dies (end of file).
//!
//! A resident that ends or fails before `done` ends the replica; the reason is in `exit.json`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use serde::{Deserialize, Serialize};

use crate::shim::protocol;

/// The number under which a resident finds its control socket.
pub const CONTROL_FD: i32 = 3;
/// The number of the first of the descriptors that the client gave.
pub const FIRST_FD: i32 = 4;

/// What a resident tells the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToShim {
    /// CRIU may start.
    Ready,
    /// Keep duplicates of the descriptors that come with this message.
    Hold,
    /// Shared and device memory are in place, and the rest follows when it is touched: the driver may be called, and a server that was
    /// only stopped for this runs.
    MayRun,
    /// The replica no longer needs this resident.
    Done,
    /// The replica's memory can no longer be trusted.
    Failed(String),
}

/// What the shim tells a resident.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromShim {
    /// The server is restored. A pidfd of its init comes with this message.
    Restored {
        /// Its process number as the host sees it.
        pid: u32,
    },
}

/// The resident's end of the control socket.
#[derive(Debug)]
pub struct Control(UnixStream);

impl Control {
    /// Takes over the descriptor that the shim left. Call it once, first thing in the process.
    ///
    /// # Errors
    /// If this process was not started by a shim.
    pub fn inherited() -> io::Result<Self> {
        Ok(Self(rewarm_sys::process::take_inherited(CONTROL_FD)?.into()))
    }

    /// Takes over descriptor number `index` of those that the client gave.
    ///
    /// # Errors
    /// If there is none.
    pub fn given(index: i32) -> io::Result<OwnedFd> {
        rewarm_sys::process::take_inherited(FIRST_FD + index)
    }

    /// Tells the shim something.
    ///
    /// # Errors
    /// If the shim is gone.
    pub fn tell(&self, message: &ToShim, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        protocol::send(&self.0, message, fds)
    }

    /// The same socket once more, for a thread that listens while another speaks.
    ///
    /// # Errors
    /// If this process has no descriptor left.
    pub fn duplicate(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Waits for the shim's next word; `None` if it is gone.
    ///
    /// # Errors
    /// If the message is malformed.
    pub fn next(&self) -> io::Result<Option<(FromShim, Vec<OwnedFd>)>> {
        protocol::receive(&self.0)
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
