//! The memory of a task that stands still, written from outside: as ordinary memory, in huge pages where its mapping is marked for
//! them, or through its userfaultfd, in small ones.
//!
//! UFFDIO_COPY never makes huge pages. `process_vm_writev` does, in what is not registered; in what is registered and missing it
//! would wait for ever. So memory is taken out of the userfaultfd ([`Stopped::open`]) before it is written in huge pages, and what
//! stays in it is copied.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use nix::errno::Errno;
use rewarm_sys::fresh::Fresh;
use rewarm_sys::procmem;

use super::error::Error;
use super::fill::{Backoff, NO_MEMORY_MAX, STEP};
use super::pending::Piece;
use super::plan::PAGE;
use super::ranges::Ranges;
use super::space::Space;
use super::userfault::Userfault;

/// Bytes of a huge page.
pub(super) const HUGE_PAGE: u64 = 2 << 20;

/// Parts of a huge page that are shorter do not show how long it took: their mapping may have small pages.
const SHOWS: usize = 64 << 10;

/// A stopped task and what it lacks.
#[derive(Debug)]
pub(super) struct Stopped<U> {
    /// Pid as seen from here.
    pub(super) pid: i32,
    /// Whose content stream fills it.
    pub(super) task: u32,
    /// What to write, in mappings that the task may write itself.
    pub(super) pieces: Vec<Piece>,
    /// Zero pages that must be there.
    pub(super) zeros: Vec<Range<u64>>,
    /// Whose userfaultfd it is registered with; without one, nothing is.
    pub(super) space: Option<Arc<Space<U>>>,
    /// What may be taken out of the userfaultfd: all that is missing there is in `pieces` and `zeros`.
    pub(super) own: Ranges,
}

impl<U: Userfault> Stopped<U> {
    /// Makes ordinary memory of the huge pages in which these addresses lie, as far as they are its own. What the kernel keeps
    /// registered stays so.
    pub(super) fn open(&self, addresses: impl Iterator<Item = Range<u64>>) {
        let Some(space) = &self.space else { return };
        let mut wanted = Ranges::default();
        for range in addresses {
            wanted.insert(range.start / HUGE_PAGE * HUGE_PAGE..range.end.next_multiple_of(HUGE_PAGE));
        }
        let gate = space.enter_alone();
        let Some(uffd) = gate.as_ref() else { return };
        let mut state = space.state();
        for range in wanted.iter().flat_map(|range| self.own.within(range).collect::<Vec<_>>()) {
            for part in state.registered.within(range).collect::<Vec<_>>() {
                if uffd.unregister(part.start, part.end - part.start).is_ok() {
                    state.registered.remove(part);
                }
            }
        }
    }

    /// Puts pieces into place. `fresh` is told how long huge pages take, where it is given.
    pub(super) fn put(&self, pieces: &[procmem::Piece<'_>], fresh: Option<&Fresh>) -> Result<(), Error> {
        let Some(space) = &self.space else { return self.write(pieces, fresh) };
        let mut open = Vec::with_capacity(pieces.len());
        {
            // Nobody takes anything out of the userfaultfd meanwhile.
            let gate = space.enter();
            let parts: Vec<_> = {
                let state = space.state();
                pieces.iter().flat_map(|piece| parts(piece, &state.registered)).collect()
            };
            for (piece, registered) in parts {
                match gate.as_ref() {
                    Some(uffd) if registered => self.copy(&**uffd, piece)?,
                    _ => open.push(piece),
                }
            }
        }
        self.write(&open, fresh)
    }

    /// Writes what is not registered.
    fn write(&self, pieces: &[procmem::Piece<'_>], fresh: Option<&Fresh>) -> Result<(), Error> {
        if let Some(fresh) = fresh {
            for part in pieces.iter().flat_map(blocks).filter(|part| part.bytes.len() >= SHOWS) {
                let page = procmem::Piece { target: part.target, bytes: &part.bytes[..PAGE as usize] };
                let touch = || procmem::write(self.pid, &[page]).map_err(io::Error::from);
                fresh.bring_huge(touch).map_err(|error| Error::Write {
                    task: self.task,
                    vaddr: part.target,
                    errno: error.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
                })?;
            }
        }
        pieces.chunks(procmem::PIECES_MAX).try_for_each(|batch| self.write_all(batch))
    }

    fn write_all(&self, pieces: &[procmem::Piece<'_>]) -> Result<(), Error> {
        let mut rest = pieces.to_vec();
        while let Some(first) = rest.first() {
            let vaddr = first.target;
            let refused = |errno| Error::Write { task: self.task, vaddr, errno };
            let written = procmem::write(self.pid, &rest).map_err(refused)?;
            if written == 0 {
                return Err(refused(Errno::EFAULT));
            }
            advance(&mut rest, written);
        }
        Ok(())
    }

    /// Copies what is registered.
    fn copy(&self, uffd: &U, piece: procmem::Piece<'_>) -> Result<(), Error> {
        let refused = |vaddr, errno| Err(Error::Refused { task: self.task, vaddr, errno });
        let (mut at, mut step, mut tries, mut backoff) = (0, STEP as usize, 0, Backoff::default());
        while at < piece.bytes.len() {
            let vaddr = piece.target + at as u64;
            let end = piece.bytes.len().min(at + step);
            let progress = uffd.copy(vaddr, &piece.bytes[at..end]);
            if progress.bytes > 0 {
                at += progress.bytes as usize;
                (step, tries) = (STEP as usize, 0);
                backoff.reset();
                continue;
            }
            match progress.stopped {
                // The page is there, and so it is ordinary memory.
                Some(Errno::EEXIST) => {
                    let page = &piece.bytes[at..at + PAGE as usize];
                    self.write_all(&[procmem::Piece { target: vaddr, bytes: page }])?;
                    at += PAGE as usize;
                }
                // Over the border of a mapping.
                Some(Errno::ENOENT) if end - at > PAGE as usize => {
                    step = ((end - at) / 2).next_multiple_of(PAGE as usize);
                }
                Some(Errno::ENOENT) => return Err(Error::Unregistered { task: self.task, vaddr }),
                None | Some(Errno::EAGAIN | Errno::ENOMEM) if tries < NO_MEMORY_MAX => {
                    tries += 1;
                    backoff.wait::<U>();
                }
                errno => return refused(vaddr, errno.unwrap_or(Errno::EAGAIN)),
            }
        }
        Ok(())
    }
}

/// A piece in parts, each with whether it is registered.
fn parts<'a>(piece: &procmem::Piece<'a>, registered: &Ranges) -> Vec<(procmem::Piece<'a>, bool)> {
    let end = piece.target + piece.bytes.len() as u64;
    let cut = |range: Range<u64>| {
        let bytes = &piece.bytes[(range.start - piece.target) as usize..(range.end - piece.target) as usize];
        procmem::Piece { target: range.start, bytes }
    };
    let (mut parts, mut at) = (Vec::new(), piece.target);
    for range in registered.within(piece.target..end) {
        if at < range.start {
            parts.push((cut(at..range.start), false));
        }
        at = range.end;
        parts.push((cut(range), true));
    }
    if at < end {
        parts.push((cut(at..end), false));
    }
    parts
}

/// A piece, cut where huge pages begin.
fn blocks<'a>(piece: &procmem::Piece<'a>) -> impl Iterator<Item = procmem::Piece<'a>> + use<'a> {
    let (mut target, mut rest) = (piece.target, piece.bytes);
    std::iter::from_fn(move || {
        let room = (HUGE_PAGE - target % HUGE_PAGE).min(rest.len() as u64);
        let (bytes, after) = rest.split_at(room as usize);
        let part = procmem::Piece { target, bytes };
        (target, rest) = (target + room, after);
        (!bytes.is_empty()).then_some(part)
    })
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
    use super::*;

    fn piece(target: u64, bytes: &[u8]) -> procmem::Piece<'_> {
        procmem::Piece { target, bytes }
    }

    #[test]
    fn a_short_write_goes_on_where_it_stopped() {
        let mut rest = vec![piece(0, &b"abc"[..]), piece(100, b"defg"), piece(200, b"h")];
        advance(&mut rest, 5);
        let left: Vec<_> = rest.iter().map(|piece| (piece.target, piece.bytes)).collect();
        assert_eq!(left, [(102, &b"fg"[..]), (200, b"h")]);
        advance(&mut rest, 3);
        assert!(rest.is_empty());
    }

    #[test]
    fn a_piece_is_cut_where_registration_ends_and_where_huge_pages_begin() {
        let mut registered = Ranges::default();
        registered.insert(102..104);
        registered.insert(106..120);
        let found = |piece| {
            let parts = parts(&piece, &registered).into_iter();
            parts.map(|(part, known)| (part.target, part.bytes.to_vec(), known)).collect::<Vec<_>>()
        };
        let part = |target, bytes: &[u8], known| (target, bytes.to_vec(), known);
        assert_eq!(
            found(piece(101, b"abcdefg")),
            [part(101, b"a", false), part(102, b"bc", true), part(104, b"de", false), part(106, b"fg", true)]
        );
        assert_eq!(found(piece(110, b"ab")), [part(110, b"ab", true)]);
        assert_eq!(found(piece(119, b"ab")), [part(119, b"a", true), part(120, b"b", false)]);
        assert_eq!(found(piece(90, b"ab")), [part(90, b"ab", false)]);
        let bytes = vec![0; 5 << 20];
        let cut: Vec<_> =
            blocks(&piece(1 << 20, &bytes)).map(|part| (part.target, part.bytes.len())).collect();
        assert_eq!(cut, [(1 << 20, 1 << 20), (2 << 20, 2 << 20), (4 << 20, 2 << 20)]);
    }
}
