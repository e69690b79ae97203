//! What the driver refuses: memory that it cannot checkpoint, copies that it cannot read, devices that are full.

use std::time::Duration;

use rewarm_gpu::{Helper, states};

use super::{LOCK, added, added_to, checkpointed, code, take, text, whole};
use crate::bench::{Bench, Server};

/// How long a restore may take that must fail. The real driver may wait for a page that nobody brings.
const PATIENCE: Duration = Duration::from_secs(20);
/// In pieces of so many MiB a device is filled.
const PIECE_MIB: &str = "16";

pub(super) fn by_the_driver(bench: &mut Bench) -> Result<String, String> {
    let managed = bench.serve(&["--mib", "2", "--threads", "0"])?;
    managed.ask("POST", "/managed?4", "")?;
    let [shared, opened] = [(); 2].map(|()| bench.serve(&["--mib", "2", "--threads", "0"]));
    let (shared, opened) = (shared?, opened?);
    let answer: serde_json::Value = serde_json::from_str(&shared.ask("POST", "/share", "")?).map_err(text)?;
    opened.ask("POST", "/open", answer["handle"].as_str().ok_or("no handle")?)?;
    let mut wrong = Vec::new();
    for (what, server) in [("managed", managed), ("shared", shared), ("opened", opened)] {
        let mut helper = bench.helper();
        helper.lock(server.pid, LOCK).map_err(text)?;
        let result = code(take(&mut helper, server, rewarm_gpu::Step::Checkpoint));
        bench.notes.push(format!("{what}: {result}"));
        let state = helper.state(server.pid).map_err(text)?;
        for step in states::way_back(state).ok_or_else(|| format!("{what} is {state}"))? {
            take(&mut helper, server, *step).map_err(text)?;
        }
        let whole = whole(server)?;
        if result == "0" || whole != "whole" {
            wrong.push(format!("{what}: {result}, then {whole}"));
        }
    }
    Ok(if wrong.is_empty() { "refused, then whole".to_owned() } else { wrong.join("; ") })
}

pub(super) fn absent_copies(bench: &mut Bench) -> Result<String, String> {
    let (server, added) = added(bench)?;
    for range in added {
        server.ask("POST", &format!("/absent?{:x}-{:x}", range.start, range.end), "")?;
    }
    let mut helper = bench.helper().with_deadline(PATIENCE);
    let refused = code(helper.restore(server.pid, 0, &[]));
    Ok(format!("{refused} and {}", helper.state(server.pid).map_err(text)?))
}

pub(super) fn copies_put_back(bench: &mut Bench) -> Result<String, String> {
    let server = bench.serve(&["--mib", "16", "--threads", "0"])?;
    let mut session = server.session()?;
    let mut helper = bench.helper().with_deadline(PATIENCE);
    for range in added_to(&mut helper, server)? {
        session.ask("POST", &format!("/put-back?{:x}-{:x}", range.start, range.end))?;
    }
    let done = code(helper.restore(server.pid, 0, &[]));
    if done != "0" {
        return Ok(format!("{done} and {}", helper.state(server.pid).map_err(text)?));
    }
    helper.unlock(server.pid).map_err(text)?;
    Ok(format!("{done}, then {}", whole(server)?))
}

/// A checkpointed server, another one that has taken all of its device meanwhile, and what a restore says.
fn onto_a_full_device(bench: &mut Bench) -> Result<(Helper, [Server; 2], String), String> {
    let (mut helper, server) = checkpointed(bench, &["--mib", "32", "--threads", "0"])?;
    let other = bench.serve(&["--mib", "2", "--threads", "0"])?;
    let taken = other.ask("POST", &format!("/fill?{PIECE_MIB}"), "")?;
    bench.notes.push(format!("taken: {taken}"));
    let refused = code(helper.restore(server.pid, 32 << 20, &[]));
    Ok((helper, [server, other], refused))
}

pub(super) fn full(bench: &mut Bench) -> Result<String, String> {
    let (mut helper, [server, _], refused) = onto_a_full_device(bench)?;
    Ok(format!("{refused} and {}", helper.state(server.pid).map_err(text)?))
}

pub(super) fn full_then_free(bench: &mut Bench) -> Result<String, String> {
    let (mut helper, [server, other], refused) = onto_a_full_device(bench)?;
    bench.notes.push(format!("full: {refused}"));
    bench.kill(other);
    bench.used_mib()?;
    let again = code(helper.restore(server.pid, 32 << 20, &[]));
    if again != "0" {
        return Ok(again);
    }
    helper.unlock(server.pid).map_err(text)?;
    Ok(format!("{again}, then {}", whole(server)?))
}
