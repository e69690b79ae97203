//! What can go wrong in a snapshot, and what is true of the server afterwards.

use std::io;

use rewarm_report::{Aftermath, Class, Classify, Stage};

use crate::preflight::Obstacle;

/// Result of a snapshot.
pub type Result<T> = std::result::Result<T, Error>;

/// A failed snapshot: the stage, the cause, and the state in which the server was found afterwards.
#[derive(Debug, thiserror::Error)]
#[error("snapshot {name}: stage {stage}")]
pub struct Error {
    /// The replica.
    pub name: String,
    /// The stage that failed.
    pub stage: Stage,
    /// Why.
    #[source]
    pub cause: Cause,
    /// What is true of the server, read from the system after everything was undone.
    pub aftermath: Aftermath,
}

/// Why a stage failed.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The replica holds what cannot be dumped.
    #[error("{} cannot be carried", count(obstacles))]
    Obstacles {
        /// Every reason.
        obstacles: Vec<Obstacle>,
    },
    /// The images hold a connection to the outside that was not there at the preflight.
    #[error("a connection from {local} to {remote} was opened while the snapshot began")]
    NewConnection {
        /// The replica's end.
        local: String,
        /// The other end.
        remote: String,
    },
    /// The replica is not in a state in which it can be dumped.
    #[error("the replica is {status}, expected ready")]
    State {
        /// Its state.
        status: String,
    },
    /// The caller wants it given up.
    #[error("interrupted by {signal}")]
    Interrupted {
        /// By which signal.
        signal: &'static str,
    },
    /// The server died during the dump.
    #[error("the server ended during the dump")]
    ServerEnded,
    /// CRIU took longer than it may.
    #[error("the server was frozen for {seconds} s, which is the limit; the dump was given up")]
    Deadline {
        /// The limit in seconds.
        seconds: u64,
    },
    /// The store was slower than the server may be frozen, and memory was short.
    #[error(
        "the store did not take the frozen server's pages within {seconds} s, and only {mib} MiB of them find room in memory; the dump was given up; allow more memory (--freeze-memory) or time (--freeze-timeout)"
    )]
    StoreBehind {
        /// The limit in seconds.
        seconds: u64,
        /// Memory for pages that wait for the store.
        mib: u64,
    },
    /// The receiver could not take the pages, or the files could not be copied inside the freeze.
    #[error("take the frozen server's memory and files")]
    Receive(#[source] io::Error),
    /// The images contain more than the restore side would admit.
    #[error("no restore would admit it, since it has more than its own configuration grants: {}", violations.join("; "))]
    Inadmissible {
        /// Every violation.
        violations: Vec<String>,
    },
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
    /// CRIU or its images.
    #[error(transparent)]
    Criu(#[from] rewarm_criu::Error),
    /// The store.
    #[error(transparent)]
    Store(#[from] rewarm_store::Error),
    /// Probe or hook.
    #[error(transparent)]
    Probe(#[from] rewarm_probe::Error),
}

fn count(obstacles: &[Obstacle]) -> String {
    match obstacles {
        [one] => format!("what the server holds ({one})"),
        many => {
            let lines: Vec<String> = many.iter().map(|obstacle| format!("\n  - {obstacle}")).collect();
            format!("{} things that the server holds:{}\nthey", many.len(), lines.concat())
        }
    }
}

impl Cause {
    pub(crate) fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        |source| Self::Io { action, source }
    }
}

impl Classify for Cause {
    fn class(&self) -> Class {
        match self {
            Self::Obstacles { .. }
            | Self::NewConnection { .. }
            | Self::Inadmissible { .. }
            | Self::State { .. } => Class::Incompatible,
            Self::Interrupted { .. }
            | Self::ServerEnded
            | Self::Deadline { .. }
            | Self::StoreBehind { .. }
            | Self::Receive(_)
            | Self::Io { .. } => Class::Failed,
            Self::Container(error) => error.class(),
            Self::Criu(error) => error.class(),
            Self::Store(error) => error.class(),
            Self::Probe(error) => error.class(),
        }
    }
}

impl Classify for Error {
    fn class(&self) -> Class {
        if self.aftermath == Aftermath::Stopped { Class::Stranded } else { self.cause.class() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_is_left_stopped_outranks_every_cause() {
        let class = |aftermath| {
            let cause = Cause::State { status: "paused".to_owned() };
            Error { name: "llm".to_owned(), stage: Stage::Dump, cause, aftermath }.class()
        };
        assert_eq!(class(Aftermath::Stopped), Class::Stranded);
        for other in [Aftermath::Serving, Aftermath::Gone, Aftermath::Nothing] {
            assert_eq!(class(other), Class::Incompatible, "{other:?}");
        }
    }
}
