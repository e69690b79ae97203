//! `rewarm rm`
//!
//! Two things are removed by this verb: what a stopped replica left, and snapshots. A replica's name has neither slash nor
//! `@`; a snapshot's reference has a slash. Objects of a removed snapshot stay until `rewarm gc`.

use rewarm_store::{Reference, Removed, Store};
use serde::Serialize;

use crate::args::{Global, Rm, Unwanted};
use crate::failure::Cause;
use crate::render::{Output, count};
use crate::replicas;

#[derive(Serialize)]
struct Report {
    removed: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    snapshots: Vec<RemovedSnapshot>,
}

#[derive(Serialize)]
struct RemovedSnapshot {
    store: String,
    name: String,
    #[serde(flatten)]
    removed: Removed,
}

pub(crate) async fn run(args: &Rm, global: &Global) -> Result<u8, Cause> {
    let mut report = Report { removed: Vec::new(), snapshots: Vec::new() };
    let mut failed = None;
    let any_replica = args.names.iter().any(|unwanted| matches!(unwanted, Unwanted::Replica(_)));
    let state = if any_replica { Some(replicas::open(global)?) } else { None };
    for unwanted in &args.names {
        let result = match (unwanted, &state) {
            (Unwanted::Replica(name), Some(state)) => {
                state.remove(name).map(|()| report.removed.push(name.to_string())).map_err(Cause::from)
            }
            (Unwanted::Snapshot(reference), _) => {
                remove(reference).await.map(|removed| report.snapshots.extend(removed))
            }
            (Unwanted::Replica(_), None) => unreachable!("opened where there is a replica"),
        };
        if let Err(error) = result {
            failed = Some(failed.unwrap_or(error));
        }
    }
    if failed.is_none() || !report.removed.is_empty() || !report.snapshots.is_empty() {
        Output::new(global).answer(&report, text)?;
    }
    failed.map_or(Ok(0), Err)
}

async fn remove(reference: &Reference) -> Result<Vec<RemovedSnapshot>, Cause> {
    let store = Store::open(&reference.store).await?;
    let removed = store.remove(&reference.name, &reference.target).await?;
    let named = |removed| RemovedSnapshot {
        store: reference.store.to_string(),
        name: reference.name.to_string(),
        removed,
    };
    Ok(removed.into_iter().map(named).collect())
}

fn text(report: &Report) -> String {
    let replicas = report.removed.iter().map(|name| format!("{name} is removed\n"));
    let snapshots = report.snapshots.iter().map(|snapshot| {
        let left = match snapshot.removed.left {
            0 => String::new(),
            left => format!(", {} left", count(left, "variant")),
        };
        let gone = count(snapshot.removed.manifests.len(), "variant");
        format!("{}/{}@{}: {gone} removed{left}\n", snapshot.store, snapshot.name, snapshot.removed.tag)
    });
    replicas.chain(snapshots).collect()
}
