//! `rewarm cache`

use rewarm_fetcher::{Fetcher, Status};
use serde::Serialize;

use crate::args::Global;
use crate::failure::Cause;
use crate::render::{Output, bytes, table};

#[derive(Serialize)]
struct Report {
    /// Whether a fetcher runs: without one nothing is in memory.
    running: bool,
    #[serde(flatten)]
    status: Option<Status>,
}

pub(crate) fn run(global: &Global) -> Result<u8, Cause> {
    let status = Fetcher::status(&global.state)?;
    Output::new(global).answer(&Report { running: status.is_some(), status }, text)?;
    Ok(0)
}

fn text(report: &Report) -> String {
    let Some(status) = &report.status else {
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
    format!("{table}\nat most {} while nobody holds them, {pages}\n", bytes(status.limit_bytes))
}
