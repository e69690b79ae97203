//! What others see of the pools and can ask of them: the admin API, the metrics and the KEDA scaler are built on nothing
//! else.
//!
//! A [`Handle`] is given to each of them. [`Handle::status`] is made when somebody asks and costs nothing otherwise;
//! [`Handle::notices`] tells what happens; [`Handle::command`] asks for something.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rewarm_autoscaler::pool::{State, Tier};
use rewarm_report::Timing;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::sync::broadcast;
use utoipa::ToSchema;

use crate::admin::document;

/// Milliseconds since 1970.
pub type UnixMs = u64;

/// Everything at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Status {
    /// Version of the program.
    pub version: String,
    /// Since when it serves.
    pub since: UnixMs,
    /// Now.
    pub now: UnixMs,
    /// Host and device memory that replicas take.
    pub memory: MemoryStatus,
    /// The pools, in the order of the file.
    pub pools: Vec<PoolStatus>,
}

/// Memory that replicas take, as the ledger has it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct MemoryStatus {
    /// Host memory that is taken, in bytes.
    pub host_used: u64,
    /// What may be taken; absent without a limit.
    pub host_limit: Option<u64>,
    /// What decoded snapshots may take beside that; absent without a limit.
    pub cache_limit: Option<u64>,
    /// Device memory that is taken, in bytes.
    pub device_used: u64,
}

/// One pool.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct PoolStatus {
    /// Its name.
    pub name: String,
    /// What is restored, as the file says.
    pub snapshot: String,
    /// The digest to which that points, as far as known.
    pub digest: Option<String>,
    /// Where clients come.
    pub listen: String,
    /// The limits that hold.
    pub limits: LimitsStatus,
    /// The policy's name.
    pub policy: String,
    /// Whether it is paused by hand: nothing is started, and requests are refused.
    pub paused: bool,
    /// The number of replicas that was set by hand, which counts in place of the policy's.
    pub fixed: Option<u32>,
    /// Requests in flight in replicas.
    pub in_flight: u32,
    /// Requests held.
    pub held: u32,
    /// How long the oldest held request has waited, in milliseconds.
    pub oldest_held_ms: Option<f64>,
    /// Replicas that the last decision wanted, within the limits.
    pub desired: u32,
    /// What a start is expected to take, in seconds.
    pub start_seconds: StartSecondsStatus,
    /// Why nothing is started at the moment, or only in another way, after several failures in a row.
    pub circuit: Option<CircuitStatus>,
    /// Why a start that is wanted is not begun: memory is short, or starts have failed.
    pub obstacle: Option<String>,
    /// Every replica that exists, warm ones too.
    pub replicas: Vec<ReplicaStatus>,
    /// The last decisions that changed something, at most [`DECISIONS_MAX`], oldest first.
    pub decisions: Vec<DecisionStatus>,
    /// The last starts, at most [`STARTS_MAX`], oldest first.
    pub starts: Vec<StartStatus>,
    /// Sums since the program was started.
    pub totals: Totals,
}

/// How many decisions of each pool are remembered.
pub const DECISIONS_MAX: usize = 1000;
/// How many starts of each pool are remembered.
pub const STARTS_MAX: usize = 200;

/// Limits of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, ToSchema)]
pub struct LimitsStatus {
    /// Requests that one replica answers at once, at most.
    pub concurrency: u32,
    /// Requests for each replica that the policy aims at.
    pub target_concurrency: u32,
    /// Fewest replicas.
    pub min_replicas: u32,
    /// Most replicas, warm ones not counted.
    pub max_replicas: u32,
    /// Most warm replicas.
    pub warm: u32,
    /// Most requests held.
    pub queue_max: u64,
    /// How long one is held, in milliseconds.
    pub queue_deadline_ms: f64,
    /// How long one may wait before the policy helps, in milliseconds.
    pub target_wait_ms: f64,
}

/// Seconds that a start of each kind is expected to take.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, ToSchema)]
pub struct StartSecondsStatus {
    /// A warm replica is woken.
    pub wake: f64,
    /// The snapshot is restored, or, while restores are left alone, the server is started cold.
    pub restore: f64,
}

/// Starts are held back.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct CircuitStatus {
    /// How often a start has failed in a row.
    pub failures: u32,
    /// When the next one is tried.
    pub until: UnixMs,
    /// How the last one failed.
    pub reason: String,
}

/// One replica.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ReplicaStatus {
    /// Its name, by which `rewarm ps`, `logs` and `exec` know it.
    pub name: String,
    /// What it is doing.
    #[schema(schema_with = document::state)]
    pub state: State,
    /// Requests that it is answering.
    pub in_flight: u32,
    /// Requests that it was given since it was started last.
    pub requests: u64,
    /// Since when it has been in its state.
    pub since: UnixMs,
    /// How it was started last.
    #[schema(schema_with = document::tier)]
    pub tier: Tier,
    /// The snapshot that it came from, with its digest; absent for a cold one.
    pub source: Option<String>,
    /// Host memory that is counted for it, in bytes.
    pub host_bytes: u64,
}

/// One decision, with what it was made from.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct DecisionStatus {
    /// When.
    pub at: UnixMs,
    /// Replicas that the policy wanted.
    pub wanted: u32,
    /// The same within the limits, or what was set by hand.
    pub desired: u32,
    /// Replicas that served or were on their way.
    pub active: u32,
    /// Warm replicas.
    pub warm: u32,
    /// Requests in flight.
    pub in_flight: u32,
    /// Requests held.
    pub held: u32,
    /// How long the oldest held request had waited, in milliseconds.
    pub oldest_held_ms: Option<f64>,
    /// What starts were expected to take.
    pub start_seconds: StartSecondsStatus,
    /// Why, in words.
    pub reason: String,
    /// What was done, in words; empty where nothing could be done.
    pub steps: Vec<String>,
}

/// How a start ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum StartOutcome {
    /// It serves, or waits warm.
    Ready,
    /// It failed.
    Failed,
    /// It took too long and was killed.
    TimedOut,
    /// It was not wanted any more.
    GivenUp,
}

impl StartOutcome {
    /// All of them.
    pub const ALL: [StartOutcome; 4] =
        [StartOutcome::Ready, StartOutcome::Failed, StartOutcome::TimedOut, StartOutcome::GivenUp];

    /// As it is written in JSON and in labels of metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            StartOutcome::Ready => "ready",
            StartOutcome::Failed => "failed",
            StartOutcome::TimedOut => "timed_out",
            StartOutcome::GivenUp => "given_up",
        }
    }
}

/// One start that has ended.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct StartStatus {
    /// When it began.
    pub at: UnixMs,
    /// The replica.
    pub replica: String,
    /// Where it came from.
    #[schema(schema_with = document::tier)]
    pub tier: Tier,
    /// How it ended.
    pub outcome: StartOutcome,
    /// How long it took, in milliseconds.
    pub took_ms: f64,
    /// The stages of a restore, with their times.
    #[schema(value_type = Vec<document::StageTiming>)]
    pub stages: Vec<Timing>,
    /// Why it failed, or why it was started cold.
    pub reason: Option<String>,
}

/// Sums since the program was started. They only grow.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct Totals {
    /// Requests that were answered, by the status that the client was given.
    pub responses: BTreeMap<u16, u64>,
    /// Requests that came.
    pub requests: u64,
    /// Requests that were held at first.
    pub held: u64,
    /// Requests that were refused because the queue was full (429).
    pub refused_full: u64,
    /// Requests whose deadline passed while they were held (503).
    pub refused_late: u64,
    /// Requests whose client left while they were held.
    pub left: u64,
    /// Requests that were tried a second time.
    pub retried: u64,
    /// Requests that were cut off because their replica died.
    pub cut_off: u64,
    /// Requests that a drain cut off which took longer than the pool allows. Without such a limit there are none: what is in flight is waited for.
    pub killed_in_flight: u64,
    /// How long requests waited for a slot, in seconds.
    pub wait_seconds: Histogram,
    /// How long answers took from the slot to their last byte, in seconds.
    pub service_seconds: Histogram,
    /// Starts, by tier and outcome.
    #[schema(schema_with = document::start_sums)]
    pub starts: Vec<(Tier, StartOutcome, u64)>,
    /// Decisions that changed the number of replicas.
    pub decisions: u64,
    /// Replicas that ended although nobody asked them to.
    pub died: u64,
    /// Bytes of requests' bodies.
    pub request_bytes: u64,
    /// Bytes of responses' bodies.
    pub response_bytes: u64,
}

/// A histogram as Prometheus has it.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Histogram {
    /// Upper bounds of the buckets, rising; a last one without bound is implied.
    pub bounds: Vec<f64>,
    /// How many values fell into each bucket alone, one more than there are bounds.
    pub counts: Vec<u64>,
    /// Sum of all values.
    pub sum: f64,
}

impl Default for Histogram {
    /// Bounds for seconds, from a millisecond to two minutes.
    fn default() -> Self {
        let bounds = vec![
            0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
        ];
        Self { counts: vec![0; bounds.len() + 1], bounds, sum: 0.0 }
    }
}

impl Histogram {
    /// Takes a value in.
    pub fn record(&mut self, value: f64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        self.counts[bucket] += 1;
        self.sum += value;
    }

    /// How many values there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// Something that happened, told at once.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case", tag = "notice")]
pub enum Notice {
    /// A request is held, and none was before.
    FirstHeld {
        /// The pool.
        pool: String,
    },
    /// A replica changed its state, or is gone (`cold`).
    Replica {
        /// The pool.
        pool: String,
        /// The replica.
        name: String,
        /// Its state now.
        #[schema(schema_with = document::state)]
        state: State,
    },
    /// A decision changed the number of replicas.
    Decision {
        /// The pool.
        pool: String,
        /// What was decided.
        decision: DecisionStatus,
    },
    /// A start has ended.
    Start {
        /// The pool.
        pool: String,
        /// How.
        start: StartStatus,
    },
}

/// Something that is asked for by hand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "command")]
pub enum Command {
    /// So many replicas, whatever the policy wants; without a number the policy decides again.
    Scale {
        /// The pool.
        pool: String,
        /// How many.
        replicas: Option<u32>,
    },
    /// One replica gets no further requests, finishes those it has, and is stopped.
    Drain {
        /// The pool.
        pool: String,
        /// The replica.
        replica: String,
    },
    /// The pool starts nothing and refuses requests; what is in flight is finished, and its replicas go.
    Pause {
        /// The pool.
        pool: String,
    },
    /// The end of a pause.
    Resume {
        /// The pool.
        pool: String,
    },
}

impl Command {
    /// The pool that is meant.
    #[must_use]
    pub fn pool(&self) -> &str {
        match self {
            Command::Scale { pool, .. }
            | Command::Drain { pool, .. }
            | Command::Pause { pool }
            | Command::Resume { pool } => pool,
        }
    }
}

/// Why a command was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// There is no such pool.
    #[error("no pool is called {pool:?}")]
    UnknownPool {
        /// The name.
        pool: String,
    },
    /// There is no such replica.
    #[error("no replica of pool {pool} is called {replica:?}")]
    UnknownReplica {
        /// The pool.
        pool: String,
        /// The name.
        replica: String,
    },
    /// It cannot be done.
    #[error("{problem}")]
    Impossible {
        /// The value seen and the one expected.
        problem: String,
    },
}

/// Who knows the pools.
#[async_trait::async_trait]
pub trait Source: Send + Sync + 'static {
    /// Everything, now.
    fn status(&self) -> Status;

    /// What happens from now on. A reader that is too slow loses the oldest notices, and is told so.
    fn notices(&self) -> broadcast::Receiver<Notice>;

    /// Does something, and says in words what was done.
    ///
    /// # Errors
    /// Where it is not done.
    async fn command(&self, command: Command) -> Result<String, Refused>;

    /// A connection to the port of a replica's server, for what it says of itself (`/metrics`).
    ///
    /// # Errors
    /// There is no such replica, or it does not listen.
    async fn dial(&self, replica: &str) -> io::Result<TcpStream>;
}

/// The pools as others may use them. Clones are the same.
#[derive(Clone)]
pub struct Handle(Arc<dyn Source>);

impl std::fmt::Debug for Handle {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        to.write_str("Handle")
    }
}

impl Handle {
    /// Over somebody who knows them.
    #[must_use]
    pub fn new(source: Arc<dyn Source>) -> Self {
        Self(source)
    }

    /// As [`Source::status`].
    #[must_use]
    pub fn status(&self) -> Status {
        self.0.status()
    }

    /// As [`Source::notices`].
    #[must_use]
    pub fn notices(&self) -> broadcast::Receiver<Notice> {
        self.0.notices()
    }

    /// As [`Source::command`].
    ///
    /// # Errors
    /// Where it is not done.
    pub async fn command(&self, command: Command) -> Result<String, Refused> {
        self.0.command(command).await
    }

    /// As [`Source::dial`].
    ///
    /// # Errors
    /// As there.
    pub async fn dial(&self, replica: &str) -> io::Result<TcpStream> {
        self.0.dial(replica).await
    }
}

/// The time of day, for people: what is measured is measured otherwise.
#[must_use]
pub fn now() -> UnixMs {
    let passed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(passed.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_falls_into_the_first_bucket_that_holds_it() {
        let mut histogram = Histogram { bounds: vec![1.0, 2.0], counts: vec![0; 3], sum: 0.0 };
        for value in [0.5, 1.0, 1.5, 2.5] {
            histogram.record(value);
        }
        assert_eq!((histogram.counts.clone(), histogram.sum, histogram.count()), (vec![2, 1, 1], 5.5, 4));
    }

    #[test]
    fn a_command_is_read_by_its_name() {
        let command: Command =
            serde_json::from_str(r#"{"command":"scale","pool":"llama","replicas":3}"#).expect("good");
        assert_eq!(command, Command::Scale { pool: "llama".to_owned(), replicas: Some(3) });
        assert_eq!(command.pool(), "llama");
    }
}
