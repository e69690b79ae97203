//! `rewarm run`
//!
//! The connection to the shim is a lease: whatever goes wrong before the commit, this process being killed included, the
//! shim ends the server and removes what it made.

use rewarm_container::{Gpu, Spec};
use rewarm_gpu::provide::{Places, ProvideError};
use rewarm_probe::Ready;
use rewarm_report::{Clock, Timing};
use rewarm_restore::{Ground, cold};
use serde::Serialize;

use crate::args::{Global, Run};
use crate::failure::Cause;
use crate::render::{Output, seconds};
use crate::replicas::{self, Published};
use crate::signals::Interrupts;
use crate::{env, programs};

/// What was started, in JSON.
#[derive(Debug, Serialize)]
struct Started {
    name: String,
    started: &'static str,
    pid: u32,
    shim_pid: u32,
    uuid: String,
    publish: Vec<Published>,
    stages: Vec<Timing>,
    /// Milliseconds from the command to ready.
    ready_ms: f64,
}

pub(crate) async fn run(args: &Run, global: &Global) -> Result<u8, Cause> {
    let mut interrupts = Interrupts::watch()?;
    programs::fit_for_containers()?;
    let state = replicas::open(global)?;
    let output = Output::new(global);
    let ground = Ground {
        state,
        program: replicas::program(),
        clock: Clock::start(output.progress()).pausing_at(env::pause_at()),
    };
    let started =
        cold::run(&args.name, spec(args)?, None, args.ready_timeout, &ground, interrupts.next()).await?;
    let started = Started {
        name: started.name.to_string(),
        started: "cold",
        pid: started.pid,
        shim_pid: started.shim_pid,
        uuid: started.uuid.to_string(),
        publish: started.published.iter().map(Published::from).collect(),
        stages: ground.clock.timings(),
        ready_ms: started.ready_after.as_secs_f64() * 1000.0,
    };
    output.answer(&started, |started| {
        let ports: Vec<String> = started.publish.iter().map(Published::describe).collect();
        let ports = if ports.is_empty() { String::new() } else { format!(", {}", ports.join(", ")) };
        format!("{} is ready after {}{ports}\n", started.name, seconds(started.ready_ms))
    })?;
    Ok(0)
}

fn spec(args: &Run) -> Result<Spec, Cause> {
    let mut ports = args.port.clone();
    // A port that is published is one on which the server listens.
    for publish in &args.publish {
        if !ports.contains(&publish.port) {
            ports.push(publish.port);
        }
    }
    let gpu = args.gpu.as_ref().map(|wanted| {
        let provided = Places::here(env::cdi()).provide(wanted)?;
        Ok::<_, ProvideError>(Gpu { wanted: wanted.clone(), provided })
    });
    Ok(Spec {
        gpu: gpu.transpose()?,
        name: Some(args.name.clone()),
        command: args.command.clone(),
        rootfs: args.rootfs.clone().unwrap_or_else(|| "/".into()),
        mounts: args.mount.clone(),
        user: args.user.clone(),
        env: args.env.iter().map(|(key, value)| format!("{key}={value}")).collect(),
        workdir: args.workdir.clone(),
        memory_bytes: args.memory,
        cpus: args.cpus,
        net: args.net.clone(),
        ports,
        publish: args.publish.clone(),
        ready: args.ready.as_ref().map(Ready::to_string),
        labels: args.label.iter().cloned().collect(),
        deterministic: args.deterministic,
        ..Spec::default()
    })
}
