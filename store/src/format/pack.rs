//! Packs: chunks one after another, and a footer by which a pack explains itself.
//!
//! ```text
//! | header 16 | chunk | chunk | ... | footer (protobuf) | length u32 LE | BLAKE3 of footer, 32 | "RWRMPEND" |
//! ```
//!
//! A restore never reads the footer: the index says where each chunk lies. It is there to rebuild an index and for gc.

use prost::Message;
use uuid::Uuid;

use crate::digest::{ChunkId, Digest};
use crate::error::Damage;
use crate::format::frame::HEADER_BYTES;
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

/// Length of the footer that a pack's last [`TRAILER_BYTES`] announce, and its digest. The pack has `pack_bytes`.
pub(crate) fn read_trailer(trailer: &[u8], pack_bytes: u64) -> Result<(u64, [u8; 32]), Damage> {
    let Ok(trailer) = <&[u8; TRAILER_BYTES]>::try_from(trailer) else {
        return Err(Damage::Length { found: trailer.len() as u64, expected: TRAILER_BYTES as u64 });
    };
    if trailer[36..] != END_MAGIC[..] {
        return Err(Damage::Frame {
            what: "magic at the end",
            found: trailer[36..].escape_ascii().to_string(),
            expected: END_MAGIC.escape_ascii().to_string(),
        });
    }
    let length = u64::from(u32::from_le_bytes([trailer[0], trailer[1], trailer[2], trailer[3]]));
    let limit = pack_bytes.saturating_sub((HEADER_BYTES + TRAILER_BYTES) as u64);
    if length > limit {
        return Err(Damage::Bound { what: "length of the footer", found: length, limit });
    }
    let mut digest = [0; 32];
    digest.copy_from_slice(&trailer[4..36]);
    Ok((length, digest))
}

/// The chunks that a footer with this digest lists.
pub(crate) fn read_footer(
    id: Uuid,
    footer: &[u8],
    digest: [u8; 32],
    pack_bytes: u64,
) -> Result<Vec<(ChunkId, Location)>, Damage> {
    let (found, expected) = (Digest::of(footer), Digest::from_bytes(digest));
    if found != expected {
        return Err(Damage::Digest { found: found.to_string(), expected: expected.to_string() });
    }
    let footer = Footer::decode(footer)?;
    if footer.counts.len() != footer.leaves.len() {
        let (found, limit) = (footer.counts.len() as u64, footer.leaves.len() as u64);
        return Err(Damage::Bound { what: "leaves of the footer", found, limit });
    }
    let mut chunks = Vec::new();
    for (&count, leaf) in footer.counts.iter().zip(&footer.leaves) {
        let refs = decode_leaf(leaf, count, &[pack_bytes])?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Codec;

    #[test]
    fn a_footer_reads_back_from_the_end_of_its_pack() {
        let pack = Uuid::from_u128(7);
        let at = |n: u64| Location { pack, offset: 16 + n * 10, stored: 10, raw: 4096, codec: Codec::Lz4 };
        let chunks: Vec<_> = (0..5000).map(|n| (ChunkId([n as u8; 32]), at(n))).collect();
        let ending = ending(&chunks);
        let bytes = 16 + 5000 * 10 + ending.len() as u64;
        let (footer, trailer) = ending.split_at(ending.len() - TRAILER_BYTES);
        let (length, digest) = read_trailer(trailer, bytes).unwrap();
        assert_eq!(length, footer.len() as u64);
        assert_eq!(read_footer(pack, footer, digest, bytes).unwrap(), chunks);
        assert!(matches!(read_footer(pack, &footer[1..], digest, bytes), Err(Damage::Digest { .. })));
        assert!(matches!(read_trailer(trailer, 100), Err(Damage::Bound { .. })));
        assert!(matches!(read_trailer(&trailer[1..], bytes), Err(Damage::Length { .. })));
    }
}
