//! Copying a snapshot into another store: what is missing there, checked on the way, its tag last.
//!
//! Objects keep their names, so the copy has the digest of the original, and a signature of it stays good. Packs are
//! copied as a whole, since the index says where in them each chunk lies.

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use uuid::Uuid;

use crate::digest::Digest;
use crate::error::{Damage, Error, Result};
use crate::format::pack::{TRAILER_BYTES, read_trailer};
use crate::format::tag::{DecidingFacts, Variant};
use crate::format::{boot_path, index_path, manifest_path, pack_path};
use crate::lease::{Announcement, Doing};
use crate::limits::{BOOT_BYTES_LIMIT, INDEX_BYTES_LIMIT, PACK_BYTES_LIMIT};
use crate::objects::Objects;
use crate::reader::{Boot, Snapshot, Verified, Wanted};
use crate::store::Store;
use crate::url::{Name, check_word};
use crate::writer::{Base, now, take_tag};

/// Packs that are copied at the same time; each is in memory as a whole.
const PACKS_IN_FLIGHT: usize = 4;

/// What a copy did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Copied {
    /// Objects that were copied.
    pub objects: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Objects that were there already.
    pub present: u64,
    /// Bytes of them.
    pub present_bytes: u64,
    /// Number of the tag's index object that names the copy; unchanged if it named it before.
    pub number: u64,
}

/// A copy that is under way.
struct Copying {
    from: Objects,
    to: Objects,
    store: Store,
    objects: AtomicU64,
    bytes: AtomicU64,
    present: AtomicU64,
    present_bytes: AtomicU64,
}

impl Store {
    /// Copies a snapshot of another store to `name` and `tag` of this one. A folder that is not there is made.
    ///
    /// # Errors
    /// [`Error::Damaged`] if the original is, [`Error::TagTaken`] if another snapshot is published under the tag at the
    /// same time, [`Error::Doomed`] if gc has marked what is there already for removal.
    pub async fn copy_from(&self, snapshot: &Snapshot, name: &Name, tag: &str) -> Result<Copied> {
        check_word(tag).map_err(|source| Error::Syntax { text: tag.to_owned(), kind: "tag", source })?;
        let to = self.objects_for_writing().await?.clone();
        let announcement = Announcement::make(&to, Doing::Session).await?;
        let result = self.copy_announced(snapshot, name, tag, to, &announcement).await;
        announcement.end().await;
        result
    }

    async fn copy_announced(
        &self,
        snapshot: &Snapshot,
        name: &Name,
        tag: &str,
        to: Objects,
        announcement: &Announcement,
    ) -> Result<Copied> {
        let base = Base::read(self, name, tag).await?;
        let copying = Copying {
            from: snapshot.store().objects().await?.clone(),
            to,
            store: self.clone(),
            objects: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            present: AtomicU64::new(0),
            present_bytes: AtomicU64::new(0),
        };
        copying.content(snapshot).await?;
        announcement.confirm().await?;
        let facts = DecidingFacts::of(&snapshot.manifest().facts);
        let bytes = snapshot.manifest_bytes();
        let variant = Variant { manifest: snapshot.digest(), bytes, published: now(), facts };
        let number = match base.names(&variant) {
            Some(number) => number,
            None => take_tag(self, base, variant).await?,
        };
        Ok(copying.copied(number))
    }
}

impl Copying {
    /// Everything but the tag, in the order in which one object leads to the next, backwards.
    async fn content(&self, snapshot: &Snapshot) -> Result<()> {
        let boot = snapshot.boot().await?;
        let wanted = boot.wanted(&mut Verified::default()).await?;
        let packs: Vec<((Uuid, u64), Wanted)> = boot.packs().iter().copied().zip(wanted).collect();
        stream::iter(packs)
            .map(|((pack, bytes), wanted)| self.pack(&boot, pack, bytes, wanted))
            .buffer_unordered(PACKS_IN_FLIGHT)
            .try_collect::<()>()
            .await?;
        if let Some((digest, bytes)) = boot.index() {
            self.digested(&index_path(&digest), digest, bytes, INDEX_BYTES_LIMIT).await?;
        }
        let named = snapshot.manifest().boot;
        self.digested(&boot_path(&named.digest), named.digest, named.bytes, BOOT_BYTES_LIMIT).await?;
        let path = manifest_path(&snapshot.digest());
        if !self.is_there(&path, snapshot.manifest_bytes()).await? {
            self.put(&path, snapshot.object()).await?;
        }
        Ok(())
    }

    async fn pack(&self, boot: &Boot, pack: Uuid, bytes: u64, wanted: Wanted) -> Result<()> {
        let path = pack_path(pack);
        if self.is_there(&path, bytes).await? {
            // The same id and length; the same footer says that it is the same pack.
            let ending = bytes.saturating_sub(TRAILER_BYTES as u64)..bytes;
            let ours = self.to.get_range(&path, ending.clone()).await?;
            read_trailer(&ours, bytes).map_err(|damage| self.to.damaged(&path, damage))?;
            if self.from.get_range(&path, ending).await? == ours {
                return Ok(());
            }
            let (found, expected) = ("another pack".to_owned(), format!("that of {}", self.from.name()));
            return Err(self.to.damaged(&path, Damage::Frame { what: "content", found, expected }));
        }
        let stored = self.from.get_exact(&path, bytes, PACK_BYTES_LIMIT).await?;
        if let Some(damage) = boot.check_pack(pack, stored.clone(), wanted).await.into_iter().next() {
            return Err(damage);
        }
        self.put(&path, stored).await
    }

    async fn digested(&self, path: &Path, digest: Digest, bytes: u64, limit: u64) -> Result<()> {
        if self.is_there(path, bytes).await? {
            return Ok(());
        }
        let stored = self.from.get_exact(path, bytes, limit).await?;
        let found = Digest::of(&stored);
        if found != digest {
            let (found, expected) = (found.to_string(), digest.to_string());
            return Err(self.from.damaged(path, Damage::Digest { found, expected }));
        }
        self.put(path, stored).await
    }

    /// Whether the object is there, whole and to stay.
    async fn is_there(&self, path: &Path, expected: u64) -> Result<bool> {
        if self.store.is_doomed(path).await? {
            return Err(Error::Doomed { store: self.store.to_string(), object: path.to_string() });
        }
        match self.to.size(path).await? {
            None => Ok(false),
            Some(found) if found == expected => {
                self.present.fetch_add(1, Ordering::Relaxed);
                self.present_bytes.fetch_add(expected, Ordering::Relaxed);
                Ok(true)
            }
            Some(found) => Err(self.to.damaged(path, Damage::Length { found, expected })),
        }
    }

    async fn put(&self, path: &Path, bytes: Bytes) -> Result<()> {
        self.objects.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.to.put(path, bytes.into()).await
    }

    fn copied(&self, number: u64) -> Copied {
        Copied {
            objects: self.objects.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            present: self.present.load(Ordering::Relaxed),
            present_bytes: self.present_bytes.load(Ordering::Relaxed),
            number,
        }
    }
}
