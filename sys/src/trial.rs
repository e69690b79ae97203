//! Memory on which tests try a userfaultfd: registered, touched, moved, given up, and a fork of its owner.
//!
//! Only for programs that are under test. The memory is reached through volatile raw accesses, since its content is
//! chosen by another process. Touching what was unmapped kills the program, as it would any other.

use std::io;
use std::ops::Range;

use crate::uffd::Uffd;

/// Size of a page.
pub const PAGE: usize = 4096;

/// A range of private anonymous memory at a fixed place. Dropping it does not unmap it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    start: usize,
    pages: usize,
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Area {
    /// Maps memory at this address, where nothing is mapped.
    ///
    /// # Errors
    /// `EEXIST` if something is.
    pub fn map(start: usize, pages: usize) -> io::Result<Area> {
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let flags = flags | libc::MAP_FIXED_NOREPLACE | libc::MAP_NORESERVE;
        let place = std::ptr::without_provenance_mut(start);
        // SAFETY: without MAP_FIXED no mapping that exists is touched.
        let got = unsafe { libc::mmap(place, pages * PAGE, protection, flags, -1, 0) };
        if got == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Area { start, pages }) }
    }

    /// First address.
    #[must_use]
    pub fn start(&self) -> usize {
        self.start
    }

    /// Length in pages.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// The part made of these pages, as an area of its own.
    ///
    /// # Panics
    /// If it is not inside.
    #[must_use]
    pub fn part(&self, pages: Range<usize>) -> Area {
        assert!(pages.start <= pages.end && pages.end <= self.pages, "{pages:?} of {}", self.pages);
        Area { start: self.start + pages.start * PAGE, pages: pages.len() }
    }

    fn bytes(&self) -> usize {
        self.pages * PAGE
    }

    fn pointer(&self) -> *mut libc::c_void {
        std::ptr::with_exposed_provenance_mut(self.start)
    }

    /// Registers the area for missing pages.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn register(&self, uffd: &Uffd) -> io::Result<()> {
        // SAFETY: areas are reached through raw accesses only, no Rust object lives in them.
        unsafe { uffd.register(self.start as u64, self.bytes() as u64) }
    }

    /// Reads a word.
    #[must_use]
    pub fn load(&self, page: usize, word: usize) -> u64 {
        // SAFETY: `word_at` is inside the area, aligned; unmapped memory ends the program.
        unsafe { self.word_at(page, word).read_volatile() }
    }

    /// Writes a word.
    pub fn store(&self, page: usize, word: usize, value: u64) {
        // SAFETY: as in `load`; no reference to the memory exists.
        unsafe { self.word_at(page, word).write_volatile(value) }
    }

    fn word_at(&self, page: usize, word: usize) -> *mut u64 {
        assert!(page < self.pages && word < PAGE / 8, "page {page} of {}, word {word}", self.pages);
        std::ptr::with_exposed_provenance_mut(self.start + page * PAGE + word * 8)
    }

    /// Calls madvise on the whole area.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn advise(&self, advice: i32) -> io::Result<()> {
        // SAFETY: what the advice does to the content of an area is the test's business; nothing else lives there.
        check(unsafe { libc::madvise(self.pointer(), self.bytes(), advice) })
    }

    /// Makes the area writable or not.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn protect(&self, writable: bool) -> io::Result<()> {
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: nothing but the test's own accesses reaches an area.
        check(unsafe { libc::mprotect(self.pointer(), self.bytes(), protection) })
    }

    /// Unmaps the area.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn unmap(self) -> io::Result<()> {
        // SAFETY: nothing but the test's own accesses reaches an area.
        check(unsafe { libc::munmap(self.pointer(), self.bytes()) })
    }

    /// Moves the area to an address; what was mapped there goes.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn relocate(self, to: usize) -> io::Result<Area> {
        let place: *mut libc::c_void = std::ptr::without_provenance_mut(to);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: old and new place are areas of the test, in which no Rust object lives.
        let got = unsafe { libc::mremap(self.pointer(), self.bytes(), self.bytes(), flags, place) };
        if got == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Area { start: to, ..self })
    }

    /// Makes the area longer where it is.
    ///
    /// # Errors
    /// `ENOMEM` if something is mapped there.
    pub fn grow(self, pages: usize) -> io::Result<Area> {
        let longer = Area { pages: self.pages + pages, ..self };
        // SAFETY: without MREMAP_MAYMOVE only unmapped addresses are taken.
        let got = unsafe { libc::mremap(self.pointer(), self.bytes(), longer.bytes(), 0) };
        if got == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(longer) }
    }

    /// How many pages are resident.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn resident(&self) -> io::Result<usize> {
        let mut pages = vec![0_u8; self.pages];
        // SAFETY: the buffer has a byte for each page.
        check(unsafe { libc::mincore(self.pointer(), self.bytes(), pages.as_mut_ptr()) })?;
        Ok(pages.iter().filter(|page| **page & 1 != 0).count())
    }
}

/// Forks; the child runs `child` and exits with what it returns. Returns the child's pid.
///
/// For programs under test only: with other threads around, the child must not use what they may have locked, but
/// for the allocator, which the C library mends.
///
/// # Errors
/// When no process can be made.
pub fn fork(child: impl FnOnce() -> i32) -> io::Result<i32> {
    // SAFETY: by this function's contract the child uses nothing that another thread may hold.
    match unsafe { libc::fork() } {
        0 => {
            let code = child();
            // SAFETY: ends the process without running handlers of the parent.
            unsafe { libc::_exit(code) }
        }
        pid @ 1.. => Ok(pid),
        _ => Err(io::Error::last_os_error()),
    }
}
