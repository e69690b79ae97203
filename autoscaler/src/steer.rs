//! From a wanted number of replicas to the next thing to do: the order of starts, and who goes first.
//!
//! Starts: a draining replica is taken back at once where the policy can do that, then a warm one is woken, then the snapshot is restored. Whether a
//! restore is possible at all, or a cold start takes its place, is the caller's knowledge.

use std::cmp::Reverse;

use crate::pool::{Pool, Replica, ReplicaId, State};

/// Whom a policy lets go first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// The one with the fewest requests in flight, of equals the newest. What is on its way is let arrive.
    Idlest,
    /// What is not ready yet, then what became ready last, whatever it is doing: how a Kubernetes ReplicaSet chooses.
    Newest,
}

/// One thing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Give this draining replica requests again.
    Undrain(ReplicaId),
    /// Wake this warm replica.
    Wake(ReplicaId),
    /// Let this replica serve that is on its way in order to wait.
    Claim(ReplicaId),
    /// Restore the snapshot.
    Restore,
    /// Let this replica finish what it has, then stop it.
    Drain(ReplicaId),
    /// Give up this start.
    Cancel(ReplicaId),
}

/// What to do next so that `wanted` replicas are active; nothing where they are, or where the pool is at its limit.
///
/// The caller does it and asks again.
#[must_use]
pub fn next_step(pool: &Pool, wanted: u32, victim: Victim, undrains: bool) -> Option<Step> {
    let active = pool.active();
    if active < wanted {
        if undrains && let Some(id) = busiest(pool, State::Draining) {
            return Some(Step::Undrain(id));
        }
        // Draining replicas count: they still hold a machine's slots and memory.
        if pool.charged() >= pool.shape().max {
            return None;
        }
        let parking = || pool.replicas().find(|replica| replica.is_parking()).map(|r| Step::Claim(r.id()));
        return busiest(pool, State::Warm).map(Step::Wake).or_else(parking).or(Some(Step::Restore));
    }
    if active > wanted { leave(pool, victim) } else { None }
}

fn busiest(pool: &Pool, state: State) -> Option<ReplicaId> {
    if pool.count(state) == 0 {
        return None;
    }
    let found = pool.replicas().filter(|replica| replica.state() == state && !replica.is_dismissed());
    found.max_by_key(|replica| (replica.in_flight(), Reverse(replica.id()))).map(Replica::id)
}

fn leave(pool: &Pool, victim: Victim) -> Option<Step> {
    let serving = pool.replicas().filter(|replica| matches!(replica.state(), State::Ready | State::Busy));
    match victim {
        Victim::Idlest => serving
            .min_by_key(|replica| (replica.in_flight(), Reverse(replica.id())))
            .map(|r| Step::Drain(r.id())),
        Victim::Newest => {
            let pending =
                pool.replicas().filter(|replica| replica.is_starting()).max_by_key(|replica| replica.since());
            pending
                .map(|replica| Step::Cancel(replica.id()))
                .or_else(|| serving.max_by_key(|r| (r.ready_since(), r.id())).map(|r| Step::Drain(r.id())))
        }
    }
}
