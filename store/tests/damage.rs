//! Damage of every kind of object is found and named, and no wrong byte is given out.

use std::sync::Arc;

use bytes::Bytes;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use rewarm_report::{Class, Classify};
use rewarm_store::fault::{Faults, FaultyStore, Operation, Wrong};
use rewarm_store::{
    Damage, Digest, Error, Facts, Name, Reference, RegionKind, SessionOptions, Sink, Snapshot, Store, Target,
};

use futures::TryStreamExt;

#[path = "contract/content.rs"]
mod content;

const MIB: usize = 1 << 20;

struct World {
    objects: Arc<InMemory>,
    store: Store,
    content: [Bytes; 2],
}

/// A snapshot of two regions in three packs, and the store that it lies in.
async fn world() -> World {
    let objects = Arc::new(InMemory::new());
    let store = Store::from_objects(objects.clone(), "memory");
    let content = [content::random(70 * MIB, 1), content::compressible(4 * MIB, 2)];
    write(&store, &content, Facts::default()).await.unwrap();
    World { objects, store, content }
}

async fn write(store: &Store, content: &[Bytes], facts: Facts) -> rewarm_store::Result<Digest> {
    let options = SessionOptions { destination: Some((name(), "v1".into())), ..SessionOptions::default() };
    let session = store.begin(options).await?;
    for (n, content) in content.iter().enumerate() {
        let mut region = session.region(RegionKind::Task { pid: n as u32 }).await?;
        for begin in (0..content.len()).step_by(MIB) {
            region.push(content.slice(begin..content.len().min(begin + MIB))).await?;
        }
        region.finish(Vec::new()).await?;
    }
    session.skeleton("core-1.img", content::random(10_000, 9))?;
    Ok(session.publish(&name(), "v1", facts).await?.digest)
}

fn name() -> Name {
    "web".parse().unwrap()
}

fn reference() -> Reference {
    Reference { store: "unused".parse().unwrap(), name: name(), target: Target::Tag("v1".into()) }
}

impl World {
    async fn objects_below(&self, folder: &str) -> Vec<Path> {
        let folder = Path::from(folder);
        self.objects.list(Some(&folder)).map_ok(|meta| meta.location).try_collect().await.unwrap()
    }

    async fn change(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) -> Bytes {
        let before = self.objects.get(path).await.unwrap().bytes().await.unwrap();
        let mut bytes = before.to_vec();
        change(&mut bytes);
        self.objects.put(path, bytes.into()).await.unwrap();
        before
    }

    async fn read_all(&self) -> rewarm_store::Result<()> {
        let boot = self.store.resolve(&reference()).await?.boot().await?;
        for (n, content) in self.content.iter().enumerate() {
            boot.fetch(n, Arc::new(Only(content.clone())), 4).await?;
        }
        boot.verify(4).await?.whole()?;
        Ok(())
    }
}

/// Takes nothing but the right bytes.
struct Only(Bytes);

impl Sink for Only {
    fn put(&self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        let offset = offset as usize;
        assert!(self.0[offset..offset + bytes.len()] == *bytes, "a wrong byte was given out");
        Ok(())
    }
}

fn damage(result: rewarm_store::Result<()>, object: &Path) -> Damage {
    let error = result.expect_err(object.as_ref());
    assert_eq!(error.class(), Class::Integrity, "{error:?}");
    assert!(error.to_string().contains(object.as_ref()), "{error} does not name {object}");
    match error {
        Error::Damaged { source, .. } => *source,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_found_in_every_kind_of_object() {
    let world = world().await;
    world.read_all().await.unwrap();
    for folder in ["manifests", "boots", "packs"] {
        for path in world.objects_below(folder).await {
            let length = world.objects.head(&path).await.unwrap().size as usize;
            for at in [0, 20, length / 2, length - 60, length - 1] {
                if folder == "packs" && at == 0 {
                    // The header of a pack is for people: nothing is decided by it.
                    continue;
                }
                let before = world.change(&path, |bytes| bytes[at] ^= 0x40).await;
                damage(world.read_all().await, &path);
                world.objects.put(&path, before.into()).await.unwrap();
            }
        }
    }
    world.read_all().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_object_is_found() {
    let world = world().await;
    for folder in ["manifests", "boots", "packs"] {
        for path in world.objects_below(folder).await {
            let before = world.change(&path, |bytes| bytes.truncate(bytes.len() / 2)).await;
            damage(world.read_all().await, &path);
            world.objects.put(&path, before.into()).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_object_is_damage_where_a_manifest_names_it() {
    let world = world().await;
    for folder in ["boots", "packs"] {
        for path in world.objects_below(folder).await {
            let before = world.objects.get(&path).await.unwrap().bytes().await.unwrap();
            world.objects.delete(&path).await.unwrap();
            assert!(matches!(damage(world.read_all().await, &path), Damage::Missing));
            world.objects.put(&path, before.into()).await.unwrap();
        }
    }
    for path in world.objects_below("manifests").await {
        world.objects.delete(&path).await.unwrap();
    }
    assert_eq!(world.read_all().await.unwrap_err().class(), Class::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_packs_that_change_places_are_found() {
    let world = world().await;
    let packs = world.objects_below("packs").await;
    let first = world.objects.get(&packs[0]).await.unwrap().bytes().await.unwrap();
    world
        .change(&packs[1], |bytes| {
            let length = bytes.len().min(first.len());
            bytes[..length].copy_from_slice(&first[..length]);
        })
        .await;
    assert!(matches!(damage(world.read_all().await, &packs[1]), Damage::Chunk { .. } | Damage::Codec { .. }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_format_is_incompatible_and_names_both_versions() {
    let world = world().await;
    let manifest = world.objects_below("manifests").await.remove(0);
    let bytes = world.objects.get(&manifest).await.unwrap().bytes().await.unwrap();
    let next = rewarm_store::format::FORMAT_NEWEST + 1;
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    let (_, rest) = text.split_once(',').expect("a manifest begins with its format");
    let newer = format!("{{\"format\":{next},\"new\":true,{rest}");
    let digest = Digest::of(newer.as_bytes());
    let path = Path::from(format!("manifests/{}", digest.to_string().trim_start_matches("blake3:")));
    world.objects.put(&path, newer.into()).await.unwrap();
    let by_digest = Reference { target: Target::Digest(digest), ..reference() };
    let error = world.store.resolve(&by_digest).await.unwrap_err();
    assert_eq!(error.class(), Class::Incompatible);
    let expected =
        format!("has format {next}, this program reads up to format {}", rewarm_store::format::FORMAT_NEWEST);
    assert!(error.to_string().ends_with(&expected), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_damages_on_the_way_gives_out_nothing() {
    let world = world().await;
    let faults = Arc::new(Faults::default());
    let objects = Arc::new(FaultyStore::new(world.objects.clone(), faults.clone()));
    let store = Store::from_objects(objects, "faulty");
    for wrong in [
        Wrong { flip: Some(("packs", 1 << 20)), ..Wrong::default() },
        Wrong { truncate: Some(("packs", 1)), ..Wrong::default() },
        Wrong { flip: Some(("boots", 100)), ..Wrong::default() },
        Wrong { truncate: Some(("manifests", 5)), ..Wrong::default() },
    ] {
        faults.set(wrong.clone());
        let boot = async { store.resolve(&reference()).await?.boot().await };
        let result = match boot.await {
            Ok(boot) => boot.fetch(0, Arc::new(Only(world.content[0].clone())), 4).await.map(drop),
            Err(error) => Err(error),
        };
        assert_eq!(result.unwrap_err().class(), Class::Integrity, "{wrong:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sink_that_fails_ends_the_fetch() {
    struct Broken;
    impl Sink for Broken {
        fn put(&self, _: u64, _: &[u8]) -> std::io::Result<()> {
            Err(std::io::Error::other("no room"))
        }
    }
    let world = world().await;
    let snapshot: Snapshot = world.store.resolve(&reference()).await.unwrap();
    let error = snapshot.boot().await.unwrap().fetch(0, Arc::new(Broken), 4).await.unwrap_err();
    assert!(matches!(error, Error::Sink { region: 0, .. }), "{error:?}");
}

/// A store that fails for good at any step of writing: the caller hears it, and nothing is visible.
#[tokio::test(flavor = "multi_thread")]
async fn failing_for_good_while_writing_leaves_nothing_visible() {
    let content = [content::random(70 * MIB, 3)];
    for always in [
        (Operation::Put, "boots"),
        (Operation::Put, "manifests"),
        (Operation::Put, "tags"),
        (Operation::Put, "packs"),
    ] {
        let faults = Arc::new(Faults::default());
        let inner = Arc::new(InMemory::new());
        let store = Store::from_objects(Arc::new(FaultyStore::new(inner.clone(), faults.clone())), "faulty");
        // Packs go in parts first: both ways must fail for the session to fail.
        let every = if always.1 == "packs" { 1 } else { 0 };
        faults.set(Wrong { always: Some(always), ..Wrong::default() });
        let error = if every == 0 {
            write(&store, &content, Facts::default()).await.unwrap_err()
        } else {
            let session = store.begin(SessionOptions::default()).await.unwrap();
            faults.set(Wrong { every: 1, ..Wrong::default() });
            push_until_it_fails(&session, &content[0]).await
        };
        assert_eq!(error.class(), Class::Failed, "{always:?}: {error:?}");
        faults.set(Wrong::default());
        assert!(store.list().await.unwrap().is_empty(), "{always:?}");
    }
}

async fn push_until_it_fails(session: &rewarm_store::Session, content: &Bytes) -> Error {
    let mut region = session.region(RegionKind::Task { pid: 1 }).await.unwrap();
    for round in 0..100 {
        let content = content::random(content.len().min(16 * MIB), 50 + round);
        if let Err(error) = region.push(content).await {
            return error;
        }
    }
    region.finish(Vec::new()).await.expect_err("packs cannot be written")
}

/// What a dropped session had begun to send is aborted, what it had sent is removed.
#[tokio::test(flavor = "multi_thread")]
async fn an_aborted_session_leaves_no_object() {
    let faults = Arc::new(Faults::default());
    let inner = Arc::new(InMemory::new());
    let store = Store::from_objects(Arc::new(FaultyStore::new(inner.clone(), faults.clone())), "faulty");
    let session = store.begin(SessionOptions::default()).await.unwrap();
    let mut region = session.region(RegionKind::Task { pid: 1 }).await.unwrap();
    for n in 0..50 {
        region.push(content::random(MIB, 70 + n)).await.unwrap();
    }
    region.finish(Vec::new()).await.unwrap();
    session.abort().await;
    let left: Vec<_> = inner.list(None).try_collect().await.unwrap();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(faults.aborted(), 1, "the pack that was being filled");
}
