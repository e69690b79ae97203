//! Verification: every byte of every object that a snapshot names, and every damage told.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, stream};
use uuid::Uuid;

use crate::codec::Codec;
use crate::digest::Digest;
use crate::error::{Damage, Error, Result};
use crate::format::frame::{self, HEADER_BYTES, Magic};
use crate::format::index::ChunkRef;
use crate::format::pack::{TRAILER_BYTES, read_footer, read_trailer};
use crate::format::{index_path, pack_path};
use crate::limits::{INDEX_BYTES_LIMIT, PACK_BYTES_LIMIT};
use crate::reader::{Boot, BootInner};

/// What a verification read and found.
#[derive(Debug, Default)]
pub struct Verified {
    /// Bytes of content of the snapshot.
    pub bytes: u64,
    /// Chunks of the snapshot, each as often as it has it.
    pub chunks: u64,
    /// Packs that were read.
    pub packs: u64,
    /// Bytes of these packs.
    pub pack_bytes: u64,
    /// Every damage, object by object.
    pub damage: Vec<Error>,
}

impl Verified {
    /// Itself if nothing is damaged.
    ///
    /// # Errors
    /// The first damage.
    pub fn whole(mut self) -> Result<Self> {
        if self.damage.is_empty() { Ok(self) } else { Err(self.damage.swap_remove(0)) }
    }
}

/// The chunks that a snapshot wants of one pack, by their offset.
pub(crate) type Wanted = BTreeMap<u64, ChunkRef>;

impl Boot {
    /// Reads and checks every byte of every object that a restore would need, and that packs explain themselves as the
    /// index does. Damage does not end it: [`Verified::whole`] gives the first.
    ///
    /// # Errors
    /// What the store answers, other than damage.
    pub async fn verify(&self, parallel: usize) -> Result<Verified> {
        let mut verified = Verified::default();
        match self.check_index().await {
            Err(error @ Error::Damaged { .. }) => verified.damage.push(error),
            checked => checked?,
        }
        let wanted = self.wanted(&mut verified).await?;
        let packs: Vec<(Uuid, u64)> = self.packs().to_vec();
        let read = packs.into_iter().zip(wanted).map(|((pack, bytes), wanted)| {
            let inner = self.inner.clone();
            async move {
                let stored = inner.objects.get_exact(&pack_path(pack), bytes, PACK_BYTES_LIMIT).await;
                match stored {
                    Ok(stored) => Ok((bytes, check_pack(inner, pack, stored, wanted).await)),
                    Err(error @ Error::Damaged { .. }) => Ok((0, vec![error])),
                    Err(error) => Err(error),
                }
            }
        });
        let mut read = stream::iter(read).buffer_unordered(parallel.max(1));
        while let Some(checked) = read.next().await {
            let (bytes, damage) = checked?;
            verified.packs += 1;
            verified.pack_bytes += bytes;
            verified.damage.extend(damage);
        }
        Ok(verified)
    }

    /// A restore reads single leaves of the index object; here all of it counts.
    async fn check_index(&self) -> Result<()> {
        let Some((digest, bytes)) = self.index() else { return Ok(()) };
        let (objects, path) = (&self.inner.objects, index_path(&digest));
        let found = Digest::of(&objects.get_exact(&path, bytes, INDEX_BYTES_LIMIT).await?);
        if found != digest {
            let (found, expected) = (found.to_string(), digest.to_string());
            return Err(objects.damaged(&path, Damage::Digest { found, expected }));
        }
        Ok(())
    }

    /// The chunks that are wanted of each pack. Leaves that are damaged are counted as such.
    pub(crate) async fn wanted(&self, verified: &mut Verified) -> Result<Vec<Wanted>> {
        let mut wanted = vec![Wanted::new(); self.packs().len()];
        for region in 0..self.regions().len() {
            match self.chunks(region).await {
                Ok(map) => {
                    for chunk in map.refs() {
                        verified.chunks += 1;
                        verified.bytes += u64::from(chunk.raw);
                        wanted[chunk.pack as usize].insert(chunk.offset, *chunk);
                    }
                }
                Err(error @ Error::Damaged { .. }) => verified.damage.push(error),
                Err(error) => return Err(error),
            }
        }
        Ok(wanted)
    }

    /// Checks a whole pack that was read from wherever.
    pub(crate) async fn check_pack(&self, pack: Uuid, stored: Bytes, wanted: Wanted) -> Vec<Error> {
        check_pack(self.inner.clone(), pack, stored, wanted).await
    }
}

async fn check_pack(inner: Arc<BootInner>, pack: Uuid, stored: Bytes, wanted: Wanted) -> Vec<Error> {
    let check = tokio::task::spawn_blocking(move || {
        let damaged = |damage| inner.objects.damaged(pack_path(pack), damage);
        let mut found = Vec::new();
        let mut raw = Vec::new();
        let chunks = match explained(&inner, pack, &stored) {
            Ok(chunks) => chunks,
            Err(error) => {
                // What the index wants of it is told all the same.
                found.push(error);
                wanted.values().copied().collect()
            }
        };
        for chunk in &chunks {
            let end = chunk.offset + u64::from(chunk.stored);
            let content = &stored[chunk.offset as usize..end as usize];
            found.extend(inner.check(pack, chunk, content, &mut raw).err());
        }
        for (offset, chunk) in wanted {
            let listed = chunks.iter().any(|other| other.offset == offset && other.same_place(&chunk));
            if !listed {
                let (there, expected) = ("nothing".to_owned(), format!("chunk {} at {offset}", chunk.id));
                found.push(damaged(Damage::Frame { what: "entry of the footer", found: there, expected }));
            }
        }
        found
    });
    check.await.expect("checking does not panic")
}

/// The chunks of a pack as its footer lists them: one after another, from the header to the footer.
fn explained(inner: &BootInner, pack: Uuid, stored: &[u8]) -> Result<Vec<ChunkRef>> {
    let (objects, path) = (&inner.objects, pack_path(pack));
    let damaged = |damage| objects.damaged(&path, damage);
    let (codec, _) = frame::open(Magic::Pack, stored, objects.name(), path.as_ref())?;
    if codec != Codec::None {
        let (found, expected) = (codec.id().to_string(), "0".to_owned());
        return Err(damaged(Damage::Frame { what: "codec of a pack", found, expected }));
    }
    let bytes = stored.len() as u64;
    let begin = stored.len().saturating_sub(TRAILER_BYTES);
    let (length, digest) = read_trailer(&stored[begin..], bytes).map_err(damaged)?;
    let footer = begin - length as usize;
    let listed = read_footer(pack, &stored[footer..begin], digest, bytes).map_err(damaged)?;
    let chunks: Vec<ChunkRef> = listed.iter().map(|(id, location)| location.with(*id, 0)).collect();
    let mut end = HEADER_BYTES as u64;
    for chunk in &chunks {
        if chunk.offset != end {
            return Err(damaged(Damage::Bound {
                what: "offset of a chunk",
                found: chunk.offset,
                limit: end,
            }));
        }
        end += u64::from(chunk.stored);
    }
    if end != footer as u64 {
        return Err(damaged(Damage::Bound { what: "end of the chunks", found: end, limit: footer as u64 }));
    }
    Ok(chunks)
}

impl ChunkRef {
    /// Whether both say the same of the same bytes.
    fn same_place(&self, other: &Self) -> bool {
        Self { pack: 0, ..*self } == Self { pack: 0, ..*other }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::ChunkKey;
    use crate::format::boot::{Leaf, LeafPlace, Root, RootRegion};
    use crate::format::index::encode_leaf;
    use crate::format::manifest::RegionKind;
    use crate::objects::Objects;

    use object_store::ObjectStoreExt;
    use object_store::memory::InMemory;

    /// A snapshot of one chunk whose leaf lies in an index object, as those of more than 10 GiB do.
    async fn with_index(objects: &Arc<InMemory>) -> (Root, Bytes) {
        let content = [7u8; 4096];
        let pack = Uuid::from_u128(1);
        let chunk = ChunkRef {
            id: ChunkKey::public().id([&content[..]]),
            pack: 0,
            offset: HEADER_BYTES as u64,
            stored: 4096,
            raw: 4096,
            codec: Codec::None,
        };
        let ending = crate::format::pack::ending(&[(chunk.id, chunk.location(pack))]);
        let stored = [&frame::header(Magic::Pack, Codec::None)[..], &content, &ending].concat();
        let bytes = stored.len() as u64;
        objects.put(&pack_path(pack), stored.into()).await.unwrap();
        let leaf = encode_leaf(&[chunk]);
        let place = LeafPlace::Indexed {
            offset: HEADER_BYTES as u64,
            length: leaf.len() as u64,
            digest: Digest::of(&leaf),
        };
        let index = Bytes::from([&frame::header(Magic::Index, Codec::None)[..], &leaf, &[9; 16]].concat());
        objects.put(&index_path(&Digest::of(&index)), index.clone().into()).await.unwrap();
        let leaves = vec![Leaf { chunks: 1, bytes: 4096, place }];
        let region =
            RootRegion { kind: RegionKind::Task { pid: 1 }, meta: Bytes::new(), bytes: 4096, leaves };
        let root = Root {
            packs: vec![(pack, bytes)],
            regions: vec![region],
            skeleton: BTreeMap::new(),
            index: Some((Digest::of(&index), index.len() as u64)),
            session: None,
        };
        (root, index)
    }

    #[tokio::test]
    async fn every_bit_of_an_index_object_counts() {
        let objects = Arc::new(InMemory::new());
        let (root, index) = with_index(&objects).await;
        let boot = || Boot::new(Objects::new(objects.clone(), "memory".into()), root.clone());
        let verified = boot().verify(1).await.unwrap().whole().unwrap();
        assert_eq!((verified.chunks, verified.packs), (1, 1));
        let path = index_path(&Digest::of(&index));
        for at in 0..index.len() {
            let mut changed = index.to_vec();
            changed[at] ^= 1 << (at % 8);
            objects.put(&path, changed.into()).await.unwrap();
            let error = boot().verify(1).await.unwrap().whole().unwrap_err();
            assert!(error.to_string().contains(path.as_ref()), "byte {at}: {error}");
            let leaf = (HEADER_BYTES..index.len() - 16).contains(&at);
            assert_eq!(
                boot().chunks(0).await.is_err(),
                leaf,
                "a restore reads the leaf and checks it: byte {at}"
            );
        }
        objects.put(&path, index.slice(..index.len() - 1).into()).await.unwrap();
        assert!(boot().verify(1).await.unwrap().whole().is_err());
        objects.delete(&path).await.unwrap();
        assert!(matches!(boot().chunks(0).await, Err(Error::Damaged { .. })));
    }
}
