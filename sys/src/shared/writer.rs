//! The writing side of a stream.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use super::slots::Slots;
use super::{Map, Shape, complete, wake};
use crate::fresh::{Fresh, HUGE_BYTES};

/// The writing side. One at a time.
#[derive(Debug)]
pub struct Writer {
    content: File,
    small: Option<Map>,
    /// The same content again, where fresh pages are huge ones.
    huge: Option<Map>,
    table: Map,
    shape: Shape,
    fresh: Fresh,
    slots: Slots,
    /// For each slot: which mapping its pages were brought into.
    brought: Vec<AtomicU8>,
    /// Bytes of each block that this writer has put so far.
    put: Vec<AtomicU32>,
    /// Bytes of each block that belong to a region.
    wanted: Vec<u32>,
}

/// A kernel that has refused so many huge pages has none to give.
const REFUSALS_MAX: u32 = 8;

/// Not brought in yet.
const ABSENT: u8 = 0;
const SMALL: u8 = 1;
const HUGE: u8 = 2;
/// It could not be: what is put there goes through a system call, which says why.
const REFUSED: u8 = 3;

impl Writer {
    /// Goes on where an earlier writer stopped. `regions`: where each begins (a multiple of the block length) and how
    /// many bytes it has. `passing`: what readers are done with takes what comes next; the owner must know ([`super::Owner::pass`]).
    ///
    /// # Errors
    /// `InvalidData` if the files are not a stream, or the regions do not lie in it.
    pub fn open(
        content: impl Into<OwnedFd>,
        table: impl Into<OwnedFd>,
        regions: &[(u64, u64)],
        passing: bool,
    ) -> io::Result<Self> {
        let (content, table) = (File::from(content.into()), File::from(table.into()));
        let shape = Shape::of(&content, &table)?;
        if passing && !shape.content.is_multiple_of(shape.block) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a passing stream has whole blocks only",
            ));
        }
        let table_bytes = usize::try_from(table.metadata()?.len()).map_err(io::Error::other)?;
        let table = Map::new(&table, table_bytes, true)?.expect("the head is not empty");
        let mut wanted = vec![0; usize::try_from(shape.blocks()).map_err(io::Error::other)?];
        for &(start, bytes) in regions {
            let end = start.checked_add(bytes).filter(|end| *end <= shape.content);
            let Some(end) = end.filter(|_| start.is_multiple_of(shape.block)) else {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "a region lies outside of the stream",
                ));
            };
            for block in start / shape.block..end.div_ceil(shape.block) {
                let length = end.min((block + 1) * shape.block) - block * shape.block;
                wanted[block as usize] = u32::try_from(length).expect("a block is at most 1 GiB");
            }
        }
        let content_bytes = usize::try_from(shape.content).map_err(io::Error::other)?;
        let small = Map::new(&content, content_bytes, true)?;
        let huge = Map::new(&content, content_bytes, true)?.filter(Map::take_huge_pages);
        let word = |block| table.word(Shape::word_at(block)).load(Ordering::Acquire);
        let slots = Slots::new(passing, (0..shape.blocks()).map(word));
        let brought = (0..shape.blocks()).map(|_| AtomicU8::new(ABSENT)).collect();
        let put = wanted.iter().map(|_| AtomicU32::new(0)).collect();
        let (fresh, blocks) = (Fresh::default(), shape.blocks());
        let writer = Self { content, small, huge, table, shape, fresh, slots, brought, put, wanted };
        let arrived = (0..blocks).filter(|block| writer.has(*block));
        let arrived = arrived.map(|block| u64::from(writer.wanted[block as usize])).sum();
        writer.table.arrived().store(arrived, Ordering::Relaxed);
        Ok(writer)
    }

    fn word(&self, block: u64) -> &AtomicU32 {
        self.table.word(Shape::word_at(block))
    }

    /// Whether the block is complete, or was.
    #[must_use]
    pub fn has(&self, block: u64) -> bool {
        self.word(block).load(Ordering::Acquire) != 0
    }

    /// Bytes that have arrived and were not given back.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        let (arrived, released) = (self.table.arrived(), self.table.released());
        arrived.load(Ordering::Relaxed).saturating_sub(released.load(Ordering::Relaxed))
    }

    /// Whether every block that the part touches is complete.
    #[must_use]
    pub fn has_all(&self, offset: u64, bytes: u64) -> bool {
        (offset / self.shape.block..(offset + bytes).div_ceil(self.shape.block)).all(|block| self.has(block))
    }

    /// Writes bytes that this writer has not written before, but for blocks that are complete already, and wakes who
    /// waits for the blocks that are complete by that.
    ///
    /// # Errors
    /// What the kernel says, for example that memory is full; `InvalidInput` beyond the end.
    pub fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64).filter(|end| *end <= self.shape.content);
        let Some(end) = end else { return Err(io::ErrorKind::InvalidInput.into()) };
        let mut at = offset;
        while at < end {
            let block = at / self.shape.block;
            let next = ((block + 1) * self.shape.block).min(end);
            if !self.has(block) {
                let slot = self.slots.of(block, |block| self.word(block).load(Ordering::Acquire));
                let part = &bytes[(at - offset) as usize..(next - offset) as usize];
                self.write(slot, at % self.shape.block, part)?;
                self.count(block, slot, u32::try_from(next - at).expect("a block is at most 1 GiB"))?;
            }
            at = next;
        }
        Ok(())
    }

    /// Memory for bytes that this writer has not written before, to be filled in place: what is read or computed into it need
    /// not be copied. As for [`Writer::put`], nobody else writes these bytes meanwhile. `None` where they must be put: a part of
    /// them is there already, or has no memory that is mapped, or lies beyond the end.
    #[must_use]
    pub fn room(&self, offset: u64, bytes: u64) -> Option<Room<'_>> {
        let end = offset.checked_add(bytes).filter(|end| *end <= self.shape.content)?;
        let mut parts = Vec::new();
        let mut at = offset;
        while at < end {
            let block = at / self.shape.block;
            let next = ((block + 1) * self.shape.block).min(end);
            if self.has(block) {
                return None;
            }
            let slot = self.slots.of(block, |block| self.word(block).load(Ordering::Acquire));
            let map = self.mapping(slot)?;
            let start = u64::from(slot) * self.shape.block + at % self.shape.block;
            let start = usize::try_from(start).ok()?;
            parts.push(Part { block, slot, map, start, length: u32::try_from(next - at).ok()? });
            at = next;
        }
        Some(Room { writer: self, parts })
    }

    /// Makes huge pages of what was brought in in small ones, for readers to come: otherwise they take a fault for every
    /// few pages. For when all has arrived; takes up to seconds a GiB, and ends early when the kernel gives none. Gives the
    /// bytes that lie in huge pages by that.
    pub fn join_pages(&self) -> u64 {
        let Some(map) = self.huge.as_ref().filter(|_| !self.slots.are_passing()) else { return 0 };
        let (mut joined, mut refused) = (0, 0);
        for start in (0..map.bytes).step_by(HUGE_BYTES).filter(|start| start + HUGE_BYTES <= map.bytes) {
            let slot = start as u64 / self.shape.block;
            if self.brought[slot as usize].load(Ordering::Acquire) != SMALL {
                continue;
            }
            if refused == REFUSALS_MAX {
                break;
            }
            match map.collapse(start, HUGE_BYTES) {
                Ok(()) => joined += HUGE_BYTES as u64,
                Err(_) => refused += 1,
            }
        }
        joined
    }

    /// Makes what lies behind the end of a region zero, where another block may have been before.
    fn clear_end(&self, block: u64, slot: u32) -> io::Result<()> {
        let (wanted, length) = (u64::from(self.wanted[block as usize]), self.shape.length(block));
        if !self.slots.are_passing() || wanted == length {
            return Ok(());
        }
        self.write(slot, wanted, &vec![0; (length - wanted) as usize])
    }

    /// Writes a part of a block that belongs to nobody else.
    fn write(&self, slot: u32, inside: u64, part: &[u8]) -> io::Result<()> {
        let at = u64::from(slot) * self.shape.block + inside;
        let Some(map) = self.mapping(slot) else { return self.content.write_all_at(part, at) };
        let at = usize::try_from(at).expect("the content was mapped");
        // SAFETY: nobody reads the block before its word names the slot, and nobody else writes this part of it.
        unsafe { map.write(at, part) };
        Ok(())
    }

    /// The mapping into which the pages of a slot were brought; `None` if they could not be.
    fn mapping(&self, slot: u32) -> Option<&Map> {
        match self.bring(slot) {
            SMALL => self.small.as_ref(),
            HUGE => self.huge.as_ref(),
            _ => None,
        }
    }

    /// Brings the pages of a slot in, unless they are, and says into which mapping.
    fn bring(&self, slot: u32) -> u8 {
        let state = &self.brought[slot as usize];
        let before = state.load(Ordering::Acquire);
        if before != ABSENT {
            return before;
        }
        let start = usize::try_from(u64::from(slot) * self.shape.block).expect("the content was mapped");
        let length = usize::try_from(self.shape.length(slot.into())).expect("the content was mapped");
        // A huge page brings its neighbours in, for which this is asked again: only the first of them is new.
        let huge = self.huge.as_ref().filter(|_| {
            if start.is_multiple_of(HUGE_BYTES) {
                self.fresh.next_is_huge()
            } else {
                self.is_beside_huge(slot)
            }
        });
        let brought = match (huge, &self.small) {
            (Some(map), _) => (HUGE, self.fresh.bring_huge(|| map.populate(start, length))),
            (None, Some(map)) => (SMALL, map.populate(start, length)),
            (None, None) => (REFUSED, Ok(())),
        };
        let now = if brought.1.is_ok() { brought.0 } else { REFUSED };
        // Of two threads both have brought the same pages in; the first one's word counts.
        match state.compare_exchange(ABSENT, now, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => now,
            Err(first) => first,
        }
    }

    /// Whether the slot in front of this one lies in the same huge page, and that was brought in as one.
    fn is_beside_huge(&self, slot: u32) -> bool {
        slot.checked_sub(1)
            .is_some_and(|before| self.brought[before as usize].load(Ordering::Acquire) == HUGE)
    }

    fn count(&self, block: u64, slot: u32, bytes: u32) -> io::Result<()> {
        let (put, wanted) = (&self.put[block as usize], self.wanted[block as usize]);
        self.table.arrived().fetch_add(u64::from(bytes), Ordering::Relaxed);
        // Whoever completes the block has seen what the others wrote.
        if put.fetch_add(bytes, Ordering::AcqRel) + bytes == wanted {
            self.clear_end(block, slot)?;
            let word = self.word(block);
            // Release: whoever sees the word sees the bytes.
            word.store(complete(slot), Ordering::Release);
            wake(word);
        }
        Ok(())
    }
}

/// Memory of a stream for bytes that are on their way. Dropped before [`Room::done`], it was never there.
#[derive(Debug)]
pub struct Room<'a> {
    writer: &'a Writer,
    parts: Vec<Part<'a>>,
}

/// What lies in one block.
#[derive(Debug)]
struct Part<'a> {
    block: u64,
    slot: u32,
    map: &'a Map,
    start: usize,
    length: u32,
}

impl Room<'_> {
    /// The memory, in the order of the stream. What is in it at first means nothing.
    pub fn parts(&mut self) -> Vec<&mut [u8]> {
        let mut parts: Vec<&mut [u8]> = Vec::new();
        for part in &self.parts {
            // SAFETY: nobody reads a block before its word names its slot, and nobody else writes this part of it; no two parts
            // of a room overlap, since each lies in a block, and thus in a slot, of its own.
            parts.push(unsafe { part.map.bytes_mut(part.start, part.length as usize) });
        }
        parts
    }

    /// The bytes are there. Wakes who waits for the blocks that are complete by that.
    ///
    /// # Errors
    /// As for [`Writer::put`].
    pub fn done(self) -> io::Result<()> {
        self.parts.iter().try_for_each(|part| self.writer.count(part.block, part.slot, part.length))
    }
}
