//! `timens-ID.img` and `userns-ID.img`: clocks and user namespaces.
//!
//! CRIU writes the dumping side's CLOCK_MONOTONIC and CLOCK_BOOTTIME into each dump. At restore it makes a time
//! namespace whose clocks go on from there, whatever the clocks of the restoring machine say: to the tasks no time has
//! passed, and every deadline that they have noted down stays as far away as it was.

use std::path::Path;
use std::time::Duration;

use prost::Message;

use super::{Kind, numbered, read_one};
use crate::{Error, Fault};

/// The clocks that a time namespace can shift.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clocks {
    /// CLOCK_MONOTONIC.
    pub monotonic: Duration,
    /// CLOCK_BOOTTIME.
    pub boottime: Duration,
}

/// A range of users or groups of a user namespace.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct IdRange {
    /// First number inside.
    #[prost(uint32, tag = "1")]
    pub inside: u32,
    /// First number outside.
    #[prost(uint32, tag = "2")]
    pub outside: u32,
    /// How many.
    #[prost(uint32, tag = "3")]
    pub count: u32,
}

/// A user namespace.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct UserNamespace {
    /// Users.
    #[prost(message, repeated, tag = "1")]
    pub users: Vec<IdRange>,
    /// Groups.
    #[prost(message, repeated, tag = "2")]
    pub groups: Vec<IdRange>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(crate) struct TimensEntry {
    #[prost(message, optional, tag = "1")]
    pub(crate) monotonic: Option<TimespecEntry>,
    #[prost(message, optional, tag = "2")]
    pub(crate) boottime: Option<TimespecEntry>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(crate) struct TimespecEntry {
    #[prost(uint64, tag = "1")]
    pub(crate) seconds: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) nanoseconds: u64,
}

/// The clocks at the dump, as the tasks saw them. `None` if the dumping kernel had no time namespaces: the tasks see the
/// restoring machine's clocks then, and deadlines noted down are wrong by the difference.
///
/// # Errors
/// [`Error::Image`] if the file is not what CRIU writes.
pub fn clocks(directory: &Path) -> crate::Result<Option<Clocks>> {
    let Some((_, path)) = numbered(directory, "timens-", 10)?.pop() else { return Ok(None) };
    let entry: TimensEntry = read_one(&path, Kind::Timens)?;
    let time = |entry: Option<TimespecEntry>| {
        let TimespecEntry { seconds, nanoseconds } = entry.ok_or(Fault::Absent { what: "clock" })?;
        match u32::try_from(nanoseconds) {
            Ok(nanoseconds @ ..1_000_000_000) => Ok(Duration::new(seconds, nanoseconds)),
            _ => Err(Fault::Value {
                what: "nanoseconds of a clock",
                seen: nanoseconds,
                expected: "less than 10^9",
            }),
        }
    };
    let clocks = time(entry.monotonic)
        .and_then(|monotonic| Ok(Clocks { monotonic, boottime: time(entry.boottime)? }))
        .map_err(Error::image(&path))?;
    Ok(Some(clocks))
}

/// The user namespaces that a restore would make.
///
/// # Errors
/// [`Error::Image`] if a file is not what CRIU writes.
pub fn users(directory: &Path) -> crate::Result<Vec<UserNamespace>> {
    numbered(directory, "userns-", 10)?.iter().map(|(_, path)| read_one(path, Kind::Userns)).collect()
}
