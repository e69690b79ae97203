//! `rewarm wait`

use rewarm_container::shim::Client;
use rewarm_container::{Error, Exit, Name, State};
use serde::Serialize;

use crate::args::{Global, Wait};
use crate::failure::Cause;
use crate::render::Output;
use crate::replicas::{self, Ended};

#[derive(Serialize)]
struct Report {
    name: String,
    exit: Ended,
}

pub(crate) fn run(args: &Wait, global: &Global) -> Result<u8, Cause> {
    let state = replicas::open(global)?;
    let exit = wait(&state, &args.name)?;
    let report = Report { name: args.name.to_string(), exit: Ended::from(&exit) };
    Output::new(global).answer(&report, |_| format!("{}: {}\n", args.name, exit))?;
    Ok(u8::try_from(exit.status.code() & 0xff).expect("masked"))
}

fn wait(state: &State, name: &Name) -> Result<Exit, Cause> {
    let error = match Client::connect(state, name).and_then(|client| client.wait()) {
        Ok(exit) => return Ok(exit),
        Err(error) => error,
    };
    match state.exit(name) {
        Ok(Some(exit)) => Ok(exit),
        // A shim that vanished without a word has crashed: sweeping writes that down.
        Ok(None) if matches!(error, Error::Protocol { .. } | Error::System { .. }) => {
            state.sweep()?;
            state.exit(name)?.ok_or_else(|| error.into())
        }
        _ => Err(error.into()),
    }
}
