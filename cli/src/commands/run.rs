//! `rewarm run`
//!
//! The connection to the shim is a lease: whatever goes wrong before the commit, this process being killed included, the
//! shim ends the server and removes what it made.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rewarm_container::dial::Inside;
use rewarm_container::shim::{Client, Prepare};
use rewarm_container::{Net, Origin, Spec, State};
use rewarm_probe::{Ready, wait_ready};
use serde::Serialize;

use crate::args::{Global, Run};
use crate::failure::Cause;
use crate::programs;
use crate::render::{Output, seconds};
use crate::replicas::{self, Published};
use crate::signals::Interrupts;

/// runc makes a container in a fraction of a second; a machine under load is given time.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the removal of a replica that did not become ready may take.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(20);

/// What was started, in JSON.
#[derive(Debug, Serialize)]
struct Started {
    name: String,
    started: &'static str,
    pid: u32,
    shim_pid: u32,
    uuid: String,
    publish: Vec<Published>,
    stages: Vec<Stage>,
    /// Milliseconds from the command to ready.
    ready_ms: f64,
}

/// The steps of a cold start are none of a pipeline's stages, but are told in the same form.
#[derive(Debug, Serialize)]
struct Stage {
    stage: &'static str,
    start_ms: f64,
    took_ms: f64,
}

struct Steps {
    began: Instant,
    stages: Vec<Stage>,
}

impl Steps {
    fn step<T>(&mut self, stage: &'static str, start: Instant, value: T) -> T {
        let (start_ms, took_ms) = (millis(start - self.began), millis(start.elapsed()));
        self.stages.push(Stage { stage, start_ms, took_ms });
        value
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

pub(crate) async fn run(args: &Run, global: &Global) -> Result<u8, Cause> {
    let mut interrupts = Interrupts::watch()?;
    programs::fit_for_containers()?;
    let state = replicas::open(global)?;
    let spec = spec(args);
    let started = start(&state, spec, args.ready_timeout, &mut interrupts).await?;
    Output::new(global).answer(&started, |started| {
        let ports: Vec<String> = started.publish.iter().map(Published::describe).collect();
        let ports = if ports.is_empty() { String::new() } else { format!(", {}", ports.join(", ")) };
        format!("{} is ready after {}{ports}\n", started.name, seconds(started.ready_ms))
    })?;
    Ok(0)
}

fn spec(args: &Run) -> Spec {
    let mut ports = args.port.clone();
    // A port that is published is one on which the server listens.
    for publish in &args.publish {
        if !ports.contains(&publish.port) {
            ports.push(publish.port);
        }
    }
    Spec {
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
        ..Spec::default()
    }
}

/// Starts a server cold and waits until it is ready. A failure leaves nothing behind.
async fn start(
    state: &State,
    spec: Spec,
    timeout: Duration,
    interrupts: &mut Interrupts,
) -> Result<Started, Cause> {
    let mut steps = Steps { began: Instant::now(), stages: Vec::new() };
    let name = spec.name.clone().expect("the name is an argument of the command line");
    let claim = state.create(&name)?;
    let start = Instant::now();
    let client = Arc::new(Client::spawn(claim, &replicas::program())?);
    let lease = Lease { client, state };
    match serve(&lease.client, spec, timeout, interrupts, &mut steps, start).await {
        Ok((record, pid)) => Ok(Started {
            name: name.to_string(),
            started: "cold",
            pid,
            shim_pid: record.shim_pid,
            uuid: record.uuid.to_string(),
            publish: record.published.iter().map(Published::from).collect(),
            ready_ms: millis(steps.began.elapsed()),
            stages: steps.stages,
        }),
        Err(cause) => Err(lease.end(cause)),
    }
}

async fn serve(
    client: &Arc<Client>,
    spec: Spec,
    timeout: Duration,
    interrupts: &mut Interrupts,
    steps: &mut Steps,
    start: Instant,
) -> Result<(rewarm_container::Record, u32), Cause> {
    let ready = ready_check(&spec)?;
    let port = spec.ports.first().copied();
    let prepared = client.prepare(Prepare { spec, origin: Origin::Cold, generation: 0 })?;
    steps.step("sandbox", start, ());
    let start = Instant::now();
    let pid = client.start(START_TIMEOUT)?;
    steps.step("start", start, ());
    let start = Instant::now();
    if let Some(ready) = ready {
        let inside = Inside::new(client.clone());
        tokio::select! {
            waited = wait_ready(&ready, &inside, port, timeout, ended(client.clone())) => drop(waited?),
            signal = interrupts.next() => return Err(Cause::Interrupted { signal }),
        }
    }
    client.commit()?;
    steps.step("ready", start, ());
    Ok((prepared.record, pid))
}

/// The check that a specification asks for, or the first port, or none.
fn ready_check(spec: &Spec) -> Result<Option<Ready>, Cause> {
    match (&spec.ready, spec.ports.first()) {
        (Some(check), _) => Ok(Some(check.parse()?)),
        // Without an interface no port can be dialled.
        (None, Some(port)) if spec.net != Net::None => Ok(Some(Ready::tcp(*port))),
        (None, _) => Ok(None),
    }
}

/// Completes when the server ends, with how.
async fn ended(client: Arc<Client>) -> String {
    match tokio::task::spawn_blocking(move || client.wait()).await.expect("the client does not panic") {
        Ok(exit) => replicas::ending(&exit),
        Err(error) => format!("its shim is gone: {error}"),
    }
}

/// A replica that is not ready yet.
struct Lease<'a> {
    client: Arc<Client>,
    state: &'a State,
}

impl Lease<'_> {
    /// Ends the server, waits until everything is gone, and adds what the server wrote to the failure.
    fn end(self, cause: Cause) -> Cause {
        let Self { client, state } = self;
        let output = replicas::last_lines(client.paths());
        let name = client.name().clone();
        // The lease ends with the client in any case; the answer only says that it is over.
        let _ = client.kill("it did not become ready");
        drop(client);
        let deadline = Instant::now() + REMOVAL_TIMEOUT;
        while Instant::now() < deadline {
            match state.remove(&name) {
                Ok(()) | Err(rewarm_container::Error::UnknownName { .. }) => break,
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
        if output.is_empty() { cause } else { Cause::NotReady { cause: Box::new(cause), output } }
    }
}
