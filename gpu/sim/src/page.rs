//! What caller and target share: one page in the target's memory.
//!
//! The page is a variable of this library. Both sides have the same library, so the caller knows how far from its load
//! address the page lies, and finds the load address in the target's maps. It reads and writes the page as a debugger does,
//! with the rights that this takes, and wakes the target's thread with a real-time signal. All of it survives CRIU and works
//! across namespaces.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64};

/// Marks a page that a target has set up, and the layout below.
pub const MAGIC: u64 = 0x5245_5741_524d_0002;
/// Most pairs of a device map.
pub const PAIRS_MAX: usize = 16;

/// An identity of a device.
pub type Uuid = [u8; 16];

/// A request and its answer, and the state.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct Page {
    /// [`MAGIC`] once the target has a context.
    pub magic: AtomicU64,
    /// The target's number in its own namespace: a forked child has a copy of the page but is not its owner.
    pub owner: AtomicI32,
    /// The restore thread's number in its own namespace.
    pub thread: AtomicI32,
    /// The driver's state of the process.
    pub state: AtomicU32,
    /// Set when a failure is of the kind that only the end of the process mends.
    pub broken: AtomicU32,
    /// How many requests were made.
    pub asked: AtomicU64,
    /// How many were carried out.
    pub done: AtomicU64,
    /// The step asked for: an index of [`STEPS`].
    pub step: AtomicU32,
    /// What shall go wrong: a [`crate::control::Fault`].
    pub fault: AtomicU32,
    /// How long a lock may wait.
    pub timeout_ms: AtomicU32,
    /// Pairs of the map.
    pub pair_count: AtomicU32,
    /// How fast memory is moved, in MiB a second; 0 for as fast as it goes.
    pub rate: AtomicU64,
    /// The result.
    pub result: AtomicU32,
    /// How often a restore found something else in the place of a device range.
    pub clobbered: AtomicU32,
    /// 1 where the caller moves the memory itself (custom storage).
    pub custom: AtomicU32,
    /// How many pieces of device memory are at the caller's disposal.
    pub piece_count: AtomicU32,
    /// Where they are listed: so many pieces in the target's memory.
    pub pieces: AtomicU64,
    /// The map.
    pub pairs: Pairs,
}

/// The map's cells; written by the caller while the target waits.
#[repr(transparent)]
#[derive(Debug)]
pub struct Pairs(pub UnsafeCell<[[Uuid; 2]; PAIRS_MAX]>);

// SAFETY: the target reads it only between a request and its answer, in which the caller does not write.
unsafe impl Sync for Pairs {}

const _: () = assert!(size_of::<Page>() == 4096);

/// Names of the steps.
pub const STEPS: [&str; 5] = ["lock", "checkpoint", "restore", "unlock", "complete"];

/// This process's page.
pub static PAGE: Page = Page {
    magic: AtomicU64::new(0),
    owner: AtomicI32::new(0),
    thread: AtomicI32::new(0),
    state: AtomicU32::new(0),
    broken: AtomicU32::new(0),
    asked: AtomicU64::new(0),
    done: AtomicU64::new(0),
    step: AtomicU32::new(0),
    fault: AtomicU32::new(0),
    timeout_ms: AtomicU32::new(0),
    pair_count: AtomicU32::new(0),
    rate: AtomicU64::new(0),
    result: AtomicU32::new(0),
    clobbered: AtomicU32::new(0),
    custom: AtomicU32::new(0),
    piece_count: AtomicU32::new(0),
    pieces: AtomicU64::new(0),
    pairs: Pairs(UnsafeCell::new([[[0; 16]; 2]; PAIRS_MAX])),
};

/// The signal that wakes a target's thread.
#[must_use]
pub fn wake_signal() -> libc::c_int {
    libc::SIGRTMIN() + 6
}
