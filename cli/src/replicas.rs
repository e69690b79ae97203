//! Replicas as the verbs see them: the state folder, a view for `--json`.

use std::sync::Arc;

use rewarm_container::cgroup::Cgroup;
use rewarm_container::shim::Client;
use rewarm_container::{Entry, Exit, ExitStatus, Memory, Name, Origin, Publish, Record, State, Status};
use serde::Serialize;

use crate::args::Global;
use crate::failure::Cause;
use crate::render;

/// Opens the state folder and cleans up after shims that died.
pub(crate) fn open(global: &Global) -> Result<State, Cause> {
    let boot = rewarm_container::state::boot_id()?;
    let state = State::open(&global.state, &boot)?;
    for swept in state.sweep()? {
        if swept.kept {
            render::warn(&format!(
                "replica {} had lost its shim and was ended; it is kept as crashed",
                swept.name
            ));
        }
    }
    Ok(state)
}

/// The program that shims are made of: this one. `/proc/self/exe` still works when the file was replaced.
pub(crate) fn program() -> std::path::PathBuf {
    let link = || "/proc/self/exe".into();
    std::env::current_exe().ok().filter(|path| path.exists()).unwrap_or_else(link)
}

/// Connects to the shim of a replica that runs.
pub(crate) fn connect(state: &State, name: &Name) -> Result<Arc<Client>, Cause> {
    Ok(Arc::new(Client::connect(state, name)?))
}

/// One published port in JSON.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Published {
    address: String,
    host_port: u16,
    port: u16,
}

impl Published {
    /// For a person: `0.0.0.0:8080->8000`.
    pub(crate) fn describe(&self) -> String {
        let address =
            if self.address.contains(':') { format!("[{}]", self.address) } else { self.address.clone() };
        format!("{address}:{}->{}", self.host_port, self.port)
    }
}

impl From<&Publish> for Published {
    fn from(publish: &Publish) -> Self {
        Self { address: publish.address.to_string(), host_port: publish.host_port, port: publish.port }
    }
}

/// A replica in JSON.
#[derive(Debug, Serialize)]
pub(crate) struct View {
    name: String,
    status: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    uuid: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    generation: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    created: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    started: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    shim_pid: Option<u32>,
    publish: Vec<Published>,
    ports: Vec<u16>,
    command: Vec<String>,
    #[serde(skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    labels: std::collections::BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory_bytes: Option<u64>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    /// `filling` or `present`, for a restored replica.
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<&'static str>,
    /// Milliseconds from the moment in which the replica was made until its memory was complete.
    #[serde(skip_serializing_if = "Option::is_none")]
    present_ms: Option<i64>,
    /// It was drained for a pause or a snapshot, and is to go on yet.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    drained: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    exit: Option<Ended>,
}

/// What a replica takes.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Usage {
    /// Bytes of host memory charged to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) host_bytes: Option<u64>,
    /// Bytes of device memory, known from its restore or its last pause; none while it is paused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) device_bytes: Option<u64>,
    /// While it is paused: how long waking it takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    wakes_in_seconds: Option<f64>,
    /// How long the driver took to bring device memory back at its restore.
    #[serde(skip_serializing_if = "Option::is_none")]
    restore_driver_seconds: Option<f64>,
}

impl Usage {
    pub(crate) fn of(record: &Record) -> Self {
        let paused = record.status == Status::Paused;
        let wake = record.device.filter(|_| paused).and_then(|device| Some((device.wake?, device.bytes)));
        Self {
            host_bytes: Cgroup::open(&record.cgroup).ok().and_then(|cgroup| cgroup.memory_bytes()),
            device_bytes: record.device.map(|device| if paused { 0 } else { device.bytes }),
            wakes_in_seconds: wake.map(|(wake, bytes)| wake.estimate(bytes).as_secs_f64()),
            restore_driver_seconds: record
                .device
                .and_then(|device| device.restored_in)
                .map(|time| time.as_secs_f64()),
        }
    }
}

/// How a replica ended, in JSON.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Ended {
    /// As a shell shows it.
    pub(crate) code: i32,
    #[serde(skip_serializing_if = "Option::is_none")]
    signal: Option<i32>,
    #[serde(flatten)]
    cause: rewarm_container::Cause,
    ended: String,
}

impl From<&Exit> for Ended {
    fn from(exit: &Exit) -> Self {
        let signal = match exit.status {
            ExitStatus::Signal(signal) => Some(signal),
            ExitStatus::Code(_) | ExitStatus::Unknown => None,
        };
        Self { code: exit.status.code(), signal, cause: exit.cause.clone(), ended: exit.ended.to_string() }
    }
}

impl From<&Entry> for View {
    fn from(entry: &Entry) -> Self {
        let record = entry.record.as_ref();
        let (started, source) = match record.map(|record| &record.origin) {
            None => (None, None),
            Some(Origin::Cold) => (Some("cold"), None),
            Some(Origin::Restored { source }) => (Some("restored"), Some(source.clone())),
        };
        let alive = entry.exit.is_none();
        let (memory, present_ms) = match record.and_then(|record| Some((record, record.memory?))) {
            None => (None, None),
            Some((_, Memory::Filling)) => (Some("filling"), None),
            Some((record, Memory::Present { since })) => {
                (Some("present"), Some(since.as_millisecond() - record.created.as_millisecond()))
            }
        };
        Self {
            name: entry.name.to_string(),
            status: entry.status.to_string(),
            uuid: record.map(|record| record.uuid.to_string()),
            generation: record.map(|record| record.generation),
            created: record.map(|record| record.created.to_string()),
            started,
            source,
            pid: record.and_then(|record| record.pid).filter(|_| alive),
            shim_pid: record.map(|record| record.shim_pid).filter(|_| alive),
            publish: record
                .map(|record| record.published.iter().map(Published::from).collect())
                .unwrap_or_default(),
            ports: record.map(|record| record.spec.ports.clone()).unwrap_or_default(),
            command: record.map(|record| record.spec.command.clone()).unwrap_or_default(),
            labels: record.map(|record| record.spec.labels.clone()).unwrap_or_default(),
            memory_bytes: record.and_then(|record| record.spec.memory_bytes),
            usage: record.filter(|_| alive).map(Usage::of),
            memory,
            present_ms,
            drained: alive && record.is_some_and(|record| record.drained.is_some()),
            exit: entry.exit.as_ref().map(Ended::from),
        }
    }
}
