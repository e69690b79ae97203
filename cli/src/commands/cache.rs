//! `rewarm cache`

use rewarm_fetcher::{DiskStatus, Fetcher, Status, disk};
use serde::Serialize;

use crate::args::{Cache, Global};
use crate::env;
use crate::failure::Cause;
use crate::render::{Output, bytes, table};

#[derive(Serialize)]
struct Report {
    /// Whether a fetcher runs: without one nothing is in memory.
    running: bool,
    /// What is kept on disk, whether one runs or not.
    disk: Option<DiskStatus>,
    #[serde(flatten)]
    status: Option<Held>,
}

/// What a fetcher holds in memory.
#[derive(Serialize)]
struct Held {
    pid: u32,
    limit_bytes: u64,
    /// Whether the limit holds for what is held, too.
    bounded: bool,
    huge_pages: bool,
    /// From stores, since the fetcher was started.
    read_bytes: u64,
    streams: Vec<rewarm_fetcher::StreamStatus>,
}

pub(crate) fn run(global: &Global, args: &Cache) -> Result<u8, Cause> {
    let folder = env::packs_dir();
    let file = |doing, source| {
        let path = folder.clone().unwrap_or_default();
        Cause::File { doing, path, source }
    };
    if args.clear {
        Fetcher::clear(&global.state)?;
        // The fetcher may keep nothing, or run for another folder.
        folder.as_deref().map_or(Ok(()), disk::clear).map_err(|error| file("clear", error))?;
    }
    let status = Fetcher::status(&global.state)?;
    let (disk, status) = match status {
        Some(Status { pid, limit_bytes, bounded, huge_pages, read_bytes, streams, disk }) => {
            (disk, Some(Held { pid, limit_bytes, bounded, huge_pages, read_bytes, streams }))
        }
        None => {
            let looked = folder.as_deref().map(disk::look_at).transpose();
            (looked.map_err(|error| file("look into", error))?, None)
        }
    };
    Output::new(global).answer(&Report { running: status.is_some(), disk, status }, text)?;
    Ok(0)
}

fn text(report: &Report) -> String {
    memory(report.status.as_ref()) + &on_disk(report.disk.as_ref())
}

fn memory(status: Option<&Held>) -> String {
    let Some(status) = status else {
        return "no fetcher runs: the next restore starts one\n".to_owned();
    };
    let rows = status.streams.iter().map(|stream| {
        let arrived = if stream.complete { "all".to_owned() } else { bytes(stream.arrived_bytes) };
        vec![
            stream.digest.clone(),
            bytes(stream.bytes),
            arrived,
            bytes(stream.read_bytes),
            stream.holders.to_string(),
            stream.store.clone(),
        ]
    });
    let table = table(&["SNAPSHOT", "MEMORY", "ARRIVED", "READ", "HOLDERS", "STORE"], rows);
    let pages = if status.huge_pages { "in huge pages" } else { "in ordinary pages" };
    let when = if status.bounded { "altogether" } else { "while nobody holds them" };
    format!("{table}\nat most {} {when}, {pages}\n", bytes(status.limit_bytes))
}

fn on_disk(disk: Option<&DiskStatus>) -> String {
    let Some(disk) = disk else { return "nothing is kept on disk\n".to_owned() };
    let limit = match disk.limit_bytes {
        0 => String::new(),
        limit => format!(", at most {}", bytes(limit)),
    };
    let trouble = disk.trouble.as_ref().map(|trouble| format!("not all could be kept: {trouble}\n"));
    let packs = if disk.packs == 1 { "pack" } else { "packs" };
    format!("on disk {} of {} {packs}{limit}\n", bytes(disk.bytes), disk.packs) + &trouble.unwrap_or_default()
}
