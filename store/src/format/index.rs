//! Leaves of the index: which chunks make up a stretch of a region's stream, and where they lie.
//!
//! A leaf holds columns, not records: ids are random and everything else is small numbers. Lengths are counted in
//! pages, since every chunk is a whole number of them.

use prost::Message;
use uuid::Uuid;

use crate::codec::Codec;
use crate::digest::ChunkId;
use crate::error::Damage;
use crate::limits::{CHUNK_BYTES_LIMIT, LEAF_CHUNKS_LIMIT, PACK_BYTES_LIMIT, PAGE_BYTES};

/// Where a chunk lies and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Location {
    /// The pack.
    pub(crate) pack: Uuid,
    /// Offset in the pack, in bytes.
    pub(crate) offset: u64,
    /// Bytes that it takes there.
    pub(crate) stored: u32,
    /// Bytes of its content.
    pub(crate) raw: u32,
    pub(crate) codec: Codec,
}

/// A chunk of a region's stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChunkRef {
    pub(crate) id: ChunkId,
    /// Position of the pack in the boot object's table.
    pub(crate) pack: u32,
    pub(crate) offset: u64,
    pub(crate) stored: u32,
    pub(crate) raw: u32,
    pub(crate) codec: Codec,
}

/// The stored form of a leaf.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct LeafColumns {
    #[prost(bytes = "vec", tag = "1")]
    ids: Vec<u8>,
    #[prost(uint32, repeated, tag = "2")]
    packs: Vec<u32>,
    #[prost(uint32, repeated, tag = "3")]
    offsets: Vec<u32>,
    #[prost(uint32, repeated, tag = "4")]
    stored: Vec<u32>,
    #[prost(uint32, repeated, tag = "5")]
    pages: Vec<u32>,
    #[prost(bytes = "vec", tag = "6")]
    codecs: Vec<u8>,
}

/// Encodes at most [`LEAF_CHUNKS_LIMIT`] chunks as a leaf.
pub(crate) fn encode_leaf(chunks: &[ChunkRef]) -> Vec<u8> {
    assert!(chunks.len() as u64 <= LEAF_CHUNKS_LIMIT, "{} chunks in one leaf", chunks.len());
    let mut columns = LeafColumns::default();
    for chunk in chunks {
        columns.ids.extend_from_slice(chunk.id.as_bytes());
        columns.packs.push(chunk.pack);
        columns.offsets.push(u32::try_from(chunk.offset).expect("a pack is shorter than 4 GiB"));
        columns.stored.push(chunk.stored);
        columns.pages.push(chunk.raw / PAGE_BYTES as u32);
        columns.codecs.push(chunk.codec.id());
    }
    columns.encode_to_vec()
}

/// Decodes a leaf of `count` chunks whose packs are within a table of these lengths.
pub(crate) fn decode_leaf(bytes: &[u8], count: u64, pack_bytes: &[u64]) -> Result<Vec<ChunkRef>, Damage> {
    let columns = LeafColumns::decode(bytes)?;
    let lengths = [
        columns.ids.len() / 32,
        columns.packs.len(),
        columns.offsets.len(),
        columns.stored.len(),
        columns.pages.len(),
        columns.codecs.len(),
    ];
    for length in lengths {
        if length as u64 != count || columns.ids.len() % 32 != 0 {
            return Err(Damage::Bound {
                what: "chunks in a leaf's column",
                found: length as u64,
                limit: count,
            });
        }
    }
    (0..lengths[0]).map(|n| columns.chunk(n, pack_bytes)).collect()
}

impl LeafColumns {
    fn chunk(&self, n: usize, pack_bytes: &[u64]) -> Result<ChunkRef, Damage> {
        let id: [u8; 32] = self.ids[n * 32..][..32].try_into().expect("a slice of 32 bytes");
        let pages = u64::from(self.pages[n]);
        let bound = |what, found, limit| Err(Damage::Bound { what, found, limit });
        let Some(&pack) = pack_bytes.get(self.packs[n] as usize) else {
            return bound("pack of a chunk", u64::from(self.packs[n]), pack_bytes.len() as u64);
        };
        let end = u64::from(self.offsets[n]) + u64::from(self.stored[n]);
        if end > pack.min(PACK_BYTES_LIMIT) {
            return bound("end of a chunk in its pack", end, pack.min(PACK_BYTES_LIMIT));
        }
        if pages == 0 || pages > CHUNK_BYTES_LIMIT / PAGE_BYTES {
            return bound("pages of a chunk", pages, CHUNK_BYTES_LIMIT / PAGE_BYTES);
        }
        let Some(codec) = Codec::from_id(self.codecs[n]) else {
            return bound("codec of a chunk", u64::from(self.codecs[n]), 3);
        };
        Ok(ChunkRef {
            id: ChunkId(id),
            pack: self.packs[n],
            offset: u64::from(self.offsets[n]),
            stored: self.stored[n],
            raw: (pages * PAGE_BYTES) as u32,
            codec,
        })
    }
}
