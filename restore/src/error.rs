//! What can go wrong in a restore. Whatever it is, nothing of the replica is left.

use std::io;

use rewarm_container::Name;
use rewarm_report::{Class, Classify, Stage};

use crate::verdict::Reason;

/// Result of a restore.
pub type Result<T> = std::result::Result<T, Error>;

/// A failed restore: the replica, the stage and the cause.
#[derive(Debug, thiserror::Error)]
#[error("restore {name}: stage {stage}")]
pub struct Error {
    /// The replica, or the reference while no replica has a name yet.
    pub name: String,
    /// The stage that failed.
    pub stage: Stage,
    /// Why.
    #[source]
    pub cause: Cause,
}

/// Why a stage failed.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The snapshot does not fit this machine; nothing was fetched.
    #[error("the snapshot does not fit this machine:{}", list(reasons))]
    Incompatible {
        /// Every reason.
        reasons: Vec<Reason>,
    },
    /// The images ask for more than the bundle allows.
    #[error("the images ask for more than the bundle allows: {}", violations.join("; "))]
    Inadmissible {
        /// Every violation.
        violations: Vec<String>,
    },
    /// What the store holds contradicts itself although every digest is right: it was written by something else.
    #[error("the snapshot contradicts itself: {what}")]
    Inconsistent {
        /// What.
        what: String,
    },
    /// Another replica of the same restore has the whole error.
    #[error("{what}")]
    Shared {
        /// What concerns all replicas.
        what: String,
        /// What the caller can do about it.
        class: Class,
        /// Whether a further attempt is worth it: the fetcher was lost, not the snapshot.
        lost: bool,
    },
    /// The server was started and did not become ready.
    #[error("{source}")]
    NotStarted {
        /// Why.
        source: Box<Cause>,
        /// The last lines of its output; empty if it wrote nothing.
        output: String,
    },
    /// The caller wanted it given up.
    #[error("interrupted by {signal}; {}", given_up_in_words(given_up))]
    Interrupted {
        /// By which signal.
        signal: &'static str,
        /// The replicas that had been begun, of which nothing is left.
        given_up: Vec<Name>,
    },
    /// The operation was interrupted before this replica was begun.
    #[error("it was not begun, because the operation was interrupted")]
    GivenUp,
    /// A file or the system.
    #[error("{action}")]
    Io {
        /// What was done, with its object.
        action: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The container or its shim.
    #[error(transparent)]
    Container(#[from] rewarm_container::Error),
    /// The working set could not be written into a folder.
    #[error(transparent)]
    Recording(rewarm_store::Error),
    /// CRIU or its images.
    #[error(transparent)]
    Criu(#[from] rewarm_criu::Error),
    /// The store, or the fetcher that reads it.
    #[error(transparent)]
    Fetcher(#[from] rewarm_fetcher::Error),
    /// Probe, hook or ready check.
    #[error(transparent)]
    Probe(#[from] rewarm_probe::Error),
}

fn list(reasons: &[Reason]) -> String {
    reasons.iter().map(|reason| format!("\n  - {reason}")).collect()
}

fn given_up_in_words(names: &[Name]) -> String {
    if names.is_empty() {
        return "no replica had been begun".to_owned();
    }
    let names: Vec<&str> = names.iter().map(Name::as_str).collect();
    format!("given up, with nothing left of it: {}", names.join(", "))
}

impl Cause {
    /// The same failure for each of several replicas.
    pub(crate) fn shared(&self) -> Self {
        let mut chain = vec![self.to_string()];
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            chain.push(error.to_string());
            source = error.source();
        }
        chain.dedup();
        Self::Shared { what: chain.join(": "), class: self.class(), lost: self.lost() }
    }

    /// Whether the fetcher was lost in the middle: another one may do better.
    pub(crate) fn lost(&self) -> bool {
        match self {
            Self::Fetcher(error) => error.is_gone(),
            Self::Shared { lost, .. } => *lost,
            _ => false,
        }
    }

    pub(crate) fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        |source| Self::Io { action, source }
    }
}

impl Classify for Cause {
    fn class(&self) -> Class {
        match self {
            Self::Incompatible { .. } | Self::Inadmissible { .. } => Class::Incompatible,
            Self::Inconsistent { .. } => Class::Integrity,
            Self::Io { .. } | Self::Interrupted { .. } | Self::GivenUp => Class::Failed,
            Self::Shared { class, .. } => *class,
            Self::NotStarted { source, .. } => source.class(),
            Self::Container(error) => error.class(),
            Self::Criu(error) => error.class(),
            Self::Fetcher(error) => error.class(),
            Self::Recording(error) => error.class(),
            Self::Probe(error) => error.class(),
        }
    }
}

impl Classify for Error {
    fn class(&self) -> Class {
        self.cause.class()
    }
}
