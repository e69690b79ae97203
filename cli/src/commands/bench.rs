//! `rewarm bench`, and the server that it measures where no other is named.

use rewarm_bench::{Options, Outcome, draw, serve};

use crate::args::{Bench, BenchServer, Global};
use crate::failure::Cause;
use crate::render::{Output, table};
use crate::signals::Interrupts;
use crate::{programs, render, replicas};

pub(crate) async fn run(args: &Bench, global: &Global) -> Result<u8, Cause> {
    let mut interrupts = Interrupts::watch()?;
    programs::fit_for_containers()?;
    let programs = programs::find(global).await?;
    let work = work_folder(args)?;
    let options = Options {
        program: replicas::program(),
        criu: programs.criu.path,
        server: args.server.clone(),
        size_bytes: args.size,
        touch: args.touch,
        store: args.store.as_ref().map(ToString::to_string),
        compression: args.compression.to_string(),
        own_bytes: args.own_memory,
        rounds: usize::from(args.rounds),
        work: work.path().to_owned(),
    };
    let quiet = global.quiet;
    let note = |text: &str| {
        if !quiet {
            render::talk(&format!("bench: {text}"));
        }
    };
    let outcome = rewarm_bench::run(&options, note, interrupts.next()).await?;
    if let Some(path) = &args.plot {
        draw(&outcome, path)?;
    }
    Output::new(global).answer(&outcome, text)?;
    Ok(0)
}

fn work_folder(args: &Bench) -> Result<tempfile::TempDir, Cause> {
    let made = tempfile::Builder::new().prefix("rewarm-bench.").tempdir_in(&args.work);
    made.map_err(|source| Cause::File { doing: "make a folder in", path: args.work.clone(), source })
}

fn text(outcome: &Outcome) -> String {
    let machine = &outcome.machine;
    format!(
        "{}, {} cores of {}, Linux {}; milliseconds, medians (least to most)\n\n{}",
        outcome.date,
        machine.cores,
        machine.processor,
        machine.kernel,
        table(
            &["CASE", "STORE", "RESUME", "FIRST ANSWER", "ALL PRESENT", "READ MiB", "CPU"],
            outcome.table()
        )
    )
}

pub(crate) fn server(args: &BenchServer) -> Result<u8, Cause> {
    let served = serve(args.port, &args.weights, args.touch);
    served.map_err(|source| Cause::File { doing: "serve", path: args.weights.clone(), source })?;
    Ok(0)
}
