//! `rewarm rm`

use serde::Serialize;

use crate::args::{Global, Rm};
use crate::failure::Cause;
use crate::render::Output;
use crate::replicas;

#[derive(Serialize)]
struct Report {
    removed: Vec<String>,
}

pub(crate) fn run(args: &Rm, global: &Global) -> Result<u8, Cause> {
    let state = replicas::open(global)?;
    let mut report = Report { removed: Vec::new() };
    let mut failed = None;
    for name in &args.names {
        match state.remove(name) {
            Ok(()) => report.removed.push(name.to_string()),
            Err(error) => failed = Some(failed.unwrap_or_else(|| error.into())),
        }
    }
    if failed.is_none() || !report.removed.is_empty() {
        let line = |name: &String| format!("{name} is removed\n");
        Output::new(global).answer(&report, |report| report.removed.iter().map(line).collect())?;
    }
    failed.map_or(Ok(0), Err)
}
