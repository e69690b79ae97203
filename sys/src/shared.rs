//! A stream that one process writes in any order and others read as its parts arrive.
//!
//! Two files make it: the content, and a table with one word for each block, which becomes other than 0 when the whole
//! block is there. Readers wait for that in the kernel (futex) and need both files for reading only. The writer may die at any
//! moment and another one may go on: what the table does not call complete is written again, with the same bytes.
//! Content lies in a tmpfs and is brought in ahead of the copy, in huge pages where those come quickly ([`crate::fresh`]).
//!
//! What every reader is done with can be let go: the word says so, so that a reader who comes too late is told and does not see
//! other bytes. Its memory is free at once; or, while a stream passes, it takes the next block, which costs neither the kernel
//! nor a page fault anything. A block lies in any slot of the content, therefore, and its word names it.
//!
//! The content consists of regions; each begins at a block, and what lies behind its end is never written.
//!
//! ```text
//! table: | magic u64 | content bytes u64 | block bytes u64 | arrived bytes u64 | failed u32 | unused u32 | released bytes u64 | 4 unused u32 | word of block 0 | ... |
//! word:  0: not there; n + 1: complete, in slot n; the same with bit 31: was there, and was given back
//! ```

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};

use crate::fresh::{Fresh, HUGE_BYTES, populate_at};

mod slots;

use slots::Slots;

const MAGIC: u64 = 0x3362_6174_7473_7772;
const HEAD_BYTES: usize = 64;
const ARRIVED_AT: usize = 24;
const FAILED_AT: usize = 32;
const RELEASED_AT: usize = 40;
/// It was there, and its memory was given back.
const RELEASED: u32 = 1 << 31;

/// The word of a block that is complete.
fn complete(slot: u32) -> u32 {
    slot + 1
}

/// Where a block lies, or lay, by its word; `None` if it has not arrived.
fn slot_of(word: u32) -> Option<u32> {
    (word & !RELEASED).checked_sub(1)
}

fn is_here(word: u32) -> bool {
    word != 0 && word & RELEASED == 0
}

/// A mapping of a shared file.
#[derive(Debug)]
struct Map {
    start: NonNull<libc::c_void>,
    bytes: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; it is read as plain bytes or through atomics only.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    fn new(fd: impl AsFd, bytes: usize, writable: bool) -> io::Result<Option<Self>> {
        let Some(length) = NonZeroUsize::new(bytes) else { return Ok(None) };
        let write = if writable { ProtFlags::PROT_WRITE } else { ProtFlags::empty() };
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
        let start = unsafe { mmap(None, length, ProtFlags::PROT_READ | write, MapFlags::MAP_SHARED, fd, 0) }?;
        Ok(Some(Self { start, bytes }))
    }

    /// Asks for huge pages; whether the kernel gives any here.
    fn take_huge_pages(&self) -> bool {
        // SAFETY: advice about whole pages of the own mapping; it changes no byte.
        unsafe { madvise(self.start, self.bytes, MmapAdvise::MADV_HUGEPAGE) }.is_ok()
    }

    /// The word at a byte offset.
    fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.bytes, "word at {offset} of {}", self.bytes);
        // SAFETY: in bounds and aligned (the mapping is page aligned); other processes use the word atomically as well.
        unsafe { AtomicU32::from_ptr(self.start.as_ptr().cast::<u8>().add(offset).cast::<u32>()) }
    }

    /// The count of arrived bytes.
    fn arrived(&self) -> &AtomicU64 {
        self.count(ARRIVED_AT)
    }

    /// The count of bytes that were given back.
    fn released(&self) -> &AtomicU64 {
        self.count(RELEASED_AT)
    }

    fn count(&self, at: usize) -> &AtomicU64 {
        assert!(self.bytes >= HEAD_BYTES && at + 8 <= HEAD_BYTES, "a table of {} bytes", self.bytes);
        // SAFETY: in bounds and aligned (the mapping is page aligned); other processes use it atomically as well.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().cast::<u8>().add(at).cast::<u64>()) }
    }

    fn bytes(&self, start: usize, length: usize) -> &[u8] {
        self.check(start, length);
        // SAFETY: in bounds; a part that is given out has arrived, and is not written before every reader is done with it.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast::<u8>().add(start), length) }
    }

    /// # Safety
    /// Nobody else reads or writes the part meanwhile, and the mapping is a writable one.
    unsafe fn write(&self, start: usize, bytes: &[u8]) {
        self.check(start, bytes.len());
        // SAFETY: in bounds, writable and exclusive by the caller's word.
        unsafe {
            let target = self.start.as_ptr().cast::<u8>().add(start);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len());
        }
    }

    fn populate(&self, start: usize, length: usize) -> io::Result<()> {
        self.check(start, length);
        populate_at(self.start.as_ptr().cast::<u8>().wrapping_add(start), length)
    }

    fn check(&self, start: usize, length: usize) {
        let fits = start.checked_add(length).is_some_and(|end| end <= self.bytes);
        assert!(fits, "{start}+{length} of {}", self.bytes);
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and no reference into it outlives `self`.
        let _ = unsafe { munmap(self.start, self.bytes) };
    }
}

/// Where blocks begin and end, and what the table is long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    content: u64,
    block: u64,
}

impl Shape {
    fn blocks(self) -> u64 {
        self.content.div_ceil(self.block)
    }

    fn length(self, block: u64) -> u64 {
        self.block.min(self.content - block * self.block)
    }

    fn word_at(block: u64) -> usize {
        HEAD_BYTES + 4 * usize::try_from(block).expect("the table was mapped")
    }

    fn table_bytes(self) -> Option<u64> {
        self.blocks().checked_mul(4)?.checked_add(HEAD_BYTES as u64)
    }

    /// Reads the head of a table and compares the lengths of both files with it.
    fn of(content: &File, table: &File) -> io::Result<Self> {
        let invalid =
            |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("not a stream: {what}"));
        let mut head = [0; HEAD_BYTES];
        table.read_exact_at(&mut head, 0)?;
        let number = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
        let shape = Shape { content: number(8), block: number(16) };
        if number(0) != MAGIC || !(1..=1 << 30).contains(&shape.block) {
            return Err(invalid("the table's head"));
        }
        if content.metadata()?.len() != shape.content {
            return Err(invalid("the length of the content"));
        }
        if shape.table_bytes() != Some(table.metadata()?.len()) {
            return Err(invalid("the length of the table"));
        }
        Ok(shape)
    }
}

/// The two files of a stream, nothing of it there yet: the side that owns the memory and may give the stream up.
#[derive(Debug)]
pub struct Owner {
    content: OwnedFd,
    table_file: OwnedFd,
    table: Map,
    shape: Shape,
    /// A writer takes what is given back for what comes next.
    passing: Mutex<bool>,
}

impl Owner {
    /// A stream of `bytes` bytes in blocks of `block_bytes`. Its content is an unnamed file of the file system that
    /// `folder` lies in, or without one a memory file.
    ///
    /// # Errors
    /// If the files cannot be made.
    ///
    /// # Panics
    /// If the block length is 0 or larger than 1 GiB.
    pub fn create(bytes: u64, block_bytes: u64, folder: Option<BorrowedFd<'_>>) -> io::Result<Self> {
        assert!((1..=1 << 30).contains(&block_bytes), "blocks of {block_bytes} bytes");
        let shape = Shape { content: bytes, block: block_bytes };
        let content = match folder {
            Some(folder) => unnamed(folder)?,
            None => File::from(memfd_create(c"rewarm-stream", MFdFlags::MFD_CLOEXEC)?),
        };
        content.set_len(bytes)?;
        let table_file = memfd_create(c"rewarm-stream-table", MFdFlags::MFD_CLOEXEC)?;
        let table_bytes = shape.table_bytes().ok_or(io::ErrorKind::InvalidInput)?;
        let file = File::from(table_file.try_clone()?);
        file.set_len(table_bytes)?;
        for (at, value) in [(0, MAGIC), (8, bytes), (16, block_bytes)] {
            file.write_all_at(&value.to_le_bytes(), at)?;
        }
        let table_bytes = usize::try_from(table_bytes).map_err(io::Error::other)?;
        let table = Map::new(&table_file, table_bytes, true)?.expect("the head is not empty");
        Ok(Self { content: content.into(), table_file, table, shape, passing: Mutex::new(false) })
    }

    /// From now on writers are opened as passing ones, until [`Owner::settle`].
    pub fn pass(&self) {
        *self.passing() = true;
    }

    fn passing(&self) -> MutexGuard<'_, bool> {
        self.passing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No writer is left and none will come: memory that was given back, and that none took again, is free from now on.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn settle(&self) -> io::Result<()> {
        // What is given back from here on is freed by who gives it back.
        if !std::mem::take(&mut *self.passing()) {
            return Ok(());
        }
        let words = || (0..self.shape.blocks()).map(|block| self.word(block).load(Ordering::Acquire));
        let here: HashSet<u32> = words().filter(|word| is_here(*word)).filter_map(slot_of).collect();
        let mut free: Vec<u32> = words().filter_map(slot_of).filter(|slot| !here.contains(slot)).collect();
        free.sort_unstable();
        free.dedup();
        free.chunk_by(|one, next| one + 1 == *next)
            .try_for_each(|run| self.free(u64::from(run[0]), run.len() as u64))
    }

    fn word(&self, block: u64) -> &AtomicU32 {
        self.table.word(Shape::word_at(block))
    }

    /// Frees the memory of these slots.
    fn free(&self, first: u64, count: u64) -> io::Result<()> {
        let number = |bytes: u64| libc::off_t::try_from(bytes).map_err(io::Error::other);
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (start, end) = (first * self.shape.block, (first + count) * self.shape.block);
        Ok(fallocate(&self.content, mode, number(start)?, number(end.min(self.shape.content) - start)?)?)
    }

    /// The two files that [`Writer::open`] wants, in its order.
    #[must_use]
    pub fn files(&self) -> [BorrowedFd<'_>; 2] {
        [self.content.as_fd(), self.table_file.as_fd()]
    }

    /// The two files that [`Reader::open`] wants, in its order: descriptors that can only read.
    ///
    /// # Errors
    /// If the process has no descriptor left.
    pub fn for_reading(&self) -> io::Result<[OwnedFd; 2]> {
        let again = |fd: &OwnedFd| File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).map(OwnedFd::from);
        Ok([again(&self.content)?, again(&self.table_file)?])
    }

    /// Length of the content in bytes, gaps included.
    #[must_use]
    pub fn content_bytes(&self) -> u64 {
        self.shape.content
    }

    /// Bytes that have arrived so far.
    #[must_use]
    pub fn arrived_bytes(&self) -> u64 {
        self.table.arrived().load(Ordering::Relaxed)
    }

    /// Gives the memory of these blocks back. They must have arrived, and no reader may be in the middle of one. Whoever asks
    /// for one later gets [`Missing::Released`].
    ///
    /// # Errors
    /// `InvalidInput` if one of them has not arrived or does not exist; what the kernel says.
    pub fn release(&self, blocks: Range<u64>) -> io::Result<()> {
        let arrived = |block| self.word(block).load(Ordering::Acquire) != 0;
        if blocks.end > self.shape.blocks() || !blocks.clone().all(arrived) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let passing = self.passing();
        let mut slots: Vec<u64> = Vec::new();
        for block in blocks {
            let word = self.word(block).fetch_or(RELEASED, Ordering::AcqRel);
            if is_here(word) {
                self.table.released().fetch_add(self.shape.length(block), Ordering::Relaxed);
                slots.extend(slot_of(word).map(u64::from));
            }
        }
        if *passing {
            return Ok(());
        }
        drop(passing);
        slots.sort_unstable();
        slots.chunk_by(|one, next| one + 1 == *next).try_for_each(|run| self.free(run[0], run.len() as u64))
    }

    /// Tells every reader that the rest will not come.
    pub fn fail(&self) {
        self.table.word(FAILED_AT).store(1, Ordering::Release);
        for block in 0..self.shape.blocks() {
            wake(self.table.word(Shape::word_at(block)));
        }
    }
}

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

/// Not brought in yet.
const ABSENT: u8 = 0;
const SMALL: u8 = 1;
const HUGE: u8 = 2;
/// It could not be: what is put there goes through a system call, which says why.
const REFUSED: u8 = 3;

impl Writer {
    /// Goes on where an earlier writer stopped. `regions`: where each begins (a multiple of the block length) and how
    /// many bytes it has. `passing`: what readers are done with takes what comes next; the owner must know ([`Owner::pass`]).
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
        let map = match self.bring(slot) {
            SMALL => self.small.as_ref(),
            HUGE => self.huge.as_ref(),
            _ => None,
        };
        let Some(map) = map else { return self.content.write_all_at(part, at) };
        let at = usize::try_from(at).expect("the content was mapped");
        // SAFETY: nobody reads the block before its word names the slot, and nobody else writes this part of it.
        unsafe { map.write(at, part) };
        Ok(())
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

/// Why a block cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// The owner gave up.
    #[error("the stream was given up before block {block} arrived")]
    Failed {
        /// Which block.
        block: u64,
    },
    /// It did not arrive in time.
    #[error("block {block} did not arrive in time")]
    Late {
        /// Which block.
        block: u64,
    },
    /// It was there, and everybody was said to be done with it.
    #[error("block {block} of the stream was given back already")]
    Released {
        /// Which block.
        block: u64,
    },
    /// Nobody is left who could bring it.
    #[error("whoever fetched the stream is gone, and block {block} has not arrived")]
    Abandoned {
        /// Which block.
        block: u64,
    },
}

/// The reading side, in any process that was given the two files.
#[derive(Debug)]
pub struct Reader {
    content: Option<Map>,
    table: Map,
    shape: Shape,
}

impl Reader {
    /// Maps a stream. Descriptors that can only read suffice.
    ///
    /// # Errors
    /// `InvalidData` if the files are not a stream or do not fit together.
    pub fn open(content: impl Into<OwnedFd>, table: impl Into<OwnedFd>) -> io::Result<Self> {
        let (content, table) = (File::from(content.into()), File::from(table.into()));
        let shape = Shape::of(&content, &table)?;
        let bytes = |bytes: u64| usize::try_from(bytes).map_err(io::Error::other);
        let table_bytes = bytes(table.metadata()?.len())?;
        let table = Map::new(&table, table_bytes, false)?.expect("the head is not empty");
        Ok(Self { content: Map::new(&content, bytes(shape.content)?, false)?, table, shape })
    }

    /// Length of the stream in bytes.
    #[must_use]
    pub fn content_bytes(&self) -> u64 {
        self.shape.content
    }

    /// Length of a block in bytes; the last one may be shorter.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        self.shape.block
    }

    /// Bytes that have arrived so far.
    #[must_use]
    pub fn arrived_bytes(&self) -> u64 {
        self.table.arrived().load(Ordering::Relaxed)
    }

    /// Whether the block has arrived, given back meanwhile or not.
    #[must_use]
    pub fn has_arrived(&self, block: u64) -> bool {
        self.table.word(Shape::word_at(block)).load(Ordering::Acquire) != 0
    }

    /// Whether the block is here.
    #[must_use]
    pub fn has(&self, block: u64) -> bool {
        is_here(self.table.word(Shape::word_at(block)).load(Ordering::Acquire))
    }

    /// Waits until a block has arrived and gives its bytes. `alive` is asked from time to time whether anybody is left
    /// who could bring it.
    ///
    /// # Errors
    /// If the owner gave up or is gone, or nothing came within `limit`.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn wait(&self, block: u64, limit: Duration, alive: &dyn Fn() -> bool) -> Result<&[u8], Missing> {
        let deadline = Instant::now() + limit;
        let length = self.shape.length(block);
        let word = self.table.word(Shape::word_at(block));
        loop {
            let state = word.load(Ordering::Acquire);
            if state & RELEASED != 0 {
                return Err(Missing::Released { block });
            }
            if let Some(slot) = slot_of(state) {
                let start = u64::from(slot) * self.shape.block;
                let here = self.content.as_ref().filter(|_| start + length <= self.shape.content);
                let Some(content) = here else { return Err(Missing::Failed { block }) };
                let start = usize::try_from(start).expect("the content was mapped");
                return Ok(content.bytes(start, usize::try_from(length).expect("the content was mapped")));
            }
            if self.table.word(FAILED_AT).load(Ordering::Acquire) != 0 {
                return Err(Missing::Failed { block });
            }
            if !alive() {
                // The last words of who is gone may have been this block.
                if self.has(block) {
                    continue;
                }
                return Err(Missing::Abandoned { block });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Missing::Late { block });
            }
            // Not for ever at once: a writer that was killed wakes nobody.
            sleep_while(word, state, left.min(Duration::from_millis(100)));
        }
    }
}

/// A tmpfs that gives huge pages to who asks for them, is mounted nowhere and belongs to a user: the folder of many streams' content.
///
/// # Errors
/// Without CAP_SYS_ADMIN, or where the kernel has no huge pages for tmpfs.
pub fn huge_folder(bytes: u64, uid: u32, gid: u32) -> io::Result<OwnedFd> {
    let (size, uid, gid) = (bytes.to_string(), uid.to_string(), gid.to_string());
    let options =
        [("size", size.as_str()), ("huge", "advise"), ("mode", "700"), ("uid", &uid), ("gid", &gid)];
    crate::mount::detached_tmpfs(&options)
}

fn unnamed(folder: BorrowedFd<'_>) -> io::Result<File> {
    use nix::fcntl::{OFlag, openat};
    use nix::sys::stat::Mode;
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    Ok(File::from(openat(folder, ".", flags, Mode::S_IRUSR | Mode::S_IWUSR)?))
}

fn wake(word: &AtomicU32) {
    // SAFETY: the word outlives the call; FUTEX_WAKE reads nothing else.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

/// Sleeps as long as the word has this value, at most `limit`. May return early.
fn sleep_while(word: &AtomicU32, value: u32, limit: Duration) {
    let limit = libc::timespec {
        tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: libc::c_long::from(limit.subsec_nanos()),
    };
    // SAFETY: word and time outlive the call. Not private: writer and reader are different processes.
    let result =
        unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, &raw const limit) };
    // EAGAIN: the value has changed already; ETIMEDOUT, EINTR: the caller looks again.
    debug_assert!(result == 0 || matches!(Errno::last(), Errno::EAGAIN | Errno::ETIMEDOUT | Errno::EINTR));
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOREVER: Duration = Duration::from_secs(20);

    fn alive() -> bool {
        true
    }

    fn writer(owner: &Owner, regions: &[(u64, u64)]) -> Writer {
        let [content, table] = owner.files().map(|fd| fd.try_clone_to_owned().expect("duplicate"));
        let passing = *owner.passing();
        Writer::open(content, table, regions, passing).expect("a stream")
    }

    /// Bytes of memory that the content takes.
    fn memory(owner: &Owner) -> i64 {
        nix::sys::stat::fstat(&owner.content).expect("our own file").st_blocks * 512
    }

    fn reader(owner: &Owner) -> Reader {
        let [content, table] = owner.for_reading().expect("descriptors");
        Reader::open(content, table).expect("a stream")
    }

    #[test]
    fn a_block_is_readable_when_its_last_byte_has_arrived() {
        let owner = Owner::create(12_288, 4096, None).expect("memory files");
        let (writer, reader) = (writer(&owner, &[(0, 10_000)]), reader(&owner));
        writer.put(4096, &[2; 4096]).expect("room");
        writer.put(0, &[1; 4000]).expect("room");
        assert!(!reader.has(0) && reader.has(1) && !reader.has(2));
        writer.put(4000, &[3; 96]).expect("room");
        // The region ends here; what lies behind is never written.
        writer.put(8192, &[4; 1808]).expect("room");
        let first = reader.wait(0, Duration::ZERO, &alive).expect("arrived");
        assert_eq!((first[3999], first[4000], first.len()), (1, 3, 4096));
        assert_eq!(reader.wait(2, Duration::ZERO, &alive).expect("arrived")[..1808], [4; 1808]);
        assert_eq!(reader.arrived_bytes(), 10_000);
    }

    #[test]
    fn a_reader_that_waits_is_woken() {
        let owner = Owner::create(8192, 4096, None).expect("memory files");
        let (writer, reader) = (writer(&owner, &[(0, 8192)]), reader(&owner));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| reader.wait(1, FOREVER, &alive).map(<[u8]>::to_vec));
            writer.put(2000, &[5; 6192]).expect("room");
            assert_eq!(waiting.join().expect("no panic"), Ok(vec![5; 4096]));
        });
    }

    #[test]
    fn a_second_writer_does_again_what_the_first_left_half_done_and_nothing_else() {
        let owner = Owner::create(8192, 4096, None).expect("memory files");
        let reader = reader(&owner);
        let first = writer(&owner, &[(0, 8192)]);
        first.put(0, &[1; 6000]).expect("room");
        drop(first);
        let second = writer(&owner, &[(0, 8192)]);
        assert!(second.has_all(0, 4096) && !second.has_all(0, 4097));
        assert_eq!(reader.arrived_bytes(), 4096);
        // What is complete is not touched again, whoever sends it.
        second.put(0, &[9; 4096]).expect("room");
        second.put(4096, &[2; 4096]).expect("room");
        assert_eq!(reader.wait(0, Duration::ZERO, &alive).expect("arrived"), [1; 4096]);
        assert_eq!(reader.wait(1, Duration::ZERO, &alive).expect("arrived"), [2; 4096]);
    }

    #[test]
    fn an_owner_that_gives_up_or_is_gone_wakes_who_waits_and_a_silent_one_is_late() {
        let owner = Owner::create(4096, 4096, None).expect("memory files");
        let reader = reader(&owner);
        assert_eq!(reader.wait(0, Duration::from_millis(5), &alive), Err(Missing::Late { block: 0 }));
        assert_eq!(reader.wait(0, FOREVER, &|| false), Err(Missing::Abandoned { block: 0 }));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| reader.wait(0, FOREVER, &alive).map(<[u8]>::to_vec));
            owner.fail();
            assert_eq!(waiting.join().expect("no panic"), Err(Missing::Failed { block: 0 }));
        });
    }

    #[test]
    fn what_was_given_back_takes_no_memory_and_is_never_read_as_zeros() {
        let owner = Owner::create(16_384, 4096, None).expect("memory files");
        let (writer, reader) = (writer(&owner, &[(0, 16_384)]), reader(&owner));
        writer.put(0, &[1; 12_288]).expect("room");
        let too_early = owner.release(2..4).expect_err("block 3 is not there");
        assert_eq!(too_early.kind(), io::ErrorKind::InvalidInput);
        assert!(owner.release(3..5).is_err());
        let before = memory(&owner);
        owner.release(1..3).expect("both have arrived");
        assert_eq!(before - memory(&owner), 2 * 4096);
        assert_eq!(reader.wait(1, FOREVER, &alive), Err(Missing::Released { block: 1 }));
        assert!(reader.has(0) && !reader.has(1) && reader.has_arrived(1) && !reader.has_arrived(3));
        // A writer that goes on does not bring it again.
        drop(writer);
        let next = self::writer(&owner, &[(0, 16_384)]);
        assert!(next.has(2));
        assert_eq!(next.held_bytes(), 4096);
        assert_eq!(reader.arrived_bytes(), 12_288);
        next.put(4096, &[9; 8192]).expect("room");
        assert_eq!(reader.wait(2, FOREVER, &alive), Err(Missing::Released { block: 2 }));
        assert_eq!(reader.wait(0, FOREVER, &alive).expect("still here"), [1; 4096]);
    }

    /// Blocks of one page with their number in each byte.
    fn numbered(block: u64) -> [u8; 4096] {
        [(block % 251) as u8 + 1; 4096]
    }

    #[test]
    fn what_passes_takes_the_memory_of_what_was_given_back() {
        let owner = Owner::create(64 * 4096, 4096, None).expect("memory files");
        owner.pass();
        // The last block ends with 96 bytes of gap.
        let (writer, reader) = (writer(&owner, &[(0, 64 * 4096 - 96)]), reader(&owner));
        for block in 0..64 {
            let bytes = if block == 63 { 4000 } else { 4096 };
            writer.put(block * 4096, &numbered(block)[..bytes]).expect("room");
            let seen = reader.wait(block, Duration::ZERO, &alive).expect("arrived");
            assert_eq!(seen[..bytes], numbered(block)[..bytes]);
            assert!(seen[bytes..].iter().all(|&byte| byte == 0), "of another block");
            if let Some(done) = block.checked_sub(4) {
                owner.release(done..done + 1).expect("arrived");
                assert_eq!(reader.wait(done, FOREVER, &alive), Err(Missing::Released { block: done }));
            }
        }
        assert!(memory(&owner) <= 8 * 4096, "{} bytes", memory(&owner));
        // The rest is still what it was, and what nobody holds goes when nothing comes any more.
        owner.settle().expect("memory files");
        assert_eq!(memory(&owner), 4 * 4096);
        assert_eq!(reader.wait(61, FOREVER, &alive).expect("held"), numbered(61));
        owner.release(60..64).expect("arrived");
        assert_eq!(memory(&owner), 0);
    }

    #[test]
    fn a_second_writer_of_what_passes_takes_nothing_that_is_held() {
        let owner = Owner::create(32 * 4096, 4096, None).expect("memory files");
        owner.pass();
        let (first, reader) = (writer(&owner, &[(0, 32 * 4096)]), reader(&owner));
        (0..8).for_each(|block| first.put(block * 4096, &numbered(block)).expect("room"));
        // Half done when its writer dies: its memory is taken again.
        first.put(20 * 4096, &[0xff; 100]).expect("room");
        owner.release(2..5).expect("arrived");
        drop(first);
        let second = writer(&owner, &[(0, 32 * 4096)]);
        owner.release(6..7).expect("arrived");
        (8..32).for_each(|block| second.put(block * 4096, &numbered(block)).expect("room"));
        for block in 0..32 {
            let seen = reader.wait(block, FOREVER, &alive);
            match block {
                2..=4 | 6 => assert_eq!(seen, Err(Missing::Released { block })),
                _ => assert_eq!(seen.expect("held"), numbered(block)),
            }
        }
        assert!(memory(&owner) <= 29 * 4096, "{} bytes", memory(&owner));
    }

    /// Threads that write, read, compare and give back, in every order that they find.
    #[test]
    fn what_passes_between_threads_is_never_mixed_up() {
        const BLOCKS: u64 = 400;
        let owner = Owner::create(BLOCKS * 4096, 4096, None).expect("memory files");
        owner.pass();
        let (writer, reader) = (writer(&owner, &[(0, BLOCKS * 4096)]), reader(&owner));
        let (owner, writer, reader) = (&owner, &writer, &reader);
        std::thread::scope(|scope| {
            for half in 0..2 {
                scope.spawn(move || {
                    for block in 0..BLOCKS {
                        // Each block in two parts by two threads.
                        let part = &numbered(block)[..2048];
                        writer.put(block * 4096 + half * 2048, part).expect("room");
                    }
                });
            }
            for turn in 0..2 {
                scope.spawn(move || {
                    for block in (turn..BLOCKS).step_by(2) {
                        let seen = reader.wait(block, FOREVER, &alive).expect("held by this thread");
                        assert_eq!(seen, numbered(block), "block {block}");
                        owner.release(block..block + 1).expect("arrived");
                    }
                });
            }
        });
    }

    #[test]
    fn a_reader_cannot_write() {
        let owner = Owner::create(4096, 4096, None).expect("memory files");
        let [content, table] = owner.for_reading().expect("descriptors");
        assert!(File::from(content).write_all_at(b"x", 0).is_err());
        assert!(Map::new(&table, HEAD_BYTES, true).is_err());
    }

    #[test]
    fn nothing_can_be_put_beyond_the_end_and_foreign_files_are_refused() {
        let owner = Owner::create(4096, 4096, None).expect("memory files");
        let writer = writer(&owner, &[(0, 4096)]);
        assert_eq!(writer.put(1, &[0; 4096]).expect_err("too long").kind(), io::ErrorKind::InvalidInput);
        let [content, table] = owner.files().map(|fd| fd.try_clone_to_owned().expect("duplicate"));
        assert!(Writer::open(content, table, &[(0, 4097)], false).is_err());
        let file = || OwnedFd::from(tempfile::tempfile().expect("a file"));
        assert!(Reader::open(file(), file()).is_err());
    }

    #[test]
    fn an_empty_stream_can_be_opened() {
        let owner = Owner::create(0, 4096, None).expect("memory files");
        assert_eq!(reader(&owner).content_bytes(), 0);
    }
}
