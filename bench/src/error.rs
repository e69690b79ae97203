//! Why a benchmark ended without figures.

use std::io;
use std::path::PathBuf;

use rewarm_report::{Class, Classify};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure of the benchmark. Nothing that it started is left.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call to the system.
    #[error("cannot {doing}")]
    Io {
        /// What was tried.
        doing: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A program did not do what it was asked.
    #[error("{program} ended with {status}: {last}")]
    Program {
        /// With its arguments.
        program: String,
        /// How it ended.
        status: String,
        /// The last lines of what it said.
        last: String,
    },
    /// A program's output is not what it is known for.
    #[error("{program} printed no {expected}: {seen}")]
    Output {
        /// With its verb.
        program: String,
        /// What was looked for.
        expected: &'static str,
        /// The beginning of what was there.
        seen: String,
    },
    /// The server file.
    #[error("server file {}: {problem}", path.display())]
    Server {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// No answer, or another one than the running server gives.
    #[error("{case}: the server does not answer as the running one does")]
    Answer {
        /// Which arm.
        case: String,
        /// What was seen and expected.
        #[source]
        source: rewarm_probe::Error,
    },
    /// Somebody listens where the stock arm's server would.
    #[error(
        "port {port} of this machine is in use; stock CRIU runs without a container and needs it: free it, or give the server another port"
    )]
    Port {
        /// The port.
        port: u16,
    },
    /// Something did not happen in time.
    #[error("{what} did not happen within {seconds} s")]
    Late {
        /// What.
        what: String,
        /// The limit.
        seconds: u64,
    },
    /// The chart could not be drawn.
    #[error("cannot draw {}: {problem}", path.display())]
    Chart {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// SIGINT or SIGTERM.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// For `map_err`.
    pub(crate) fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }
}

impl Classify for Error {
    fn class(&self) -> Class {
        match self {
            Self::Server { .. } => Class::Usage,
            Self::Answer { source, .. } => source.class(),
            _ => Class::Failed,
        }
    }
}
