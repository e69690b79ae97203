//! `seccomp.img`: the filter programs of all threads.

use std::io;
use std::path::Path;

use prost::Message;

use super::{Kind, read_one};
use crate::{Error, Fault};

/// The most filters of a dump; each thread has one chain of them and most share it.
const FILTERS_MAX: usize = 1 << 16;
/// Bytes of an instruction of a filter program.
const INSTRUCTION_BYTES: usize = 8;
/// The kernel's limit of instructions of one program.
const INSTRUCTIONS_MAX: usize = 4096;

/// A filter program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// Instructions of classic BPF, eight bytes each.
    pub program: Vec<u8>,
    /// Index of the filter that was installed before this one; both decide, the stricter answer counts.
    pub outer: Option<u32>,
    /// Flags of seccomp(2).
    pub flags: u32,
}

#[derive(Clone, PartialEq, Message)]
struct SeccompEntry {
    #[prost(message, repeated, tag = "1")]
    filters: Vec<FilterEntry>,
}

#[derive(Clone, PartialEq, Message)]
struct FilterEntry {
    #[prost(bytes, tag = "1")]
    program: Vec<u8>,
    #[prost(uint32, optional, tag = "2")]
    outer: Option<u32>,
    #[prost(uint32, tag = "3")]
    flags: u32,
}

/// Reads all filters. None if no thread has one.
///
/// # Errors
/// [`Error::Image`] if the file is not what CRIU writes.
pub fn read(directory: &Path) -> crate::Result<Vec<Filter>> {
    let path = directory.join("seccomp.img");
    let entry: SeccompEntry = match read_one(&path, Kind::Seccomp) {
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    if entry.filters.len() > FILTERS_MAX {
        let fault = Fault::Limit {
            what: "number of filters",
            seen: entry.filters.len() as u64,
            limit: FILTERS_MAX as u64,
        };
        return Err(Error::image(path)(fault));
    }
    let filter = |(index, FilterEntry { program, outer, flags })| {
        let seen = program.len() as u64;
        if program.is_empty()
            || program.len() % INSTRUCTION_BYTES != 0
            || program.len() > INSTRUCTIONS_MAX * INSTRUCTION_BYTES
        {
            return Err(Fault::Value {
                what: "bytes of a filter",
                seen,
                expected: "up to 4096 instructions of 8 bytes",
            });
        }
        if let Some(outer) = outer
            && outer as usize >= index
        {
            return Err(Fault::Value {
                what: "outer filter",
                seen: u64::from(outer),
                expected: "an earlier one",
            });
        }
        Ok(Filter { program, outer, flags })
    };
    entry.filters.into_iter().enumerate().map(filter).collect::<Result<_, _>>().map_err(Error::image(path))
}
