//! What can go wrong, by what the caller can do about it.

use std::io;
use std::path::{Path, PathBuf};

use rewarm_report::{Class, Classify, Remote};

use crate::spec::Name;

/// A failure of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value that a user wrote is malformed.
    #[error("{what} {value:?}: expected {expected}")]
    Malformed {
        /// What the value is for.
        what: &'static str,
        /// The value seen.
        value: String,
        /// The form expected.
        expected: &'static str,
    },
    /// Another replica has this name.
    #[error("replica {name} exists already and is {status}")]
    NameInUse {
        /// The name.
        name: Name,
        /// What that replica does.
        status: crate::record::Status,
    },
    /// No replica has this name.
    #[error("no replica is named {name}")]
    UnknownName {
        /// The name.
        name: Name,
    },
    /// The replica exists, but its server has ended.
    #[error("replica {name} is not running: it is {status}")]
    NotRunning {
        /// The name.
        name: Name,
        /// What became of it.
        status: crate::record::Status,
    },
    /// A port of the host is taken.
    #[error("publish {address}: {source}")]
    PortInUse {
        /// The address asked for.
        address: std::net::SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// The specification asks for more than this machine or this user can give.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A stored tree of files is malformed or tries to leave its directory.
    #[error("tree entry {path:?}: {reason}")]
    Tree {
        /// The entry's path.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A call to the system failed.
    #[error("{action} {object}")]
    System {
        /// What was tried, as a verb.
        action: &'static str,
        /// What it was tried on.
        object: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A program failed.
    #[error("{program} ended with {status}: {cause}")]
    Program {
        /// The program and its verb, for example `runc create`.
        program: String,
        /// How it ended.
        status: String,
        /// The line of its log that says why.
        cause: String,
        /// The last lines that it wrote.
        output: Vec<String>,
        /// Its full log, while it exists.
        log: Option<PathBuf>,
    },
    /// The replica must not live any more because of a child of its shim.
    #[error("{operation} ended because {reason}")]
    Resident {
        /// What was given up.
        operation: &'static str,
        /// What the child said or did.
        reason: String,
        /// The log of the program that it worked with, which may know the reason behind it.
        log: PathBuf,
    },
    /// An operation took longer than it may.
    #[error("{operation} took longer than {seconds} s")]
    Deadline {
        /// What took too long.
        operation: &'static str,
        /// The limit in seconds.
        seconds: u64,
    },
    /// The command that asked is gone, so the operation was given up.
    #[error("{operation} was given up because the command that asked for it is gone")]
    Abandoned {
        /// What was given up.
        operation: &'static str,
    },
    /// The replica is busy with something that excludes this.
    #[error("replica {name} is busy: {with}")]
    Busy {
        /// The name.
        name: Name,
        /// What it is busy with.
        with: String,
    },
    /// The replica is not in the state that the request needs.
    #[error("{request} needs a replica that is {expected}, but {name} is {status}")]
    Order {
        /// The request.
        request: &'static str,
        /// The name.
        name: Name,
        /// The state seen.
        status: crate::record::Status,
        /// The state expected.
        expected: &'static str,
    },
    /// The device plane.
    #[error(transparent)]
    Device(Box<rewarm_gpu::Failure>),
    /// What the driver could not checkpoint; nothing was touched.
    #[error("{0}")]
    Unfit(rewarm_gpu::preflight::Unfit),
    /// Device state that cannot be carried; the server was restored before this was said, or is killed.
    #[error(transparent)]
    Carry(Box<rewarm_gpu::carried::CarryError>),
    /// Device memory of a restored server that did not come back.
    #[error("bring device memory back: {0}")]
    Begin(Box<rewarm_gpu::Cause>),
    /// The shim does not speak our protocol, or vanished in the middle of a message.
    #[error("shim of {name}: {reason}")]
    Protocol {
        /// The replica.
        name: Name,
        /// What was wrong.
        reason: String,
    },
    /// The shim carried out the request and it failed there.
    #[error("{request} in the shim of {name}")]
    Shim {
        /// The request.
        request: &'static str,
        /// The replica.
        name: Name,
        /// What the caller can do.
        class: Class,
        /// What went wrong, as a chain.
        source: Remote,
    },
}

/// What a specification asks for that cannot be given here; nothing was started.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// A file or directory that must exist does not.
    #[error("{what} {path}: {source}", path = path.display())]
    Missing {
        /// What the path is for.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// More of something is wanted than there is.
    #[error("{what}: {wanted} wanted, but there is {available}")]
    Exceeds {
        /// What it is about, for example `memory`.
        what: &'static str,
        /// How much was asked for.
        wanted: String,
        /// How much there is.
        available: String,
    },
    /// A kernel feature is missing that the specification needs.
    #[error("{what} needs {feature}, which this machine does not have")]
    Unsupported {
        /// What the specification asks for.
        what: &'static str,
        /// What is missing.
        feature: String,
    },
    /// A user or group name is not known inside the root file system.
    #[error("{what} {name:?} is not in {file}", file = file.display())]
    UnknownUser {
        /// `user` or `group`.
        what: &'static str,
        /// The name.
        name: String,
        /// Where it was looked for.
        file: PathBuf,
    },
    /// A file that cannot be carried to another machine.
    #[error("{path}: a {kind} cannot be part of a snapshot")]
    File {
        /// Its path inside the tree.
        path: String,
        /// What it is.
        kind: &'static str,
    },
}

/// The form in which an error goes to a client, with the log of the program that failed: the full one, or the one with
/// which a resident did. It exists until the client of the shim is dropped.
pub(crate) fn remote(error: &(dyn std::error::Error + 'static)) -> Remote {
    Remote::with_log(error, &|error| match error.downcast_ref::<Error>() {
        Some(Error::Program { log, .. }) => log.clone(),
        Some(Error::Resident { log, .. }) => Some(log.clone()),
        _ => None,
    })
}

impl Error {
    /// The log that says more about this failure, see [`Remote::log`].
    #[must_use]
    pub fn log(&self) -> Option<&Path> {
        match self {
            Self::Shim { source, .. } => source.log(),
            Self::Program { log, .. } => log.as_deref(),
            _ => None,
        }
    }
}

impl Classify for Error {
    fn class(&self) -> Class {
        match self {
            Self::Malformed { .. } => Class::Usage,
            Self::UnknownName { .. } => Class::NotFound,
            Self::Refused(_) | Self::Unfit(_) => Class::Incompatible,
            Self::Tree { .. } => Class::Integrity,
            Self::Device(failure) => failure.class(),
            Self::Carry(error) if matches!(**error, rewarm_gpu::carried::CarryError::Leftover { .. }) => {
                Class::Incompatible
            }
            Self::Carry(_) | Self::Begin(_) => Class::Failed,
            Self::Shim { class, .. } => *class,
            Self::NameInUse { .. }
            | Self::NotRunning { .. }
            | Self::PortInUse { .. }
            | Self::System { .. }
            | Self::Program { .. }
            | Self::Resident { .. }
            | Self::Deadline { .. }
            | Self::Abandoned { .. }
            | Self::Busy { .. }
            | Self::Order { .. }
            | Self::Protocol { .. } => Class::Failed,
        }
    }
}

impl From<rewarm_gpu::carried::CarryError> for Error {
    fn from(error: rewarm_gpu::carried::CarryError) -> Self {
        Self::Carry(Box::new(error))
    }
}

impl From<rewarm_gpu::Failure> for Error {
    fn from(failure: rewarm_gpu::Failure) -> Self {
        Self::Device(Box::new(failure))
    }
}

/// Names the action and the object of a failed system call.
pub(crate) trait Context<T> {
    fn context(self, action: &'static str, object: impl std::fmt::Display) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, action: &'static str, object: impl std::fmt::Display) -> Result<T, Error> {
        self.map_err(|error| Error::System { action, object: object.to_string(), source: error.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_survives_the_way_through_json() {
        let inner = io::Error::from_raw_os_error(13);
        let error = Error::System { action: "mount", object: "overlay".into(), source: inner };
        let remote = remote(&error);
        let json = serde_json::to_string(&remote).expect("json");
        let back: Remote = serde_json::from_str(&json).expect("json");
        assert_eq!(back.chain(), ["mount overlay", "Permission denied (os error 13)"]);
    }
}
