//! Where a signature is required, nothing of an unsigned snapshot is read: neither its facts nor its content.

use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use rewarm_report::{Class, Classify};
use rewarm_store::fault::{Faults, FaultyStore, Operation, Wrong};
use rewarm_store::{
    Digest, Error, Facts, Mistrust, Name, Reference, RegionKind, SessionOptions, SigningKey, Store, Target,
    Trust,
};

#[path = "contract/content.rs"]
mod content;

struct World {
    objects: Arc<InMemory>,
    key: SigningKey,
}

impl World {
    fn new() -> Self {
        Self { objects: Arc::new(InMemory::new()), key: SigningKey::generate().unwrap() }
    }

    fn open(&self) -> Store {
        Store::from_objects(self.objects.clone(), "memory")
    }

    /// The store of somebody who trusts this world's key only.
    fn strict(&self) -> Store {
        self.open().requiring(Trust::new([self.key.public()]))
    }

    async fn write(&self, tag: &str, seed: u64, sign: Option<&SigningKey>) -> Digest {
        let options = SessionOptions { sign: sign.cloned(), ..SessionOptions::default() };
        let session = self.open().begin(options).await.unwrap();
        let mut region = session.region(RegionKind::Task { pid: 1 }).await.unwrap();
        region.push(content::random(1 << 20, seed)).await.unwrap();
        region.push(content::compressible(1 << 20, seed)).await.unwrap();
        region.finish(Vec::new()).await.unwrap();
        session.publish(&name(), tag, Facts::default()).await.unwrap().digest
    }

    async fn manifest(&self, digest: &Digest) -> Bytes {
        self.objects.get(&path(digest)).await.unwrap().bytes().await.unwrap()
    }

    /// Stores a manifest object under its own digest, as whoever can write the bucket may do.
    async fn forge(&self, object: Vec<u8>) -> Reference {
        let digest = Digest::of(&object);
        self.objects.put(&path(&digest), object.into()).await.unwrap();
        by_digest(digest)
    }
}

fn name() -> Name {
    "web".parse().unwrap()
}

fn path(digest: &Digest) -> Path {
    Path::from(format!("manifests/{}", digest.hex()))
}

fn by_tag(tag: &str) -> Reference {
    Reference { store: "unused".parse().unwrap(), name: name(), target: Target::Tag(tag.to_owned()) }
}

fn by_digest(digest: Digest) -> Reference {
    Reference { target: Target::Digest(digest), ..by_tag("unused") }
}

async fn mistrust(store: &Store, reference: &Reference) -> Mistrust {
    let error = store.resolve(reference).await.expect_err("it is not to be trusted");
    assert_eq!(error.class(), Class::Integrity, "{error:?}");
    match error {
        Error::Untrusted { source, .. } => source,
        other => panic!("{other:?}"),
    }
}

fn lines(object: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let at = object.iter().position(|&byte| byte == b'\n').unwrap() + 1;
    (object[..at].to_vec(), object[at..].to_vec())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signed_snapshot_is_read_and_says_by_whom() {
    let world = World::new();
    world.write("v1", 1, Some(&world.key)).await;
    let snapshot = world.strict().resolve(&by_tag("v1")).await.unwrap();
    assert_eq!(snapshot.signer(), Some(world.key.public()));
    assert_eq!(snapshot.signers(), [world.key.public()]);
    snapshot.boot().await.unwrap().verify(2).await.unwrap().whole().unwrap();
    // Who asks for no signature reads it as well.
    assert_eq!(world.open().resolve(&by_tag("v1")).await.unwrap().signer(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unsigned_one_is_refused_before_anything_but_its_manifest_is_read() {
    let world = World::new();
    world.write("v1", 1, None).await;
    assert!(matches!(mistrust(&world.strict(), &by_tag("v1")).await, Mistrust::Missing { .. }));
    assert!(world.open().resolve(&by_tag("v1")).await.unwrap().signers().is_empty());
    // A store from which nothing but tags and manifests can be read is enough to refuse it.
    let faults = Arc::new(Faults::default());
    let bare = Store::from_objects(Arc::new(FaultyStore::new(world.objects.clone(), faults.clone())), "bare");
    faults.set(Wrong { always: Some((Operation::Get, "boots")), ..Wrong::default() });
    let bare = bare.requiring(Trust::new([world.key.public()]));
    assert!(matches!(mistrust(&bare, &by_tag("v1")).await, Mistrust::Missing { .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_key_is_refused_and_both_are_named() {
    let world = World::new();
    let other = SigningKey::generate().unwrap();
    world.write("v1", 1, Some(&other)).await;
    let found = mistrust(&world.strict(), &by_tag("v1")).await;
    let text = found.to_string();
    assert!(matches!(found, Mistrust::Unknown { .. }), "{text}");
    assert!(text.contains(&other.public().to_string()), "{text}");
    assert!(text.contains(&world.key.public().to_string()), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_that_was_changed_after_signing_is_refused() {
    let world = World::new();
    let digest = world.write("v1", 1, Some(&world.key)).await;
    let object = world.manifest(&digest).await;
    let (line, seal) = lines(&object);
    for at in 0..line.len() - 1 {
        // Every byte of the signed line counts; the quickest way to see it is the check alone.
        let mut changed = line.clone();
        changed[at] ^= 1;
        let trust = Trust::new([world.key.public()]);
        // A byte that becomes a line feed moves the seal, so that there is none.
        let wrong = trust.check(&[changed, seal.clone()].concat()).expect_err("every byte is signed");
        assert!(matches!(wrong, Mistrust::Wrong { .. } | Mistrust::Missing { .. }), "byte {at}: {wrong}");
    }
    let text = String::from_utf8(line).unwrap();
    let changed = text.replace("\"name\":\"web\"", "\"name\":\"wab\"");
    assert_ne!(changed, text);
    let forged = world.forge([changed.into_bytes(), seal].concat()).await;
    assert_eq!(mistrust(&world.strict(), &forged).await, Mistrust::Wrong { key: world.key.public() });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signature_that_was_moved_to_another_manifest_is_refused() {
    let world = World::new();
    let signed = world.write("v1", 1, Some(&world.key)).await;
    let other = world.write("v2", 2, None).await;
    let (_, seal) = lines(&world.manifest(&signed).await);
    let (line, _) = lines(&world.manifest(&other).await);
    let forged = world.forge([line, seal].concat()).await;
    assert_eq!(mistrust(&world.strict(), &forged).await, Mistrust::Wrong { key: world.key.public() });
}

#[tokio::test(flavor = "multi_thread")]
async fn content_is_not_reused_from_what_is_not_trusted() {
    let world = World::new();
    world.write("v1", 1, None).await;
    let options = SessionOptions { sign: Some(world.key.clone()), ..SessionOptions::default() };
    let session = world.strict().begin(options).await.unwrap();
    let mut region = session.region(RegionKind::Task { pid: 1 }).await.unwrap();
    region.push(content::random(1 << 20, 1)).await.unwrap();
    region.finish(Vec::new()).await.unwrap();
    session.publish(&name(), "v2", Facts::default()).await.unwrap();
    let packs: Vec<_> = world.objects.list(Some(&Path::from("packs"))).try_collect().await.unwrap();
    assert_eq!(packs.len(), 2, "the second snapshot has packs of its own");
}
