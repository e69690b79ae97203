//! The chunks of a region: which stretch of the stream each covers, for random access.

use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, stream};

use crate::digest::Digest;
use crate::error::{Damage, Result};
use crate::format::boot::{Leaf, LeafPlace};
use crate::format::index::{ChunkRef, decode_leaf};
use crate::format::index_path;
use crate::objects::Objects;
use crate::reader::Boot;

/// Leaves that are read at the same time.
const LEAVES_IN_FLIGHT: usize = 16;

/// A chunk of a region's stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Where it begins in the stream, in bytes.
    pub offset: u64,
    /// Its length, in bytes.
    pub bytes: u32,
}

/// All chunks of a region, in the order of the stream.
#[derive(Debug, Default)]
pub struct ChunkMap {
    refs: Vec<ChunkRef>,
    /// Where each chunk begins.
    offsets: Vec<u64>,
}

impl ChunkMap {
    /// Number of chunks.
    #[must_use]
    pub fn len(&self) -> usize {
        self.refs.len()
    }

    /// Whether the region is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.refs.is_empty()
    }

    /// Chunk number `n`.
    #[must_use]
    pub fn get(&self, n: usize) -> Option<Chunk> {
        Some(Chunk { offset: *self.offsets.get(n)?, bytes: self.refs.get(n)?.raw })
    }

    /// Number of the chunk that holds the byte at `offset` of the stream.
    #[must_use]
    pub fn at(&self, offset: u64) -> Option<usize> {
        let n = self.offsets.partition_point(|begin| *begin <= offset).checked_sub(1)?;
        (offset < self.offsets[n] + u64::from(self.refs[n].raw)).then_some(n)
    }

    pub(crate) fn refs(&self) -> &[ChunkRef] {
        &self.refs
    }

    pub(crate) fn offset(&self, n: usize) -> u64 {
        self.offsets[n]
    }

    fn push(&mut self, chunk: ChunkRef) {
        let offset = match (self.offsets.last(), self.refs.last()) {
            (Some(offset), Some(last)) => offset + u64::from(last.raw),
            _ => 0,
        };
        self.refs.push(chunk);
        self.offsets.push(offset);
    }
}

impl Boot {
    /// The chunks of a region. Read once, then kept.
    ///
    /// # Errors
    /// [`crate::Error::Damaged`] if a leaf of the index is missing or is not what the boot object says.
    ///
    /// # Panics
    /// If there is no such region.
    pub async fn chunks(&self, region: usize) -> Result<Arc<ChunkMap>> {
        let map = self.inner.maps[region].get_or_try_init(|| self.read_chunks(region)).await?;
        Ok(map.clone())
    }

    async fn read_chunks(&self, region: usize) -> Result<Arc<ChunkMap>> {
        let inner = &*self.inner;
        let lengths: Arc<[u64]> = inner.packs.iter().map(|(_, bytes)| *bytes).collect();
        let index = inner.root.index.map(|(digest, _)| digest);
        let leaves: Vec<Leaf> = inner.root.regions[region].leaves.clone();
        let leaves: Vec<Vec<ChunkRef>> = stream::iter(leaves)
            .map(|leaf| read_leaf(inner.objects.clone(), index, leaf, lengths.clone()))
            .buffered(LEAVES_IN_FLIGHT)
            .try_collect()
            .await?;
        let mut map = ChunkMap::default();
        for chunk in leaves.into_iter().flatten() {
            map.push(chunk);
        }
        Ok(Arc::new(map))
    }
}

async fn read_leaf(
    objects: Objects,
    index: Option<Digest>,
    leaf: Leaf,
    lengths: Arc<[u64]>,
) -> Result<Vec<ChunkRef>> {
    let (bytes, object) = match leaf.place {
        LeafPlace::Inline(bytes) => (bytes, "leaf in the boot object".to_owned()),
        LeafPlace::Indexed { offset, length, digest } => {
            // A boot object that names no index object allows no leaf in it.
            let path = index_path(&index.unwrap_or(digest));
            let bytes = objects.get_range(&path, offset..offset + length).await?;
            let found = Digest::of(&bytes);
            if found != digest {
                let (found, expected) = (found.to_string(), digest.to_string());
                return Err(objects.damaged(&path, Damage::Digest { found, expected }));
            }
            (bytes, path.to_string())
        }
    };
    let refs =
        decode_leaf(&bytes, leaf.chunks, &lengths).map_err(|damage| objects.damaged(&object, damage))?;
    let found: u64 = refs.iter().map(|chunk| u64::from(chunk.raw)).sum();
    if found != leaf.bytes {
        return Err(objects.damaged(&object, Damage::Length { found, expected: leaf.bytes }));
    }
    Ok(refs)
}
