//! What can go wrong between a restore and the fetcher.

use std::io;

use rewarm_report::{Class, Classify, Remote};
use serde::{Deserialize, Serialize};

/// Result of a request to the fetcher.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure a store's is, for who wants to say what to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Store, name, tag or object does not exist.
    NotFound,
    /// Credentials or permissions.
    Denied,
    /// Nobody answers at its address.
    Unreachable,
    /// A newer program wrote it.
    Newer,
    /// A signature is required and missing.
    Untrusted,
    /// Anything else.
    Other,
}

/// A failed request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The store failed, or what it holds is damaged.
    #[error(transparent)]
    Store(#[from] Failure),
    /// The fetcher could not be started.
    #[error("start the fetcher: {action}")]
    Start {
        /// What was done.
        action: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The fetcher ended in the middle; another one will be started by the next request.
    #[error("the fetcher ended while it was asked to {request}; its log is fetcher.log in the state folder")]
    Gone {
        /// What it was asked.
        request: &'static str,
        /// What the connection said.
        #[source]
        source: io::Error,
    },
    /// It speaks another protocol or answered something else.
    #[error("the fetcher answered {request} with {answer}")]
    Protocol {
        /// What it was asked.
        request: &'static str,
        /// What it said.
        answer: String,
    },
    /// A part of the stream did not come.
    #[error("fetch the snapshot's content")]
    Missing(#[source] rewarm_sys::shared::Missing),
}

/// A failure as one process tells it another.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    /// Its kind.
    pub kind: Kind,
    /// What the caller can do about it.
    pub class: Class,
    error: Remote,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Failure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl Failure {
    pub(crate) fn of(error: &(dyn std::error::Error + 'static), class: Class) -> Self {
        Self { kind: Kind::Other, class, error: Remote::from_error(error) }
    }

    pub(crate) fn of_store(error: &rewarm_store::Error) -> Self {
        use rewarm_store::Error as Store;
        let kind = match error {
            Store::NotFound { .. } => Kind::NotFound,
            Store::Denied { .. } => Kind::Denied,
            Store::Unreachable { .. } => Kind::Unreachable,
            Store::Newer { .. } => Kind::Newer,
            Store::Untrusted { .. } => Kind::Untrusted,
            _ => Kind::Other,
        };
        Self { kind, ..Self::of(error, error.class()) }
    }
}

impl Error {
    /// The store's kind of failure, where it is one.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Error::Store(failure) => failure.kind,
            _ => Kind::Other,
        }
    }

    /// Whether the fetcher itself was lost: trying once more may well succeed.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(self, Error::Gone { .. } | Error::Missing(rewarm_sys::shared::Missing::Abandoned { .. }))
    }

    pub(crate) fn start(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        |source| Self::Start { action, source }
    }
}

impl Classify for Error {
    fn class(&self) -> Class {
        match self {
            Error::Store(failure) => failure.class,
            _ => Class::Failed,
        }
    }
}
