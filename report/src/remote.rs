//! An error on its way from one process to another.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// An error of another process: its message and, as sources, what caused it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Remote {
    message: String,
    cause: Option<Box<Remote>>,
    /// The log of the program that failed, as long as it exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    log: Option<PathBuf>,
}

impl Remote {
    /// Takes over an error and its sources. A source that repeats the end of the message before it is left out.
    pub fn from_error(error: &(dyn std::error::Error + 'static)) -> Self {
        Self::with_log(error, &|_| None)
    }

    /// The same, with the log that `log` knows of an error.
    pub fn with_log(
        error: &(dyn std::error::Error + 'static),
        log: &dyn Fn(&(dyn std::error::Error + 'static)) -> Option<PathBuf>,
    ) -> Self {
        let message = error.to_string();
        let mut source = error.source();
        while source.is_some_and(|source| message.ends_with(&source.to_string())) {
            source = source.and_then(std::error::Error::source);
        }
        let cause = source.map(|source| Box::new(Self::with_log(source, log)));
        Self { message, cause, log: log(error) }
    }

    /// The log of the program that failed, of the outermost error that has one.
    #[must_use]
    pub fn log(&self) -> Option<&Path> {
        self.log.as_deref().or_else(|| self.cause.as_deref().and_then(Self::log))
    }

    /// The messages, outermost first.
    #[must_use]
    pub fn chain(&self) -> Vec<&str> {
        std::iter::successors(Some(self), |remote| remote.cause.as_deref())
            .map(|remote| remote.message.as_str())
            .collect()
    }
}

impl std::fmt::Display for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Remote {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as &(dyn std::error::Error + 'static))
    }
}
