//! `rewarm wake`

use rewarm_container::Record;
use rewarm_container::dial::Inside;
use rewarm_probe::Resume;
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
    let Record { spec, drained, .. } = client.status()?;
    let (given, owed) = (Resume::new(args.engine.as_ref(), args.post.as_ref(), args.hook_timeout), drained);
    // What is given takes the place of what the pause left to do, each for itself.
    let due = owed.is_some();
    let Resume { steps, hook, hook_timeout } = owed.unwrap_or_default();
    let resume = Resume {
        steps: if args.engine.is_some() { given.steps } else { steps },
        hook_timeout: if given.hook.is_some() { given.hook_timeout } else { hook_timeout },
        hook: given.hook.or(hook),
    };
    let failures = resume.take(&Inside::new(client.clone()), spec.ports.first().copied()).await;
    if due {
        client.resumed(failures.is_empty())?;
    }
    let mut failures = failures.into_iter();
    if let Some(first) = failures.next() {
        for failure in failures {
            render::warn(&format!("the server is to go on, but {failure}"));
        }
        return Err(first.into());
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
