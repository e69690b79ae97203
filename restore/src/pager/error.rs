//! Why a pager gave up. Whatever the reason, the replica must be killed: pages are missing.

use std::io;
use std::time::Duration;

use nix::errno::Errno;
use rewarm_report::{Class, Classify};

use super::source::SourceError;

/// Failures of the pager. Tasks are named by their pid inside their pid namespace.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// CRIU's connection broke or spoke something else.
    #[error("receive userfaultfds from CRIU")]
    Intake(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// CRIU restores a task that the snapshot does not know.
    #[error("CRIU announced task {task}, for which there is no plan")]
    UnknownTask {
        /// Its pid.
        task: u32,
    },
    /// A chunk is damaged or cannot be had.
    #[error("fill task {task}: chunk at stream offset {offset}")]
    Source {
        /// The task.
        task: u32,
        /// Place of the chunk in its stream, in bytes.
        offset: u64,
        /// Why.
        #[source]
        source: SourceError,
    },
    /// The source handed over something that is not the chunk.
    #[error("fill task {task}: chunk at stream offset {offset} has {got} bytes, {wanted} expected")]
    Length {
        /// The task.
        task: u32,
        /// Place of the chunk in its stream, in bytes.
        offset: u64,
        /// Bytes handed over.
        got: u64,
        /// Bytes expected.
        wanted: u64,
    },
    /// A chunk did not come.
    #[error("fill task {task}: chunk at stream offset {offset} did not come within {deadline:?}")]
    Deadline {
        /// The task.
        task: u32,
        /// Place in its stream, in bytes.
        offset: u64,
        /// The time allowed.
        deadline: Duration,
    },
    /// The kernel refused to put a page into place.
    #[error("fill task {task} at {vaddr:#x}")]
    Refused {
        /// The task.
        task: u32,
        /// The address.
        vaddr: u64,
        /// Why.
        #[source]
        errno: Errno,
    },
    /// A page of the plan lies where nothing is registered: it would read as zeros.
    #[error("fill task {task}: {vaddr:#x} is not registered for missing pages")]
    Unregistered {
        /// The task.
        task: u32,
        /// The address.
        vaddr: u64,
    },
    /// Events contradict each other: two threads changed one place at the same time and the kernel told it the other way round.
    #[error(
        "follow task {task}: move of {length} bytes from {from:#x} to {to:#x} contradicts what is mapped"
    )]
    OutOfOrder {
        /// The task.
        task: u32,
        /// Old address.
        from: u64,
        /// New address.
        to: u64,
        /// Length in bytes.
        length: u64,
    },
    /// A userfaultfd could not be read, or the set of them not be waited for.
    #[error("wait for page faults")]
    Wait(#[source] io::Error),
    /// The stopped tree could not be filled.
    #[error("write to stopped task {task} at {vaddr:#x}")]
    Write {
        /// The task.
        task: u32,
        /// The address.
        vaddr: u64,
        /// Why.
        #[source]
        errno: Errno,
    },
    /// What a stopped task has mapped could not be read.
    #[error("look at what task {task} has mapped")]
    Look {
        /// The task.
        task: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The process behind a task was not found.
    #[error("find the process of task {task}")]
    NoProcess {
        /// The task.
        task: u32,
    },
    /// The shim is gone or does not take what is sent.
    #[error("talk to the shim")]
    Control(#[source] io::Error),
    /// The shim closed its end before all pages were in place: it died, or it gives the replica up.
    #[error("shim left before all pages were in place")]
    ShimLeft,
    /// A bug.
    #[error("pager thread panicked: {message}")]
    Panicked {
        /// What it said.
        message: String,
    },
}

impl Classify for Error {
    fn class(&self) -> Class {
        match self {
            Error::Source { source: SourceError::Damaged(_), .. } | Error::Length { .. } => Class::Integrity,
            _ => Class::Failed,
        }
    }
}
