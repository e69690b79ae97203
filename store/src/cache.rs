//! Copies of packs on this machine, in which a reader looks before it asks the store.

use std::fmt;
use std::ops::Range;

use uuid::Uuid;

/// Keeps parts of packs where they can be read sooner than from the store. Calls block.
///
/// What it gives is checked like what the store gives: a copy that is damaged costs a request to the store and is
/// written anew.
pub trait PackCache: fmt::Debug + Send + Sync {
    /// A part of a pack of this length, if all of it may be there.
    fn read(&self, pack: Uuid, bytes: u64, range: Range<u64>) -> Option<Vec<u8>>;

    /// Keeps a part that was read from the store and checked. Failing to is no error: it is read from the store again.
    fn keep(&self, pack: Uuid, bytes: u64, offset: u64, content: &[u8]);
}
