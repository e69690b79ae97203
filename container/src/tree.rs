//! A directory that goes from one replica to another: the root file system's delta, `/dev/shm`.
//!
//! [`scan`] lists a directory as a [`Tree`] (small, stored as the region's meta), [`Tree::read`] gives the content of its
//! files as one stream, [`Applier`] writes both into an empty directory; parts of the stream may arrive in any order from
//! several threads. The stream is the files' data extents, in order, each padded with zeros to a multiple of 4096 bytes;
//! holes of sparse files take no room in it.
//!
//! In the upper layer of an overlay, a character device 0:0 is a whiteout and `trusted.overlay.opaque` hides what lies
//! below a directory. Both are carried. Attributes that tie a file to its host's lower layer (`origin`, `nlink`, `impure`,
//! `uuid`) are left out; those that would point elsewhere (`redirect`, `metacopy`) are refused, and the overlay is mounted
//! so that it never writes them.
//!
//! A stored tree comes from outside: nothing in it can lead out of the directory it is applied to.

mod apply;
mod format;
mod read;
mod scan;

pub use apply::Applier;
pub use format::{Entry, Extent, Kind, Time, Tree, Xattr};
pub use read::Reader;
pub use scan::scan;

/// Extents are padded to this, the page size that the store cuts at.
pub const ALIGN: u64 = 4096;
