//! Which slot of the content takes which block.
//!
//! All of it follows from the table's words: a slot is taken by a block whose word names it and that is not given back. So a
//! writer that begins where another one died need know nothing else, and only a writer ever takes a slot.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use super::{is_here, slot_of};

/// The slots of one writer.
#[derive(Debug)]
pub(super) struct Slots {
    /// `None`: each block has its own.
    passing: Option<Mutex<Passing>>,
    /// The slot of each block that has one from this writer, and 1; otherwise 0.
    taken: Vec<AtomicU32>,
}

#[derive(Debug)]
struct Passing {
    free: Vec<u32>,
    /// Slots in use and their blocks, the oldest first.
    used: VecDeque<(u64, u32)>,
    /// The first that was never used.
    fresh: u32,
}

impl Slots {
    /// For a table with these words, one for each block.
    pub(super) fn new(passing: bool, words: impl Iterator<Item = u32> + Clone) -> Self {
        let taken: Vec<AtomicU32> = words.clone().map(|_| AtomicU32::new(0)).collect();
        let passing = passing.then(|| {
            let named = words.clone().filter_map(slot_of);
            let fresh = named.max().map_or(0, |slot| slot + 1).min(taken.len() as u32);
            let here = (0..).zip(words).filter(|(_, word)| is_here(*word));
            let used: VecDeque<(u64, u32)> =
                here.filter_map(|(block, word)| Some((block, slot_of(word)?))).collect();
            let here: HashSet<u32> = used.iter().map(|(_, slot)| *slot).collect();
            let free = (0..fresh).rev().filter(|slot| !here.contains(slot)).collect();
            Mutex::new(Passing { free, used, fresh })
        });
        Self { passing, taken }
    }

    /// Whether a slot may have held another block before.
    pub(super) fn are_passing(&self) -> bool {
        self.passing.is_some()
    }

    /// The slot of a block that is not complete yet; the same each time. `word` reads the table.
    pub(super) fn of(&self, block: u64, word: impl Fn(u64) -> u32) -> u32 {
        let own = u32::try_from(block).expect("a stream has fewer blocks");
        let Some(passing) = &self.passing else { return own };
        let taken = &self.taken[block as usize];
        if let Some(slot) = taken.load(Ordering::Acquire).checked_sub(1) {
            return slot;
        }
        let mut passing = passing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = taken.load(Ordering::Acquire).checked_sub(1) {
            return slot;
        }
        let slot = passing.take(word, self.taken.len());
        passing.used.push_back((block, slot));
        taken.store(slot + 1, Ordering::Release);
        slot
    }
}

impl Passing {
    /// The slot that was let go last, since its memory is the likeliest to be in a cache; or a fresh one.
    fn take(&mut self, word: impl Fn(u64) -> u32, slots: usize) -> u32 {
        if self.free.is_empty() {
            let Self { free, used, .. } = self;
            used.retain(|&(block, slot)| {
                let word = word(block);
                // What is still being written has no word yet.
                let is_taken = word == 0 || is_here(word);
                if !is_taken {
                    free.push(slot);
                }
                is_taken
            });
        }
        self.free.pop().unwrap_or_else(|| {
            // Every slot in use belongs to another block, and there are as many slots as blocks.
            assert!((self.fresh as usize) < slots, "{} slots are in use", self.fresh);
            self.fresh += 1;
            self.fresh - 1
        })
    }
}
