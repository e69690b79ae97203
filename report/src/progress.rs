//! What a caller may draw while an operation runs.

use crate::stage::{Stage, Timing};

/// Receives the progress of an operation. All methods do nothing by default; they may be called from any thread.
pub trait Progress: Send + Sync {
    /// A stage began.
    fn started(&self, _stage: Stage) {}
    /// A stage ended, well or badly.
    fn finished(&self, _timing: Timing) {}
    /// `done` of `total` bytes of a stage are through; `total` is absent while it is not known.
    fn bytes(&self, _stage: Stage, _done: u64, _total: Option<u64>) {}
    /// Something that a person should read but that stops nothing.
    fn warning(&self, _text: &str) {}
}

/// Progress that nobody watches.
#[derive(Debug, Clone, Copy, Default)]
pub struct Hidden;

impl Progress for Hidden {}
