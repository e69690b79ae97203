//! `rewarm stop`

use rewarm_container::shim::Client;
use rewarm_container::{Error, Exit, Name, State};
use serde::Serialize;

use crate::args::{Global, Stop};
use crate::failure::Cause;
use crate::render::Output;
use crate::replicas::{self, Ended};

#[derive(Serialize)]
struct Stopped {
    name: String,
    exit: Ended,
}

#[derive(Serialize)]
struct Report {
    replicas: Vec<Stopped>,
}

pub(crate) fn run(args: &Stop, global: &Global) -> Result<u8, Cause> {
    let state = replicas::open(global)?;
    let mut exits: Vec<(Name, Exit)> = Vec::new();
    let mut failed = None;
    // One that cannot be stopped must not keep the others from it; the first failure is the command's.
    for name in &args.names {
        match stop(&state, name, args.timeout) {
            Ok(exit) => exits.push((name.clone(), exit)),
            Err(cause) => failed = Some(failed.unwrap_or(cause)),
        }
    }
    let stopped = |(name, exit): &(Name, Exit)| Stopped { name: name.to_string(), exit: Ended::from(exit) };
    let report = Report { replicas: exits.iter().map(stopped).collect() };
    if failed.is_none() || !exits.is_empty() {
        let line = |(name, exit): &(Name, Exit)| format!("{name} is stopped: {}\n", exit);
        Output::new(global).answer(&report, |_| exits.iter().map(line).collect())?;
    }
    failed.map_or(Ok(0), Err)
}

/// Stops one; one that has ended already gives its exit.
fn stop(state: &State, name: &Name, timeout: std::time::Duration) -> Result<Exit, Cause> {
    let outcome = Client::connect(state, name).and_then(|client| client.stop(timeout));
    match outcome {
        Ok(exit) => Ok(exit),
        Err(error) => match (state.exit(name), error) {
            // It ended by itself before or while it was asked.
            (Ok(Some(exit)), Error::NotRunning { .. } | Error::Protocol { .. } | Error::Shim { .. }) => {
                Ok(exit)
            }
            (_, error) => Err(error.into()),
        },
    }
}
