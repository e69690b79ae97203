//! What a replay is judged by.

use std::time::Duration;

use serde::Serialize;

use crate::moment::Moment;
use crate::pool::{Pool, State, Tier};

/// What one policy made of one trace.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// The policy.
    pub name: String,
    /// Share of all requests that waited at most the target wait for a slot. A dropped request did not.
    pub within_target: f64,
    /// From the start of a restore or wake to the end of the drain, for each request.
    pub replica_seconds_per_request: f64,
    /// From arrival to slot.
    pub wait_ms: WaitMs,
    /// How often each tier was used.
    pub starts: Starts,
    /// Host memory of warm replicas over time.
    pub paused_host_gib_s: f64,
    /// Requests that were refused, or whose deadline passed while they were held.
    pub drops: u64,
    /// Requests that were cut off by a stop.
    pub killed_in_flight: u64,
    /// Most requests held at once.
    pub held_max: usize,
    /// What random numbers began with.
    pub seed: u64,
}

/// Quantiles of the wait, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct WaitMs {
    /// Half wait at most so long.
    pub p50: f64,
    /// 99 of 100.
    pub p99: f64,
    /// 999 of 1000.
    pub p999: f64,
}

/// Starts by tier.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Starts {
    /// Of warm replicas.
    pub wake: u64,
    /// Of the snapshot.
    pub restore: u64,
    /// By command.
    pub cold: u64,
}

/// Sums while a replay runs.
#[derive(Debug)]
pub(super) struct Account {
    target: Duration,
    at: Moment,
    /// Replicas and paused replicas, each times nanoseconds.
    charged: u128,
    paused: u128,
    last_answer: Moment,
    /// `paused` at the last answer: how long a policy keeps replicas after it is no matter of the warm ones.
    paused_at_last_answer: u128,
    waits: Vec<u64>,
    within: u64,
    pub(super) starts: Starts,
    pub(super) drops: u64,
    answers: u64,
    pub(super) held_max: usize,
}

impl Account {
    pub(super) fn new(target: Duration, requests: usize) -> Self {
        Self {
            target,
            at: Moment::START,
            charged: 0,
            paused: 0,
            last_answer: Moment::START,
            paused_at_last_answer: 0,
            waits: Vec::with_capacity(requests),
            within: 0,
            starts: Starts::default(),
            drops: 0,
            answers: 0,
            held_max: 0,
        }
    }

    /// Charges for the time since the last call, in which the pool was as it is now.
    pub(super) fn advance(&mut self, now: Moment, pool: &Pool) {
        let passed = u128::from(now.nanos() - self.at.nanos());
        self.charged += passed * u128::from(pool.charged());
        self.paused += passed * u128::from(pool.count(State::Warm));
        self.at = now;
    }

    pub(super) fn waited(&mut self, wait: Duration) {
        self.within += u64::from(wait <= self.target);
        self.waits.push(wait.as_nanos() as u64);
    }

    pub(super) fn answered(&mut self, now: Moment) {
        self.last_answer = now;
        self.paused_at_last_answer = self.paused;
        self.answers += 1;
    }

    pub(super) fn last_answer(&self) -> Moment {
        self.last_answer
    }

    pub(super) fn started(&mut self, tier: Tier) {
        match tier {
            Tier::Wake => self.starts.wake += 1,
            Tier::Restore => self.starts.restore += 1,
            Tier::Cold => self.starts.cold += 1,
        }
    }

    /// Closes the books. Replicas that a policy never lets go are charged for up to the last answer.
    pub(super) fn close(mut self, name: &str, pool: &Pool, replica_memory: u64, seed: u64) -> Outcome {
        let tail = u128::from(self.at.nanos().saturating_sub(self.last_answer.nanos()));
        // Nothing is started after the last answer, so what is there at the end was there all the time.
        let charged = self.charged.saturating_sub(tail * u128::from(pool.charged()));
        let paused = self.paused_at_last_answer;
        let requests = self.waits.len() as u64 + self.drops;
        let gib = replica_memory as f64 / f64::from(1_u32 << 30);
        let wait_ms =
            WaitMs { p50: self.quantile_ms(0.5), p99: self.quantile_ms(0.99), p999: self.quantile_ms(0.999) };
        Outcome {
            name: name.to_owned(),
            within_target: self.within as f64 / requests.max(1) as f64,
            replica_seconds_per_request: charged as f64 / 1e9 / requests.max(1) as f64,
            wait_ms,
            starts: self.starts,
            paused_host_gib_s: paused as f64 / 1e9 * gib,
            drops: self.drops,
            killed_in_flight: self.waits.len() as u64 - self.answers - u64::from(pool.in_flight()),
            held_max: self.held_max,
            seed,
        }
    }

    /// The smallest wait that at least this share of the answered requests kept to.
    fn quantile_ms(&mut self, share: f64) -> f64 {
        if self.waits.is_empty() {
            return 0.0;
        }
        let place = (self.waits.len() as f64 * share).ceil() as usize;
        let place = place.clamp(1, self.waits.len()) - 1;
        let (_, nanos, _) = self.waits.select_nth_unstable(place);
        // Microseconds are as fine as anybody looks.
        (*nanos as f64 / 1e3).round() / 1e3
    }
}
