//! `rewarm pause`

use rewarm_container::Status;
use rewarm_container::dial::Inside;
use serde::Serialize;

use crate::args::{Global, Pause};
use crate::failure::Cause;
use crate::render::Output;
use crate::{drained, render, replicas};

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
        Some(engine) => {
            let paused = drained::pause(&client, engine, args.hook_timeout, args.lock_timeout).await;
            paused.map_err(|drained::Failed { cause, left }| {
                // What is told at last is why the pause failed.
                left.iter().for_each(|text| render::warn(text));
                cause
            })?
        }
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
