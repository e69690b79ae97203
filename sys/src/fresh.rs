//! Fresh memory, brought in before it is written: in huge pages while those come quickly.
//!
//! A huge page costs less to bring in than 512 small ones (measured 0.17 s against 0.4-0.5 s a GiB), unless the memory is not
//! there: the host of a virtual machine takes free blocks back that are at least as large as a huge page (free page reporting),
//! and gives them again at 2.2-2.7 s a GiB. Small pages come from smaller blocks first, which it never took. So the time of
//! each huge page is looked at, and after a slow one small pages are taken for a while.

use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::libc;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use nix::time::{ClockId, clock_gettime};

/// Bytes of a huge page.
pub const HUGE_BYTES: usize = 2 << 20;

/// The most that a quick huge page takes of its thread's time: what the same bytes take in small pages.
const QUICK: Duration = Duration::from_millis(1);

/// So many huge pages are made of small ones after a slow one, before the next is tried.
const SMALL: u32 = 64;

/// What [`is_quick`] takes at most.
pub const SAMPLE_MAX: usize = 64 << 20;

/// Chooses the pages of what is brought in next. For several threads.
#[derive(Debug, Default)]
pub struct Fresh {
    /// Huge pages that are still to be made of small ones.
    small: AtomicU32,
}

impl Fresh {
    /// Whether the next [`HUGE_BYTES`] are to be one huge page.
    pub fn next_is_huge(&self) -> bool {
        self.small.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err()
    }

    /// Brings the pages of a huge one in with `bring`, and remembers whether it was quick.
    ///
    /// # Errors
    /// Those of `bring`.
    pub fn bring_huge<T>(&self, bring: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        // The thread's own time: it may have to wait for a core.
        let before = thread_time();
        let brought = bring()?;
        self.took(thread_time().saturating_sub(before));
        Ok(brought)
    }

    fn took(&self, time: Duration) {
        if time > QUICK {
            self.small.store(SMALL, Ordering::Relaxed);
        }
    }
}

/// Whether huge pages for so many bytes would come quickly, as far as a sixteenth of them shows, [`SAMPLE_MAX`] at most. They are
/// taken and given back; free memory that was used last is handed out first, so what comes next gets the same. Also `false`
/// where there are none.
#[must_use]
pub fn is_quick(bytes: u64) -> bool {
    let sample = usize::try_from(bytes / 16).map_or(SAMPLE_MAX, |part| part.min(SAMPLE_MAX));
    let pages = sample.div_ceil(HUGE_BYTES).max(1);
    // One more, since they begin at a multiple of their length.
    let length = NonZeroUsize::new((pages + 1) * HUGE_BYTES).expect("at least two pages");
    let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new private mapping, whose only pointer stays in this function.
    let Ok(start) = (unsafe { mmap_anonymous(None, length, rights, MapFlags::MAP_PRIVATE) }) else {
        return false;
    };
    // SAFETY: it is the mapping made above, and advice changes no byte of it.
    let marked = unsafe { madvise(start, length.get(), MmapAdvise::MADV_HUGEPAGE) }.is_ok();
    let quick = marked && are_quick(start, pages);
    // SAFETY: the mapping made above, which nobody uses any more.
    let _ = unsafe { munmap(start, length.get()) };
    quick
}

fn are_quick(start: NonNull<libc::c_void>, pages: usize) -> bool {
    let first = start.as_ptr().cast::<u8>();
    let first = first.wrapping_add(first.align_offset(HUGE_BYTES));
    are_all_quick((0..pages).map(|page| {
        let before = thread_time();
        populate_at(first.wrapping_add(page * HUGE_BYTES), HUGE_BYTES)?;
        Ok(thread_time().saturating_sub(before))
    }))
}

/// By how long each huge page took. After the first slow one none is taken any more.
fn are_all_quick(mut took: impl Iterator<Item = io::Result<Duration>>) -> bool {
    took.all(|took| took.is_ok_and(|took| took <= QUICK))
}

/// Brings in the pages of a part of a mapping, as if each had been written, without changing them.
///
/// # Errors
/// `EFAULT` or `ENOMEM` where there is no room for them, `EINVAL` on Linux before 5.14.
pub fn populate(part: &mut [u8]) -> io::Result<()> {
    populate_at(part.as_mut_ptr(), part.len())
}

/// The same for memory that others may be writing.
pub(crate) fn populate_at(start: *mut u8, bytes: usize) -> io::Result<()> {
    // SAFETY: the kernel brings in pages of what is mapped there and changes no byte; where nothing is, it says so.
    let result = unsafe { libc::madvise(start.cast(), bytes, libc::MADV_POPULATE_WRITE) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes one huge page of the small ones of a part of a mapping that is marked for huge pages.
///
/// # Errors
/// `EINVAL` on Linux before 6.1 or where the part cannot have one; `ENOMEM`, `EBUSY`, `EAGAIN` where it has none now.
pub(crate) fn collapse_at(start: *mut u8, bytes: usize) -> io::Result<()> {
    // SAFETY: the kernel changes where bytes lie and none of them; where nothing is mapped, it says so.
    let result = unsafe { libc::madvise(start.cast(), bytes, libc::MADV_COLLAPSE) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_slow_huge_page_small_ones_are_taken_for_a_while() {
        let fresh = Fresh::default();
        assert!(fresh.next_is_huge());
        fresh.took(QUICK);
        assert!(fresh.next_is_huge());
        fresh.took(QUICK + Duration::from_nanos(1));
        let small = (0..SMALL).filter(|_| !fresh.next_is_huge()).count();
        assert_eq!(small, SMALL as usize);
        assert!(fresh.next_is_huge(), "one is tried again");
    }

    #[test]
    fn a_slow_huge_page_ends_the_sample() {
        let slow = QUICK + Duration::from_nanos(1);
        let mut taken = 0;
        let took = [Ok(QUICK), Ok(slow), Ok(QUICK)].into_iter().inspect(|_| taken += 1);
        assert!(!are_all_quick(took));
        assert_eq!(taken, 2);
        assert!(are_all_quick([Ok(QUICK), Ok(Duration::ZERO)].into_iter()));
        assert!(!are_all_quick([Ok(QUICK), Err(io::ErrorKind::OutOfMemory.into())].into_iter()));
    }

    #[test]
    fn what_is_brought_in_is_there_and_zero() {
        let mut area = vec![1_u8; 0];
        area.resize(HUGE_BYTES, 0);
        let fresh = Fresh::default();
        let start = area.as_ptr().align_offset(4096);
        let part = &mut area[start..start + (1 << 20)];
        match fresh.bring_huge(|| populate(part)) {
            Ok(()) => assert!(part.iter().all(|&byte| byte == 0)),
            // Linux before 5.14.
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EINVAL)),
        }
    }
}
