//! How many heavy tests run at once, across threads and processes.
//!
//! A test runner may start one process for each test, so the count lives in locked files. The kernel gives a slot back
//! when its holder dies, however it dies.

use std::fs::{File, TryLockError};
use std::time::{Duration, Instant};

/// Heavy tests (servers with hundreds of megabytes) at a time. With more, the deadlines of the tests measure the load.
const HEAVY_MAX: usize = 2;
/// Longest wait for a slot; the whole run is shorter than that.
const WAIT_MAX: Duration = Duration::from_secs(900);
const POLL: Duration = Duration::from_millis(100);

/// A place among the heavy tests, given back on drop.
#[derive(Debug)]
pub struct Slot {
    _file: File,
}

/// Waits until fewer than two other heavy tests run.
///
/// # Panics
///
/// When no slot becomes free within a quarter of an hour, or the lock files cannot be made.
#[must_use]
pub fn heavy() -> Slot {
    let folder = std::env::temp_dir();
    let began = Instant::now();
    loop {
        for number in 0..HEAVY_MAX {
            let path = folder.join(format!("rewarm-test-slot-{number}"));
            let file = File::options().create(true).append(true).open(&path).expect("a lock file");
            match file.try_lock() {
                Ok(()) => return Slot { _file: file },
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => panic!("lock {}: {error}", path.display()),
            }
        }
        assert!(began.elapsed() < WAIT_MAX, "no slot for a heavy test within {WAIT_MAX:?}");
        std::thread::sleep(POLL);
    }
}
