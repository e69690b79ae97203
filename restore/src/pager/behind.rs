//! What lies behind the fill: content that no address space of a task wants any more is given back, so that a restore does
//! not hold its memory twice.
//!
//! Only the pager's main thread gives back. It alone takes in address spaces, so none can appear between its look at all
//! of them and what follows from it; and it looks alone behind each gate, so no copy is under way. What is not pending then
//! is never copied again: pending content moves and is inherited, but never comes back.

use std::ops::Range;
use std::sync::Arc;

use super::source::Source;
use super::space::Space;
use super::userfault::Userfault;

/// Chunks that one look goes over at most: it must not cost what it saves.
const LOOK_MAX: usize = 4096;

/// The chunks of one task's content that are not given back yet.
#[derive(Debug)]
pub(super) struct Behind {
    task: u32,
    left: Vec<Range<u64>>,
    /// Where the next look begins.
    at: usize,
}

impl Behind {
    /// Nothing of a task's content, `bytes` long, is given back.
    pub(super) fn new(task: u32, bytes: u64, source: &dyn Source) -> Self {
        let mut left = Vec::new();
        let mut at = 0;
        while at < bytes {
            let chunk = source.chunk(task, at);
            at = chunk.end;
            left.push(chunk);
        }
        Self { task, left, at: 0 }
    }

    /// Gives back what has arrived and none of these address spaces, all that there are, lacks.
    pub(super) fn give_back<U: Userfault>(&mut self, spaces: &[Arc<Space<U>>], source: &dyn Source) {
        if self.at >= self.left.len() {
            self.at = 0;
        }
        let end = self.left.len().min(self.at + LOOK_MAX);
        let looked_at = &self.left[self.at..end];
        let mut done: Vec<bool> =
            looked_at.iter().map(|chunk| source.is_near(self.task, chunk.start)).collect();
        for space in spaces.iter().filter(|space| space.task == self.task && !space.is_gone()) {
            let gate = space.enter_alone();
            let state = space.state();
            for (done, chunk) in done.iter_mut().zip(looked_at) {
                *done = *done && state.pending.next_in_stream(chunk.start).is_none_or(|at| at >= chunk.end);
            }
            drop((state, gate));
        }
        let mut joined: Vec<Range<u64>> = Vec::new();
        for (chunk, _) in looked_at.iter().zip(&done).filter(|(_, done)| **done) {
            match joined.last_mut() {
                Some(last) if last.end == chunk.start => last.end = chunk.end,
                _ => joined.push(chunk.clone()),
            }
        }
        joined.into_iter().for_each(|part| source.release(self.task, part));
        let (mut index, mut kept) = (0, self.at);
        let from = self.at;
        self.left.retain(|_| {
            let here = index;
            index += 1;
            let given = (from..end).contains(&here) && done[here - from];
            kept += usize::from(!given && (from..end).contains(&here));
            !given
        });
        self.at = kept;
    }
}
