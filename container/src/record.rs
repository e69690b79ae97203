//! What is written down about a replica: `replica.json` while it lives, `exit.json` when it has ended.

use std::fmt;
use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Context, Error};
use crate::spec::{Name, Publish, Spec};

/// What a replica does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It is being made and nobody has committed it yet.
    Starting,
    /// It serves.
    Ready,
    /// It exists but its processes are frozen.
    Frozen,
    /// It is being stopped.
    Stopping,
    /// Its server has ended.
    Exited,
    /// Its shim or its pager died, or the machine was restarted.
    Crashed,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Frozen => "frozen",
            Self::Stopping => "stopping",
            Self::Exited => "exited",
            Self::Crashed => "crashed",
        })
    }
}

/// Where a replica's first instruction came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "started")]
pub enum Origin {
    /// Its command was started.
    Cold,
    /// It was restored.
    Restored {
        /// The snapshot's reference, with its digest.
        source: String,
    },
}

/// `replica.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The replica.
    pub name: Name,
    /// Different for every replica, clones included.
    pub uuid: Uuid,
    /// 0 for a cold start, one more for each restore of a restored one.
    pub generation: u64,
    /// When it was made.
    pub created: Timestamp,
    /// Cold or restored.
    #[serde(flatten)]
    pub origin: Origin,
    /// What was asked for.
    pub spec: Spec,
    /// What it does.
    pub status: Status,
    /// Process number of the shim.
    pub shim_pid: u32,
    /// Process number of the server's first process, seen from the host.
    pub pid: Option<u32>,
    /// Name of its cgroup below each hierarchy.
    pub cgroup: String,
    /// Published ports, with the ports that the kernel chose.
    pub published: Vec<Publish>,
}

/// `identity.json` in `/run/rewarm` inside the replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The replica.
    pub name: Name,
    /// Different for every replica, clones included.
    pub uuid: Uuid,
    /// 0 for a cold start, one more for each restore of a restored one.
    pub generation: u64,
    /// When the replica was made.
    pub time: Timestamp,
}

/// How the server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It returned this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
    /// Nobody was there to see it.
    Unknown,
}

impl ExitStatus {
    /// The number that a shell would show: the code, or 128 and the signal.
    #[must_use]
    pub fn code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
            Self::Unknown => 255,
        }
    }
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "code {code}"),
            Self::Signal(signal) => match nix::sys::signal::Signal::try_from(*signal) {
                Ok(known) => write!(f, "signal {known}"),
                Err(_) => write!(f, "signal {signal}"),
            },
            Self::Unknown => f.write_str("an unknown status"),
        }
    }
}

/// Why the server ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "cause", content = "reason")]
pub enum Cause {
    /// By itself.
    Ended,
    /// Somebody asked for it to be stopped.
    Stopped,
    /// Somebody asked for it to be killed, and said why.
    Killed(String),
    /// The kernel killed one of its processes because the memory limit was reached.
    OutOfMemory,
    /// A resident (the pager) died or failed before it was done, so its memory could no longer be trusted.
    Resident(String),
    /// The shim died.
    Crashed,
}

/// `exit.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// How the server ended.
    pub status: ExitStatus,
    /// Why.
    #[serde(flatten)]
    pub cause: Cause,
    /// When.
    pub ended: Timestamp,
}

impl fmt::Display for Exit {
    /// For a sentence: `it ended with code 3, since its memory limit was reached`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it ended with {}", self.status)?;
        match &self.cause {
            Cause::Ended | Cause::Stopped => Ok(()),
            Cause::Killed(reason) => write!(f, ", killed: {reason}"),
            Cause::OutOfMemory => f.write_str(", since its memory limit was reached"),
            Cause::Resident(reason) => {
                write!(f, ", killed because its memory could not be trusted: {reason}")
            }
            Cause::Crashed => f.write_str(", together with its shim"),
        }
    }
}

/// Writes a file so that a reader sees the old content or the new, never a part.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let text = serde_json::to_vec_pretty(value).expect("these types have string keys only");
    let temporary = path.with_extension("json.new");
    std::fs::write(&temporary, text).context("write", temporary.display())?;
    std::fs::rename(&temporary, path).context("rename", temporary.display())
}

/// Reads such a file; `None` if it does not exist or is not readable as what it should be.
pub(crate) fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Option<T> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}
