//! The parsers of stored objects, for fuzzers outside this crate: what each takes from hostile bytes, as plain numbers.

use crate::codec::{self, Codec, Compression};
use crate::digest::ChunkId;
use crate::format::boot::{self, Leaf, LeafPlace, Root, RootRegion};
use crate::format::frame::HEADER_BYTES;
use crate::format::index::{ChunkRef, decode_leaf, encode_leaf};
use crate::format::manifest::RegionKind;
use crate::format::{manifest, tag};
use crate::limits;

/// Where a leaf says that a chunk lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeafChunk {
    /// Position of the pack in the boot object's table.
    pub pack: u32,
    /// Offset in the pack, in bytes.
    pub offset: u32,
    /// Bytes that it takes there.
    pub stored: u32,
    /// Pages of its content.
    pub pages: u32,
    /// Id of the codec.
    pub codec: u8,
}

/// Longest content of a chunk, in bytes.
pub const CHUNK_BYTES_LIMIT: u64 = limits::CHUNK_BYTES_LIMIT;
/// Most regions of a snapshot.
pub const REGIONS_LIMIT: u64 = limits::REGIONS_LIMIT;
/// Bytes in front of a boot object's content.
pub const BOOT_HEADER_BYTES: usize = HEADER_BYTES;

/// A leaf of these chunks; a codec that there is not is written as raw.
#[must_use]
pub fn leaf(chunks: &[LeafChunk]) -> Vec<u8> {
    let refs: Vec<ChunkRef> = chunks
        .iter()
        .map(|chunk| ChunkRef {
            id: ChunkId([chunk.codec; 32]),
            pack: chunk.pack,
            offset: u64::from(chunk.offset),
            stored: chunk.stored,
            raw: chunk.pages * limits::PAGE_BYTES as u32,
            codec: Codec::from_id(chunk.codec).unwrap_or(Codec::None),
        })
        .collect();
    encode_leaf(&refs)
}

/// What is taken from the bytes of a leaf that is said to have `count` chunks in packs of these lengths.
#[must_use]
pub fn read_leaf(bytes: &[u8], count: u64, packs: &[u64]) -> Option<Vec<LeafChunk>> {
    let refs = decode_leaf(bytes, count, packs).ok()?;
    let chunk = |chunk: ChunkRef| LeafChunk {
        pack: chunk.pack,
        offset: u32::try_from(chunk.offset).unwrap_or(u32::MAX),
        stored: chunk.stored,
        pages: chunk.raw / limits::PAGE_BYTES as u32,
        codec: chunk.codec.id(),
    };
    Some(refs.into_iter().map(chunk).collect())
}

/// The shape of a boot object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootShape {
    /// Lengths of its packs.
    pub packs: Vec<u64>,
    /// Length of its index object; 0 if it has none.
    pub index_bytes: u64,
    /// Bytes of each region and its leaves.
    pub regions: Vec<(u64, Vec<LeafShape>)>,
    /// Names of its skeleton's files with their lengths.
    pub files: Vec<(String, usize)>,
}

/// What a boot object says of a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeafShape {
    /// Its chunks.
    pub chunks: u64,
    /// Bytes of content.
    pub bytes: u64,
    /// Where it lies in the index object: offset and length; absent if it is inline.
    pub place: Option<(u64, u64)>,
}

/// A boot object of this shape, and the length of its content.
///
/// # Panics
/// If the shape exceeds what a boot object can hold.
#[must_use]
pub fn boot(shape: &BootShape) -> (Vec<u8>, u64) {
    let digest = crate::digest::Digest::of(b"leaf");
    let region = |(bytes, leaves): &(u64, Vec<LeafShape>)| RootRegion {
        kind: RegionKind::Task { pid: leaves.len() as u32 },
        meta: bytes::Bytes::from_static(b"meta"),
        bytes: *bytes,
        leaves: leaves
            .iter()
            .map(|leaf| Leaf {
                chunks: leaf.chunks,
                bytes: leaf.bytes,
                place: match leaf.place {
                    Some((offset, length)) => LeafPlace::Indexed { offset, length, digest },
                    None => LeafPlace::Inline(bytes::Bytes::from_static(b"leaf")),
                },
            })
            .collect(),
    };
    let root = Root {
        packs: shape.packs.iter().map(|bytes| (uuid::Uuid::nil(), *bytes)).collect(),
        regions: shape.regions.iter().map(region).collect(),
        skeleton: shape.files.iter().map(|(name, bytes)| (name.clone(), vec![0; *bytes].into())).collect(),
        index: (shape.index_bytes > 0).then_some((digest, shape.index_bytes)),
        session: None,
    };
    let (bytes, raw_bytes) = boot::encode(&root).expect("a small boot object");
    (bytes.to_vec(), raw_bytes)
}

/// What is taken from the bytes of a boot object whose content is said to have this length.
#[must_use]
pub fn read_boot(bytes: &[u8], raw_bytes: u64) -> Option<BootShape> {
    let root = boot::decode(bytes, raw_bytes, "store", "boot").ok()?;
    let leaf = |leaf: &Leaf| LeafShape {
        chunks: leaf.chunks,
        bytes: leaf.bytes,
        place: match leaf.place {
            LeafPlace::Inline(_) => None,
            LeafPlace::Indexed { offset, length, .. } => Some((offset, length)),
        },
    };
    Some(BootShape {
        packs: root.packs.iter().map(|(_, bytes)| *bytes).collect(),
        index_bytes: root.index.map_or(0, |(_, bytes)| bytes),
        regions: root
            .regions
            .iter()
            .map(|region| (region.bytes, region.leaves.iter().map(leaf).collect()))
            .collect(),
        files: root.skeleton.iter().map(|(name, bytes)| (name.clone(), bytes.len())).collect(),
    })
}

/// Number of regions and of signatures that are taken from the bytes of a manifest.
#[must_use]
pub fn read_manifest(bytes: &[u8]) -> Option<(usize, usize)> {
    let (manifest, seal) = manifest::decode(bytes, "store", "manifest").ok()?;
    Some((manifest.regions.len(), seal.signatures.len()))
}

/// Number of variants that are taken from the bytes of a tag's index object.
#[must_use]
pub fn read_tag(bytes: &[u8]) -> Option<usize> {
    Some(tag::decode(bytes, "store", "tag").ok()?.variants.len())
}

/// Whether these bytes decode to content of exactly this length. A codec that there is not decodes nothing.
#[must_use]
pub fn decodes(codec: u8, stored: &[u8], raw: &mut [u8]) -> bool {
    Codec::from_id(codec).is_some_and(|codec| codec::decode(codec, stored, raw).is_ok())
}

/// Content in the stored form of a codec, if it becomes shorter by it.
#[must_use]
pub fn encoded(codec: u8, content: &[u8]) -> Option<Vec<u8>> {
    let compression = match codec {
        2 => Compression::Zstd(1),
        3 => Compression::Planes,
        _ => return None,
    };
    let (_, stored) = codec::encode(compression, 1, &[bytes::Bytes::copy_from_slice(content)]);
    stored.map(Vec::from)
}
