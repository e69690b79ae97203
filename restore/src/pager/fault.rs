//! Answering a page fault: with the page's content, or with zeros when none is pending there.

use nix::errno::Errno;

use super::error::Error;
use super::events::Fault;
use super::fill::Backoff;
use super::plan::PAGE;
use super::space::Space;
use super::userfault::Userfault;

/// Zero pages that one read fault brings at most: they cost nothing but are mapped one by one.
const ZERO_PAGES: u64 = 16;

static ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];

/// What a fault needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// Nothing: it is answered.
    Nothing,
    /// The content at this place of the stream, which a busy thread brings and answers with.
    Left(u64),
    /// The content at this place of the stream.
    Content(u64),
    /// Another try after events were read.
    Again,
    /// The address space is gone.
    Gone,
}

/// Answers a fault if no content belongs there, else says which does. `may_leave`: a thread that is busy with this content may answer it.
pub(super) fn answer<U: Userfault>(space: &Space<U>, fault: Fault, may_leave: bool) -> Result<Need, Error> {
    let page = fault.address / PAGE * PAGE;
    let gate = space.enter();
    let Some(uffd) = gate.as_ref() else { return Ok(Need::Gone) };
    let zeros = {
        let state = space.state();
        if let Some(piece) = state.pending.at(page) {
            let offset = piece.offset + (page - piece.vaddr);
            if may_leave && space.leave(fault.address, offset) {
                return Ok(Need::Left(offset));
            }
            return Ok(Need::Content(offset));
        }
        let limit = page + ZERO_PAGES * PAGE;
        let mapped = state.registered.around(page).map_or(page + PAGE, |range| range.end);
        let end = limit.min(mapped);
        state.pending.first_in(&(page..end)).unwrap_or(end) - page
    };
    // A write would fault a second time on the kernel's shared zero page, so it gets a page of its own.
    let progress = if fault.write { uffd.copy(page, &ZEROS) } else { uffd.zero(page, zeros) };
    if progress.bytes > 0 {
        // A mapping that grew in place says so by its first fault only.
        space.state().registered.insert(page..page + progress.bytes);
        return Ok(Need::Nothing);
    }
    match progress.stopped {
        None | Some(Errno::EAGAIN | Errno::ENOMEM) => Ok(Need::Again),
        Some(Errno::EEXIST) => {
            let _ = uffd.wake(page, PAGE);
            Ok(Need::Nothing)
        }
        // More than one page: the window may cross a border that is not known here.
        Some(Errno::ENOENT) if !fault.write && zeros > PAGE => {
            let one = uffd.zero(page, PAGE);
            if one.bytes == 0 {
                let _ = uffd.wake(page, PAGE);
            }
            Ok(Need::Nothing)
        }
        // Not mapped or not registered any more: let the thread find out by itself.
        Some(Errno::ENOENT) => {
            let _ = uffd.wake(page, PAGE);
            Ok(Need::Nothing)
        }
        Some(Errno::ESRCH | Errno::ENOSPC) => Ok(Need::Gone),
        Some(errno) => Err(Error::Refused { task: space.task, vaddr: page, errno }),
    }
}

/// Answers a fault with a zero page as long as it takes, unless content is pending there; for threads that read no events.
pub(super) fn insist<U: Userfault>(space: &Space<U>, fault: Fault) -> Result<Need, Error> {
    let mut backoff = Backoff::default();
    loop {
        match answer(space, fault, false)? {
            Need::Again => backoff.wait::<U>(),
            need => return Ok(need),
        }
    }
}
