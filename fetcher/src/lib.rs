//! The fetcher: one process for each state folder that downloads, verifies and decodes for all restores, and the memory
//! in which the decoded content stays.
//!
//! ```text
//! rewarm restore (root) --requests, credentials--> keeper --one store, its credentials--> worker --network--> store
//!       |    ^                                       |  ^                                    |
//!       |    '----- read-only descriptors -----------'  '----- files of a folder, opened     |
//!       v                                                                                    |
//!     pagers --lease, wanted blocks--> keeper          decoded blocks --shared memory <------'
//! ```
//!
//! **The keeper** ([`keeper`]) holds the listening socket, the requests and the memory. It parses nothing that came from
//! a network, and runs as a user of its own whose only capability is to open files for reading: stores in folders that
//! only root may read are opened by it, file by file, below the folder that root named.
//! **A worker** ([`worker`]) is its child, one for each store and set of credentials: it has the network, no capability
//! and no other store's credentials. It writes decoded blocks into the keeper's memory and marks those that are
//! complete. If it dies, another one goes on: what is not marked is done again.
//!
//! What came over a network stays on disk as well ([`disk`]), as far as a limit goes; it outlives both.
//!
//! A [`Lease`] keeps a stream in memory. Streams that nobody holds stay as a cache, the least recently used leave first.

mod access;
mod broker;
mod cache;
mod client;
pub mod disk;
mod error;
mod fill;
pub mod keeper;
mod kept;
mod layout;
mod protocol;
mod start;
pub mod worker;
mod workers;

pub use access::Access;
pub use client::{Fetcher, Found, Lease, Presence, Status, Stream, StreamStatus};
pub use disk::DiskStatus;
pub use error::{Error, Kind, Result};
pub use layout::{BLOCK_BYTES, Layout};
pub use start::{DiskSettings, Settings};

/// User and group of the fetcher's processes: a number of its own, so that no other process can signal or trace them.
/// It lies in the range that Debian keeps free for such uses (60000 to 61183).
pub const USER: u32 = 60_871;
