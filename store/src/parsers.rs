//! The parsers of stored objects, for fuzzers outside this crate: what each takes from hostile bytes, as plain numbers; and
//! boot objects as a forger would write them, for tests of those who read them.

use std::collections::BTreeMap;

use crate::codec::{self, Codec, Compression};
use crate::digest::ChunkId;
use crate::format::boot::{self, Leaf, LeafPlace, Root, RootRegion};
use crate::format::frame::HEADER_BYTES;
use crate::format::index::{ChunkRef, decode_leaf, encode_leaf};
use crate::format::manifest::RegionKind;
use crate::format::{manifest, pack_path, tag};
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
    let refs: Vec<ChunkRef> =
        chunks.iter().map(|chunk| chunk_ref(ChunkId([chunk.codec; 32]), chunk)).collect();
    encode_leaf(&refs)
}

fn chunk_ref(id: ChunkId, chunk: &LeafChunk) -> ChunkRef {
    ChunkRef {
        id,
        pack: chunk.pack,
        offset: u64::from(chunk.offset),
        stored: chunk.stored,
        raw: chunk.pages * limits::PAGE_BYTES as u32,
        codec: Codec::from_id(chunk.codec).unwrap_or(Codec::None),
    }
}

fn leaf_chunk(chunk: &ChunkRef) -> LeafChunk {
    LeafChunk {
        pack: chunk.pack,
        offset: u32::try_from(chunk.offset).unwrap_or(u32::MAX),
        stored: chunk.stored,
        pages: chunk.raw / limits::PAGE_BYTES as u32,
        codec: chunk.codec.id(),
    }
}

/// What is taken from the bytes of a leaf that is said to have `count` chunks in packs of these lengths.
#[must_use]
pub fn read_leaf(bytes: &[u8], count: u64, packs: &[u64]) -> Option<Vec<LeafChunk>> {
    let refs = decode_leaf(bytes, count, packs).ok()?;
    Some(refs.iter().map(leaf_chunk).collect())
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

/// The boot object, and the length of its content, that a forger makes of another one whose leaves are all inline: `forge`
/// is given the name of a pack's object and the longest chunk in it, to change it.
///
/// # Panics
/// If it is no such boot object.
#[must_use]
pub fn forged_chunk(
    bytes: &[u8],
    raw_bytes: u64,
    forge: impl FnOnce(&str, &mut LeafChunk),
) -> (Vec<u8>, u64) {
    let mut root = boot::decode(bytes, raw_bytes, "store", "boot").expect("a boot object");
    let lengths: Vec<u64> = root.packs.iter().map(|(_, bytes)| *bytes).collect();
    let mut leaves: Vec<&mut Leaf> = root.regions.iter_mut().flat_map(|region| &mut region.leaves).collect();
    let mut read: Vec<Vec<ChunkRef>> = leaves
        .iter()
        .map(|leaf| match &leaf.place {
            LeafPlace::Inline(bytes) => decode_leaf(bytes, leaf.chunks, &lengths).expect("a leaf"),
            LeafPlace::Indexed { .. } => panic!("a leaf in an index object"),
        })
        .collect();
    let longest = read.iter_mut().flatten().max_by_key(|chunk| chunk.stored).expect("content");
    let mut forged = leaf_chunk(longest);
    forge(pack_path(root.packs[longest.pack as usize].0).as_ref(), &mut forged);
    *longest = chunk_ref(longest.id, &forged);
    for (leaf, chunks) in leaves.iter_mut().zip(&read) {
        leaf.bytes = chunks.iter().map(|chunk| u64::from(chunk.raw)).sum();
        leaf.place = LeafPlace::Inline(encode_leaf(chunks).into());
    }
    encode(root)
}

/// The same with a leaf, and so a region, that claims to have so many bytes.
///
/// # Panics
/// If it is no boot object with content.
#[must_use]
pub fn forged_length(bytes: &[u8], raw_bytes: u64, claimed: u64) -> (Vec<u8>, u64) {
    let mut root = boot::decode(bytes, raw_bytes, "store", "boot").expect("a boot object");
    let leaf = root.regions.iter_mut().find_map(|region| region.leaves.first_mut()).expect("content");
    leaf.bytes = claimed;
    encode(root)
}

/// The same with other files in the skeleton: `forge` is given them by name, to change them.
///
/// # Panics
/// If it is no boot object.
#[must_use]
pub fn forged_files(
    bytes: &[u8],
    raw_bytes: u64,
    forge: impl FnOnce(&mut BTreeMap<String, Vec<u8>>),
) -> (Vec<u8>, u64) {
    let mut root = boot::decode(bytes, raw_bytes, "store", "boot").expect("a boot object");
    let mut files = root.skeleton.iter().map(|(name, bytes)| (name.clone(), bytes.to_vec())).collect();
    forge(&mut files);
    root.skeleton = files.into_iter().map(|(name, bytes)| (name, bytes.into())).collect();
    encode(root)
}

/// The same with another opaque part of the longest region.
///
/// # Panics
/// If it is no boot object with content.
#[must_use]
pub fn forged_meta(bytes: &[u8], raw_bytes: u64, meta: Vec<u8>) -> (Vec<u8>, u64) {
    let mut root = boot::decode(bytes, raw_bytes, "store", "boot").expect("a boot object");
    root.regions.iter_mut().max_by_key(|region| region.bytes).expect("content").meta = meta.into();
    encode(root)
}

fn encode(mut root: Root) -> (Vec<u8>, u64) {
    for region in &mut root.regions {
        region.bytes = region.leaves.iter().map(|leaf| leaf.bytes).sum();
    }
    let (bytes, raw_bytes) = boot::encode(&root).expect("a small boot object");
    (bytes.to_vec(), raw_bytes)
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
