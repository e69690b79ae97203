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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Ledger, Memory};
    use crate::moment::Moment;
    use crate::pool::{Shape, Tier};

    const NOW: Moment = Moment::START;

    fn pool() -> Pool {
        let memory = Memory::default();
        let shape = Shape { concurrency: 8, max: 5, warm: 2, serving: memory, paused: memory };
        Pool::new(shape, Ledger::new(Memory::UNLIMITED))
    }

    /// One that answers its last request and gets no other.
    fn draining(pool: &mut Pool) -> ReplicaId {
        let id = pool.start(Tier::Restore, NOW).expect("memory");
        pool.started(id, NOW);
        assert!(pool.assign_to(id, NOW) && !pool.drain(id, NOW));
        id
    }

    #[test]
    fn what_is_there_comes_before_what_is_woken_and_that_before_what_is_restored() {
        let mut pool = pool();
        let drains = draining(&mut pool);
        let waits = pool.park(NOW).expect("memory");
        let comes = pool.start_parking(Tier::Restore, NOW).expect("memory");
        let next = |pool: &Pool| next_step(pool, 9, Victim::Idlest, true);
        assert_eq!(next(&pool), Some(Step::Undrain(drains)));
        assert_eq!(
            next_step(&pool, 9, Victim::Idlest, false),
            Some(Step::Wake(waits)),
            "it cannot take it back"
        );
        pool.undrain(drains, NOW);
        assert_eq!(next(&pool), Some(Step::Wake(waits)));
        pool.wake(waits, NOW).expect("memory");
        assert_eq!(next(&pool), Some(Step::Claim(comes)));
        pool.claim(comes);
        for _ in 0..2 {
            assert_eq!(next(&pool), Some(Step::Restore));
            pool.start(Tier::Cold, NOW).expect("memory");
        }
        assert_eq!((next(&pool), pool.charged()), (None, 5), "the pool is at its limit");
        assert_eq!(next_step(&pool, 5, Victim::Idlest, true), None, "there are as many as are wanted");
    }

    #[test]
    fn what_is_to_go_for_good_is_neither_taken_back_nor_woken() {
        let mut pool = pool();
        let (drains, waits) = (draining(&mut pool), pool.park(NOW).expect("memory"));
        [drains, waits].into_iter().for_each(|id| pool.dismiss(id));
        assert_eq!(next_step(&pool, 1, Victim::Idlest, true), Some(Step::Restore));
    }

    #[test]
    fn the_idlest_goes_first_or_what_came_last() {
        let mut pool = pool();
        let ids: Vec<ReplicaId> = (0..3).map(|_| pool.start(Tier::Restore, NOW).expect("memory")).collect();
        ids[..2].iter().for_each(|id| pool.started(*id, NOW));
        assert!(pool.assign_to(ids[1], NOW));
        assert_eq!(next_step(&pool, 2, Victim::Idlest, true), Some(Step::Drain(ids[0])));
        assert_eq!(next_step(&pool, 2, Victim::Newest, true), Some(Step::Cancel(ids[2])));
        pool.started(ids[2], NOW + std::time::Duration::from_secs(1));
        assert_eq!(next_step(&pool, 2, Victim::Newest, true), Some(Step::Drain(ids[2])));
    }
}
