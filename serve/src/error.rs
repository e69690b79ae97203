//! What can go wrong, by what the caller can do about it.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use rewarm_report::{Class, Classify};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure to serve.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("read {what} {}", path.display())]
    ReadFile {
        /// `configuration`, `certificate`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The configuration is not TOML.
    #[error("parse configuration {}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A key that no configuration has.
    #[error("unknown key {key:?} in {place}; the nearest known key is {nearest:?}")]
    UnknownKey {
        /// The key as written.
        key: String,
        /// Where it stands.
        place: String,
        /// The known key that is most like it.
        nearest: &'static str,
    },
    /// A value that makes no sense.
    #[error("{key} of {place} is {seen}, expected {expected}")]
    BadValue {
        /// The key.
        key: &'static str,
        /// Where it stands.
        place: String,
        /// The value.
        seen: String,
        /// What would be good.
        expected: String,
    },
    /// Another `serve` has the state folder.
    #[error("another rewarm serve works in {}, expected at most one", state.display())]
    Taken {
        /// The folder.
        state: PathBuf,
    },
    /// An address cannot be had.
    #[error("listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Certificate or key.
    #[error(transparent)]
    Tls(#[from] rewarm_gateway::tls::TlsError),
    /// The gateway process.
    #[error("gateway: {doing}")]
    Gateway {
        /// What was done.
        doing: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The gateway process ends again and again.
    #[error("the gateway ended {times} times in a row; its log is the output of this program")]
    GatewayDies {
        /// How often.
        times: u32,
    },
    /// A pool of which no replica could be made.
    #[error("{problem}")]
    Pools {
        /// What is wrong with it.
        problem: String,
    },
    /// The replicas that are there cannot be listed.
    #[error("look for replicas: {reason}")]
    Replicas {
        /// Why not.
        reason: String,
    },
    /// A policy or one of its settings.
    #[error(transparent)]
    Policy(#[from] rewarm_autoscaler::Error),
}

impl Classify for Error {
    fn class(&self) -> Class {
        match self {
            Error::Taken { .. }
            | Error::Listen { .. }
            | Error::Gateway { .. }
            | Error::GatewayDies { .. }
            | Error::Replicas { .. } => Class::Failed,
            _ => Class::Usage,
        }
    }
}
