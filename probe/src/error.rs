//! What can go wrong, by what the caller can do about it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use rewarm_report::{Class, Classify};

use crate::compare::Difference;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure of a probe, a ready check or a hook.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A probe file, a file that it names, or an engine file cannot be read.
    #[error("read {}", path.display())]
    ReadFile {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is not TOML, has an unknown key, or a value has the wrong type.
    #[error("parse {}", path.display())]
    ParseFile {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A key that no probe file has.
    #[error("unknown key {key:?} in {table}; the nearest known key is {nearest:?}")]
    UnknownKey {
        /// The key as written.
        key: String,
        /// Where it stands: `probe file x.toml, request 2`.
        table: String,
        /// The known key that is most like it.
        nearest: &'static str,
    },
    /// A value that has the right type but makes no sense.
    #[error("{key} of {table} is {seen}, expected {expected}")]
    BadValue {
        /// The key.
        key: &'static str,
        /// Where it stands.
        table: String,
        /// The value.
        seen: String,
        /// What would be good.
        expected: &'static str,
    },
    /// A hook or a ready check on the command line that cannot be read.
    #[error("{what} {seen:?} is malformed, expected {expected}")]
    Malformed {
        /// `ready check` or `hook`.
        what: &'static str,
        /// The text.
        seen: String,
        /// What would be good.
        expected: &'static str,
    },
    /// No port is known for a request, a ready check or a hook.
    #[error("{what} names no port and the replica declares none")]
    NoPort {
        /// The request, check or hook.
        what: String,
    },
    /// The server gave no answer to a question.
    #[error("ask request {request:?}")]
    Ask {
        /// Name of the request.
        request: String,
        /// Why.
        #[source]
        source: RequestError,
    },
    /// The answer cannot be kept, so the probe would prove nothing on a restore.
    #[error("record request {request:?}: {problem}")]
    Unrecordable {
        /// Name of the request.
        request: String,
        /// What is wrong with the answer, with the values seen and expected.
        problem: String,
    },
    /// An answer differs from the one that was recorded.
    #[error(transparent)]
    Differs(Box<Difference>),
    /// A recording cannot be read.
    #[error("read the recorded probe")]
    BadRecording(#[source] serde_json::Error),
    /// The server was not ready in time.
    #[error("ready check {check} did not pass within {}: {last}", humantime::format_duration(*waited))]
    NotReady {
        /// The check.
        check: String,
        /// How long was waited.
        waited: Duration,
        /// What the last attempt said.
        last: String,
    },
    /// The server ended before it was ready.
    #[error("server ended before ready check {check} passed: {status}")]
    ServerEnded {
        /// The check.
        check: String,
        /// How it ended, in the caller's words.
        status: String,
    },
    /// A hook could not be run.
    #[error("run hook {hook}")]
    HookStart {
        /// The hook.
        hook: String,
        /// Why.
        #[source]
        source: RequestError,
    },
    /// A step of an engine failed in each attempt.
    #[error("step {step:?} failed {}: {failure}", if *attempts == 1 { "at once".to_owned() } else { format!("{attempts} times") })]
    Step {
        /// Its name.
        step: String,
        /// How often it was tried.
        attempts: u32,
        /// What the last attempt said.
        failure: String,
    },
    /// A hook ran and failed.
    #[error("hook {hook} {outcome}{}", with_output(output))]
    HookFailed {
        /// The hook.
        hook: String,
        /// `ended with exit status: 3`, `answered 500`, `was killed after 60s`.
        outcome: String,
        /// Its last lines of output.
        output: String,
    },
}

fn with_output(output: &str) -> String {
    if output.is_empty() { String::new() } else { format!("; its output:\n{output}") }
}

/// Why a single request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The port does not take the connection.
    #[error("connect to port {port}")]
    Connect {
        /// Port inside the replica.
        port: u16,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A command could not be started in the replica.
    #[error("start the command in the replica")]
    Exec(#[source] io::Error),
    /// The server does not speak HTTP/1.1, or closed the connection.
    #[error("exchange HTTP with port {port}")]
    Http {
        /// Port inside the replica.
        port: u16,
        /// Why.
        #[source]
        source: hyper::Error,
    },
    /// Method, path or a header cannot be sent.
    #[error("build the request")]
    Build(#[source] hyper::http::Error),
    /// The answer is longer than [`crate::limits::ANSWER_BYTES_MAX`].
    #[error("answer is longer than {limit} bytes")]
    TooLong {
        /// The limit.
        limit: usize,
    },
    /// No whole answer in time.
    #[error("no whole answer from port {port} within {}", humantime::format_duration(*timeout))]
    TimedOut {
        /// Port inside the replica.
        port: u16,
        /// The limit.
        timeout: Duration,
    },
}

impl Classify for Error {
    fn class(&self) -> Class {
        match self {
            Error::ParseFile { .. }
            | Error::UnknownKey { .. }
            | Error::BadValue { .. }
            | Error::Malformed { .. }
            | Error::NoPort { .. } => Class::Usage,
            Error::ReadFile { .. } => Class::Usage,
            Error::Differs(_) => Class::Integrity,
            Error::BadRecording(_) => Class::Integrity,
            Error::Ask { .. }
            | Error::Unrecordable { .. }
            | Error::NotReady { .. }
            | Error::ServerEnded { .. }
            | Error::HookStart { .. }
            | Error::Step { .. }
            | Error::HookFailed { .. } => Class::Failed,
        }
    }
}
