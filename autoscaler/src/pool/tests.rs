//! The book of one pool: what each call does to it, alone and in any order.

use super::*;
use proptest::prelude::*;

const GIB: u64 = 1 << 30;

fn pool(host: u64, warm: u32) -> Pool {
    let serving = Memory { host: GIB, device: GIB };
    let paused = Memory { host: 2 * GIB, device: 0 };
    let shape = Shape { concurrency: 2, max: 4, warm, serving, paused };
    Pool::new(shape, Ledger::new(Memory { host, device: u64::MAX }))
}

fn at(seconds: f64) -> Moment {
    Moment::from_seconds(seconds)
}

#[test]
fn requests_go_to_the_busiest_with_a_free_slot() {
    let mut pool = pool(u64::MAX, 0);
    let now = at(0.0);
    let first = pool.start(Tier::Restore, now).expect("memory");
    let second = pool.start(Tier::Restore, now).expect("memory");
    assert_eq!(pool.assign(now, 0), None);
    pool.started(first, now);
    pool.started(second, now);
    let order: Vec<_> = (0..5).map(|_| pool.assign(now, 0)).collect();
    assert_eq!(order, [Some(first), Some(first), Some(second), Some(second), None]);
    pool.finish(first, now);
    assert!(!pool.drain(second, now));
    assert_eq!((pool.assign(now, 0), pool.assign(now, 0)), (Some(first), None));
    assert!(!pool.finish(second, now) && pool.finish(second, now));
    assert!(matches!(pool.retire(second, now), Retired::Removed(Some(_))));
    assert!(pool.find(second).is_none() && pool.find(first).is_some());
}

#[test]
fn the_idlest_are_left_out_where_they_are_to_become_idle() {
    let mut pool = pool(u64::MAX, 0);
    let now = at(0.0);
    let ids: Vec<ReplicaId> = (0..3).map(|_| pool.start(Tier::Restore, now).expect("memory")).collect();
    ids.iter().for_each(|id| pool.started(*id, now));
    let order: Vec<_> = (0..3).map(|_| pool.assign(now, 2)).collect();
    assert_eq!(order, [Some(ids[0]), Some(ids[0]), None]);
    assert_eq!((pool.assign(now, 1), pool.assign(now, 3)), (Some(ids[1]), None));
}

#[test]
fn a_drained_replica_is_paused_while_there_is_room() {
    let mut pool = pool(u64::MAX, 1);
    let now = at(0.0);
    for paused in [true, false] {
        let id = pool.start(Tier::Restore, now).expect("memory");
        pool.started(id, now);
        assert!(pool.drain(id, now));
        assert_eq!(matches!(pool.retire(id, now), Retired::Pausing), paused);
        if paused {
            pool.paused(id, now).expect("memory");
        }
    }
    assert_eq!((pool.count(State::Warm), pool.charged()), (1, 0));
}

#[test]
fn what_memory_does_not_allow_is_not_begun() {
    let mut pool = pool(2 * GIB, 2);
    let now = at(0.0);
    let warm = pool.park(now).expect("memory");
    assert!(pool.start(Tier::Restore, now).is_err());
    assert_eq!(pool.charged(), 0);
    pool.wake(warm, now).expect("no more host memory than before");
    assert_eq!(pool.charged(), 1);
}

#[test]
fn device_memory_and_its_copy_are_there_at_once_while_a_replica_changes() {
    let mut pool = pool(3 * GIB, 1);
    let now = at(0.0);
    let (serving, both) = (Memory { host: GIB, device: GIB }, Memory { host: 2 * GIB, device: GIB });
    let first = pool.start(Tier::Restore, now).expect("memory");
    assert_eq!(pool.ledger.used(), both, "it is restored");
    pool.started(first, now);
    assert_eq!(pool.ledger.used(), serving, "it serves");
    let second = pool.start(Tier::Restore, now).expect("memory");
    pool.started(second, now);
    pool.drain(first, now);
    assert!(matches!(pool.retire(first, now), Retired::Pausing));
    assert_eq!(pool.ledger.used(), Memory { host: 3 * GIB, device: 2 * GIB }, "one is being paused");
    pool.paused(first, now).expect("memory");
    assert_eq!(pool.ledger.used(), Memory { host: 3 * GIB, device: GIB }, "one waits");
    pool.wake(first, now).expect("memory");
    assert_eq!(pool.ledger.used(), Memory { host: 3 * GIB, device: 2 * GIB }, "it is woken");
    pool.started(first, now);
    let third = pool.start(Tier::Restore, now).expect_err("one could not be restored beside two that serve");
    assert_eq!((third.wanted, third.free), (2 * GIB, GIB));
}

#[test]
fn a_replica_is_not_paused_where_memory_does_not_allow_it() {
    let mut pool = pool(2 * GIB, 1);
    let now = at(0.0);
    let first = pool.start(Tier::Restore, now).expect("memory");
    pool.started(first, now);
    let second = pool.adopt(Tier::Restore, false, now).expect("memory");
    pool.drain(first, now);
    assert!(matches!(pool.retire(first, now), Retired::Removed(Some(_))));
    pool.drain(second, now);
    assert!(matches!(pool.retire(second, now), Retired::Pausing));
}

#[test]
#[should_panic(expected = "Started is not legal for a replica that is Ready")]
fn an_illegal_move_is_not_taken() {
    let mut pool = pool(u64::MAX, 0);
    let id = pool.start(Tier::Cold, at(0.0)).expect("memory");
    pool.started(id, at(0.0));
    pool.started(id, at(0.0));
}

#[test]
#[should_panic(expected = "would be cut off its requests")]
fn a_replica_with_requests_is_not_retired() {
    let mut pool = pool(u64::MAX, 0);
    let id = pool.start(Tier::Cold, at(0.0)).expect("memory");
    pool.started(id, at(0.0));
    pool.assign(at(0.0), 0);
    pool.drain(id, at(0.0));
    pool.retire(id, at(0.0));
}

proptest! {
    /// Every legal call in any order: the counters are what a count of the replicas gives, and memory is theirs.
    #[test]
    fn the_book_agrees_with_the_replicas(steps in proptest::collection::vec((0..14_u8, 0..8_usize), 1..300)) {
        let mut pool = pool(9 * GIB, 2);
        for (index, (step, which)) in steps.into_iter().enumerate() {
            let now = at(index as f64);
            let ids: Vec<ReplicaId> = pool.replicas().map(Replica::id).collect();
            let picked = ids.get(which % ids.len().max(1)).map(|id| pool.get(*id)).map(|r| (r.id, r.state, r.in_flight));
            match (step, picked) {
                (0, _) => { let _ = pool.start(Tier::Restore, now); }
                (1, _) => { let _ = pool.park(now); }
                (2, Some((id, State::Warm, _))) => { let _ = pool.wake(id, now); }
                (3, Some((id, State::Restoring | State::Waking, _))) if !pool.get(id).is_parking() => pool.started(id, now),
                (4, _) => { pool.assign(now, 0); }
                (5, Some((id, _, 1..))) => { pool.finish(id, now); }
                (6, Some((id, State::Ready | State::Busy, _))) => { pool.drain(id, now); }
                (7, Some((id, State::Draining, _))) => pool.undrain(id, now),
                (8, Some((id, State::Draining | State::Restoring | State::Waking, 0)))
                    if matches!(pool.retire(id, now), Retired::Pausing) && pool.paused(id, now).is_err() =>
                {
                    pool.fail_and_remove(id, now);
                }
                (9, Some((id, _, _))) => { pool.fail_and_remove(id, now); }
                (10, _) => { let _ = pool.start_parking(Tier::Restore, now); }
                (11, Some((id, State::Restoring, _)))
                    if pool.get(id).is_parking() && pool.parked(id, now).is_err() =>
                {
                    pool.fail_and_remove(id, now);
                }
                (12, Some((id, State::Restoring, _))) if pool.get(id).is_parking() => pool.claim(id),
                (13, Some((id, State::Ready | State::Busy, _))) => { pool.assign_to(id, now); }
                _ => {}
            }
            for state in State::ALL.into_iter().filter(|state| *state != State::Cold) {
                let counted = pool.replicas().filter(|replica| replica.state == state).count() as u32;
                prop_assert_eq!(pool.count(state), counted, "{:?}", state);
            }
            let starting = pool.replicas().filter(|replica| replica.is_starting()).count() as u32;
            let parking = pool.replicas().filter(|replica| replica.is_parking()).count() as u32;
            prop_assert_eq!((pool.starting(), pool.parking()), (starting, parking));
            let in_flight: u32 = pool.replicas().map(Replica::in_flight).sum();
            prop_assert_eq!(pool.in_flight(), in_flight);
            prop_assert!(pool.replicas().all(|replica| replica.in_flight <= 2));
            prop_assert!(pool.replicas().all(|replica| (replica.in_flight > 0) == (replica.state == State::Busy)
                || replica.state == State::Draining));
            let held: u64 = pool.replicas().map(|replica| replica.hold.as_ref().map_or(0, |hold| hold.memory().host)).sum();
            prop_assert_eq!(pool.ledger.used().host, held);
        }
    }
}

impl Pool {
    fn fail_and_remove(&mut self, id: ReplicaId, now: Moment) {
        if self.get(id).state != State::Failed {
            self.fail(id, now);
        }
        self.remove(id, now);
    }
}
