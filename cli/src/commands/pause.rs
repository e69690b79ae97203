//! `rewarm pause`

use rewarm_container::dial::Inside;
use rewarm_probe::engine;
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
    if let Some(hook) = &args.pre {
        let port = client.status()?.spec.ports.first().copied();
        hook.run(&Inside::new(client.clone()), port, args.hook_timeout).await?;
    }
    if let Some(engine) = &args.engine {
        let port = client.status()?.spec.ports.first().copied();
        engine::take(&engine.before, &Inside::new(client.clone()), port).await?;
    }
    let paused = client.pause(args.lock_timeout)?;
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
