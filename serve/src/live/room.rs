//! Room for starts, where memory is short: all pools take it from one ledger, and a request that is held is worth more than a replica
//! that only waits, whichever pool has that one.
//!
//! A pool whose start does not fit says so here. Replicas that wait in other pools make room as soon as that would be enough, no pool
//! makes further ones meanwhile, and whoever looks for room looks again when something has been given back.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rewarm_autoscaler::ledger::{HOST, Short};
use rewarm_autoscaler::pool::{Replica, ReplicaId, State};

use super::Live;
use super::inner::Inner;

/// What pools know of each other. Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Room(Arc<Pools>);

#[derive(Default)]
struct Pools {
    all: Mutex<Vec<Weak<Live>>>,
    /// Pools with a start that waits for memory.
    lacking: AtomicU32,
}

/// A pool has a start that waits for memory, until this is dropped.
pub(super) struct Lack {
    room: Room,
    /// Nobody has been asked to make room yet.
    unsaid: bool,
}

impl Drop for Lack {
    fn drop(&mut self) {
        self.room.0.lacking.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Why a start that is wanted is not begun.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Obstacle {
    #[error("a start waits for memory: {0}")]
    Memory(#[from] Short),
    #[error("nothing is started for a while after several failures: {0}")]
    Circuit(String),
}

impl Room {
    fn lack(&self) -> Lack {
        self.0.lacking.fetch_add(1, Ordering::Relaxed);
        Lack { room: self.clone(), unsaid: true }
    }

    /// Whether a start waits for memory in any pool.
    pub(super) fn is_short(&self) -> bool {
        self.0.lacking.load(Ordering::Relaxed) > 0
    }

    /// A pool is there.
    pub(super) fn enter(&self, pool: Weak<Live>) {
        let mut pools = self.lock();
        pools.retain(|pool| pool.strong_count() > 0);
        pools.push(pool);
    }

    /// Ends replicas that wait in other pools, where this pool's start fits after that.
    pub(super) fn make(&self, pool: &Live, short: Short) {
        let pools = self.pools();
        let coming: u64 = pools.iter().map(|pool| pool.look(|inner| inner.leaving_bytes())).sum();
        let mut missing = short.wanted.saturating_sub(short.free.saturating_add(coming));
        let others = || pools.iter().filter(|other| !std::ptr::eq(Arc::as_ptr(other), pool));
        let waiting: u64 = others().map(|other| other.look(|inner| inner.waiting_bytes())).sum();
        // Nothing is given up for nothing.
        if missing == 0 || waiting < missing {
            return;
        }
        for other in others() {
            missing = missing.saturating_sub(other.with(|inner| inner.make_room(missing)));
        }
    }

    /// Something was given back: whoever looks for room looks again.
    pub(super) fn given_back(&self) {
        for pool in self.pools() {
            pool.sooner.notify_one();
        }
    }

    /// The others, to be locked one after the other: never two at once.
    fn pools(&self) -> Vec<Arc<Live>> {
        self.lock().iter().filter_map(Weak::upgrade).collect()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Weak<Live>>> {
        self.0.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// What stands in the way of the next start, as far as anything does.
    pub(super) fn meets(&mut self, obstacle: Option<Obstacle>) {
        self.lack = match (&obstacle, self.lack.take()) {
            // For what will never fit, nobody has to stand back.
            (Some(Obstacle::Memory(short)), lack) if short.wanted <= short.total => {
                Some(lack.unwrap_or_else(|| self.shared.room.lack()))
            }
            _ => None,
        };
        self.obstacle = obstacle;
    }

    /// Whether others are to be asked for room at once.
    pub(super) fn lacks_room(&self) -> bool {
        self.lack.as_ref().is_some_and(|lack| lack.unsaid)
    }

    /// What others are to make room for: a request is held, and a start that would help does not fit.
    pub(super) fn asks_for_room(&mut self) -> Option<Short> {
        self.lack.as_mut()?.unsaid = false;
        match &self.obstacle {
            Some(Obstacle::Memory(short)) if !self.queue.is_empty() && short.kind == HOST => Some(*short),
            _ => None,
        }
    }

    /// Host memory of replicas that are being ended.
    fn leaving_bytes(&self) -> u64 {
        self.stopping.values().flatten().map(|hold| hold.memory().host).sum()
    }

    fn waiting(&self) -> Vec<(ReplicaId, u64)> {
        let waits = |replica: &&Replica| replica.state() == State::Warm || replica.is_parking();
        let waiting = self.pool.replicas().filter(waits);
        waiting.map(|replica| (replica.id(), replica.memory().host)).collect()
    }

    /// Host memory of replicas that wait, or are on their way to that.
    fn waiting_bytes(&self) -> u64 {
        self.waiting().into_iter().map(|(_, bytes)| bytes).sum()
    }

    /// Ends replicas that wait, until so many bytes are given up or none is left; how many were.
    fn make_room(&mut self, missing: u64) -> u64 {
        let mut given = 0;
        for (id, bytes) in self.waiting() {
            if given >= missing {
                break;
            }
            tracing::info!(
                pool = self.config.name,
                replica = self.name(id),
                "it waited, and makes room for a start of another pool"
            );
            if let Some(member) = self.members.get_mut(&id) {
                member.lost = Some("it makes room for a start of another pool".to_owned());
            }
            self.dismiss(id);
            given += bytes;
        }
        given
    }
}
