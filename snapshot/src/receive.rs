//! Takes what a frozen server has, pages from CRIU and files at the vote, into the arena, and hands it on in batches.
//!
//! Runs in a thread of its own, the only one of this process that counts while the server is frozen. It looks at nothing:
//! zero pages are looked for and chunks are cut behind it (`stream.rs`), by threads that stand back until the server goes
//! on. The only thing that it can wait for, beside CRIU, is room in the arena.

use std::io::{self, Read};
use std::sync::mpsc::Sender;
use std::time::Instant;

use bytes::Bytes;
use rewarm_container::tree::Tree;
use rewarm_criu::layout::PAGE_BYTES;
use rewarm_criu::page_server::{Flags, Object, PageSink};
use rewarm_sys::priority::{self, Priority};

use crate::arena::{Arena, SEGMENT_BYTES, Segment};

/// What is done while everything is still frozen, after the last page and before CRIU learns the result.
pub(crate) type AtVote = Box<dyn FnOnce(&mut Intake) -> io::Result<()> + Send>;

/// A part of what a server has. `Pages` and `Content` take their bytes from their batch, in order.
#[derive(Debug)]
pub(crate) enum Item {
    /// The pages of an object begin; what came before has ended.
    Object(Object),
    /// Pages of the object.
    Pages { vaddr: u64, pages: u64, flags: Flags },
    /// The content of a tree begins; what came before has ended.
    Tree { name: &'static str, meta: Vec<u8> },
    /// So many bytes of it.
    Content { bytes: u64 },
}

/// Items and the bytes that they take, all of one segment.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) items: Vec<Item>,
    pub(crate) bytes: Bytes,
}

/// Fills segments of the arena and sends them on.
pub(crate) struct Intake {
    arena: Arena,
    deadline: Instant,
    batches: Sender<Batch>,
    segment: Option<Segment>,
    used: usize,
    items: Vec<Item>,
    bytes: u64,
}

impl Intake {
    /// Waits for room until `deadline` at most.
    pub(crate) fn new(arena: Arena, deadline: Instant, batches: Sender<Batch>) -> Self {
        Self { arena, deadline, batches, segment: None, used: 0, items: Vec::new(), bytes: 0 }
    }

    /// Takes the whole content of a tree from `data`.
    pub(crate) fn tree(&mut self, name: &'static str, tree: &Tree, data: &mut dyn Read) -> io::Result<()> {
        self.items.push(Item::Tree { name, meta: tree.encode() });
        let mut left = tree.stream_bytes();
        while left > 0 {
            let bytes = self.fill(left, data)?;
            self.items.push(Item::Content { bytes });
            left -= bytes;
        }
        Ok(())
    }

    fn pages(&mut self, mut vaddr: u64, pages: u64, flags: Flags, data: &mut dyn Read) -> io::Result<()> {
        let mut left = pages * PAGE_BYTES;
        while left > 0 {
            let bytes = self.fill(left, data)?;
            self.items.push(Item::Pages { vaddr, pages: bytes / PAGE_BYTES, flags });
            self.bytes += bytes;
            vaddr += bytes;
            left -= bytes;
        }
        Ok(())
    }

    /// Reads up to `bytes` bytes, as many as the segment has room for; whole pages.
    fn fill(&mut self, bytes: u64, data: &mut dyn Read) -> io::Result<u64> {
        if self.used == SEGMENT_BYTES {
            self.flush()?;
        }
        let segment = match &mut self.segment {
            Some(segment) => segment,
            None => self.segment.insert(self.arena.segment(self.deadline)?),
        };
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX).min(SEGMENT_BYTES - self.used);
        data.read_exact(&mut segment[self.used..self.used + bytes])?;
        self.used += bytes;
        Ok(bytes as u64)
    }

    /// Sends on what there is.
    fn flush(&mut self) -> io::Result<()> {
        let bytes = self.segment.take().map_or_else(Bytes::new, |segment| segment.share(self.used));
        self.used = 0;
        let batch = Batch { items: std::mem::take(&mut self.items), bytes };
        // Whoever takes batches ends early only by a failure, which is told in its own words.
        self.batches.send(batch).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }
}

/// The receiving side of one dump.
pub(crate) struct Receiver {
    intake: Intake,
    frozen: bool,
    at_vote: Option<AtVote>,
    failure: Option<io::Error>,
}

impl Receiver {
    pub(crate) fn new(intake: Intake, at_vote: AtVote) -> Self {
        Self { intake, frozen: false, at_vote: Some(at_vote), failure: None }
    }

    /// Why the vote was against the dump, if it was.
    pub(crate) fn take_failure(&mut self) -> Option<io::Error> {
        self.failure.take()
    }

    /// Bytes of pages that CRIU sent.
    pub(crate) fn received_bytes(&self) -> u64 {
        self.intake.bytes
    }

    /// The first sign that everything is frozen: from here on only this thread and CRIU count.
    fn begin(&mut self) {
        if std::mem::replace(&mut self.frozen, true) {
            return;
        }
        // Without it the freeze is longer, and that is all.
        let _ = priority::set_all_threads(Priority::Idle);
        let _ = priority::set_this_thread(Priority::Normal);
    }
}

impl PageSink for Receiver {
    fn open(&mut self, object: Object) -> io::Result<()> {
        self.begin();
        self.intake.items.push(Item::Object(object));
        Ok(())
    }

    fn run(&mut self, vaddr: u64, pages: u64, flags: Flags, data: &mut dyn Read) -> io::Result<()> {
        self.intake.pages(vaddr, pages, flags, data)
    }

    fn vote(&mut self) -> i32 {
        let Some(at_vote) = self.at_vote.take() else { return 1 };
        match at_vote(&mut self.intake).and_then(|()| self.intake.flush()) {
            Ok(()) => 0,
            Err(error) => {
                self.failure = Some(error);
                1
            }
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if self.frozen {
            let _ = priority::set_all_threads(Priority::Normal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    fn receiver(at_vote: AtVote) -> (Receiver, std::sync::mpsc::Receiver<Batch>) {
        let (batches, received) = channel();
        let deadline = Instant::now() + Duration::from_secs(20);
        (Receiver::new(Intake::new(Arena::new(0), deadline, batches), at_vote), received)
    }

    #[test]
    fn a_run_longer_than_a_segment_goes_on_in_the_next_batch() {
        let (mut receiver, batches) = receiver(Box::new(|_| Ok(())));
        receiver.open(Object::Task { pid: 1 }).expect("opened");
        let pages = (SEGMENT_BYTES as u64 / PAGE_BYTES) + 2;
        let mut data = io::repeat(7).take(pages * PAGE_BYTES);
        receiver.run(0x10000, pages, Flags::PRESENT, &mut data).expect("received");
        assert_eq!(receiver.vote(), 0);
        assert_eq!(receiver.received_bytes(), pages * PAGE_BYTES);
        drop(receiver);
        let batches: Vec<Batch> = batches.iter().collect();
        assert_eq!(batches.iter().map(|batch| batch.bytes.len()).collect::<Vec<_>>(), [SEGMENT_BYTES, 8192]);
        assert!(matches!(
            batches[0].items[..],
            [Item::Object(_), Item::Pages { vaddr: 0x10000, pages: 512, .. }]
        ));
        assert!(matches!(batches[1].items[..], [Item::Pages { vaddr: 0x21_0000, pages: 2, .. }]));
    }

    #[test]
    fn a_failure_at_the_vote_is_a_vote_against_the_dump_and_is_kept() {
        let (mut receiver, _batches) = receiver(Box::new(|_| Err(io::Error::other("disk full"))));
        assert_ne!(receiver.vote(), 0);
        assert_eq!(receiver.take_failure().expect("kept").to_string(), "disk full");
    }

    #[test]
    fn nobody_who_takes_batches_is_a_vote_against_the_dump() {
        let (mut receiver, batches) = receiver(Box::new(|_| Ok(())));
        drop(batches);
        assert_ne!(receiver.vote(), 0);
    }
}
