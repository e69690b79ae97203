//! One address space that is being filled: its userfaultfd, what is pending in it, and the rule that keeps the two true.
//!
//! **The gate.** A copy must not use what an unread event has made untrue. The kernel answers `EAGAIN` while an event
//! is unread, but not after the read: a thread that looked its target up before, and copies after, would bring back
//! content that the task gave up. So every copy looks up and copies under a read lock of the gate, and events are read
//! and applied under its write lock: whoever gets through the gate sees a state that includes every event that was read.
//! The kernel lets the task go on at the read, so nothing may happen between the read and the change of state.
//!
//! Holding the gate costs a waiting fault at most one step of each filler, which is why steps are small.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use super::pending::Pending;
use super::plan::{AtFork, Plan};
use super::ranges::Ranges;
use super::userfault::Userfault;

/// What is known of an address space. Guarded by a mutex that is held for look-ups only, never over a system call.
#[derive(Debug, Clone, Default)]
pub(super) struct State {
    pub(super) pending: Pending,
    /// Where pages are registered, as far as it can be known: a stack or a mapping that grew in place is more.
    pub(super) registered: Ranges,
    /// Where a forked child starts with zeros.
    pub(super) wiped: Ranges,
    /// What a forked child does not have.
    pub(super) absent: Ranges,
    /// Where the background goes on in the content stream.
    pub(super) cursor: u64,
}

impl State {
    pub(super) fn new(plan: &Plan) -> State {
        let mut state = State { pending: Pending::new(plan.pieces().iter().copied()), ..State::default() };
        for mapping in plan.mappings() {
            let range = mapping.start..mapping.end;
            match mapping.at_fork {
                AtFork::Copied => {}
                AtFork::Wiped => state.wiped.insert(range.clone()),
                AtFork::Absent => state.absent.insert(range.clone()),
            }
            state.registered.insert(range);
        }
        state
    }

    /// What a child has that is forked now.
    pub(super) fn forked(&self) -> State {
        let mut child = self.clone();
        for range in self.wiped.iter().chain(self.absent.iter()) {
            child.pending.take(&range);
        }
        for range in self.absent.iter() {
            child.registered.remove(range);
        }
        child.cursor = 0;
        child
    }
}

/// A part of the stream that a thread is busy with.
#[derive(Debug)]
struct Busy {
    range: Range<u64>,
    since: Instant,
}

/// An address space. It holds its userfaultfd until it is wholly filled or gone.
#[derive(Debug)]
pub(super) struct Space<U> {
    /// Its number towards the shim.
    pub(super) id: u32,
    /// Whose content stream fills it.
    pub(super) task: u32,
    /// Whether it came by fork after the restore.
    pub(super) forked: bool,
    /// See the head of this file. `None` when the address space is filled or gone.
    gate: RwLock<Option<Arc<U>>>,
    state: Mutex<State>,
    busy: Mutex<Vec<Busy>>,
    /// Addresses whose faults were left to the thread that is busy with them, to be looked at when it is done.
    left: Mutex<Vec<u64>>,
    gone: AtomicBool,
}

/// A part of the stream that the holder is busy with, until dropped.
#[derive(Debug)]
pub(super) struct Claim<'a, U> {
    space: &'a Space<U>,
    range: Range<u64>,
}

impl<U> Drop for Claim<'_, U> {
    fn drop(&mut self) {
        let mut busy = self.space.busy.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = busy.iter().position(|entry| entry.range == self.range) {
            busy.swap_remove(index);
        }
    }
}

impl<U: Userfault> Space<U> {
    pub(super) fn new(id: u32, task: u32, forked: bool, uffd: Arc<U>, state: State) -> Self {
        Self {
            id,
            task,
            forked,
            gate: RwLock::new(Some(uffd)),
            state: Mutex::new(state),
            busy: Mutex::default(),
            left: Mutex::default(),
            gone: AtomicBool::new(false),
        }
    }

    /// Through the gate, to copy. Not together with [`Space::state`] over a system call.
    pub(super) fn enter(&self) -> RwLockReadGuard<'_, Option<Arc<U>>> {
        U::turn();
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Through the gate alone, to read events or to close.
    pub(super) fn enter_alone(&self) -> RwLockWriteGuard<'_, Option<Arc<U>>> {
        U::turn();
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known. Held for look-ups only.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims a part of the stream, unless another thread is busy with all of it.
    pub(super) fn claim(&self, range: Range<u64>) -> Option<Claim<'_, U>> {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        if busy.iter().any(|entry| entry.range.start <= range.start && range.end <= entry.range.end) {
            return None;
        }
        busy.push(Busy { range: range.clone(), since: Instant::now() });
        Some(Claim { space: self, range })
    }

    /// Leaves a fault to the thread that is busy with `offset`; false if none is.
    ///
    /// Whoever drops a claim looks at [`Space::left`] afterwards: the address may have been passed over.
    pub(super) fn leave(&self, address: u64, offset: u64) -> bool {
        let busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        let claimed = busy.iter().any(|entry| entry.range.contains(&offset));
        if claimed {
            self.left.lock().unwrap_or_else(PoisonError::into_inner).push(address);
        }
        claimed
    }

    /// Takes the faults that were left to busy threads.
    pub(super) fn left(&self) -> Vec<u64> {
        std::mem::take(&mut *self.left.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether a thread is busy with this place of the stream.
    pub(super) fn is_busy_at(&self, offset: u64) -> bool {
        let busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.iter().any(|entry| entry.range.contains(&offset))
    }

    /// The place of the stream that a thread has been busy with for longer than `deadline`.
    pub(super) fn overdue(&self, deadline: Duration) -> Option<u64> {
        self.busy
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .find(|entry| entry.since.elapsed() > deadline)
            .map(|entry| entry.range.start)
    }

    /// Somebody noticed that the address space does not exist any more.
    pub(super) fn set_gone(&self) {
        self.gone.store(true, Ordering::Release);
    }

    /// Whether somebody noticed that it does not exist any more.
    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }
}
