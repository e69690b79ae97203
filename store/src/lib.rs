//! The snapshot format and where it lies: chunk, pack, index, manifest, tags.
//!
//! Answers for what a store holds and for every byte on its way there and back; it knows nothing of CRIU, of containers
//! or of what a region's content means. A [`Store`] is opened by its [`StoreUrl`]; a [`Session`] writes a snapshot and
//! makes it visible with its last step; a [`Snapshot`] reads one and gives out nothing that was not checked.

mod cache;
mod chunk;
mod codec;
mod collect;
mod copy;
mod digest;
mod error;
#[cfg(feature = "testing")]
pub mod fault;
mod files;
pub mod format;
mod keys;
mod lease;
mod limits;
mod objects;
#[cfg(feature = "testing")]
pub mod parsers;
mod reader;
mod remove;
mod signature;
mod store;
mod url;
mod working_sets;
mod writer;

pub use cache::PackCache;
pub use codec::Compression;
pub use collect::{Collect, Collected, Count};
pub use copy::Copied;
pub use digest::{ChunkId, Digest, DigestSyntax};
pub use error::{Damage, Error, Result, Syntax};
pub use files::{Files, Folder};
pub use format::manifest::{
    Cpu, Facts, Hooks, HostFile, Manifest, Memory, RegionKind, Seal, SharedMemory, Signature, TaskMemory,
    Totals,
};
pub use format::working_set::WorkingSet;
pub use format::{FORMAT, FORMAT_NEWEST};
pub use keys::{KeyError, KeyFolder, ListedKey};
pub use limits::{PAGE_BYTES, SKELETON_FILE_BYTES_LIMIT};
pub use reader::{
    Boot, Chunk, ChunkMap, Chunks, Comparison, Fetched, Found, Hedges, Region, RegionComparison, RegionSide,
    Request, Room, Sink, Snapshot, Verified, compare,
};
pub use remove::Removed;
pub use signature::{KeySyntax, Mistrust, PublicKey, SigningKey, Trust};
pub use store::{Listed, Store, Usage};
pub use url::{DEFAULT_TAG, Name, Reference, StoreUrl, Target};
pub use writer::{Published, RegionWriter, Session, SessionOptions};
