//! Verbs that the program calls itself by. They are hidden: who calls them by hand gets nothing from it.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use rewarm_container::Name;

use crate::values;

#[derive(Debug, Args)]
pub(crate) struct BenchServer {
    /// Where it listens, on loopback.
    #[arg(long, value_name = "P", value_parser = values::port)]
    pub(crate) port: u16,
    /// What it loads.
    #[arg(long, value_name = "FILE")]
    pub(crate) weights: PathBuf,
    /// Part that an answer reads.
    #[arg(long, value_name = "PART", value_parser = values::part)]
    pub(crate) touch: f64,
}

#[derive(Debug, Args)]
pub(crate) struct Shim {
    /// The replica.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Name,
}

#[derive(Debug, Args)]
pub(crate) struct Pager {
    /// CRIU's work directory.
    #[arg(value_name = "WORK")]
    pub(crate) work: PathBuf,
    /// A folder whose cgroup.procs lists the server's processes.
    #[arg(value_name = "CGROUP")]
    pub(crate) cgroup: PathBuf,
    /// A stopped server stays stopped when its memory is complete.
    #[arg(long)]
    pub(crate) held: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Fetcher {
    /// Bytes of memory for decoded content that nobody holds.
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    pub(crate) limit: u64,
    /// Bytes on disk for what is fetched over a network.
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    pub(crate) disk: u64,
    /// How long to stay when nobody needs it.
    #[arg(long, value_name = "TIME", value_parser = values::duration, default_value = "5m")]
    pub(crate) idle: Duration,
    /// Read one store for the fetcher that started this process.
    #[arg(long)]
    pub(crate) worker: bool,
}
