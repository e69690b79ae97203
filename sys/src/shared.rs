//! A stream that one process writes in any order and others read as its parts arrive.
//!
//! Two files make it: the content, and a table that counts for each block how many of its bytes have arrived. A block
//! is readable when its count equals its length; readers wait for that in the kernel (futex). Content lies in a tmpfs
//! with huge pages where the kernel gives them: with 4 KiB pages their allocation costs more than the copy.
//!
//! ```text
//! table: | magic u64 | content bytes u64 | block bytes u64 | failed u32 | unused u32 | arrived u32 of block 0 | ... |
//! ```

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

const MAGIC: u64 = 0x6d61_6572_7473_7772;
const HEAD_BYTES: usize = 32;
const FAILED_AT: usize = 24;

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

    /// The word at a byte offset.
    fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.bytes, "word at {offset} of {}", self.bytes);
        // SAFETY: in bounds and aligned (the mapping is page aligned); other processes use the word atomically as well.
        unsafe { AtomicU32::from_ptr(self.start.as_ptr().cast::<u8>().add(offset).cast::<u32>()) }
    }

    fn bytes(&self, start: usize, length: usize) -> &[u8] {
        assert!(
            start.checked_add(length).is_some_and(|end| end <= self.bytes),
            "{start}+{length} of {}",
            self.bytes
        );
        // SAFETY: in bounds; a part that is given out has arrived, and is written only once.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast::<u8>().add(start), length) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and no reference into it outlives `self`.
        let _ = unsafe { munmap(self.start, self.bytes) };
    }
}

/// Where blocks begin and end.
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
}

/// The writing side.
#[derive(Debug)]
pub struct Writer {
    content: File,
    table_file: OwnedFd,
    table: Map,
    shape: Shape,
}

impl Writer {
    /// A stream of `bytes` bytes in blocks of `block_bytes`, nothing of it there yet. `huge` asks for huge pages.
    ///
    /// # Errors
    /// If memory files cannot be made.
    ///
    /// # Panics
    /// If the block length is 0 or larger than 1 GiB.
    pub fn create(bytes: u64, block_bytes: u64, huge: bool) -> io::Result<Self> {
        assert!((1..=1 << 30).contains(&block_bytes), "blocks of {block_bytes} bytes");
        let shape = Shape { content: bytes, block: block_bytes };
        let content = content_file(bytes, huge)?;
        content.set_len(bytes)?;
        let table_file = memfd_create(c"rewarm-stream-table", MFdFlags::MFD_CLOEXEC)?;
        let table_bytes = HEAD_BYTES as u64 + 4 * shape.blocks();
        let file = File::from(table_file.try_clone()?);
        file.set_len(table_bytes)?;
        for (at, value) in [(0, MAGIC), (8, bytes), (16, block_bytes)] {
            file.write_all_at(&value.to_le_bytes(), at)?;
        }
        let table_bytes = usize::try_from(table_bytes).map_err(io::Error::other)?;
        let table = Map::new(&table_file, table_bytes, true)?.expect("the head is not empty");
        Ok(Self { content, table_file, table, shape })
    }

    /// The two files that [`Reader::open`] wants, in its order.
    #[must_use]
    pub fn files(&self) -> [BorrowedFd<'_>; 2] {
        [self.content.as_fd(), self.table_file.as_fd()]
    }

    /// Writes bytes that have not been written before, and wakes who waits for the blocks that are complete by that.
    ///
    /// # Errors
    /// What the kernel says, for example that memory is full; `InvalidInput` beyond the end.
    pub fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64).filter(|end| *end <= self.shape.content);
        let Some(end) = end else { return Err(io::ErrorKind::InvalidInput.into()) };
        self.content.write_all_at(bytes, offset)?;
        let mut at = offset;
        while at < end {
            let block = at / self.shape.block;
            let next = ((block + 1) * self.shape.block).min(end);
            let count = u32::try_from(next - at).expect("a block is at most 1 GiB");
            let word = self.table.word(Shape::word_at(block));
            // Release: whoever sees the full count sees the bytes.
            let before = word.fetch_add(count, Ordering::Release);
            if u64::from(before) + u64::from(count) == self.shape.length(block) {
                wake(word);
            }
            at = next;
        }
        Ok(())
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
    /// The writer gave up.
    #[error("the writer gave up before block {block} arrived")]
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
}

/// The reading side, in any process that was given the two files.
#[derive(Debug)]
pub struct Reader {
    content: Option<Map>,
    table: Map,
    shape: Shape,
}

impl Reader {
    /// Maps a stream.
    ///
    /// # Errors
    /// `InvalidData` if the files are not a stream or do not fit together.
    pub fn open(content: impl Into<OwnedFd>, table: impl Into<OwnedFd>) -> io::Result<Self> {
        let (content, table) = (File::from(content.into()), File::from(table.into()));
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
        let table_bytes =
            shape.blocks().checked_mul(4).and_then(|bytes| bytes.checked_add(HEAD_BYTES as u64));
        if table_bytes != Some(table.metadata()?.len()) {
            return Err(invalid("the length of the table"));
        }
        let bytes = |bytes: u64| usize::try_from(bytes).map_err(io::Error::other);
        let table_bytes = bytes(table.metadata()?.len())?;
        // Waiting on a word needs a mapping that the kernel could write to.
        let table = Map::new(&table, table_bytes, true)?.expect("the head is not empty");
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

    /// Whether the block has arrived.
    #[must_use]
    pub fn has(&self, block: u64) -> bool {
        let count = self.table.word(Shape::word_at(block)).load(Ordering::Acquire);
        u64::from(count) == self.shape.length(block)
    }

    /// Waits until a block has arrived and gives its bytes.
    ///
    /// # Errors
    /// If the writer gave up, or nothing came within `limit`.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn wait(&self, block: u64, limit: Duration) -> Result<&[u8], Missing> {
        let deadline = Instant::now() + limit;
        let length = self.shape.length(block);
        let word = self.table.word(Shape::word_at(block));
        loop {
            let count = word.load(Ordering::Acquire);
            if u64::from(count) == length {
                let start = usize::try_from(block * self.shape.block).expect("the content was mapped");
                let length = usize::try_from(length).expect("the content was mapped");
                return Ok(self.content.as_ref().expect("a block has bytes").bytes(start, length));
            }
            if self.table.word(FAILED_AT).load(Ordering::Acquire) != 0 {
                return Err(Missing::Failed { block });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Missing::Late { block });
            }
            // Not for ever at once: a writer that was killed wakes nobody.
            sleep_while(word, count, left.min(Duration::from_millis(200)));
        }
    }
}

/// An unnamed file for content: in a tmpfs of its own with huge pages, or an ordinary memory file.
fn content_file(bytes: u64, huge: bool) -> io::Result<File> {
    if huge && let Ok(file) = huge_file(bytes) {
        return Ok(file);
    }
    Ok(File::from(memfd_create(c"rewarm-stream", MFdFlags::MFD_CLOEXEC)?))
}

fn huge_file(bytes: u64) -> io::Result<File> {
    use nix::fcntl::{OFlag, openat};
    use nix::sys::stat::Mode;
    // Whole huge pages, and one more for the file's own rounding.
    let size = (bytes.next_multiple_of(2 << 20) + (4 << 20)).to_string();
    let root = crate::mount::detached_tmpfs(&[("size", &size), ("huge", "always"), ("mode", "700")])?;
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    Ok(File::from(openat(&root, ".", flags, Mode::S_IRUSR | Mode::S_IWUSR)?))
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

    fn pair(bytes: u64, block: u64, huge: bool) -> (Writer, Reader) {
        let writer = Writer::create(bytes, block, huge).expect("memory files");
        let [content, table] = writer.files().map(|fd| fd.try_clone_to_owned().expect("duplicate"));
        let reader = Reader::open(content, table).expect("a stream");
        (writer, reader)
    }

    #[test]
    fn a_block_is_readable_when_its_last_byte_has_arrived() {
        let (writer, reader) = pair(10_000, 4096, false);
        writer.put(4096, &[2; 4096]).expect("room");
        writer.put(0, &[1; 4000]).expect("room");
        assert!(!reader.has(0) && reader.has(1) && !reader.has(2));
        writer.put(4000, &[3; 96]).expect("room");
        writer.put(8192, &[4; 1808]).expect("room");
        let first = reader.wait(0, Duration::ZERO).expect("arrived");
        assert_eq!((first[3999], first[4000], first.len()), (1, 3, 4096));
        assert_eq!(reader.wait(2, Duration::ZERO).expect("arrived"), [4; 1808]);
    }

    #[test]
    fn a_reader_that_waits_is_woken() {
        let (writer, reader) = pair(8192, 4096, true);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| reader.wait(1, Duration::from_secs(20)).map(<[u8]>::to_vec));
            writer.put(2000, &[5; 6192]).expect("room");
            assert_eq!(waiting.join().expect("no panic"), Ok(vec![5; 4096]));
        });
    }

    #[test]
    fn a_writer_that_gives_up_wakes_who_waits_and_a_silent_one_is_late() {
        let (writer, reader) = pair(4096, 4096, false);
        assert_eq!(reader.wait(0, Duration::from_millis(5)), Err(Missing::Late { block: 0 }));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| reader.wait(0, Duration::from_secs(20)).map(<[u8]>::to_vec));
            writer.fail();
            assert_eq!(waiting.join().expect("no panic"), Err(Missing::Failed { block: 0 }));
        });
    }

    #[test]
    fn nothing_can_be_put_beyond_the_end_and_foreign_files_are_refused() {
        let (writer, _) = pair(4096, 4096, false);
        assert_eq!(writer.put(1, &[0; 4096]).expect_err("too long").kind(), io::ErrorKind::InvalidInput);
        let file = || OwnedFd::from(tempfile::tempfile().expect("a file"));
        assert!(Reader::open(file(), file()).is_err());
    }

    #[test]
    fn an_empty_stream_can_be_opened() {
        let (_, reader) = pair(0, 4096, false);
        assert_eq!(reader.content_bytes(), 0);
    }
}
