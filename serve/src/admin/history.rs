//! Requests in flight and held over the last quarter of an hour, so that a page that is opened has a past to show.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rewarm_autoscaler::pool::State;
use serde::Serialize;
use tokio::time::{MissedTickBehavior, interval};
use utoipa::ToSchema;

use crate::status::{Handle, PoolStatus, Status, UnixMs};

/// How often a sample is taken.
const EVERY: Duration = Duration::from_secs(1);
/// A quarter of an hour.
const SAMPLES_MAX: usize = 900;

/// One pool at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, ToSchema)]
pub(super) struct Sample {
    /// When.
    at: UnixMs,
    /// Requests in flight.
    in_flight: u32,
    /// Requests held.
    held: u32,
    /// Replicas that serve.
    serving: u32,
}

/// The samples of one pool, oldest first.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct PoolHistory {
    /// The pool.
    name: String,
    /// At most 900, one a second.
    samples: Vec<Sample>,
}

/// The samples of all pools.
#[derive(Debug, Default)]
pub(super) struct History(Mutex<HashMap<String, VecDeque<Sample>>>);

impl History {
    /// Takes samples for ever.
    pub(super) async fn follow(&self, handle: &Handle) {
        let mut every = interval(EVERY);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            every.tick().await;
            self.take(&handle.status());
        }
    }

    /// Forgets pools that are gone.
    fn take(&self, status: &Status) {
        let mut pools = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pools.retain(|name, _| status.pools.iter().any(|pool| pool.name == *name));
        for pool in &status.pools {
            let samples = pools.entry(pool.name.clone()).or_default();
            samples.push_back(sample(pool, status.now));
            if samples.len() > SAMPLES_MAX {
                samples.pop_front();
            }
        }
    }

    /// Of all pools, by name.
    pub(super) fn pools(&self) -> Vec<PoolHistory> {
        let pools = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let copy = |(name, samples): (&String, &VecDeque<Sample>)| PoolHistory {
            name: name.clone(),
            samples: samples.iter().copied().collect(),
        };
        let mut list: Vec<PoolHistory> = pools.iter().map(copy).collect();
        list.sort_by(|a, b| a.name.cmp(&b.name));
        list
    }
}

fn sample(pool: &PoolStatus, at: UnixMs) -> Sample {
    let serves = |state: State| matches!(state, State::Ready | State::Busy);
    let serving = pool.replicas.iter().filter(|replica| serves(replica.state)).count();
    Sample { at, in_flight: pool.in_flight, held: pool.held, serving: serving as u32 }
}
