//! Which of a simulation's threads goes on: one at a time, drawn by a seed, so that the same seed gives the same run.
//!
//! Threads give their turn away where they hold no lock, so that none ever waits for another one's lock.

use std::cell::RefCell;
use std::panic::resume_unwind;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Turns that a run may take. The longest that ends takes a fraction of that.
const TURNS_MAX: u64 = 400_000;

/// A small generator of numbers that a seed repeats (SplitMix64).
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `limit`.
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}

/// A number that looks like no other one's.
pub(super) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// What a thread ends with that was given up. It is no panic of its own.
pub(super) struct GivenUp;

pub(super) struct Schedule {
    turns: Mutex<Turns>,
    /// One for each thread.
    called: Vec<Condvar>,
}

struct Turns {
    random: Random,
    alive: Vec<usize>,
    now: usize,
    taken: u64,
    over: bool,
}

thread_local! {
    static ME: RefCell<Option<(Arc<Schedule>, usize)>> = const { RefCell::new(None) };
}

impl Schedule {
    pub(super) fn new(seed: u64, threads: usize) -> Arc<Self> {
        let random = Random::new(seed);
        let turns = Turns { random, alive: (0..threads).collect(), now: 0, taken: 0, over: false };
        Arc::new(Self { turns: Mutex::new(turns), called: (0..threads).map(|_| Condvar::new()).collect() })
    }

    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The calling thread becomes this one of the simulation, and waits for its first turn.
    pub(super) fn join(self: &Arc<Self>, me: usize) {
        ME.set(Some((self.clone(), me)));
        self.wait(self.turns(), me);
    }

    /// The calling thread has ended.
    pub(super) fn leave(&self, me: usize) {
        ME.set(None);
        let mut turns = self.turns();
        turns.alive.retain(|&thread| thread != me);
        self.call(&mut turns);
    }

    /// Ends all threads at their next turn.
    pub(super) fn give_up(&self) {
        self.turns().over = true;
        self.called.iter().for_each(Condvar::notify_all);
    }

    /// Whether threads were ended because the run did not come to an end.
    pub(super) fn was_given_up(&self) -> bool {
        self.turns().over
    }

    fn call(&self, turns: &mut Turns) {
        let alive = turns.alive.len() as u64;
        if alive > 0 {
            turns.now = turns.alive[turns.random.below(alive) as usize];
            self.called[turns.now].notify_one();
        }
    }

    fn wait(&self, mut turns: MutexGuard<'_, Turns>, me: usize) {
        while turns.now != me && !turns.over {
            turns = self.called[me].wait(turns).unwrap_or_else(PoisonError::into_inner);
        }
        if turns.over {
            drop(turns);
            resume_unwind(Box::new(GivenUp));
        }
    }

    fn give_away(&self, me: usize) {
        let mut turns = self.turns();
        turns.taken += 1;
        if turns.taken > TURNS_MAX {
            drop(turns);
            self.give_up();
            turns = self.turns();
        } else {
            self.call(&mut turns);
        }
        self.wait(turns, me);
    }
}

/// Gives the turn away, where the calling thread belongs to a simulation. False if it does not.
pub(super) fn turn() -> bool {
    let me = ME.with_borrow(Clone::clone);
    me.map(|(schedule, me)| schedule.give_away(me)).is_some()
}
