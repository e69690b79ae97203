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
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};

use crate::fresh::{collapse_at, populate_at};

mod slots;
mod writer;

pub use writer::{Room, Writer};

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

    /// # Safety
    /// Nobody else reads or writes the part as long as the reference lives, and the mapping is a writable one.
    #[expect(clippy::mut_from_ref, reason = "the mapping is shared, its parts are not")]
    unsafe fn bytes_mut(&self, start: usize, length: usize) -> &mut [u8] {
        self.check(start, length);
        // SAFETY: in bounds, writable and exclusive by the caller's word.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast::<u8>().add(start), length) }
    }

    fn populate(&self, start: usize, length: usize) -> io::Result<()> {
        self.check(start, length);
        populate_at(self.start.as_ptr().cast::<u8>().wrapping_add(start), length)
    }

    fn collapse(&self, start: usize, length: usize) -> io::Result<()> {
        self.check(start, length);
        collapse_at(self.start.as_ptr().cast::<u8>().wrapping_add(start), length)
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
        // Slots are what the table says, and a writer writes the table.
        let length = end.min(self.shape.content).checked_sub(start).ok_or(io::ErrorKind::InvalidData)?;
        Ok(fallocate(&self.content, mode, number(start)?, number(length)?)?)
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

    /// Frees all memory of the content at once, whatever a writer still does. For a stream that has no reader and gets none.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn discard(&self) -> io::Result<()> {
        if self.shape.content == 0 { Ok(()) } else { self.free(0, self.shape.blocks()) }
    }

    /// Tells every reader that the rest will not come.
    pub fn fail(&self) {
        self.table.word(FAILED_AT).store(1, Ordering::Release);
        for block in 0..self.shape.blocks() {
            wake(self.table.word(Shape::word_at(block)));
        }
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
mod tests;
