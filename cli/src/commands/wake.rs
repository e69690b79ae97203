//! `rewarm wake`

use rewarm_container::dial::Inside;
use rewarm_probe::engine;
use serde::Serialize;

use crate::args::{Global, Wake};
use crate::failure::Cause;
use crate::render::Output;
use crate::{render, replicas};

#[derive(Serialize)]
struct Report {
    name: String,
    device_bytes: u64,
    seconds: f64,
    driver_seconds: f64,
}

pub(crate) async fn run(args: &Wake, global: &Global) -> Result<u8, Cause> {
    let state = replicas::open(global)?;
    let client = replicas::connect(&state, &args.name)?;
    let woken = client.wake()?;
    if let Some(engine) = &args.engine {
        let port = client.status()?.spec.ports.first().copied();
        let mut failures =
            engine::take_all(&engine.after, &Inside::new(client.clone()), port).await.into_iter();
        if let Some(first) = failures.next() {
            for error in failures {
                render::warn(&format!("a step of the engine failed: {error}"));
            }
            return Err(first.into());
        }
    }
    if let Some(hook) = &args.post {
        let port = client.status()?.spec.ports.first().copied();
        hook.run(&Inside::new(client.clone()), port, args.hook_timeout).await?;
    }
    let report = Report {
        name: args.name.to_string(),
        device_bytes: woken.device_bytes,
        seconds: woken.took.as_secs_f64(),
        driver_seconds: woken.in_driver.as_secs_f64(),
    };
    Output::new(global).answer(&report, |report| {
        let back = match report.device_bytes {
            0 => String::new(),
            bytes => format!(", {} back in device memory", render::bytes(bytes)),
        };
        format!(
            "{} is awake: took {}{back}\n",
            report.name,
            render::seconds(woken.took.as_secs_f64() * 1000.0)
        )
    })?;
    Ok(0)
}
