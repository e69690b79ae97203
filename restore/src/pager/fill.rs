//! Copying a chunk into an address space, whatever the task does meanwhile.
//!
//! What the kernel's answers mean, each seen under CRIU:
//! - a part was copied: go on behind it, the next call tells why it stopped;
//! - `EEXIST`: the page is there, another thread was sooner: one page further;
//! - `EAGAIN` with nothing copied: an event waits to be read. Whoever reads the events must get a turn, so the gate is
//!   left and what is pending is looked up again;
//! - `ENOENT`: the step crosses the border of a mapping that was split meanwhile, or a mapping vanished and its event
//!   is not readable yet (the kernel looks for the mapping before it looks for unread events). Half the step, and a
//!   single page is tried again; if it still is pending and still not registered, then it never will be, and reads as
//!   zeros: the replica must not live;
//! - `ESRCH` (`ENOSPC` on old kernels): the address space is gone.

use std::ops::Range;
use std::time::Duration;

use nix::errno::Errno;

use super::error::Error;
use super::pending::Piece;
use super::plan::PAGE;
use super::space::Space;
use super::userfault::Userfault;

/// Bytes of one UFFDIO_COPY at most. It bounds how long a fault waits at the gate: 0.5 MiB take about 0.13 ms. Larger steps are not faster.
pub(super) const STEP: u64 = 512 << 10;

/// How often a single page may be found unregistered in a row before that is believed.
const UNREGISTERED_MAX: u32 = 3;

/// How often the kernel may lack memory for a page before the replica is given up: about a second.
pub(super) const NO_MEMORY_MAX: u32 = 100;

/// What to do with pages that are not registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unregistered {
    /// CRIU may register them yet: they stay pending.
    Skip,
    /// They should be: an error.
    Refuse,
    /// A forked child need not have them (MADV_DONTFORK after the restore): they are forgotten.
    Forget,
}

/// Whether to wait when the kernel says "again".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    /// Until it does it.
    Always,
    /// Not at all: the caller is the one who has to read the events that the kernel waits for.
    Never,
}

/// How to fill.
#[derive(Debug, Clone, Copy)]
pub(super) struct How {
    pub(super) unregistered: Unregistered,
    pub(super) patience: Patience,
}

/// How a fill ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// Nothing of the range is pending, but for what was skipped.
    All,
    /// The address space is gone or was closed.
    Gone,
    /// `stop` said so, or patience ended.
    Stopped,
}

/// Waits for a kernel that says "again", first by yielding, then by sleeping.
#[derive(Debug, Default)]
pub(super) struct Backoff(u32);

impl Backoff {
    /// Waits a little, longer each time, 1 ms at most.
    pub(super) fn wait<U: Userfault>(&mut self) {
        if U::turn() {
            return;
        }
        self.0 += 1;
        if self.0 < 8 {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(u64::from(self.0.min(100)) * 10));
        }
    }

    /// Progress was made.
    pub(super) fn reset(&mut self) {
        self.0 = 0;
    }
}

/// One fill in progress.
struct Fill<'a, U> {
    space: &'a Space<U>,
    chunk: Range<u64>,
    bytes: &'a [u8],
    how: How,
    /// Next place in the stream.
    at: u64,
    /// Bytes of the next step at most.
    step: u64,
    done: u64,
    not_registered: u32,
    no_memory: u32,
    backoff: Backoff,
}

/// Puts what is pending of `part` into place, from the `bytes` of the `chunk` around it. Returns the bytes put in.
pub(super) fn fill<U: Userfault>(
    space: &Space<U>,
    chunk: Range<u64>,
    bytes: &[u8],
    part: &Range<u64>,
    how: How,
    stop: &dyn Fn() -> bool,
) -> Result<(u64, End), Error> {
    let mut fill = Fill {
        space,
        at: part.start.max(chunk.start),
        chunk,
        bytes,
        how,
        step: STEP,
        done: 0,
        not_registered: 0,
        no_memory: 0,
        backoff: Backoff::default(),
    };
    let end = part.end.min(fill.chunk.end);
    while !stop() {
        let Some(piece) = fill.next(end) else { return Ok((fill.done, End::All)) };
        match fill.step(piece)? {
            Turn::Next => {}
            Turn::Again if how.patience == Patience::Never => break,
            Turn::Again => fill.backoff.wait::<U>(),
            Turn::Gone => return Ok((fill.done, End::Gone)),
        }
    }
    Ok((fill.done, End::Stopped))
}

enum Turn {
    Next,
    Again,
    Gone,
}

impl<U: Userfault> Fill<'_, U> {
    /// What comes next, by what is known without the gate.
    fn next(&self, end: u64) -> Option<Piece> {
        let state = self.space.state();
        let at = state.pending.next_in_stream(self.at).filter(|&at| at < end)?;
        state.pending.first_in_stream(&(at..end.min(at + self.step)))
    }

    fn step(&mut self, wanted: Piece) -> Result<Turn, Error> {
        let gate = self.space.enter();
        let Some(uffd) = gate.as_ref() else { return Ok(Turn::Gone) };
        // Only what is looked up behind the gate is true.
        let Some(piece) = self.space.state().pending.first_in_stream(&wanted.stream()) else {
            return Ok(Turn::Next);
        };
        let from = (piece.offset - self.chunk.start) as usize;
        let progress = uffd.copy(piece.vaddr, &self.bytes[from..from + piece.length as usize]);
        if progress.bytes > 0 {
            self.space.state().pending.take(&(piece.vaddr..piece.vaddr + progress.bytes));
            self.done += progress.bytes;
            self.at = piece.offset + progress.bytes;
            self.step = STEP;
            self.not_registered = 0;
            self.no_memory = 0;
            self.backoff.reset();
            return Ok(Turn::Next);
        }
        match progress.stopped {
            // A copy of nothing that did not stop cannot be: pieces are never empty.
            None | Some(Errno::EAGAIN) => Ok(Turn::Again),
            Some(Errno::EEXIST) => {
                self.space.state().pending.take(&(piece.vaddr..piece.vaddr + PAGE));
                // Who waits for this page may have come to wait just before it was there.
                let _ = uffd.wake(piece.vaddr, PAGE);
                self.at = piece.offset + PAGE;
                Ok(Turn::Next)
            }
            Some(Errno::ENOENT) => self.not_registered(piece),
            Some(Errno::ESRCH | Errno::ENOSPC) => Ok(Turn::Gone),
            Some(Errno::ENOMEM) if self.no_memory < NO_MEMORY_MAX => {
                self.no_memory += 1;
                Ok(Turn::Again)
            }
            Some(errno) => Err(Error::Refused { task: self.space.task, vaddr: piece.vaddr, errno }),
        }
    }

    fn not_registered(&mut self, piece: Piece) -> Result<Turn, Error> {
        if piece.length > PAGE {
            self.step = (piece.length / 2).next_multiple_of(PAGE);
            return Ok(Turn::Next);
        }
        match self.how.unregistered {
            Unregistered::Skip => {}
            _ if self.not_registered < UNREGISTERED_MAX => {
                self.not_registered += 1;
                return Ok(Turn::Again);
            }
            Unregistered::Refuse => {
                return Err(Error::Unregistered { task: self.space.task, vaddr: piece.vaddr });
            }
            Unregistered::Forget => {
                self.space.state().pending.take(&piece.addresses());
            }
        }
        self.not_registered = 0;
        self.at = piece.offset + PAGE;
        Ok(Turn::Next)
    }
}
