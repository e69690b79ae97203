//! What the two processes of `rewarm serve` say to each other.
//!
//! The parent (root) makes and ends replicas and opens connections into them; the gateway (no rights) has the clients and
//! decides. One message is a frame of JSON; descriptors travel with its first byte. Both sides only tell: an answer is a
//! message of its own, which names what it is about.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use rewarm_autoscaler::pool::Tier;
use rewarm_sys::fdpass;
use serde::{Deserialize, Serialize};

use crate::replicas::{Existing, Known, Started};

/// Longest message: a configuration with certificates, and the replicas of a large machine.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Most descriptors in one message: the listening sockets of a configuration.
const FDS_MAX: usize = 200;

/// What an address is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Purpose {
    /// Clients of pools.
    Clients,
    /// The admin API.
    Admin,
    /// The KEDA scaler.
    Keda,
}

/// Everything that the gateway cannot read by itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Configure {
    /// The configuration's text, which the parent has found to be good.
    pub(crate) text: String,
    /// Its file, for messages.
    pub(crate) path: PathBuf,
    /// New listening sockets, in the order of the descriptors that come along.
    pub(crate) listening: Vec<(Purpose, SocketAddr)>,
    /// Certificate and key in PEM.
    pub(crate) tls: Option<(String, String)>,
    /// What the admin API wants as a token.
    pub(crate) token: Option<String>,
    /// Replicas that are there already; at the beginning only.
    pub(crate) existing: Vec<Existing>,
    /// What all devices have together, where that is known.
    pub(crate) device_bytes: Option<u64>,
    /// What new pools' snapshots are, where memory is limited: what is there and what is started must be counted from the
    /// first moment on.
    pub(crate) known: BTreeMap<String, Known>,
}

/// From the parent to the gateway.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToGateway {
    /// Serve so, from now on.
    Configure(Box<Configure>),
    /// A pool's snapshot was looked at.
    Known { pool: String, known: Known },
    /// A replica serves.
    Started { name: String, started: Started },
    /// A replica is paused.
    Paused { name: String },
    /// A paused replica serves again.
    Woken { name: String },
    /// A start, a pause or a wake failed.
    Failed { name: String, reason: String },
    /// A replica that was to go is gone.
    Stopped { name: String },
    /// A replica ended by itself.
    Ended { name: String, reason: String },
    /// A capture is over.
    Captured { name: String, problem: Option<String> },
    /// A connection is open; it comes along unless there is an error.
    Dialled { number: u64, error: Option<(i32, String)> },
    /// Answer what is there, take nothing more, and say when that is done.
    Finish,
}

/// From the gateway to the parent.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToParent {
    /// It serves as configured.
    Configured,
    /// Make a replica.
    Start { pool: String, name: String, tier: Tier },
    /// Start a replica cold, and publish a snapshot of it.
    Capture { pool: String, name: String },
    /// Give a start up.
    GiveUp { name: String },
    /// Pause a replica.
    Pause { name: String },
    /// Wake a replica.
    Wake { name: String },
    /// End a replica.
    Stop { name: String, why: String },
    /// Connect to a replica's server.
    Dial { number: u64, name: String, port: u16 },
    /// Nothing is in flight any more.
    Finished,
}

/// The writing half, for any number of writers.
#[derive(Debug, Clone)]
pub(crate) struct Line(Arc<(UnixStream, Mutex<()>)>);

impl Line {
    pub(crate) fn new(socket: UnixStream) -> Self {
        Self(Arc::new((socket, Mutex::new(()))))
    }

    /// Sends a message. Blocks while the other side is busy, which it is for moments only.
    pub(crate) fn tell<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let body = serde_json::to_vec(message).map_err(io::Error::other)?;
        let _turn = self.0.1.lock().unwrap_or_else(PoisonError::into_inner);
        fdpass::send_frame(&self.0.0, &body, MESSAGE_BYTES_MAX, fds)
    }

    /// Receives a message; `None` when the other side is gone.
    pub(crate) fn hear<T: for<'a> Deserialize<'a>>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let Some((body, fds)) = fdpass::recv_frame(&self.0.0, MESSAGE_BYTES_MAX, FDS_MAX)? else {
            return Ok(None);
        };
        let message = serde_json::from_slice(&body)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(Some((message, fds)))
    }
}
