//! A process that the driver has checkpointed goes through plain CRIU and is restored on the device afterwards.

use std::collections::BTreeSet;
use std::time::Instant;

use nix::sys::signal::Signal;
use rewarm_gpu::ranges::Range;
use rewarm_sys::hold::Hold;

use super::{LOCK, added_to, ms, text, whole};
use crate::bench::{Bench, Server};
use crate::criu::Criu;

/// What is seen where there is no CRIU.
const NOT_TRIED: &str = "not tried, no CRIU";
const DEVICE_BYTES: u64 = 16 << 20;
/// So much at once is asked of CRIU's daemon.
const STEP: u64 = 64 << 10;

/// A stopped, checkpointed server through a dump; `back` brings it back. Then only the driver's thread runs, until it is restored.
fn through(
    bench: &mut Bench,
    back: impl FnOnce(&mut Criu, Server, &[Range]) -> Result<String, String>,
) -> Result<String, String> {
    let Some(mut criu) = Criu::find()? else { return Ok(NOT_TRIED.to_owned()) };
    bench.notes.push(criu.version()?);
    let server = bench.serve_apart(&["--mib", "16", "--threads", "0"], &criu.output())?;
    let mut helper = bench.helper();
    let copies = added_to(&mut helper, server)?;
    server.signal(Signal::SIGSTOP);
    let took = criu.dump(bench, server)?;
    bench.notes.push(format!("dumped in {}, {} bytes", ms(took), criu.bytes()));
    let note = back(&mut criu, server, &copies)?;
    bench.notes.push(note);
    // The helper that has seen it before, which knows nothing of its having been away.
    let thread = helper.restore_thread(server.pid).map_err(text)?.ok_or("no thread")?;
    let mut hold = Hold::new(false);
    hold.all(|| vec![server.pid], &BTreeSet::from([thread]), LOCK).map_err(text)?;
    server.signal(Signal::SIGCONT);
    let took = helper.restore(server.pid, DEVICE_BYTES, &[]).map_err(text)?;
    helper.unlock(server.pid).map_err(text)?;
    drop(hold);
    bench.notes.push(format!("restored on the device in {}", ms(took)));
    Ok(format!("dumped, restored, then {}", whole(server)?))
}

pub(super) fn plainly(bench: &mut Bench) -> Result<String, String> {
    through(bench, |criu, server, _| Ok(format!("restored in {}", ms(criu.restore(server)?))))
}

pub(super) fn with_copies_brought_first(bench: &mut Bench) -> Result<String, String> {
    through(bench, |criu, server, copies| {
        let took = criu.restore_lazily(server)?;
        let began = Instant::now();
        copies.iter().try_for_each(|range| bring(server, range))?;
        Ok(format!("restored in {}, copies brought in {}", ms(took), ms(began.elapsed())))
    })
}

/// Reads a range from outside, as which each absent page is asked for and waited for.
fn bring(server: Server, range: &Range) -> Result<(), String> {
    let mut buffer = vec![0; usize::try_from(STEP).expect("small")];
    let mut at = range.start;
    while at < range.end {
        let count = usize::try_from((range.end - at).min(STEP)).expect("small");
        let got = rewarm_sys::procmem::read(server.pid, at, &mut buffer[..count]).map_err(text)?;
        if got == 0 {
            return Err(format!("nothing can be read at {at:#x}"));
        }
        at += got;
    }
    Ok(())
}
