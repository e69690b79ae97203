//! Takes the pages that CRIU sends while the server is frozen, and casts the vote that ends the freeze.
//!
//! Runs in a thread of its own. It does nothing that can wait: pages go into memory that was touched before, zero pages
//! are looked for and chunks are cut after the server goes on.

use std::io::{self, Read};

use rewarm_criu::layout::{Layout, PAGE_BYTES, Run};
use rewarm_criu::page_server::{Flags, Object, PageSink};

use crate::arena::{Arena, Extent, Filled};

/// What is done while everything is still frozen, after the last page and before CRIU learns the result.
pub(crate) type AtVote = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// Pages as CRIU sent them.
struct Received {
    object: Object,
    runs: Vec<(u64, u64, Flags)>,
    extents: Vec<Extent>,
}

/// The receiving side of one dump.
pub(crate) struct Receiver {
    arena: Arena,
    objects: Vec<Received>,
    at_vote: Option<AtVote>,
    failure: Option<io::Error>,
}

impl Receiver {
    pub(crate) fn new(arena: Arena, at_vote: AtVote) -> Self {
        Self { arena, objects: Vec::new(), at_vote: Some(at_vote), failure: None }
    }

    /// Why the vote was against the dump, if it was.
    pub(crate) fn take_failure(&mut self) -> Option<io::Error> {
        self.failure.take()
    }

    /// The objects of the dump and the memory that holds their pages.
    pub(crate) fn finish(self) -> io::Result<Pages> {
        let memory = self.arena.finish()?;
        Ok(Pages { memory, objects: self.objects })
    }
}

impl PageSink for Receiver {
    fn open(&mut self, object: Object) -> io::Result<()> {
        self.objects.push(Received { object, runs: Vec::new(), extents: Vec::new() });
        Ok(())
    }

    fn run(&mut self, vaddr: u64, pages: u64, flags: Flags, data: &mut dyn Read) -> io::Result<()> {
        let received = self.objects.last_mut().expect("the protocol opens an object before its pages");
        let mut left = pages * PAGE_BYTES;
        while left > 0 {
            let (extent, room) = self.arena.room(left)?;
            data.read_exact(room)?;
            left -= extent.bytes as u64;
            match received.extents.last_mut() {
                Some(last) if last.segment == extent.segment && last.start + last.bytes == extent.start => {
                    last.bytes += extent.bytes;
                }
                _ => received.extents.push(extent),
            }
        }
        received.runs.push((vaddr, pages, flags));
        Ok(())
    }

    fn vote(&mut self) -> i32 {
        let Some(at_vote) = self.at_vote.take() else { return 1 };
        match at_vote() {
            Ok(()) => 0,
            Err(error) => {
                self.failure = Some(error);
                1
            }
        }
    }
}

/// All pages of a dump.
pub(crate) struct Pages {
    memory: Filled,
    objects: Vec<Received>,
}

/// One object: its layout, and its pages that are not zero.
pub(crate) struct ObjectPages {
    pub(crate) object: Object,
    pub(crate) layout: Layout,
    pub(crate) content: Vec<bytes::Bytes>,
}

impl Pages {
    /// Bytes that CRIU sent.
    pub(crate) fn received_bytes(&self) -> u64 {
        self.objects.iter().flat_map(|object| &object.runs).map(|(_, pages, _)| pages * PAGE_BYTES).sum()
    }

    /// Drops the zero pages of each object. Costs one pass over memory: the caller runs it where it may block.
    pub(crate) fn without_zeros(self) -> Vec<ObjectPages> {
        let memory = self.memory;
        self.objects.into_iter().map(|received| split(&memory, received)).collect()
    }
}

fn split(memory: &Filled, received: Received) -> ObjectPages {
    let mut layout = Layout::new();
    let mut content = Vec::new();
    let mut extents = received.extents.into_iter().map(|extent| memory.slice(extent));
    let mut current = bytes::Bytes::new();
    for (mut vaddr, mut pages, flags) in received.runs {
        while pages > 0 {
            if current.is_empty() {
                current = extents.next().expect("every run's bytes were received");
            }
            let here = pages.min(current.len() as u64 / PAGE_BYTES);
            let zero = is_zero(&current[..PAGE_BYTES as usize]);
            let alike = 1
                + (1..here)
                    .take_while(|page| {
                        let start = (page * PAGE_BYTES) as usize;
                        is_zero(&current[start..start + PAGE_BYTES as usize]) == zero
                    })
                    .count() as u64;
            let bytes = current.split_to((alike * PAGE_BYTES) as usize);
            layout.push(Run { vaddr, pages: alike, zero, lazy: flags.contains(Flags::LAZY) });
            if !zero {
                content.push(bytes);
            }
            vaddr += alike * PAGE_BYTES;
            pages -= alike;
        }
    }
    ObjectPages { object: received.object, layout, content }
}

/// Whether a page is all zero: it equals itself moved by one byte, which `memcmp` decides at memory speed.
fn is_zero(page: &[u8]) -> bool {
    page[0] == 0 && page[1..] == page[..page.len() - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = PAGE_BYTES as usize;

    fn receiver(at_vote: AtVote) -> Receiver {
        Receiver::new(Arena::touched(0, 1 << 30).expect("memory"), at_vote)
    }

    #[test]
    fn zero_pages_leave_the_stream_but_stay_in_the_layout() {
        let mut receiver = receiver(Box::new(|| Ok(())));
        receiver.open(Object::Task { pid: 1 }).expect("opened");
        let mut data = vec![1u8; 2 * PAGE];
        data.extend(vec![0u8; PAGE]);
        let mut late = vec![0u8; PAGE];
        late[PAGE - 1] = 5;
        data.extend(&late);
        receiver.run(0x10000, 4, Flags::LAZY | Flags::PRESENT, &mut data.as_slice()).expect("received");
        assert_eq!(receiver.vote(), 0);
        let pages = receiver.finish().expect("finished");
        assert_eq!(pages.received_bytes(), 4 * PAGE_BYTES);
        let objects = pages.without_zeros();
        let runs = objects[0].layout.runs();
        assert_eq!(
            runs.iter().map(|r| (r.pages, r.zero)).collect::<Vec<_>>(),
            [(2, false), (1, true), (1, false)]
        );
        let bytes: Vec<u8> = objects[0].content.concat();
        assert_eq!(bytes.len(), 3 * PAGE);
        assert_eq!(bytes[3 * PAGE - 1], 5);
    }

    #[test]
    fn a_failure_at_the_vote_is_a_vote_against_the_dump_and_is_kept() {
        let mut receiver = receiver(Box::new(|| Err(io::Error::other("disk full"))));
        assert_ne!(receiver.vote(), 0);
        assert_eq!(receiver.take_failure().expect("kept").to_string(), "disk full");
    }
}
