//! What can go wrong, by what the caller can do about it.

use std::io;
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
    /// A policy or one of its settings.
    #[error(transparent)]
    Policy(#[from] rewarm_autoscaler::Error),
}

impl Classify for Error {
    fn class(&self) -> Class {
        Class::Usage
    }
}
