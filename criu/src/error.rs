//! What can go wrong while talking with CRIU, by what the caller can do about it.

use std::io;
use std::path::{Path, PathBuf};

use rewarm_report::{Class, Classify};

use crate::{lazy_pages, log, page_server};

/// A failure of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No `criu` program was found.
    #[error("no criu program at {}", list(searched))]
    Missing {
        /// Where it was looked for.
        searched: Vec<PathBuf>,
    },
    /// The program is too old to work on this kernel.
    #[error("{} is version {version}, {needed} or newer is needed: {reason}", path.display())]
    TooOld {
        /// The program.
        path: PathBuf,
        /// Its version as it prints it.
        version: String,
        /// The oldest version that is accepted.
        needed: &'static str,
        /// What goes wrong with the older one.
        reason: &'static str,
    },
    /// The program ran and failed, or said something that is not understood.
    #[error("{command} ended with {status}: {}", last_lines(stderr))]
    Command {
        /// Command line.
        command: String,
        /// Exit status in words.
        status: String,
        /// What it said on standard error, at most 50 lines.
        stderr: String,
    },
    /// CRIU could not dump or restore a server, and its log says why.
    #[error("criu could not {verb} the server: {cause}")]
    Refused {
        /// `dump` or `restore`.
        verb: &'static str,
        /// The line of its log that names the cause.
        cause: log::Cause,
    },
    /// A call to the operating system failed.
    #[error("{action} {}", path.display())]
    Io {
        /// What was done, as a verb.
        action: &'static str,
        /// The file or program that it was done with.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// An image file is not what it should be.
    #[error("image file {}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Fault,
    },
    /// The other side of the page-server protocol broke the rules, went away or took too long.
    #[error("receive pages from criu")]
    PageServer(#[from] page_server::Fault),
    /// The other side of the lazy-pages protocol broke the rules, went away or took too long.
    #[error("receive userfaultfds from criu")]
    LazyPages(#[from] lazy_pages::Fault),
}

/// What is wrong with an image file.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The file starts with another magic number.
    #[error("starts with {seen:#010x}, expected {expected:#010x}")]
    Magic {
        /// The number in the file.
        seen: u32,
        /// The number of this kind of image.
        expected: u32,
    },
    /// The file ends inside a record.
    #[error("ends at byte {end}, inside a record that needs byte {needed}")]
    Truncated {
        /// Length of the file in bytes.
        end: u64,
        /// Where the record would end.
        needed: u64,
    },
    /// Something is larger or more numerous than CRIU ever writes.
    #[error("{what} is {seen}, at most {limit} is accepted")]
    Limit {
        /// What was counted or measured.
        what: &'static str,
        /// Its value.
        seen: u64,
        /// The limit.
        limit: u64,
    },
    /// A record is missing that every image of this kind has.
    #[error("has no {what}")]
    Absent {
        /// The record or field.
        what: &'static str,
    },
    /// A record is no protobuf message of its kind.
    #[error("record {record} is not decodable")]
    Decode {
        /// Number of the record, from 0.
        record: usize,
        /// What the decoder says.
        #[source]
        source: prost::DecodeError,
    },
    /// A record breaks the rules of the wire format.
    #[error("record {record} is no protobuf message: {reason}")]
    Wire {
        /// Number of the record, from 0.
        record: usize,
        /// Which rule.
        reason: &'static str,
    },
    /// A value contradicts another one.
    #[error("{what} is {seen:#x}, expected {expected}")]
    Value {
        /// Which value.
        what: &'static str,
        /// The value.
        seen: u64,
        /// What would be right, in words.
        expected: &'static str,
    },
}

impl Classify for Error {
    fn class(&self) -> Class {
        match self {
            Self::Missing { .. } | Self::TooOld { .. } => Class::Incompatible,
            Self::Image { .. } => Class::Integrity,
            Self::Refused { .. }
            | Self::Command { .. }
            | Self::Io { .. }
            | Self::PageServer(_)
            | Self::LazyPages(_) => Class::Failed,
        }
    }
}

impl Error {
    /// The failure that a log tells of; `None` where it names no cause. `verb` is `dump` or `restore`.
    #[must_use]
    pub fn of_log(verb: &'static str, path: &Path) -> Option<Self> {
        let cause = log::cause(path).filter(|cause| cause.certain)?;
        tracing::debug!(log = %log::tail(path).join("\n"), "the end of criu's log");
        Some(Self::Refused { verb, cause })
    }

    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    pub(crate) fn image(path: impl Into<PathBuf>) -> impl FnOnce(Fault) -> Self {
        let path = path.into();
        move |source| Self::Image { path, source }
    }
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// The last line of a child's output that is not empty.
fn last_lines(text: &str) -> &str {
    text.lines().rev().find(|line| !line.trim().is_empty()).map_or("no output", str::trim)
}
