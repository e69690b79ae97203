//! Where the content of pages comes from: chunks of each task's content stream, decoded and verified by somebody else.

use std::error::Error as StdError;
use std::ops::Range;

use super::working_set::Extent;

/// Why a chunk could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Its bytes are not those that were stored.
    #[error("chunk is damaged")]
    Damaged(#[source] Box<dyn StdError + Send + Sync>),
    /// It was given back ([`Source::release`]).
    #[error("chunk was given back")]
    Released,
    /// It could not be fetched in the time that its source allows itself, retries included.
    #[error("chunk cannot be fetched")]
    Gone(#[source] Box<dyn StdError + Send + Sync>),
}

/// The content streams of the tasks. The content stream of a task is its stored pages in order of address, cut into
/// chunks of whole pages; a chunk is fetched and decoded once and used for all pages in it.
///
/// Calls come from several threads at once, for different chunks as a rule.
pub trait Source: Send + Sync {
    /// The chunk that holds `offset` of the task's stream: a range of whole pages, in bytes, inside the stream.
    fn chunk(&self, task: u32, offset: u64) -> Range<u64>;

    /// Hands the whole chunk (a range that [`Source::chunk`] gave), verified, to `out`, which is called exactly once.
    ///
    /// The bytes are copied straight into the task: memory that other processes can change is no good place for them.
    ///
    /// # Errors
    /// The restore is given up for any error, so retries belong in here.
    fn read(&self, task: u32, chunk: Range<u64>, out: &mut dyn FnMut(&[u8])) -> Result<(), SourceError>;

    /// Whether [`Source::read`] of the chunk at `offset` would neither wait nor decode: then a fault is answered
    /// without a change of threads.
    fn is_near(&self, task: u32, offset: u64) -> bool {
        let _ = (task, offset);
        false
    }

    /// A thread of the task waits for the chunk at `offset`: a hint to fetch it before others.
    fn want(&self, task: u32, offset: u64) {
        let _ = (task, offset);
    }

    /// Nobody will ask for this part any more: its memory is free.
    fn release(&self, task: u32, part: Range<u64>) {
        let _ = (task, part);
    }

    /// Nobody needs anything any more: a [`Source::read`] that waits may end with any error.
    fn cease(&self) {}

    /// These parts are wanted first, in this order, and soon: a hint to fetch ahead.
    fn expect(&self, extents: &[Extent]) {
        let _ = extents;
    }
}
