//! `rewarm pause`

use rewarm_container::Status;
use rewarm_container::dial::Inside;
use rewarm_container::shim::{Client, Paused};
use rewarm_probe::{Engine, Resume, engine};
use serde::Serialize;

use crate::args::{Global, Pause};
use crate::failure::Cause;
use crate::render::Output;
use crate::{render, replicas};

#[derive(Serialize)]
struct Report {
    name: String,
    device_bytes: u64,
    seconds: f64,
    driver_seconds: f64,
    wakes_in_seconds: f64,
}

pub(crate) async fn run(args: &Pause, global: &Global) -> Result<u8, Cause> {
    let state = replicas::open(global)?;
    let client = replicas::connect(&state, &args.name)?;
    let record = client.status()?;
    let (inside, port) = (Inside::new(client.clone()), record.spec.ports.first().copied());
    // What does not serve answers nothing; the pause says why it cannot be paused.
    let serves = record.status == Status::Ready;
    if let Some(hook) = args.pre.as_ref().filter(|_| serves) {
        hook.run(&inside, port, args.hook_timeout).await?;
    }
    let paused = match args.engine.as_ref().filter(|_| serves) {
        Some(engine) => drained(args, engine, &client, &inside, port).await?,
        None => client.pause(args.lock_timeout)?,
    };
    let report = Report {
        name: args.name.to_string(),
        device_bytes: paused.device_bytes,
        seconds: paused.took.as_secs_f64(),
        driver_seconds: paused.in_driver.as_secs_f64(),
        wakes_in_seconds: paused.wakes_in.as_secs_f64(),
    };
    Output::new(global).answer(&report, |report| {
        let freed = match report.device_bytes {
            0 => String::new(),
            bytes => format!(", {} of device memory moved to the host", render::bytes(bytes)),
        };
        let (took, wakes) = (
            render::seconds(paused.took.as_secs_f64() * 1000.0),
            render::seconds(paused.wakes_in.as_secs_f64() * 1000.0),
        );
        format!("{} is paused: took {took}{freed}; wakes in about {wakes}\n", report.name)
    })?;
    Ok(0)
}

/// Pauses it between the steps of its engine; those after it are left to the wake. Killed from here on, this command leaves it to
/// the shim to let the server go on.
async fn drained(
    args: &Pause,
    engine: &Engine,
    client: &Client,
    inside: &Inside,
    port: Option<u16>,
) -> Result<Paused, Cause> {
    let resume = Resume::new(Some(engine), None, args.hook_timeout);
    client.drain(resume.clone())?;
    let drained = engine::take(&engine.before, inside, port).await.map_err(Cause::from);
    let paused = drained.and_then(|()| Ok(client.pause(args.lock_timeout)?));
    if paused.is_err() {
        let able = is_ready(client);
        let failures = if able { resume.take(inside, port).await } else { Vec::new() };
        for failure in &failures {
            render::warn(&format!("the server is to go on, but {failure}"));
        }
        // What is told is why the pause failed.
        if let Err(error) = client.resumed(able && failures.is_empty()) {
            render::warn(&format!("what became of its engine is not written down: {error}"));
        }
    }
    paused
}

/// Whether the server goes on. One that is stranded would answer nothing.
fn is_ready(client: &Client) -> bool {
    client.status().is_ok_and(|record| record.status == Status::Ready)
}
