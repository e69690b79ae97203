//! Packs: chunks one after another, and a footer by which a pack explains itself.
//!
//! ```text
//! | header 16 | chunk | chunk | ... | footer (protobuf) | length u32 LE | BLAKE3 of footer, 32 | "RWRMPEND" |
//! ```
//!
//! A restore never reads the footer: the index says where each chunk lies. It is there to rebuild an index and for gc.

use prost::Message;
use uuid::Uuid;

use crate::digest::ChunkId;
use crate::error::Damage;
use crate::format::index::{ChunkRef, Location, decode_leaf, encode_leaf};
use crate::limits::LEAF_CHUNKS_LIMIT;

const END_MAGIC: &[u8; 8] = b"RWRMPEND";
/// Length, digest and magic at the end of a pack.
pub(crate) const TRAILER_BYTES: usize = 4 + 32 + 8;

/// The chunks of a pack, as leaves whose pack number is 0.
#[derive(Clone, PartialEq, Eq, Message)]
struct Footer {
    #[prost(uint64, repeated, tag = "1")]
    counts: Vec<u64>,
    #[prost(bytes = "vec", repeated, tag = "2")]
    leaves: Vec<Vec<u8>>,
}

/// Footer and trailer of a pack that holds these chunks.
pub(crate) fn ending(chunks: &[(ChunkId, Location)]) -> Vec<u8> {
    let mut footer = Footer::default();
    for part in chunks.chunks(LEAF_CHUNKS_LIMIT as usize) {
        let refs: Vec<ChunkRef> = part.iter().map(|(id, location)| location.with(*id, 0)).collect();
        footer.counts.push(refs.len() as u64);
        footer.leaves.push(encode_leaf(&refs));
    }
    let mut out = footer.encode_to_vec();
    let length = u32::try_from(out.len()).expect("a footer is shorter than its pack");
    let digest = blake3::hash(&out);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(digest.as_bytes());
    out.extend_from_slice(END_MAGIC);
    out
}

/// The chunks that a whole pack's footer lists.
pub(crate) fn read_ending(id: Uuid, pack: &[u8]) -> Result<Vec<(ChunkId, Location)>, Damage> {
    let short = || Damage::Length { found: pack.len() as u64, expected: TRAILER_BYTES as u64 };
    let (rest, trailer) = pack.split_last_chunk::<TRAILER_BYTES>().ok_or_else(short)?;
    if trailer[36..] != END_MAGIC[..] {
        return Err(Damage::Frame {
            what: "magic at the end",
            found: trailer[36..].escape_ascii().to_string(),
            expected: END_MAGIC.escape_ascii().to_string(),
        });
    }
    let length = u32::from_le_bytes([trailer[0], trailer[1], trailer[2], trailer[3]]) as usize;
    if length > rest.len() {
        let (found, limit) = (length as u64, rest.len() as u64);
        return Err(Damage::Bound { what: "length of the footer", found, limit });
    }
    let bytes = &rest[rest.len() - length..];
    let digest = blake3::hash(bytes);
    if digest.as_bytes()[..] != trailer[4..36] {
        let expected = trailer[4..36].iter().map(|b| format!("{b:02x}")).collect();
        return Err(Damage::Digest { found: digest.to_hex().to_string(), expected });
    }
    let footer = Footer::decode(bytes)?;
    if footer.counts.len() != footer.leaves.len() {
        let (found, limit) = (footer.counts.len() as u64, footer.leaves.len() as u64);
        return Err(Damage::Bound { what: "leaves of the footer", found, limit });
    }
    let mut chunks = Vec::new();
    for (&count, leaf) in footer.counts.iter().zip(&footer.leaves) {
        let refs = decode_leaf(leaf, count, &[pack.len() as u64])?;
        chunks.extend(refs.iter().map(|chunk| (chunk.id, chunk.location(id))));
    }
    Ok(chunks)
}

impl Location {
    /// The chunk `id` at this location, whose pack has this number in the table.
    pub(crate) fn with(self, id: ChunkId, pack: u32) -> ChunkRef {
        ChunkRef { id, pack, offset: self.offset, stored: self.stored, raw: self.raw, codec: self.codec }
    }
}

impl ChunkRef {
    /// Where the chunk lies, whose pack is this one.
    pub(crate) fn location(&self, pack: Uuid) -> Location {
        Location { pack, offset: self.offset, stored: self.stored, raw: self.raw, codec: self.codec }
    }
}
