//! `rewarm gc`

use rewarm_store::{Collect, Collected, Count, Store};
use serde::Serialize;

use crate::args::{Gc, Global};
use crate::failure::Cause;
use crate::render::{Output, bytes, table};

#[derive(Serialize)]
struct Report {
    store: String,
    dry_run: bool,
    #[serde(flatten)]
    collected: Collected,
}

pub(crate) async fn run(args: &Gc, global: &Global) -> Result<u8, Cause> {
    let store = Store::open(&args.store).await?;
    let options = Collect { grace: args.grace, dry_run: args.dry_run };
    let collected = store.collect(options).await?;
    let report = Report { store: args.store.to_string(), dry_run: args.dry_run, collected };
    Output::new(global).answer(&report, text)?;
    Ok(0)
}

fn text(report: &Report) -> String {
    let row = |what: &str, count: Count| vec![what.to_owned(), count.objects.to_string(), bytes(count.bytes)];
    let collected = &report.collected;
    let (marked, removed) =
        if report.dry_run { ("would be marked", "would be removed") } else { ("marked now", "removed") };
    let rows = [
        row("in use", collected.alive),
        row(marked, collected.marked),
        row("marked, waiting", collected.waiting),
        row(removed, collected.removed),
    ];
    table(&["WHAT", "OBJECTS", "BYTES"], rows)
}
