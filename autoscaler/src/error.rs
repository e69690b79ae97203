//! What can go wrong, by what the caller can do about it.

use std::io;
use std::path::PathBuf;

use rewarm_report::{Class, Classify};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure to read what a simulation needs, or to draw what came of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("read {what} {}", path.display())]
    ReadFile {
        /// `trace`, `configuration`, `start times`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file has no line that counts.
    #[error("{what} {} is empty, expected {expected}", path.display())]
    Empty {
        /// What kind of file.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What would be good.
        expected: &'static str,
    },
    /// A line that cannot be understood.
    #[error("{}, line {line}: {field} is {seen:?}, expected {expected}", path.display())]
    BadLine {
        /// The file.
        path: PathBuf,
        /// Its number, from 1.
        line: usize,
        /// The field, or `line` for the whole.
        field: &'static str,
        /// What stands there.
        seen: String,
        /// What would be good.
        expected: &'static str,
    },
    /// The configuration is not TOML.
    #[error("parse configuration {}", path.display())]
    ParseConfig {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A key that no configuration has.
    #[error("unknown key {key:?} in {table}; the nearest known key is {nearest:?}")]
    UnknownKey {
        /// The key as written.
        key: String,
        /// Where it stands.
        table: String,
        /// The known key that is most like it.
        nearest: &'static str,
    },
    /// A value that makes no sense.
    #[error("{key} of {table} is {seen}, expected {expected}")]
    BadValue {
        /// The key.
        key: String,
        /// Where it stands.
        table: String,
        /// The value.
        seen: String,
        /// What would be good.
        expected: &'static str,
    },
    /// A policy that is neither built in nor in the configuration.
    #[error("unknown policy {name:?}; the nearest known policy is {nearest:?}")]
    UnknownPolicy {
        /// The name as written.
        name: String,
        /// The known one that is most like it.
        nearest: String,
    },
    /// The picture cannot be drawn or written.
    #[error("draw {}", path.display())]
    Draw {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Classify for Error {
    fn class(&self) -> Class {
        match self {
            Error::Draw { .. } => Class::Failed,
            _ => Class::Usage,
        }
    }
}
