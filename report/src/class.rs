//! The class of an error (what its caller can do) and the state of the world after a failure.

use serde::{Deserialize, Serialize};

/// What a caller can do about a failure. The command line turns it into an exit code in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// The request itself is malformed (exit 2).
    Usage,
    /// The verdict or the preflight refuses; nothing was started or frozen (exit 3).
    Incompatible,
    /// A name, a reference, a tag or a bucket does not exist (exit 4).
    NotFound,
    /// A digest, a signature or a probe answer differs from what was recorded (exit 5).
    Integrity,
    /// A process was left stopped or in an unknown state, and a person must look (exit 6).
    Stranded,
    /// Everything else (exit 1).
    Failed,
}

/// What is true of the server after an operation failed, read from the system and not guessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aftermath {
    /// The server runs and serves as before.
    Serving,
    /// The server exists but is frozen or stopped.
    Stopped,
    /// The server is gone.
    Gone,
    /// The operation left nothing behind: no process, mount, namespace, cgroup or file.
    Nothing,
}

/// Errors that know their [`Class`]. Every error type of the library crates implements it.
pub trait Classify {
    /// What the caller can do about this failure.
    fn class(&self) -> Class;
}
