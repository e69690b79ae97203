//! Filling a tree that does not run: all memory first, in huge pages where a mapping is marked for them.
//!
//! UFFDIO_COPY never makes huge pages, and collapsing them afterwards costs more than the fill. Writing from outside
//! (`process_vm_writev`) into a range that is marked, unregistered and not touched by its owner makes them, at about
//! twice the speed (measured: `research` figures 3.2 against 1.4-1.6 with two threads). The tasks must be stopped:
//! whoever runs would read zeros from pages that are not written yet.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use rewarm_sys::procmem;

use super::engine::Engine;
use super::error::Error;
use super::pending::{Pending, Piece};
use super::ranges::Ranges;
use super::source::Source;
use super::space::Space;
use super::userfault::Userfault;

/// Bytes of a huge page.
const HUGE_PAGE: u64 = 2 << 20;

/// A stopped task and what it lacks. Its ranges are not registered with a userfaultfd any more.
#[derive(Debug)]
pub struct Stopped {
    /// Pid as seen from here.
    pub pid: i32,
    /// Whose content stream fills it.
    pub task: u32,
    /// What to write, in mappings that the task may write itself.
    pub pieces: Vec<Piece>,
}

/// What an eager fill did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Written {
    /// Bytes written.
    pub bytes: u64,
    /// How long it took.
    pub time: Duration,
}

/// Gives an address space back to the kernel and takes what is pending out, to be written from outside. What cannot be
/// written so is copied before: what is not `writable` by its owner, and what the kernel keeps registered, since a write
/// from outside to a missing page that is registered waits for ever.
pub(super) fn give_back<U: Userfault>(
    engine: &Engine<U>,
    space: &Arc<Space<U>>,
    writable: &Ranges,
) -> Result<Vec<Piece>, Error> {
    let copy = |range: Range<u64>| {
        let pieces = space.state().pending.within(&range);
        pieces.iter().try_for_each(|piece| engine.fill_now(space, piece.stream()))
    };
    let mut protected = Ranges::default();
    for piece in space.state().pending.within(&(0..u64::MAX)) {
        protected.insert(piece.addresses());
    }
    writable.iter().for_each(|range| protected.remove(range));
    protected.iter().try_for_each(copy)?;
    let registered: Vec<Range<u64>> = space.state().registered.iter().collect();
    for range in registered {
        let length = range.end - range.start;
        let given =
            space.enter_alone().as_ref().is_none_or(|uffd| uffd.unregister(range.start, length).is_ok());
        if !given {
            copy(range)?;
        }
    }
    // Whoever still holds a duplicate keeps registered what the kernel would not give back, and nothing is missing there.
    space.enter_alone().take();
    Ok(space.state().pending.take(&(0..u64::MAX)))
}

/// Fills stopped tasks with several threads. On return everything is in place. Content is given back as it is.
///
/// # Errors
/// The first that any thread met: the tasks must be killed, since pages are missing.
pub fn fill_stopped(tasks: &[Stopped], source: &dyn Source, threads: usize) -> Result<Written, Error> {
    let start = Instant::now();
    let pending: Vec<Pending> = tasks.iter().map(|task| Pending::new(task.pieces.iter().copied())).collect();
    let lots = lots(tasks, &pending, source);
    // Of two address spaces that are filled from the same content neither knows what the other has read.
    let alone = |task: u32| tasks.iter().filter(|other| other.task == task).count() == 1;
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let failure = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                while !failed.load(Ordering::Acquire)
                    && let Some(lot) = lots.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    let task = &tasks[lot.index];
                    let written = lot.chunks.iter().try_for_each(|(chunk, pieces)| {
                        write_chunk(task, source, chunk, pieces)?;
                        if alone(task.task) {
                            source.release(task.task, chunk.clone());
                        }
                        Ok(())
                    });
                    if let Err(error) = written {
                        failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                        failed.store(true, Ordering::Release);
                    }
                }
            });
        }
    });
    if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    Ok(Written { bytes: pending.iter().map(Pending::bytes).sum(), time: start.elapsed() })
}

/// What one thread writes at a time.
struct Lot {
    /// Of which task.
    index: usize,
    /// Chunks with the pieces in them, in the order of the stream.
    chunks: Vec<(Range<u64>, Vec<Piece>)>,
}

/// Every chunk that is wanted, task after task, in the order of the streams. Chunks that begin in one huge page are one
/// lot: of two threads that touch a fresh huge page at the same time each makes and clears one, and the kernel throws the
/// second away.
fn lots(tasks: &[Stopped], pending: &[Pending], source: &dyn Source) -> Vec<Lot> {
    let mut lots: Vec<Lot> = Vec::new();
    for (index, (task, pending)) in tasks.iter().zip(pending).enumerate() {
        let (mut at, mut last) = (0, None);
        while let Some(next) = pending.next_in_stream(at) {
            let chunk = source.chunk(task.task, next);
            at = chunk.end;
            let pieces = pending.in_stream(&chunk);
            let block = pieces.first().map(|piece| piece.vaddr / HUGE_PAGE);
            match lots.last_mut() {
                Some(lot) if lot.index == index && block == last => lot.chunks.push((chunk, pieces)),
                _ => lots.push(Lot { index, chunks: vec![(chunk, pieces)] }),
            }
            last = block;
        }
    }
    lots
}

fn write_chunk(
    task: &Stopped,
    source: &dyn Source,
    chunk: &Range<u64>,
    pieces: &[Piece],
) -> Result<(), Error> {
    let mut outcome = None;
    source
        .read(task.task, chunk.clone(), &mut |bytes| {
            outcome = Some(if bytes.len() as u64 == chunk.end - chunk.start {
                write_pieces(task, chunk.start, bytes, pieces)
            } else {
                Err(length(task, chunk, bytes.len() as u64))
            });
        })
        .map_err(|source| Error::Source { task: task.task, offset: chunk.start, source })?;
    outcome.unwrap_or_else(|| Err(length(task, chunk, 0)))
}

fn length(task: &Stopped, chunk: &Range<u64>, got: u64) -> Error {
    Error::Length { task: task.task, offset: chunk.start, got, wanted: chunk.end - chunk.start }
}

fn write_pieces(task: &Stopped, base: u64, bytes: &[u8], pieces: &[Piece]) -> Result<(), Error> {
    for batch in pieces.chunks(procmem::PIECES_MAX) {
        let mut rest: Vec<procmem::Piece<'_>> = batch
            .iter()
            .map(|piece| {
                let from = (piece.offset - base) as usize;
                procmem::Piece { target: piece.vaddr, bytes: &bytes[from..from + piece.length as usize] }
            })
            .collect();
        while let Some(first) = rest.first() {
            let vaddr = first.target;
            let refused = |errno| Error::Write { task: task.task, vaddr, errno };
            let written = procmem::write(task.pid, &rest).map_err(refused)?;
            if written == 0 {
                return Err(refused(Errno::EFAULT));
            }
            advance(&mut rest, written);
        }
    }
    Ok(())
}

/// Takes what was written off the front.
fn advance(rest: &mut Vec<procmem::Piece<'_>>, mut written: u64) {
    let whole = rest
        .iter()
        .take_while(|piece| {
            let length = piece.bytes.len() as u64;
            let fits = length <= written;
            written -= if fits { length } else { 0 };
            fits
        })
        .count();
    rest.drain(..whole);
    if let Some(first) = rest.first_mut() {
        first.target += written;
        first.bytes = &first.bytes[written as usize..];
    }
}

#[cfg(test)]
mod tests {
    use super::super::source::SourceError;
    use super::*;

    /// Content in chunks of 512 KiB that nobody reads.
    struct Halves;

    impl Source for Halves {
        fn chunk(&self, _task: u32, offset: u64) -> Range<u64> {
            let start = offset >> 19 << 19;
            start..start + (512 << 10)
        }

        fn read(&self, _: u32, _: Range<u64>, _: &mut dyn FnMut(&[u8])) -> Result<(), SourceError> {
            unreachable!("lots are cut without reading")
        }

        fn is_near(&self, _task: u32, _offset: u64) -> bool {
            true
        }
    }

    #[test]
    fn what_begins_in_one_huge_page_is_one_lot() {
        let stopped = |task, pieces: &[Piece]| Stopped { pid: 1, task, pieces: pieces.to_vec() };
        let piece = |vaddr, offset, length| Piece { vaddr, offset, length };
        // Six chunks; the first begins 1 MiB into a huge page. The next task is another's memory at the same place.
        let tasks = [stopped(1, &[piece(5 << 20, 0, 3 << 20)]), stopped(2, &[piece(7 << 20, 0, 1 << 20)])];
        let pending: Vec<Pending> =
            tasks.iter().map(|task| Pending::new(task.pieces.iter().copied())).collect();
        let lots = lots(&tasks, &pending, &Halves);
        let seen: Vec<(usize, usize)> = lots.iter().map(|lot| (lot.index, lot.chunks.len())).collect();
        assert_eq!(seen, [(0, 2), (0, 4), (1, 2)]);
        let bytes = lots.iter().flat_map(|lot| &lot.chunks).flat_map(|(_, pieces)| pieces);
        assert_eq!(bytes.map(|piece| piece.length).sum::<u64>(), 4 << 20);
    }

    #[test]
    fn a_short_write_goes_on_where_it_stopped() {
        let piece = |target, bytes| procmem::Piece { target, bytes };
        let mut rest = vec![piece(0, &b"abc"[..]), piece(100, b"defg"), piece(200, b"h")];
        advance(&mut rest, 5);
        let left: Vec<_> = rest.iter().map(|piece| (piece.target, piece.bytes)).collect();
        assert_eq!(left, [(102, &b"fg"[..]), (200, b"h")]);
        advance(&mut rest, 3);
        assert!(rest.is_empty());
    }
}
