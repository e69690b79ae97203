//! The pager: fills a restored server's memory, before it runs or while it does.
//!
//! It plays the daemon of CRIU's lazy-pages protocol. Answers for every page that CRIU left out: each is put into place
//! once, with its content, or the replica does not live. It leaves to others where content comes from ([`Source`]), what
//! has to be put where ([`Plan`]) and what becomes of a replica whose pager gave up (the shim, [`Holder`]).
//!
//! ```text
//!  CRIU --userfaultfds--> run --duplicates, reports--> shim
//!                          |
//!             events, faults of each address space  (this thread: events.rs, fault.rs)
//!                          |
//!        faults > working set > background  (threads: engine.rs, fill.rs) <--chunks-- Source
//! ```
//!
//! **A dead pager is wrong data, not a hang**: when the last descriptor of a userfaultfd closes, missing pages read as
//! zeros. So the shim gets a duplicate of each before anything is served; a guard process, which the caller of [`run`]
//! starts first, shares the pager's table of descriptors and outlives it, since a forked child's userfaultfd exists
//! nowhere else between the read of its event and the sending of its duplicate; and after an error nothing is closed: the pager says `failed` and waits to be killed,
//! after the replica. If the shim is gone, the pager kills the tasks itself and waits until they are, before it ends.

mod behind;
mod control;
mod device;
mod eager;
mod engine;
mod error;
mod events;
mod fault;
mod fill;
mod pending;
mod plan;
mod ranges;
mod serve;
#[cfg(test)]
mod simulation;
mod source;
mod space;
mod stopped;
mod tasks;
mod userfault;
mod working_set;

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use control::{Command, Heard, Holder, Report};
pub use eager::Written;
pub use error::Error;
pub use pending::Piece;
pub use plan::{AtFork, Defect, ENTRIES_MAX, Mapping, PAGE, Plan, Run};
pub use serve::run;
pub use source::{Source, SourceError};
pub use tasks::Tasks;
pub use working_set::{EXTENTS_MAX, Extent, WorkingSet};

/// When memory is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// While the server runs; the background starts as soon as it does.
    Lazy,
    /// While the server runs; the background starts at [`Command::Fill`], until then only what is touched and the
    /// working set.
    LazyWhenTold,
    /// At [`Command::Fill`], all of it, while the tree is stopped (CRIU's `leave-stopped`).
    Eager,
}

/// How a pager works.
#[derive(Debug, Clone)]
pub struct Config {
    /// When memory is filled.
    pub mode: Mode,
    /// Threads that fill; one more serves faults only, one waits for events.
    pub threads: usize,
    /// Whether to record the working set. Faults then bring 64 KiB with them instead of a whole chunk.
    pub record: bool,
    /// What an earlier restore touched first: filled before the background.
    pub working_set: WorkingSet,
    /// Device memory, filled at [`Command::Stopped`].
    pub devices: Vec<Device>,
    /// Shared memory, filled at [`Command::Stopped`], before device memory.
    pub shared: Vec<Segment>,
    /// The replica's processes.
    pub tasks: Tasks,
    /// How long CRIU may take to connect, and again between two of its messages.
    pub criu_within: Duration,
    /// How long one chunk may take, whatever the source thinks.
    pub chunk_within: Duration,
}

/// What one task lacks.
#[derive(Debug, Clone)]
pub struct Task {
    /// Pid inside its pid namespace; names its content stream too.
    pub pid: u32,
    /// What to put where.
    pub plan: Arc<Plan>,
}

/// Device memory of a task. It lies in the task's own memory, in a stream of its own, and has to be there as a whole before
/// the driver is called: the driver pins it, and pinning a page that is absent under a userfaultfd fails instead of faulting.
#[derive(Debug, Clone)]
pub struct Device {
    /// Pid of the task inside its pid namespace.
    pub pid: u32,
    /// Names the content stream.
    pub stream: u32,
    /// What to put where.
    pub plan: Arc<Plan>,
    /// Zero pages that must be there.
    pub zeros: Vec<std::ops::Range<u64>>,
}

/// A segment of shared memory. No userfaultfd is registered for it, so all of it is written before anything runs.
#[derive(Debug, Clone)]
pub struct Segment {
    /// Pid, inside its pid namespace, of the task through whose mapping it is written.
    pub pid: u32,
    /// Names the content stream.
    pub stream: u32,
    /// What to put where.
    pub plan: Arc<Plan>,
}

/// What a pager did.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Summary {
    /// Address spaces filled, forked children included.
    pub spaces: u32,
    /// Faults on pages with content.
    pub faults: u64,
    /// Faults on pages without.
    pub zero_faults: u64,
    /// Bytes that faults brought in.
    pub fault_bytes: u64,
    /// Bytes of the working set that were put in before they were touched.
    pub working_set_bytes: u64,
    /// Bytes that the background put in.
    pub background_bytes: u64,
    /// Bytes written to the stopped tree.
    pub eager_bytes: u64,
    /// Bytes of device memory, zero pages included.
    pub device_bytes: u64,
    /// How long writing them took.
    pub device_us: u64,
    /// Bytes of shared memory.
    pub shared_bytes: u64,
    /// How long writing them took.
    pub shared_us: u64,
    /// From CRIU's connection to its last message: from then on the tasks can run.
    pub criu_us: u64,
    /// From there until all was in place.
    pub present_us: u64,
    /// Of that, the writing to the stopped tree.
    pub eager_us: u64,
}
