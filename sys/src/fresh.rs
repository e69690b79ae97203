//! Fresh memory, brought in before it is written: in huge pages while those come quickly.
//!
//! A huge page costs less to bring in than 512 small ones (measured 0.17 s against 0.4-0.5 s a GiB), unless the memory is not
//! there: the host of a virtual machine takes free blocks back that are at least as large as a huge page (free page reporting),
//! and gives them again at 2.2-2.7 s a GiB. Small pages come from smaller blocks first, which it never took. So the time of
//! each huge page is looked at, and after a slow one small pages are taken for a while.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::libc;
use nix::time::{ClockId, clock_gettime};

/// Bytes of a huge page.
pub const HUGE_BYTES: usize = 2 << 20;

/// The most that a quick huge page takes of its thread's time: what the same bytes take in small pages.
const QUICK: Duration = Duration::from_millis(1);

/// So many huge pages are made of small ones after a slow one, before the next is tried; after another slow one twice as many, up to
/// [`SMALL_MAX`], and for each quick one that is tried one less again. A slow one took 2.5 to 14 ms where this was measured.
const SMALL: u32 = 64;

/// See [`SMALL`].
const SMALL_MAX: u32 = 512;

/// Chooses the pages of what is brought in next. For several threads.
#[derive(Debug, Default)]
pub struct Fresh {
    /// Huge pages that are still to be made of small ones.
    small: AtomicU32,
    /// What is added to [`SMALL`] after the next slow one.
    more: AtomicU32,
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

    /// Whether small pages are taken, since the last huge one was slow.
    pub fn is_slow(&self) -> bool {
        self.small.load(Ordering::Relaxed) > 0
    }

    fn took(&self, time: Duration) {
        let more = self.more.load(Ordering::Relaxed);
        if time <= QUICK {
            self.more.store(more.saturating_sub(1), Ordering::Relaxed);
        } else if self.small.compare_exchange(0, SMALL + more, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            // Of several threads that met the same only the first counts.
            self.more.store((SMALL + 2 * more).min(SMALL_MAX - SMALL), Ordering::Relaxed);
        }
    }
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

    const SLOW: Duration = Duration::from_millis(2);

    #[test]
    fn after_a_slow_huge_page_small_ones_are_taken_for_a_while() {
        let fresh = Fresh::default();
        assert!(fresh.next_is_huge());
        fresh.took(QUICK);
        assert!(fresh.next_is_huge() && !fresh.is_slow());
        let small_after = |slow: u32| {
            (0..slow).for_each(|_| fresh.took(SLOW));
            assert!(fresh.is_slow());
            let small = std::iter::repeat_with(|| fresh.next_is_huge()).take_while(|huge| !huge).count();
            assert!(!fresh.is_slow(), "one is tried again");
            small
        };
        // Each time twice as many, up to a limit, however many threads met the slow one.
        assert_eq!([1, 2, 1, 1, 1].map(small_after), [64, 128, 256, 512, 512]);
        (0..448).for_each(|_| fresh.took(QUICK));
        assert_eq!(small_after(1), 64);
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
