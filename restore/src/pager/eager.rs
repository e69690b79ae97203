//! Filling tasks that do not run: all of their memory, or their copies of device memory.
//!
//! In huge pages where a mapping is marked for them, while those come quickly ([`rewarm_sys::fresh`]); collapsing small ones
//! afterwards would cost more than the fill. Written in huge pages by two threads, memory comes at about twice the speed of
//! UFFDIO_COPY (measured: `research` figures 3.2 against 1.4-1.6), unless the machine lacks it. The tasks must be stopped:
//! whoever runs would read zeros from pages that are not written yet.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rewarm_sys::fresh::Fresh;
use rewarm_sys::procmem;

use super::engine::Engine;
use super::error::Error;
use super::pending::{Pending, Piece};
use super::ranges::Ranges;
use super::source::Source;
use super::space::Space;
use super::stopped::{HUGE_PAGE, Stopped};
use super::userfault::Userfault;

/// So many lots are taken out of the userfaultfd in one go, once huge pages have come quickly for a while. Each time costs a moment
/// of every thread, and what was taken out before a slow huge page is written in huge pages all the same.
const BATCH_MAX: usize = 4;

/// What an eager fill did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Written {
    /// Bytes written, zero pages included.
    pub bytes: u64,
    /// How long it took.
    pub time: Duration,
}

/// Takes out what is pending, to be written from outside. What its owner may not write (what is not `writable`) cannot be, and is
/// copied before.
pub(super) fn take_out<U: Userfault>(
    engine: &Engine<U>,
    space: &Arc<Space<U>>,
    writable: &Ranges,
) -> Result<Vec<Piece>, Error> {
    let mut protected = Ranges::default();
    for piece in space.state().pending.within(&(0..u64::MAX)) {
        protected.insert(piece.addresses());
    }
    writable.iter().for_each(|range| protected.remove(range));
    for range in protected.iter() {
        let pieces = space.state().pending.within(&range);
        pieces.iter().try_for_each(|piece| engine.fill_now(space, piece.stream()))?;
    }
    Ok(space.state().pending.take(&(0..u64::MAX)))
}

/// Fills stopped tasks with several threads. On return everything is in place. Content is given back as it is.
///
/// # Errors
/// The first that any thread met: the tasks must be killed, since pages are missing.
pub(super) fn fill_stopped<U: Userfault>(
    tasks: &[Stopped<U>],
    source: &dyn Source,
    threads: usize,
) -> Result<Written, Error> {
    let start = Instant::now();
    let pending: Vec<Pending> = tasks.iter().map(|task| Pending::new(task.pieces.iter().copied())).collect();
    let lots = lots(tasks, &pending, source);
    // Of two address spaces that are filled from the same content neither knows what the other has read.
    let alone = |task: u32| tasks.iter().filter(|other| other.task == task).count() == 1;
    let queue = Queue { lots: &lots, fresh: Fresh::default(), place: Mutex::default() };
    let failure = Mutex::new(None);
    let nothing = vec![0; HUGE_PAGE as usize];
    let work = || {
        while let Some((batch, huge)) = queue.take() {
            let task = &tasks[batch[0].index];
            if huge {
                task.open(batch.iter().flat_map(Lot::addresses));
            }
            let fresh = huge.then_some(&queue.fresh);
            let written = batch.iter().try_for_each(|lot| match &lot.content {
                Content::Zeros(range) => put_zeros(task, range, &nothing, fresh),
                Content::Chunks(chunks) => chunks.iter().try_for_each(|(chunk, pieces)| {
                    put_chunk(task, source, chunk, pieces, fresh)?;
                    if alone(task.task) {
                        source.release(task.task, chunk.clone());
                    }
                    Ok(())
                }),
            });
            if let Err(error) = written {
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                queue.end();
            }
            if huge {
                queue.done();
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(work);
        }
    });
    if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let zeros = tasks.iter().flat_map(|task| &task.zeros).map(|zeros| zeros.end - zeros.start);
    let bytes = pending.iter().map(Pending::bytes).chain(zeros).sum();
    Ok(Written { bytes, time: start.elapsed() })
}

/// What one thread writes at a time: what begins in one huge page.
struct Lot {
    /// Of which task.
    index: usize,
    content: Content,
}

enum Content {
    /// Chunks with the pieces in them, in the order of the stream.
    Chunks(Vec<(Range<u64>, Vec<Piece>)>),
    Zeros(Range<u64>),
}

impl Lot {
    fn addresses(&self) -> Vec<Range<u64>> {
        match &self.content {
            Content::Zeros(range) => vec![range.clone()],
            Content::Chunks(chunks) => {
                chunks.iter().flat_map(|(_, pieces)| pieces).map(Piece::addresses).collect()
            }
        }
    }
}

/// Lots that are still to be written, and whether in huge pages.
struct Queue<'a> {
    lots: &'a [Lot],
    fresh: Fresh,
    place: Mutex<Place>,
}

#[derive(Default)]
struct Place {
    next: usize,
    /// Batches that were written in huge pages, since the last slow one: each may be twice as long as the one before.
    quick: u32,
}

impl<'a> Queue<'a> {
    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next lots of one task, and whether to write them in huge pages.
    fn take(&self) -> Option<(&'a [Lot], bool)> {
        let mut place = self.place();
        let rest = self.lots.get(place.next..).filter(|rest| !rest.is_empty())?;
        let huge = self.fresh.next_is_huge();
        let most = if huge { BATCH_MAX.min(1 << place.quick.min(16)) } else { 1 };
        let same = rest.iter().take(most).take_while(|lot| lot.index == rest[0].index).count();
        place.next += same;
        Some((&rest[..same], huge))
    }

    /// A batch is written in huge pages.
    fn done(&self) {
        let mut place = self.place();
        place.quick = if self.fresh.is_slow() { 0 } else { place.quick + 1 };
    }

    /// Nothing more is handed out.
    fn end(&self) {
        self.place().next = self.lots.len();
    }
}

/// Every chunk that is wanted, task after task, in the order of the streams, then zero pages. Chunks that begin in one huge page
/// are one lot: of two threads that touch a fresh huge page at the same time each makes and clears one, and the kernel throws the
/// second away.
fn lots<U>(tasks: &[Stopped<U>], pending: &[Pending], source: &dyn Source) -> Vec<Lot> {
    let mut lots: Vec<Lot> = Vec::new();
    for (index, (task, pending)) in tasks.iter().zip(pending).enumerate() {
        let (mut at, mut last) = (0, None);
        while let Some(next) = pending.next_in_stream(at) {
            let chunk = source.chunk(task.task, next);
            at = chunk.end;
            let pieces = pending.in_stream(&chunk);
            let block = pieces.first().map(|piece| piece.vaddr / HUGE_PAGE);
            match lots.last_mut() {
                Some(Lot { index: same, content: Content::Chunks(chunks) })
                    if *same == index && block == last =>
                {
                    chunks.push((chunk, pieces));
                }
                _ => lots.push(Lot { index, content: Content::Chunks(vec![(chunk, pieces)]) }),
            }
            last = block;
        }
    }
    for (index, task) in tasks.iter().enumerate() {
        for zeros in &task.zeros {
            let mut at = zeros.start;
            while at < zeros.end {
                let end = zeros.end.min((at / HUGE_PAGE + 1) * HUGE_PAGE);
                lots.push(Lot { index, content: Content::Zeros(at..end) });
                at = end;
            }
        }
    }
    lots
}

fn put_chunk<U: Userfault>(
    task: &Stopped<U>,
    source: &dyn Source,
    chunk: &Range<u64>,
    pieces: &[Piece],
    fresh: Option<&Fresh>,
) -> Result<(), Error> {
    let mut outcome = None;
    source
        .read(task.task, chunk.clone(), &mut |bytes| {
            outcome = Some(if bytes.len() as u64 == chunk.end - chunk.start {
                let place = |piece: &Piece| {
                    let from = (piece.offset - chunk.start) as usize;
                    procmem::Piece { target: piece.vaddr, bytes: &bytes[from..from + piece.length as usize] }
                };
                task.put(&pieces.iter().map(place).collect::<Vec<_>>(), fresh)
            } else {
                Err(length(task.task, chunk, bytes.len() as u64))
            });
        })
        .map_err(|source| Error::Source { task: task.task, offset: chunk.start, source })?;
    outcome.unwrap_or_else(|| Err(length(task.task, chunk, 0)))
}

fn length(task: u32, chunk: &Range<u64>, got: u64) -> Error {
    Error::Length { task, offset: chunk.start, got, wanted: chunk.end - chunk.start }
}

fn put_zeros<U: Userfault>(
    task: &Stopped<U>,
    range: &Range<u64>,
    nothing: &[u8],
    fresh: Option<&Fresh>,
) -> Result<(), Error> {
    let bytes = &nothing[..(range.end - range.start) as usize];
    task.put(&[procmem::Piece { target: range.start, bytes }], fresh)
}

#[cfg(test)]
mod tests {
    use super::super::source::SourceError;
    use super::*;
    use rewarm_sys::uffd::Uffd;

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
        let stopped = |task, pieces: &[Piece], zeros: &[Range<u64>]| Stopped::<Uffd> {
            pid: 1,
            task,
            pieces: pieces.to_vec(),
            zeros: zeros.to_vec(),
            space: None,
            own: Ranges::default(),
        };
        let piece = |vaddr, offset, length| Piece { vaddr, offset, length };
        let zeros = |mib: Range<u64>| std::iter::once(mib.start << 20..mib.end << 20).collect::<Vec<_>>();
        // Six chunks; the first begins 1 MiB into a huge page. The next task is another's memory at the same place.
        let tasks = [
            stopped(1, &[piece(5 << 20, 0, 3 << 20)], &zeros(9..11)),
            stopped(2, &[piece(7 << 20, 0, 1 << 20)], &[]),
        ];
        let pending: Vec<Pending> =
            tasks.iter().map(|task| Pending::new(task.pieces.iter().copied())).collect();
        let lots = lots(&tasks, &pending, &Halves);
        let seen: Vec<_> = lots.iter().map(|lot| (lot.index, lot.addresses())).collect();
        let halves = |range: Range<u64>| range.map(|half| half << 19..(half + 1) << 19).collect::<Vec<_>>();
        assert_eq!(
            seen,
            [
                (0, halves(10..12)),
                (0, halves(12..16)),
                (1, halves(14..16)),
                (0, zeros(9..10)),
                (0, zeros(10..11)),
            ]
        );
    }

    #[test]
    fn batches_grow_while_huge_pages_come_quickly_and_are_of_one_task() {
        let lot = |index| Lot { index, content: Content::Zeros(0..HUGE_PAGE) };
        let lots: Vec<Lot> = (0..20).map(|_| lot(0)).chain((0..90).map(|_| lot(1))).collect();
        let queue = Queue { lots: &lots, fresh: Fresh::default(), place: Mutex::default() };
        let take = || {
            let (batch, huge) = queue.take().expect("some are left");
            if huge {
                queue.done();
            }
            (batch.len(), huge)
        };
        let grown: Vec<_> = (0..7).map(|_| take()).collect();
        assert_eq!(grown, [1, 2, 4, 4, 4, 4, 1].map(|length| (length, true)));
        assert_eq!(take(), (4, true));
        // A slow one: small pages, one lot after the other, then one huge page is tried.
        let slow = || {
            let began = std::time::Instant::now();
            while began.elapsed() < Duration::from_millis(20) {}
            Ok(())
        };
        queue.fresh.bring_huge(slow).expect("brought");
        queue.done();
        assert_eq!((0..64).map(|_| take()).filter(|taken| *taken == (1, false)).count(), 64);
        assert_eq!((take(), take()), ((1, true), (2, true)));
        queue.end();
        assert!(queue.take().is_none());
    }
}
