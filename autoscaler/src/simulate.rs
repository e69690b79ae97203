//! Replays a trace through a policy in virtual time: what requests would have waited, and what replicas would have cost.
//!
//! Queue, pool, policies and the order of starts are those of the live loop; only time, replicas and clients are not real.
//! Answers take as long as the trace says, whatever else a replica is doing.

mod account;
mod engine;

use std::time::Duration;

pub use account::{Outcome, Starts, WaitMs};

use crate::config::PolicySpec;
use crate::policy::Limits;
use crate::queue::QueueLimits;
use crate::trace::Trace;

/// How long the starts of one tier take.
#[derive(Debug, Clone, PartialEq)]
pub enum StartSamples {
    /// Always the same.
    Fixed(Duration),
    /// One of these, drawn with the scenario's seed.
    Measured(Vec<Duration>),
}

/// Everything but the trace and the policy.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// Wakes.
    pub wake: StartSamples,
    /// Restores; without them every start that is no wake is a cold one.
    pub restore: Option<StartSamples>,
    /// Cold starts.
    pub cold: StartSamples,
    /// Warm replicas at the beginning, and at most.
    pub warm: u32,
    /// The pool's limits.
    pub limits: Limits,
    /// The queue's limits.
    pub queue: QueueLimits,
    /// Host memory that one warm replica holds, in bytes.
    pub replica_memory: u64,
    /// For what is drawn.
    pub seed: u64,
    /// Requests go to the replica that will be busy the longest anyway, which no gateway can know: how far any routing is from the
    /// best.
    pub clairvoyant: bool,
}

/// Replays `trace` through the policy.
#[must_use]
pub fn simulate(trace: &Trace, scenario: &Scenario, policy: &PolicySpec) -> Outcome {
    engine::Engine::new(trace, scenario, policy).run()
}
