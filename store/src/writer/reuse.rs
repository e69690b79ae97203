//! Chunks that the store has already, from the indexes of a bounded number of its snapshots.

use std::collections::{HashMap, HashSet};

use object_store::path::Path;
use uuid::Uuid;

use crate::digest::{ChunkId, Digest};
use crate::error::{Error, Result};
use crate::format::index::Location;
use crate::format::tag_number;
use crate::limits::{REUSE_CHUNKS, REUSE_SNAPSHOTS};
use crate::reader::Snapshot;
use crate::store::Store;
use crate::url::Name;

/// Chunks of older snapshots whose packs are there.
#[derive(Debug, Default)]
pub(crate) struct Reuse {
    chunks: HashMap<ChunkId, Location>,
    packs: HashMap<Uuid, u64>,
}

impl Reuse {
    pub(crate) fn get(&self, id: &ChunkId) -> Option<&Location> {
        self.chunks.get(id)
    }

    /// Length of an older pack.
    pub(crate) fn pack_bytes(&self, id: &Uuid) -> Option<u64> {
        self.packs.get(id).copied()
    }

    /// Reads indexes, those of `first` before others. A snapshot that cannot be read is left out with a warning: it must
    /// not stand in the way of a new one.
    /// Packs in `doomed` are about to be removed: nothing new may refer to them.
    pub(crate) async fn load(store: &Store, first: Option<&Name>, doomed: &HashSet<Uuid>) -> Result<Self> {
        let mut reuse = Self::default();
        let wanted = newest_manifests(store, first).await?;
        if wanted.is_empty() {
            return Ok(reuse);
        }
        for (path, bytes) in store.objects().await?.list(&Path::from("packs")).await? {
            if let Some(Ok(id)) = path.filename().map(Uuid::parse_str)
                && !doomed.contains(&id)
            {
                reuse.packs.insert(id, bytes);
            }
        }
        for digest in wanted {
            if reuse.chunks.len() >= REUSE_CHUNKS {
                break;
            }
            if let Err(error) = reuse.add(store, &digest).await {
                tracing::warn!(%store, manifest = %digest, %error, "chunks of this snapshot are not reused");
            }
        }
        Ok(reuse)
    }

    async fn add(&mut self, store: &Store, digest: &Digest) -> Result<()> {
        let snapshot = Snapshot::read(store, digest).await?;
        let boot = snapshot.boot().await?;
        let lengths: Vec<(Uuid, u64)> = boot.packs().to_vec();
        for region in 0..boot.regions().len() {
            for chunk in boot.chunks(region).await?.refs() {
                let (pack, bytes) = lengths[chunk.pack as usize];
                let whole = self.packs.get(&pack) == Some(&bytes);
                if whole && self.chunks.len() < REUSE_CHUNKS {
                    self.chunks.entry(chunk.id).or_insert_with(|| chunk.location(pack));
                }
            }
        }
        Ok(())
    }
}

/// Manifests whose chunks may be reused, at most [`REUSE_SNAPSHOTS`].
async fn newest_manifests(store: &Store, first: Option<&Name>) -> Result<Vec<Digest>> {
    let mut tags = HashMap::<(String, String), u64>::new();
    for (path, _) in store.objects().await?.list(&Path::from("tags")).await? {
        let parts: Vec<_> = path.parts().map(|part| part.as_ref().to_owned()).collect();
        if let [_, name, tag, file] = parts.as_slice()
            && let Some(number) = tag_number(file)
        {
            let highest = tags.entry((name.clone(), tag.clone())).or_default();
            *highest = number.max(*highest);
        }
    }
    let mut tags: Vec<((String, String), u64)> = tags.into_iter().collect();
    let own = |name: &str| first.is_some_and(|first| first.as_str() == name);
    tags.sort_by(|(a, _), (b, _)| (!own(&a.0), a).cmp(&(!own(&b.0), b)));
    let mut found = Vec::new();
    for ((name, tag), number) in tags {
        if found.len() >= REUSE_SNAPSHOTS {
            break;
        }
        let Ok(name) = name.parse() else { continue };
        match store.tag_at(&name, &tag, number).await {
            Ok(index) => found.extend(index.variants.iter().map(|variant| variant.manifest)),
            Err(error @ (Error::Damaged { .. } | Error::Newer { .. } | Error::NotFound { .. })) => {
                tracing::warn!(%store, %name, tag, %error, "chunks under this tag are not reused");
            }
            Err(error) => return Err(error),
        }
    }
    found.truncate(REUSE_SNAPSHOTS);
    Ok(found)
}
