//! Reading a snapshot: manifest, then boot object, then content, each byte checked before anybody sees it.
//!
//! A reference is resolved to a manifest by its digest, the manifest names the boot object by digest and length, its
//! leaves name chunks by keyed hash and length. What does not match is [`crate::Error::Damaged`], never data.

mod chunks;
mod compare;
mod fetch;
mod hedge;
mod verify;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::OnceCell;
use uuid::Uuid;

use crate::digest::{ChunkKey, Digest};
use crate::error::{Damage, Result};
use crate::format::boot::{self, Root};
use crate::format::boot_path;
use crate::format::manifest::{Manifest, RegionKind, Seal};
use crate::limits::BOOT_BYTES_LIMIT;
use crate::objects::Objects;
use crate::signature::{Mistrust, PublicKey, Trust};
use crate::store::{ReadManifest, Store};
use crate::url::Reference;

pub use chunks::{Chunk, ChunkMap};
pub use compare::{Chunks, Comparison, RegionComparison, RegionSide, compare};
pub use fetch::{Fetched, Request, Room, Sink};
pub use hedge::Hedges;
pub use verify::Verified;
pub(crate) use verify::Wanted;

/// A manifest object that was read and whose digest is right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its digest.
    pub digest: Digest,
    /// Its bytes.
    pub bytes: Bytes,
}

/// A snapshot whose manifest was read and checked. No content has moved.
#[derive(Debug, Clone)]
pub struct Snapshot {
    store: Store,
    digest: Digest,
    manifest: Arc<Manifest>,
    seal: Arc<Seal>,
    /// The manifest object as it is stored.
    object: Bytes,
    signer: Option<PublicKey>,
}

impl Store {
    /// Reads the manifest that a reference means: the newest variant where a tag has several.
    ///
    /// # Errors
    /// [`crate::Error::NotFound`] if store, name, tag or manifest do not exist, [`crate::Error::Newer`] if a newer program wrote it,
    /// [`crate::Error::Damaged`] if it is not what its digest says, [`crate::Error::Untrusted`] if a signature is
    /// required and missing.
    pub async fn resolve(&self, reference: &Reference) -> Result<Snapshot> {
        let digests = self.variants(reference).await?;
        let newest = digests.first().expect("a tag has at least one variant");
        let snapshot = Snapshot::read(self, newest).await?;
        Ok(snapshot)
    }

    /// Reads all variants that a reference means, the newest first, so that a caller can take the first that fits.
    ///
    /// # Errors
    /// The same as [`Store::resolve`].
    pub async fn resolve_all(&self, reference: &Reference) -> Result<Vec<Snapshot>> {
        let mut all = Vec::new();
        for digest in self.variants(reference).await? {
            all.push(Snapshot::read(self, &digest).await?);
        }
        Ok(all)
    }
}

impl Store {
    /// Reads the manifest objects of all variants that a reference means, the newest first, for a process that decodes
    /// them itself.
    ///
    /// # Errors
    /// The same as [`Store::resolve`], but for what decoding finds.
    pub async fn find(&self, reference: &Reference) -> Result<Vec<Found>> {
        let mut all = Vec::new();
        for digest in self.variants(reference).await? {
            all.push(Found { digest, bytes: self.manifest_bytes(&digest).await? });
        }
        Ok(all)
    }
}

impl Snapshot {
    /// Checks and decodes a manifest object that came from `store`. Nothing is asked of the store.
    ///
    /// # Errors
    /// As [`Store::resolve`].
    pub fn decode(store: &Store, found: &Found) -> Result<Self> {
        Ok(Self::over(store, &found.digest, store.decode_manifest(&found.digest, found.bytes.clone())?))
    }

    /// Reads a manifest by its digest.
    pub(crate) async fn read(store: &Store, digest: &Digest) -> Result<Self> {
        Ok(Self::over(store, digest, store.manifest(digest).await?))
    }

    fn over(store: &Store, digest: &Digest, read: ReadManifest) -> Self {
        Self {
            store: store.clone(),
            digest: *digest,
            manifest: Arc::new(read.manifest),
            seal: Arc::new(read.seal),
            object: read.bytes,
            signer: read.signer,
        }
    }

    /// The manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Signatures of the manifest.
    #[must_use]
    pub fn seal(&self) -> &Seal {
        &self.seal
    }

    /// Digest of the manifest object.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Length of the manifest object in bytes.
    #[must_use]
    pub fn manifest_bytes(&self) -> u64 {
        self.object.len() as u64
    }

    /// Who signed the manifest, where the store was opened with [`Store::requiring`].
    #[must_use]
    pub fn signer(&self) -> Option<PublicKey> {
        self.signer
    }

    /// Whose signatures fit, whoever they are and whether they are trusted or not.
    #[must_use]
    pub fn signers(&self) -> Vec<PublicKey> {
        let named = self.seal.signatures.iter().filter_map(|one| format!("ed25519:{}", one.key).parse().ok());
        named.filter(|key| self.signed_by(&Trust::new([*key])).is_ok()).collect()
    }

    /// Whose signature makes it trusted, whatever the store was opened with.
    ///
    /// # Errors
    /// Why it is not.
    pub fn signed_by(&self, trust: &Trust) -> Result<PublicKey, Mistrust> {
        trust.check(&self.object)
    }

    /// The manifest object as it is stored.
    pub(crate) fn object(&self) -> Bytes {
        self.object.clone()
    }

    /// The store that it lies in.
    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// Fetches and checks the boot object.
    ///
    /// # Errors
    /// [`crate::Error::Damaged`] if it is missing or is not what the manifest says.
    pub async fn boot(&self) -> Result<Boot> {
        let bytes = self.boot_bytes().await?;
        self.decode_boot(&bytes).await
    }

    /// Fetches the boot object for a process that decodes it itself.
    ///
    /// # Errors
    /// [`crate::Error::Damaged`] if it is missing or has another length.
    pub async fn boot_bytes(&self) -> Result<Bytes> {
        let (wanted, objects) = (self.manifest.boot, self.store.objects().await?);
        objects.get_exact(&boot_path(&wanted.digest), wanted.bytes, BOOT_BYTES_LIMIT).await
    }

    /// Checks and decodes a boot object. Nothing but a folder's existence is asked of the store.
    ///
    /// # Errors
    /// [`crate::Error::Damaged`] if it is not what the manifest says.
    pub async fn decode_boot(&self, bytes: &[u8]) -> Result<Boot> {
        let objects = self.store.objects().await?.clone();
        let wanted = self.manifest.boot;
        let path = boot_path(&wanted.digest);
        let found = Digest::of(bytes);
        if found != wanted.digest {
            let (found, expected) = (found.to_string(), wanted.digest.to_string());
            return Err(objects.damaged(&path, Damage::Digest { found, expected }));
        }
        let root = boot::decode(bytes, wanted.raw_bytes, objects.name(), path.as_ref())?;
        if self.manifest.key.chunk_ids != "public" {
            let (found, expected) = (self.manifest.key.chunk_ids.clone(), "public".to_owned());
            return Err(objects.damaged(&path, Damage::Frame { what: "key of chunk ids", found, expected }));
        }
        Ok(Boot::new(objects, root))
    }
}

/// The boot object of a snapshot: its skeleton and the way to its content.
#[derive(Clone)]
pub struct Boot {
    inner: Arc<BootInner>,
}

struct BootInner {
    objects: Objects,
    key: ChunkKey,
    packs: Vec<(Uuid, u64)>,
    root: Root,
    regions: Vec<Region>,
    /// Filled when a region's chunks are first asked for.
    maps: Vec<OnceCell<Arc<ChunkMap>>>,
}

/// A region of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// What it holds.
    pub kind: RegionKind,
    /// What its writer stored with it.
    pub meta: Bytes,
    /// Bytes of its stream.
    pub bytes: u64,
}

impl Boot {
    fn new(objects: Objects, root: Root) -> Self {
        let regions: Vec<Region> = root
            .regions
            .iter()
            .map(|region| Region {
                kind: region.kind.clone(),
                meta: region.meta.clone(),
                bytes: region.bytes,
            })
            .collect();
        let maps = regions.iter().map(|_| OnceCell::new()).collect();
        let packs = root.packs.clone();
        Self { inner: Arc::new(BootInner { objects, key: ChunkKey::public(), packs, root, regions, maps }) }
    }

    /// The skeleton's files by name.
    #[must_use]
    pub fn skeleton(&self) -> &BTreeMap<String, Bytes> {
        &self.inner.root.skeleton
    }

    /// The regions, in the order in which they were finished.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.inner.regions
    }

    /// The index object with its length, if there is one.
    pub(crate) fn index(&self) -> Option<(Digest, u64)> {
        self.inner.root.index
    }

    /// The packs that content lies in, with their lengths.
    pub(crate) fn packs(&self) -> &[(Uuid, u64)] {
        &self.inner.packs
    }
}

impl std::fmt::Debug for Boot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Boot").field("regions", &self.inner.regions.len()).finish_non_exhaustive()
    }
}
