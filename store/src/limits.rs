//! Every size, count and wait of this crate, with its reason.
//!
//! The first group is part of the format: a reader refuses what exceeds it before it takes memory. The others may be
//! changed at any time.

use std::time::Duration;

pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;

/// The unit of every content stream: the page of all architectures that CRIU restores lazily.
pub const PAGE_BYTES: u64 = 4 * KIB;

// The format.

/// Longest chunk that a reader decodes. Cutting may use less.
pub(crate) const CHUNK_BYTES_LIMIT: u64 = 4 * MIB;
/// A pack is closed before it would exceed this.
pub(crate) const PACK_BYTES_LIMIT: u64 = 64 * MIB;
/// Longest manifest: facts of a thousand host files and a probe's answers fit many times over.
pub(crate) const MANIFEST_BYTES_LIMIT: u64 = 16 * MIB;
/// Longest index object of a tag.
pub(crate) const TAG_BYTES_LIMIT: u64 = MIB;
/// Longest boot object, stored and decoded: CRIU's small images of 65,000 mappings take about 10 MiB.
pub(crate) const BOOT_BYTES_LIMIT: u64 = 256 * MIB;
/// Longest leaf of the index, 4,096 chunks of about 50 bytes each with room to spare.
pub(crate) const LEAF_BYTES_LIMIT: u64 = MIB;
/// Longest index object: leaves of 64 TiB.
pub(crate) const INDEX_BYTES_LIMIT: u64 = 16 << 30;
/// Most chunks in one leaf: about one GiB of content.
pub(crate) const LEAF_CHUNKS_LIMIT: u64 = 4096;
/// Most regions of a snapshot: one for each task or shared memory of the largest process tree that is sensible.
pub(crate) const REGIONS_LIMIT: u64 = 65_536;
/// Most leaves of a snapshot: every region may end with a short one.
pub(crate) const LEAVES_LIMIT: u64 = (CONTENT_BYTES_LIMIT >> 30) + REGIONS_LIMIT;
/// Most files of a skeleton: a few for each task of the largest process tree.
pub(crate) const SKELETON_FILES_LIMIT: u64 = 1 << 20;
/// Most packs that one snapshot may refer to: 16 TiB at the smallest size of a full pack.
pub(crate) const PACKS_LIMIT: u64 = 1 << 20;
/// Most bytes of content in one snapshot. Above it a sum of lengths could not be trusted to fit.
pub(crate) const CONTENT_BYTES_LIMIT: u64 = 1 << 46;
/// Longest file of the skeleton. What is longer is a region.
pub const SKELETON_FILE_BYTES_LIMIT: u64 = 64 * MIB;
/// Most extents of a working set: at 64 KiB each they are 12 GiB of scattered pages.
pub(crate) const EXTENTS_LIMIT: usize = 200_000;
/// Longest working set: its extents at 40 digits each.
pub(crate) const WORKING_SET_BYTES_LIMIT: u64 = 16 * MIB;
/// Most variants under one tag.
pub(crate) const VARIANTS_LIMIT: usize = 256;

// Cutting.

/// A cut is not considered before this: smaller chunks cost more index and more calls than they save.
pub(crate) const CHUNK_BYTES_MIN: u64 = 64 * KIB;
/// Mean length of a chunk in random content.
pub(crate) const CHUNK_BYTES_MEAN: u64 = 256 * KIB;
/// A cut is forced here: the price of one fault is at most the decoding of this much.
pub(crate) const CHUNK_BYTES_MAX: u64 = MIB;
/// The same three where pages look like a heap. Of those a server changes a few here and there (of 254 MiB 3 % in its first
/// 100 requests, in a thousand places), and a changed page brings its whole chunk.
pub(crate) const HEAP_CHUNK_BYTES_MIN: u64 = 8 * KIB;
/// Mean length of a chunk where pages look like a heap. Half of it would save a quarter of what is new and double the index.
pub(crate) const HEAP_CHUNK_BYTES_MEAN: u64 = 32 * KIB;
/// Longest chunk that ends where pages look like a heap.
pub(crate) const HEAP_CHUNK_BYTES_MAX: u64 = 128 * KIB;

// Writing.

/// A pack is closed when it reaches this.
pub(crate) const PACK_BYTES_TARGET: u64 = 32 * MIB;
/// Parts of a multipart upload. All but the last must be equal and at least 5 MiB (S3, R2).
pub(crate) const PART_BYTES: u64 = 8 * MIB;
/// Parts that are sent at the same time.
pub(crate) const PARTS_IN_FLIGHT: usize = 8;
/// Content that a session holds at the same time: four packs that wait for the store and four that are made.
pub(crate) const SESSION_MEMORY_BYTES: u64 = 256 * MIB;
/// What a session needs at least: a pack that waits for the store, one that is made, and content on its way.
pub(crate) const SESSION_MEMORY_BYTES_MIN: u64 = 2 * PACK_BYTES_TARGET + 8 * BATCH_BYTES;
/// Content that is hashed and compressed in one go by a worker: hides the cost of handing it over.
pub(crate) const BATCH_BYTES: u64 = MIB;
/// Batches that may wait in order for the packer; memory is limited by [`SESSION_MEMORY_BYTES`].
pub(crate) const BATCHES_QUEUED: usize = 1024;
/// Leaves up to this together lie in the boot object and cost no further round trip: about 10 GiB of content.
pub(crate) const INLINE_LEAVES_BYTES: u64 = 2 * MIB;

// Reuse of what is in the store.

/// Snapshots whose chunks a new one may reuse: the newest of its own name first.
pub(crate) const REUSE_SNAPSHOTS: usize = 16;
/// Chunks of other snapshots that a session remembers, about 100 bytes each.
pub(crate) const REUSE_CHUNKS: usize = 1 << 20;
/// One more range of old packs is allowed for this much content: 128 for a GiB.
pub(crate) const BYTES_PER_RANGE: u64 = 8 * MIB;
/// Ranges that a region may use whatever its length, so that small regions are deduplicated too.
pub(crate) const RANGES_FREE: u64 = 16;

// Reading.

/// Bytes between two wanted ranges that are read along rather than asked for separately.
pub(crate) const GAP_BYTES: u64 = 512 * KIB;
/// A request is closed when it reaches this.
pub(crate) const REQUEST_BYTES: u64 = 8 * MIB;
/// Content that is verified, decoded and put in one go by a worker.
pub(crate) const DECODE_BYTES: u64 = 2 * MIB;
/// A request is asked a second time when it takes so many times as long as the slow ones of those that were answered.
pub(crate) const HEDGE_FACTOR: u32 = 3;
/// And not before this: a round trip over any network fits in, with a lost packet sent again.
pub(crate) const HEDGE_WAIT_MIN: Duration = Duration::from_millis(500);
/// So many answers of about its length must have come: nothing else tells a lost request from a slow store.
pub(crate) const HEDGE_ANSWERS_MIN: usize = 3;
/// So many answers are remembered, the last ones.
pub(crate) const HEDGE_ANSWERS: usize = 64;
/// One part of so many may be asked for twice: a store that is overloaded must not get more to do.
pub(crate) const HEDGE_BUDGET_PARTS: u64 = 20;
/// How often a request that is under way looks whether it is late.
pub(crate) const HEDGE_LOOK: Duration = Duration::from_millis(100);

// Requests.

/// Attempts for one request, the client library's own two included in each.
pub(crate) const ATTEMPTS: u32 = 5;
/// Wait before the second attempt; doubles from there, plus or minus a quarter.
pub(crate) const BACKOFF: Duration = Duration::from_millis(100);
/// Longest wait between two attempts.
pub(crate) const BACKOFF_MAX: Duration = Duration::from_secs(3);
/// Nobody answers a connection after this.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// No byte arrives for this long.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// One request with its body: a part at 50 kB/s takes 170 s.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(600);
/// An announcement that was not renewed for this long belongs to somebody who died.
pub(crate) const LEASE: Duration = Duration::from_secs(15 * 60);
/// Time between two renewals of an announcement.
pub(crate) const RENEW_EVERY: Duration = Duration::from_secs(60);
/// How far two times of one store may be wrong against each other: S3 tells whole seconds.
pub(crate) const CLOCK_GRAIN: Duration = Duration::from_secs(2);
/// A claim on a tag that is older than this was left behind by a crash.
pub(crate) const CLAIM_AGE_MAX: Duration = Duration::from_secs(60);

const _: () = assert!(CHUNK_BYTES_MIN < CHUNK_BYTES_MEAN && CHUNK_BYTES_MEAN < CHUNK_BYTES_MAX);
const _: () = assert!(CHUNK_BYTES_MAX <= CHUNK_BYTES_LIMIT);
const _: () = assert!(HEAP_CHUNK_BYTES_MIN < HEAP_CHUNK_BYTES_MEAN);
const _: () =
    assert!(HEAP_CHUNK_BYTES_MEAN < HEAP_CHUNK_BYTES_MAX && HEAP_CHUNK_BYTES_MAX <= CHUNK_BYTES_MAX);
const _: () = assert!(PACK_BYTES_TARGET + CHUNK_BYTES_LIMIT < PACK_BYTES_LIMIT);
const _: () = assert!(SESSION_MEMORY_BYTES >= SESSION_MEMORY_BYTES_MIN);
const _: () = assert!(LEAF_CHUNKS_LIMIT * 64 <= LEAF_BYTES_LIMIT);
const _: () = assert!(INLINE_LEAVES_BYTES + SKELETON_FILE_BYTES_LIMIT < BOOT_BYTES_LIMIT);
