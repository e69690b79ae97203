//! How long a dump took, as CRIU counted it itself.
//!
//! After each dump CRIU leaves `stats-dump` in its work directory. The frozen time in it is the downtime that a dump
//! costs a server.

use std::path::Path;
use std::time::Duration;

use prost::Message;

use crate::image::{self, Kind};
use crate::{Error, Fault};

/// Times and numbers of a dump.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct DumpStats {
    /// Time that stopping all tasks took.
    pub freezing: Duration,
    /// Time that the tasks were stopped.
    pub frozen: Duration,
    /// Part of it: collecting the pages.
    pub memdump: Duration,
    /// Part of it: sending or writing the pages.
    pub memwrite: Duration,
    /// Pages that were sent or written for tasks, shared segments not counted.
    pub pages_written: u64,
}

#[derive(Clone, PartialEq, Message)]
struct StatsEntry {
    #[prost(message, optional, tag = "1")]
    dump: Option<DumpStatsEntry>,
}

#[derive(Clone, PartialEq, Message)]
struct DumpStatsEntry {
    #[prost(uint32, tag = "1")]
    freezing_us: u32,
    #[prost(uint32, tag = "2")]
    frozen_us: u32,
    #[prost(uint32, tag = "3")]
    memdump_us: u32,
    #[prost(uint32, tag = "4")]
    memwrite_us: u32,
    #[prost(uint64, tag = "7")]
    pages_written: u64,
}

/// Reads `stats-dump` in the work directory of a dump.
///
/// # Errors
/// [`Error::Io`] if there is none, [`Error::Image`] if it is not what CRIU writes.
pub fn dump(work: &Path) -> crate::Result<DumpStats> {
    let path = work.join("stats-dump");
    let entry: StatsEntry = image::read_one(&path, Kind::Stats)?;
    let entry = entry.dump.ok_or(Fault::Absent { what: "times of a dump" }).map_err(Error::image(&path))?;
    let time = |us: u32| Duration::from_micros(u64::from(us));
    Ok(DumpStats {
        freezing: time(entry.freezing_us),
        frozen: time(entry.frozen_us),
        memdump: time(entry.memdump_us),
        memwrite: time(entry.memwrite_us),
        pages_written: entry.pages_written,
    })
}
