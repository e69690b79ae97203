//! What a task does to its own memory while it is being filled: fork, move, give up, unmap.
//!
//! Events are read and applied while nobody copies (the gate in `space.rs`): the kernel lets the task go on as soon as
//! the event is read. A fault may be read before an earlier event of another thread; answering it then gives `EAGAIN`,
//! and the event is read first after all.
//!
//! The kernel queues an event after it has changed the mappings, without the lock that guards them. Two threads that
//! change the same place at the same moment can therefore be reported the wrong way round. A report that contradicts
//! what is known is taken as such a case, and ends the replica: a guess could show one page at two addresses. Two things
//! cannot be told apart from it or not be told at all:
//! - a program makes a mapping longer in place, which is not reported, and moves only the new part, never touched: no
//!   allocator does that, and it is taken for a contradiction;
//! - a thread moves or unmaps memory in the moment between another thread's fork and the queueing of the fork's event:
//!   the child is then filled as if the fork had come later. CRIU's own daemon has the same gap.

use std::ops::Range;

use rewarm_sys::uffd::Event;

use super::error::Error;
use super::ranges::Ranges;
use super::space::{Space, State};
use super::userfault::Userfault;

/// A thread of the task that waits for a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fault {
    /// The address, not rounded.
    pub(super) address: u64,
    /// Whether it wants to write.
    pub(super) write: bool,
}

/// Reads what waits and applies the events. Faults are appended to `faults`; returns the number of messages.
///
/// `forked` is called for each child at once, before anything else: it must put a duplicate of the descriptor into
/// safe hands, since the child runs from the moment of the read.
pub(super) fn read<U: Userfault>(
    space: &Space<U>,
    faults: &mut Vec<Fault>,
    forked: &mut dyn FnMut(U, &State) -> Result<(), Error>,
) -> Result<usize, Error> {
    let gate = space.enter_alone();
    let Some(uffd) = gate.as_ref() else { return Ok(0) };
    let mut messages = Vec::new();
    let count = uffd.read(&mut messages).map_err(Error::Wait)?;
    apply(space, uffd, messages, faults, forked)?;
    Ok(count)
}

/// What [`read`] does behind the gate with what it has read.
pub(super) fn apply<U: Userfault>(
    space: &Space<U>,
    uffd: &U,
    messages: Vec<Event<U>>,
    faults: &mut Vec<Fault>,
    forked: &mut dyn FnMut(U, &State) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut changed = Vec::new();
    for message in messages {
        let mut state = space.state();
        match message {
            Event::Fault { address, write } => faults.push(Fault { address, write }),
            Event::Fork { uffd } => forked(uffd, &state)?,
            Event::Remap { from, to, length } => {
                apply_remap(space.task, &mut state, from, to, length)?;
                changed.push(from..from + length);
                changed.push(to..to + length);
            }
            Event::Remove { start, end } => {
                state.pending.take(&(start..end));
                changed.push(start..end);
            }
            Event::Unmap { start, end } => {
                apply_unmap(&mut state, &(start..end));
                changed.push(start..end);
            }
        }
    }
    // Who waits in a changed place asks again and gets the answer that is right by now: a fault that was left to a
    // busy thread would otherwise never be answered when that thread finds nothing pending any more.
    for range in changed {
        let _ = uffd.wake(range.start, range.end - range.start);
    }
    Ok(())
}

fn apply_unmap(state: &mut State, range: &Range<u64>) {
    state.pending.take(range);
    for set in [&mut state.registered, &mut state.wiped, &mut state.absent] {
        set.remove(range.clone());
    }
}

/// The old place stays registered until it is unmapped: after MREMAP_DONTUNMAP it is still there, empty.
fn apply_remap(task: u32, state: &mut State, from: u64, to: u64, length: u64) -> Result<(), Error> {
    let (old, new) = (from..from + length, to..to + length);
    if !state.registered.touches(&old) || state.registered.touches(&new) {
        return Err(Error::OutOfOrder { task, from, to, length });
    }
    state.pending.relocate(from, to, length);
    state.registered.insert(new);
    for set in [&mut state.wiped, &mut state.absent] {
        shift(set, &old, to);
    }
    Ok(())
}

fn shift(set: &mut Ranges, old: &Range<u64>, to: u64) {
    let moved: Vec<Range<u64>> = set
        .iter()
        .map(|range| range.start.max(old.start)..range.end.min(old.end))
        .filter(|range| !range.is_empty())
        .collect();
    set.remove(old.clone());
    for range in moved {
        set.insert(range.start - old.start + to..range.end - old.start + to);
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::{AtFork, Mapping, PAGE, Plan, Run};
    use super::*;

    fn state() -> State {
        let mapping =
            |start, end, at_fork| Mapping { start: start * PAGE, end: end * PAGE, writable: true, at_fork };
        let run =
            |vaddr, pages, offset| Run { vaddr: vaddr * PAGE, bytes: pages * PAGE, offset: offset * PAGE };
        let mappings = vec![
            mapping(10, 20, AtFork::Copied),
            mapping(30, 40, AtFork::Wiped),
            mapping(50, 60, AtFork::Absent),
        ];
        let runs = [run(10, 10, 0), run(30, 10, 10), run(50, 10, 20)];
        State::new(&Plan::new(mappings, &runs, 30 * PAGE).expect("a plan"))
    }

    #[test]
    fn a_move_takes_pending_pages_along_and_the_old_place_reads_as_zeros() {
        let mut state = state();
        apply_remap(1, &mut state, 10 * PAGE, 100 * PAGE, 10 * PAGE).expect("a move");
        assert_eq!(state.pending.at(10 * PAGE), None);
        assert_eq!(state.pending.at(103 * PAGE).map(|piece| piece.offset), Some(0));
        assert!(state.registered.contains(10 * PAGE), "until it is unmapped");
        apply_unmap(&mut state, &(10 * PAGE..20 * PAGE));
        assert!(!state.registered.contains(10 * PAGE));
        assert_eq!(state.pending.bytes(), 30 * PAGE);
    }

    #[test]
    fn moves_that_contradict_what_is_mapped_are_refused() {
        let mut state = state();
        let unknown = apply_remap(1, &mut state, 200 * PAGE, 100 * PAGE, PAGE);
        assert!(matches!(unknown, Err(Error::OutOfOrder { .. })));
        let occupied = apply_remap(1, &mut state, 10 * PAGE, 35 * PAGE, 2 * PAGE);
        assert!(matches!(occupied, Err(Error::OutOfOrder { .. })));
    }

    #[test]
    fn a_child_gets_neither_wiped_nor_absent_content() {
        let mut state = state();
        apply_remap(1, &mut state, 30 * PAGE, 100 * PAGE, 10 * PAGE).expect("a move");
        let child = state.forked();
        assert_eq!(child.pending.bytes(), 10 * PAGE);
        assert!(child.registered.contains(105 * PAGE), "wiped, but there");
        assert!(!child.registered.contains(55 * PAGE), "absent");
    }
}
