//! `rewarm doctor`

use serde::Serialize;

use crate::args::{Doctor, Global};
use crate::doctor::{Need, Places, State, examine};
use crate::exit::Exit;
use crate::failure::Cause;
use crate::render::{Output, table};
use crate::{env, replicas};

#[derive(Serialize)]
struct Report {
    /// Whether nothing is missing.
    ready: bool,
    needs: Vec<Need>,
}

pub(crate) fn run(args: &Doctor, global: &Global) -> Result<u8, Cause> {
    let places = Places {
        criu: global.criu.clone(),
        cache: env::cache_dir(),
        state: global.state.clone(),
        libnvml: env::libnvml(),
        ask_driver: args.gpu.then(replicas::program),
    };
    let needs = examine(&places);
    let report = Report { ready: needs.iter().all(|need| need.state != State::Missing), needs };
    Output::new(global).answer(&report, text)?;
    // The table says all; a second telling as an error would only hide it.
    Ok(if report.ready { Exit::Done } else { Exit::Incompatible }.code())
}

fn text(report: &Report) -> String {
    let word = |state: State| match state {
        State::Ok => "ok",
        State::Degraded => "degraded",
        State::Missing => "missing",
    };
    let rows = report
        .needs
        .iter()
        .map(|need| vec![word(need.state).to_owned(), need.name.to_owned(), need.found.clone()]);
    let mut text = table(&["STATE", "NEED", "FOUND"], rows);
    for need in report.needs.iter().filter(|need| need.state != State::Ok) {
        let (consequence, fix) = (need.consequence.unwrap_or_default(), need.fix.unwrap_or_default());
        text.push_str(&format!("\n{} {}: {consequence}\n  fix: {fix}\n", need.name, word(need.state)));
    }
    text
}
