//! The last steps: index, boot object, manifest, tag. The tag makes a snapshot visible, so it comes last.
//!
//! A tag's next number is taken by a write that the store refuses if somebody else took it. Where a store ignores that
//! condition, a claim comes first: whoever sees a claim that is not older than their own gives way, whoever sees an
//! older one withdrawn or made good acts on that. Two can then not both believe that they have won.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use uuid::Uuid;

use crate::codec::Codec;
use crate::digest::{ChunkId, Digest};
use crate::error::{Damage, Error, Result};
use crate::format::boot::{self, Leaf, LeafPlace, Root, RootRegion};
use crate::format::frame::{self, Magic};
use crate::format::index::{ChunkRef, Location, encode_leaf};
use crate::format::manifest::{BootRef, Facts, KeyInfo, Manifest, RegionTotals, Totals};
use crate::format::tag::{DecidingFacts, TagIndex, Variant};
use crate::format::{
    FORMAT, boot_path, claim_folder, index_path, manifest, manifest_path, pack_path, tag_path,
};
use crate::lease::Announcement;
use crate::limits::{CLAIM_AGE_MAX, INLINE_LEAVES_BYTES, LEAF_CHUNKS_LIMIT};
use crate::objects::{Objects, Put};
use crate::store::Store;
use crate::url::{Name, Target};
use crate::writer::Shared;
use crate::writer::planner::{Written, WrittenRegion};

/// Packs whose presence is checked at the same time.
const CHECKS_IN_FLIGHT: usize = 16;
/// Between two looks at somebody else's claim.
const CLAIM_POLL: Duration = Duration::from_millis(100);

/// A snapshot that exists from here on.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Published {
    /// Digest of its manifest.
    pub digest: Digest,
    /// Number of the tag's index object that names it.
    pub number: u64,
    /// Bytes of content that no older snapshot brought, before compression; a chunk that occurs twice counts once.
    pub new_content_bytes: u64,
    /// Sums, as they stand in the manifest.
    #[serde(flatten)]
    pub totals: Totals,
}

/// State of a tag from which a publishing starts.
#[derive(Debug, Clone)]
pub(crate) struct Base {
    name: Name,
    tag: String,
    number: u64,
    variants: Vec<Variant>,
}

impl Base {
    pub(crate) async fn read(store: &Store, name: &Name, tag: &str) -> Result<Self> {
        let (number, variants) = match store.tag(name, tag).await? {
            Some(index) => (index.number, index.variants),
            None => (0, Vec::new()),
        };
        Ok(Self { name: name.clone(), tag: tag.to_owned(), number, variants })
    }

    pub(crate) fn is(&self, name: &Name, tag: &str) -> bool {
        self.name == *name && self.tag == tag
    }

    /// The tag's number if it names this manifest for these facts already.
    pub(crate) fn names(&self, variant: &Variant) -> Option<u64> {
        let same = self.variant(&variant.facts).is_some_and(|own| own.manifest == variant.manifest);
        same.then_some(self.number)
    }

    fn variant(&self, facts: &DecidingFacts) -> Option<&Variant> {
        self.variants.iter().find(|variant| variant.facts == *facts)
    }

    fn taken(&self, found: u64) -> Error {
        let (name, tag, expected) = (self.name.to_string(), self.tag.clone(), self.number);
        Error::TagTaken { name, tag, found, expected }
    }
}

pub(crate) async fn publish(
    shared: &Shared,
    announcement: &Announcement,
    base: Base,
    written: Written,
    skeleton: BTreeMap<String, Bytes>,
    facts: Facts,
) -> Result<Published> {
    assert_eq!(written.unfinished, 0, "regions that are begun and not finished");
    let objects = &shared.objects;
    let new_packs: u64 = written.packs.iter().map(|(_, bytes)| bytes).sum();
    let new_content_bytes = new_content_bytes(&written);
    let index = Index::build(shared, &written);
    let packs = index.packs.clone();
    check_present(objects, packs.iter().filter(|(id, _)| !written.wrote(id))).await?;
    let mut new = Vec::new();
    let (index_bytes, root) = index.into_root(&written.regions, skeleton, shared.session);
    if let Some((digest, bytes)) = index_bytes {
        objects.put(&index_path(&digest), bytes.clone().into()).await?;
        new.push((index_path(&digest), bytes.len() as u64));
    }
    let (boot, raw_bytes) = boot::encode(&root)?;
    let boot_ref = BootRef { digest: Digest::of(&boot), bytes: boot.len() as u64, raw_bytes };
    objects.put(&boot_path(&boot_ref.digest), boot.into()).await?;
    new.push((boot_path(&boot_ref.digest), boot_ref.bytes));

    let small: u64 = new.iter().map(|(_, bytes)| bytes).sum();
    let mut totals = totals(&written.regions, &root);
    totals.stored_bytes += small;
    totals.new_bytes = new_packs + small;
    let deciding = DecidingFacts::of(&facts);
    let regions = region_totals(&written.regions);
    let manifest = Manifest {
        format: manifest::format_of(&regions),
        program: concat!("rewarm ", env!("CARGO_PKG_VERSION")).to_owned(),
        name: base.name.to_string(),
        tag: base.tag.clone(),
        created: now(),
        facts,
        boot: boot_ref,
        regions,
        totals,
        key: KeyInfo::public(),
    };
    let bytes = manifest::encode(&manifest, shared.sign.as_ref())?;
    let digest = Digest::of(&bytes);
    let path = manifest_path(&digest);
    objects.put(&path, bytes.clone().into()).await?;
    new.push((path, bytes.len() as u64));
    let variant = Variant {
        manifest: digest,
        bytes: bytes.len() as u64,
        published: manifest.created.clone(),
        facts: deciding,
    };
    announcement.confirm().await?;
    let (name, tag) = (base.name.clone(), base.tag.clone());
    match take_tag(&shared.store, base, variant).await {
        Ok(number) => {
            if let Err(lapsed) = announcement.confirm().await {
                still_whole(&shared.store, objects, &name, &tag, &digest, &packs, lapsed).await?;
            }
            Ok(Published { digest, number, new_content_bytes, totals: manifest.totals })
        }
        Err(error) => {
            // Only here is it certain that no tag names what was written.
            if matches!(error, Error::TagTaken { .. }) {
                remove(objects, &new, &written.packs).await;
            }
            Err(error)
        }
    }
}

/// This program was stopped between its last look and the tag, for so long that gc may have removed what the tag leads to:
/// then the tag goes again.
async fn still_whole(
    store: &Store,
    objects: &Objects,
    name: &Name,
    tag: &str,
    digest: &Digest,
    packs: &[(Uuid, u64)],
    lapsed: Error,
) -> Result<()> {
    if check_present(objects, packs.iter()).await.is_ok() && store.needs(digest).await.is_ok() {
        return Ok(());
    }
    tracing::warn!(%store, %name, tag, "parts of the snapshot were removed while it was published");
    store.remove(name, &Target::Digest(*digest)).await?;
    Err(lapsed)
}

/// Removes the manifest first, so that nothing refers to what is gone.
async fn remove(objects: &Objects, new: &[(Path, u64)], packs: &[(Uuid, u64)]) {
    let packs = packs.iter().map(|(id, _)| pack_path(*id));
    for path in new.iter().rev().map(|(path, _)| path.clone()).chain(packs) {
        if let Err(error) = objects.delete(&path).await {
            tracing::debug!(%path, %error, "an unused object stays for gc");
        }
    }
}

pub(crate) fn now() -> String {
    let now = jiff::Timestamp::now();
    now.round(jiff::Unit::Second).unwrap_or(now).to_string()
}

fn region_totals(regions: &[WrittenRegion]) -> Vec<RegionTotals> {
    let totals = |region: &WrittenRegion| RegionTotals {
        kind: region.kind.clone(),
        bytes: content_bytes(&region.chunks),
        chunks: region.chunks.len() as u64,
    };
    regions.iter().map(totals).collect()
}

fn content_bytes(chunks: &[(ChunkId, Location)]) -> u64 {
    chunks.iter().map(|(_, location)| u64::from(location.raw)).sum()
}

fn new_content_bytes(written: &Written) -> u64 {
    let own: HashSet<Uuid> = written.packs.iter().map(|(id, _)| *id).collect();
    let chunks = written.regions.iter().flat_map(|region| &region.chunks);
    let new: HashMap<(Uuid, u64), u64> = chunks
        .filter(|(_, location)| own.contains(&location.pack))
        .map(|(_, location)| ((location.pack, location.offset), u64::from(location.raw)))
        .collect();
    new.values().sum()
}

fn totals(regions: &[WrittenRegion], root: &Root) -> Totals {
    let different: HashMap<(Uuid, u64), u64> = regions
        .iter()
        .flat_map(|region| &region.chunks)
        .map(|(_, location)| ((location.pack, location.offset), u64::from(location.stored)))
        .collect();
    Totals {
        content_bytes: regions.iter().map(|region| content_bytes(&region.chunks)).sum(),
        stored_bytes: different.values().sum(),
        new_bytes: 0,
        chunks: different.len() as u64,
        packs: root.packs.len() as u64,
    }
}

/// The index while it is being built.
struct Index {
    packs: Vec<(Uuid, u64)>,
    /// Leaves of each region: chunks, content bytes, encoded.
    leaves: Vec<Vec<(u64, u64, Vec<u8>)>>,
}

impl Index {
    fn build(shared: &Shared, written: &Written) -> Self {
        let new: HashMap<Uuid, u64> = written.packs.iter().copied().collect();
        let mut packs = Vec::new();
        let mut numbers = HashMap::<Uuid, u32>::new();
        let mut number = |id: Uuid| {
            *numbers.entry(id).or_insert_with(|| {
                let bytes = new.get(&id).copied().or_else(|| shared.reuse.pack_bytes(&id));
                packs.push((id, bytes.expect("a chunk lies in a pack that was written or read")));
                packs.len() as u32 - 1
            })
        };
        let mut leaves = Vec::with_capacity(written.regions.len());
        for region in &written.regions {
            let mut of_region = Vec::new();
            for part in region.chunks.chunks(LEAF_CHUNKS_LIMIT as usize) {
                let refs: Vec<ChunkRef> =
                    part.iter().map(|(id, location)| location.with(*id, number(location.pack))).collect();
                of_region.push((refs.len() as u64, content_bytes(part), encode_leaf(&refs)));
            }
            leaves.push(of_region);
        }
        Self { packs, leaves }
    }

    /// The root, and the index object if the leaves are too long to lie in it.
    fn into_root(
        self,
        regions: &[WrittenRegion],
        skeleton: BTreeMap<String, Bytes>,
        session: Uuid,
    ) -> (Option<(Digest, Bytes)>, Root) {
        let total: usize = self.leaves.iter().flatten().map(|(_, _, bytes)| bytes.len()).sum();
        let inline = total as u64 <= INLINE_LEAVES_BYTES;
        let mut object = frame::header(Magic::Index, Codec::None).to_vec();
        let mut place = |bytes: Vec<u8>| {
            if inline {
                return LeafPlace::Inline(bytes.into());
            }
            let (offset, length, digest) = (object.len() as u64, bytes.len() as u64, Digest::of(&bytes));
            object.extend_from_slice(&bytes);
            LeafPlace::Indexed { offset, length, digest }
        };
        let mut roots = Vec::with_capacity(regions.len());
        for (region, leaves) in regions.iter().zip(self.leaves) {
            let leaves: Vec<Leaf> = leaves
                .into_iter()
                .map(|(chunks, bytes, encoded)| Leaf { chunks, bytes, place: place(encoded) })
                .collect();
            let bytes = leaves.iter().map(|leaf| leaf.bytes).sum();
            roots.push(RootRegion { kind: region.kind.clone(), meta: region.meta.clone(), bytes, leaves });
        }
        // No leaf: the object's name is this session's alone.
        object.extend_from_slice(session.as_bytes());
        let object = (!inline).then(|| (Digest::of(&object), Bytes::from(object)));
        let index = object.as_ref().map(|(digest, bytes)| (*digest, bytes.len() as u64));
        (object, Root { packs: self.packs, regions: roots, skeleton, index, session: Some(session) })
    }
}

/// Fails if one of these packs is not there, as long as it should be.
async fn check_present(objects: &Objects, packs: impl Iterator<Item = &(Uuid, u64)>) -> Result<()> {
    let packs: Vec<(Uuid, u64)> = packs.copied().collect();
    stream::iter(packs)
        .map(|(id, expected)| async move {
            let path = pack_path(id);
            match objects.size(&path).await? {
                Some(found) if found == expected => Ok(()),
                Some(found) => Err(objects.damaged(&path, Damage::Length { found, expected })),
                None => Err(objects.damaged(&path, Damage::Missing)),
            }
        })
        .buffer_unordered(CHECKS_IN_FLIGHT)
        .try_collect::<()>()
        .await
}

/// Writes the index object after number `after` of a tag, with these variants; false if somebody else took its number.
pub(crate) async fn next_index(
    store: &Store,
    name: &Name,
    tag: &str,
    after: u64,
    writer: Uuid,
    variants: Vec<Variant>,
) -> Result<bool> {
    let index = TagIndex {
        format: FORMAT,
        name: name.to_string(),
        tag: tag.to_owned(),
        number: after + 1,
        writer: writer.to_string(),
        published: now(),
        variants,
    };
    let objects = store.objects().await?;
    let path = tag_path(name, tag, index.number);
    let put = if store.conditional().await? {
        objects.put_new(&path, index.encode().into()).await?
    } else {
        put_claimed(objects, name, tag, &path, index.number, writer, index.encode()).await?
    };
    // After a lost answer an attempt finds its own object.
    match put {
        Put::Written => Ok(true),
        Put::Exists => match store.tag_at(name, tag, index.number).await {
            Ok(there) => Ok(there.writer == index.writer),
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        },
    }
}

/// Writes the tag's next index object and gives its number.
pub(crate) async fn take_tag(store: &Store, mut base: Base, variant: Variant) -> Result<u64> {
    let writer = Uuid::now_v7();
    loop {
        let number = base.number + 1;
        let variants = TagIndex::with_variant(&base.variants, variant.clone())?;
        if next_index(store, &base.name, &base.tag, base.number, writer, variants).await? {
            return Ok(number);
        }
        let theirs = match store.tag_at(&base.name, &base.tag, number).await {
            // Whoever claimed the number has not written it.
            Err(Error::NotFound { .. }) => return Err(base.taken(number)),
            theirs => theirs?,
        };
        let before = base.variant(&variant.facts).map(|variant| variant.manifest);
        let after = theirs.variants.iter().find(|other| other.facts == variant.facts);
        if before != after.map(|variant| variant.manifest) {
            return Err(base.taken(number));
        }
        // Somebody published for another kind of machine: both stand side by side.
        base = Base { number, variants: theirs.variants, ..base };
    }
}

/// Takes a number in a store that writes over what is there. See the head of this file.
async fn put_claimed(
    objects: &Objects,
    name: &Name,
    tag: &str,
    path: &Path,
    number: u64,
    writer: Uuid,
    bytes: Bytes,
) -> Result<Put> {
    let folder = claim_folder(name, tag);
    let own = Path::from(format!("{folder}/{number:09}-{writer}"));
    objects.put(&own, Bytes::from_static(b"claim").into()).await?;
    let won = win_claim(objects, &folder, path, number, writer).await;
    let put = match won {
        Ok(true) => objects.put(path, bytes.into()).await.map(|()| Put::Written),
        Ok(false) => Ok(Put::Exists),
        Err(error) => Err(error),
    };
    objects.delete(&own).await?;
    put
}

/// Whether this writer may write the object of this number.
async fn win_claim(objects: &Objects, folder: &Path, path: &Path, number: u64, writer: Uuid) -> Result<bool> {
    loop {
        let claims = objects.list(folder).await?;
        let others: Vec<Uuid> = claims
            .iter()
            .filter_map(|(path, _)| {
                let (digits, id) = path.filename()?.split_once('-')?;
                (digits.parse() == Ok(number)).then(|| Uuid::parse_str(id).ok()).flatten()
            })
            .filter(|id| *id != writer && age(id) < CLAIM_AGE_MAX)
            .collect();
        // Looked at after the claims: a winner writes its object before it takes its claim away.
        if objects.size(path).await?.is_some() {
            return Ok(false);
        }
        if others.iter().any(|other| *other < writer) {
            return Ok(false);
        }
        if others.is_empty() {
            return Ok(true);
        }
        // Later claims give way, unless they saw no other and are about to write.
        tokio::time::sleep(CLAIM_POLL).await;
    }
}

/// Time since a version 7 id was made; zero if that lies ahead.
fn age(id: &Uuid) -> Duration {
    let made = id.get_timestamp().map_or(Duration::ZERO, |time| {
        let (seconds, nanos) = time.to_unix();
        Duration::new(seconds, nanos)
    });
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    now.saturating_sub(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_knows_its_age() {
        let fresh = Uuid::now_v7();
        assert!(age(&fresh) < Duration::from_secs(1), "{:?}", age(&fresh));
        let parsed = Uuid::parse_str("018f0000-0000-7000-8000-000000000000").unwrap();
        assert!(age(&parsed) > CLAIM_AGE_MAX);
    }
}
