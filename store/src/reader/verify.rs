//! Verification: every byte of every object that a snapshot names, and every damage told.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, stream};
use uuid::Uuid;

use crate::codec::Codec;
use crate::error::{Damage, Error, Result};
use crate::format::frame::{self, HEADER_BYTES, Magic};
use crate::format::index::ChunkRef;
use crate::format::pack::{TRAILER_BYTES, read_footer, read_trailer};
use crate::format::pack_path;
use crate::limits::PACK_BYTES_LIMIT;
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
