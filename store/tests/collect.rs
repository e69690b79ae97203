//! Removing and collecting: nothing that anybody needs goes, beside running snapshots, restores and other runs of gc.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use rewarm_report::{Class, Classify};
use rewarm_store::fault::{Faults, FaultyStore, Operation, Wrong};
use rewarm_store::{
    Collect, Collected, Digest, Error, Facts, Name, Reference, RegionKind, Session, SessionOptions, Store,
    Target,
};

#[path = "contract/content.rs"]
mod content;

const MIB: usize = 1 << 20;
/// Times of a store may be wrong against each other by so much; gc waits for longer.
const GRAIN: Duration = Duration::from_millis(2200);
/// Removes what is marked, at once.
const NOW: Collect = Collect { grace: Duration::ZERO, dry_run: false };
const LATER: Collect = Collect { grace: Duration::from_secs(3600), dry_run: false };

struct World {
    objects: Arc<InMemory>,
    faults: Arc<Faults>,
    store: Store,
}

impl World {
    fn new() -> Self {
        let (objects, faults) = (Arc::new(InMemory::new()), Arc::new(Faults::default()));
        let store =
            Store::from_objects(Arc::new(FaultyStore::new(objects.clone(), faults.clone())), "memory");
        Self { objects, faults, store }
    }

    async fn write(&self, tag: &str, seed: u64) -> Digest {
        let session = self.session(tag, seed).await;
        publish(session, tag).await.unwrap()
    }

    /// A session that has written or reused its content and is not published.
    async fn session(&self, tag: &str, seed: u64) -> Session {
        let destination = Some((name(), tag.to_owned()));
        let options = SessionOptions { destination, ..SessionOptions::default() };
        let session = self.store.begin(options).await.unwrap();
        let mut region = session.region(RegionKind::Task { pid: 1 }).await.unwrap();
        region.push(content::random(2 * MIB, seed)).await.unwrap();
        region.push(content::compressible(MIB, seed)).await.unwrap();
        region.finish(Vec::new()).await.unwrap();
        session
    }

    async fn paths(&self, folder: &str) -> Vec<String> {
        let folder = Path::from(folder);
        let listed: Vec<_> = self.objects.list(Some(&folder)).try_collect().await.unwrap();
        listed.into_iter().map(|meta| meta.location.to_string()).collect()
    }

    async fn remove(&self, tag: &str) {
        self.store.remove(&name(), &Target::Tag(tag.to_owned())).await.unwrap();
    }

    async fn verify(&self, tag: &str) {
        let boot = self.store.resolve(&by_tag(tag)).await.unwrap().boot().await.unwrap();
        boot.verify(2).await.unwrap().whole().unwrap();
    }

    async fn is_gone(&self, tag: &str) -> bool {
        matches!(self.store.resolve(&by_tag(tag)).await, Err(error) if error.class() == Class::NotFound)
    }

    async fn collect(&self, options: Collect) -> Collected {
        self.store.collect(options).await.unwrap()
    }
}

fn name() -> Name {
    "web".parse().unwrap()
}

fn by_tag(tag: &str) -> Reference {
    Reference { store: "unused".parse().unwrap(), name: name(), target: Target::Tag(tag.to_owned()) }
}

async fn publish(session: Session, tag: &str) -> rewarm_store::Result<Digest> {
    Ok(session.publish(&name(), tag, Facts::default()).await?.digest)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_tag_is_gone_from_sight_and_its_objects_are_not() {
    let world = World::new();
    let digest = world.write("v1", 1).await;
    world.write("v2", 2).await;
    let removed = world.store.remove(&name(), &Target::Tag("v1".into())).await.unwrap();
    assert_eq!((removed[0].manifests.as_slice(), removed[0].left), (&[digest][..], 0));
    assert!(world.is_gone("v1").await);
    assert_eq!(world.store.list().await.unwrap().len(), 1);
    // Who knows the digest reads it until gc has taken it away.
    let by_digest = Reference { target: Target::Digest(digest), ..by_tag("v1") };
    let boot = world.store.resolve(&by_digest).await.unwrap().boot().await.unwrap();
    boot.verify(2).await.unwrap().whole().unwrap();
    let again = world.store.remove(&name(), &Target::Tag("v1".into())).await.unwrap_err();
    assert_eq!(again.class(), Class::NotFound);
    // The tag can be used again.
    world.write("v1", 3).await;
    world.verify("v1").await;
}

/// Whoever comes second sees what the first has done: the snapshot fails, or the removal takes the new snapshot with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_removal_and_a_snapshot_at_once() {
    let world = World::new();
    world.write("v1", 1).await;
    let session = world.session("v1", 2).await;
    world.remove("v1").await;
    let error = publish(session, "v1").await.unwrap_err();
    assert!(matches!(error, Error::TagTaken { .. }), "{error:?}");
    assert!(world.is_gone("v1").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_variant_is_removed_by_its_digest_from_every_tag() {
    let world = World::new();
    let mut digests = Vec::new();
    for kernel in ["6.1", "6.18"] {
        let session = world.session("v1", 1).await;
        let facts = Facts { kernel: kernel.into(), ..Facts::default() };
        digests.push(session.publish(&name(), "v1", facts).await.unwrap().digest);
    }
    let removed = world.store.remove(&name(), &Target::Digest(digests[0])).await.unwrap();
    assert_eq!((removed[0].tag.as_str(), removed[0].left), ("v1", 1));
    assert_eq!(world.store.variants(&by_tag("v1")).await.unwrap(), [digests[1]]);
    let unknown = Digest::of(b"unknown");
    let error = world.store.remove(&name(), &Target::Digest(unknown)).await.unwrap_err();
    assert_eq!(error.class(), Class::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_is_marked_first_and_removed_when_the_grace_time_is_over() {
    let world = World::new();
    world.write("v1", 1).await;
    world.write("v2", 2).await;
    world.write("v2", 3).await;
    world.remove("v1").await;
    let before = world.paths("").await.len();
    let dry = world.collect(Collect { dry_run: true, ..NOW }).await;
    assert_eq!(world.paths("").await.len(), before, "a dry run changes nothing");
    let marked = world.collect(LATER).await;
    assert_eq!(marked.marked, dry.marked);
    // Two snapshots and three index objects of tags.
    assert_eq!((marked.marked.objects, marked.removed.objects), (2 * 3 + 3, 0));
    let waiting = world.collect(LATER).await;
    assert_eq!((waiting.waiting, waiting.removed.objects), (marked.marked, 0));
    let removed = world.collect(NOW).await;
    assert_eq!(removed.removed, marked.marked);
    world.verify("v2").await;
    assert_eq!(world.paths("packs").await.len(), 1);
    assert_eq!(world.paths("tombstones").await, [""; 0]);
    assert_eq!(world.paths("tags").await, ["tags/web/v2/000000002.json"]);
    let nothing = world.collect(NOW).await;
    assert_eq!((nothing.marked.objects, nothing.waiting.objects, nothing.removed.objects), (0, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pack_that_a_running_snapshot_wrote_stays() {
    let world = World::new();
    let session = world.session("v1", 1).await;
    tokio::time::sleep(GRAIN).await;
    for _ in 0..3 {
        let collected = world.collect(NOW).await;
        assert_eq!((collected.removed.objects, collected.sessions), (0, 1));
    }
    publish(session, "v1").await.unwrap();
    world.verify("v1").await;
    for _ in 0..2 {
        world.collect(NOW).await;
    }
    world.verify("v1").await;
}

/// The only snapshot that names a pack is removed, and gc runs as often as it likes, while another one that reuses the
/// pack is being written.
#[tokio::test(flavor = "multi_thread")]
async fn a_pack_that_a_running_snapshot_reuses_stays() {
    let world = World::new();
    world.write("old", 1).await;
    tokio::time::sleep(GRAIN).await;
    let session = world.session("new", 1).await;
    world.remove("old").await;
    for _ in 0..3 {
        let collected = world.collect(NOW).await;
        assert_eq!(collected.removed.objects, 0, "{collected:?}");
    }
    publish(session, "new").await.unwrap();
    assert_eq!(world.paths("packs").await.len(), 1, "the pack is reused");
    for _ in 0..3 {
        world.collect(NOW).await;
        world.verify("new").await;
    }
    assert!(world.is_gone("old").await);
}

/// What is marked is not referred to again: not by a session that begins afterwards, not by a copy.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_marked_is_not_reused() {
    let world = World::new();
    world.write("old", 1).await;
    let original = world.store.resolve(&by_tag("old")).await.unwrap();
    world.write("keep", 1).await;
    assert_eq!(world.paths("packs").await.len(), 1);
    world.remove("old").await;
    world.remove("keep").await;
    world.collect(LATER).await;
    let copied = world.store.copy_from(&original, &name(), "copy").await;
    assert!(matches!(copied, Err(Error::Doomed { .. })), "{copied:?}");
    world.write("new", 1).await;
    assert_eq!(world.paths("packs").await.len(), 2, "the content is written again");
    tokio::time::sleep(GRAIN).await;
    let collected = world.collect(NOW).await;
    assert!(collected.removed.objects > 0, "{collected:?}");
    world.verify("new").await;
}

/// A snapshot that was published while gc ran is alive again for the next run, and the wait begins anew.
#[tokio::test(flavor = "multi_thread")]
async fn what_comes_back_to_life_keeps_its_mark_and_its_place() {
    let world = World::new();
    world.write("old", 1).await;
    tokio::time::sleep(GRAIN).await;
    let session = world.session("new", 1).await;
    world.remove("old").await;
    // An older program, or one that knew nothing of this session, marks the pack.
    let pack = world.paths("packs").await.remove(0);
    let tombstone = Path::from(format!("tombstones/{pack}"));
    world.objects.put(&tombstone, Bytes::from_static(b"{}").into()).await.unwrap();
    publish(session, "new").await.unwrap();
    world.collect(NOW).await;
    world.verify("new").await;
    assert!(world.objects.head(&tombstone).await.is_ok());
    world.remove("new").await;
    world.collect(LATER).await;
    assert!(world.paths("packs").await.contains(&pack), "its own grace time has just begun");
}

/// A store that waits in the middle: gc has read the tags and stands still before it removes; meanwhile a snapshot that
/// wants the same content is taken.
#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_taken_while_gc_stands_still_at_every_request() {
    let at = |pause| tokio::spawn(a_snapshot_is_taken_while_gc_stands_still(pause));
    for round in (0..24).map(at).collect::<Vec<_>>() {
        round.await.unwrap();
    }
}

async fn a_snapshot_is_taken_while_gc_stands_still(pause: u64) {
    let world = World::new();
    world.write("old", 1).await;
    world.write("keep", 9).await;
    world.remove("old").await;
    world.collect(LATER).await;
    tokio::time::sleep(GRAIN).await;
    // gc has a store of its own over the same objects, so that only it is paused.
    let faults = Arc::new(Faults::default());
    let slow = Store::from_objects(Arc::new(FaultyStore::new(world.objects.clone(), faults.clone())), "slow");
    faults.pause_at(pause);
    let gc = tokio::spawn(async move { slow.collect(NOW).await });
    faults.paused().await;
    world.write("new", 1).await;
    faults.go_on();
    gc.await.unwrap().unwrap();
    world.verify("new").await;
    world.verify("keep").await;
    world.collect(NOW).await;
    world.verify("new").await;
}

/// The other way round: a snapshot stands still at some request while its source of reuse is removed and gc runs twice.
#[tokio::test(flavor = "multi_thread")]
async fn gc_runs_while_a_snapshot_stands_still_at_every_request() {
    for pause in 0..30 {
        let world = World::new();
        world.write("old", 1).await;
        tokio::time::sleep(GRAIN / 4).await;
        let faults = Arc::new(Faults::default());
        let objects = Arc::new(FaultyStore::new(world.objects.clone(), faults.clone()));
        let slow =
            World { store: Store::from_objects(objects, "slow"), objects: world.objects.clone(), faults };
        slow.faults.pause_at(pause);
        let faults = slow.faults.clone();
        let writing = tokio::spawn(async move { slow.write("new", 1).await });
        let stopped = tokio::select! {
            () = faults.paused() => true,
            () = async { while !writing.is_finished() { tokio::time::sleep(Duration::from_millis(1)).await } } => false,
        };
        world.remove("old").await;
        world.collect(NOW).await;
        world.collect(NOW).await;
        faults.go_on();
        writing.await.unwrap();
        world.verify("new").await;
        world.collect(NOW).await;
        world.verify("new").await;
        if !stopped {
            assert!(pause > 10, "a snapshot takes more than {pause} requests");
            break;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_runs_at_once_one_gives_way() {
    let world = World::new();
    world.write("v1", 1).await;
    world.remove("v1").await;
    world.collect(LATER).await;
    let faults = Arc::new(Faults::default());
    let slow = Store::from_objects(Arc::new(FaultyStore::new(world.objects.clone(), faults.clone())), "slow");
    // Its announcement is there, and it stands still.
    faults.pause_at(3);
    let first = tokio::spawn(async move { slow.collect(NOW).await });
    faults.paused().await;
    let second = world.store.collect(NOW).await;
    assert!(matches!(second, Err(Error::Collecting { .. })), "{second:?}");
    faults.go_on();
    first.await.unwrap().unwrap();
    assert_eq!(world.paths("collections").await, [""; 0]);
    world.collect(NOW).await;
}

/// Many of everything at once, for a while: every snapshot that was published stays whole until it is removed.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn snapshots_removals_and_gc_at_once() {
    let world = Arc::new(World::new());
    world.write("base", 0).await;
    let writers = (0..3u64).map(|writer| {
        let world = world.clone();
        tokio::spawn(async move {
            for round in 0..12u64 {
                let tag = format!("w{writer}-{}", round % 4);
                // Contents repeat, so that each reuses what others are about to remove.
                world.write(&tag, (writer + round) % 5).await;
                world.verify(&tag).await;
                if round % 3 == 2 {
                    world.remove(&tag).await;
                }
            }
        })
    });
    let writers: Vec<_> = writers.collect();
    let collectors = (0..2).map(|_| {
        let world = world.clone();
        tokio::spawn(async move {
            let mut ran = 0;
            for _ in 0..40 {
                match world.store.collect(NOW).await {
                    Ok(_) => ran += 1,
                    Err(Error::Collecting { .. }) => {}
                    Err(error) => panic!("{error:?}"),
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            ran
        })
    });
    let collectors: Vec<_> = collectors.collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let mut ran = 0;
    for collector in collectors {
        ran += collector.await.unwrap();
    }
    assert!(ran > 0, "no gc ran");
    for listed in world.store.list().await.unwrap() {
        world.verify(&listed.tag).await;
    }
}

/// While it reads, its snapshot is removed and gc runs: within the grace time nothing happens to it; without any, it gets
/// an error and never a wrong byte.
#[tokio::test(flavor = "multi_thread")]
async fn gc_while_a_restore_reads() {
    let world = World::new();
    world.write("v1", 1).await;
    let boot = world.store.resolve(&by_tag("v1")).await.unwrap().boot().await.unwrap();
    world.remove("v1").await;
    world.collect(LATER).await;
    world.collect(LATER).await;
    boot.verify(2).await.unwrap().whole().unwrap();
    world.collect(NOW).await;
    let error = boot.verify(2).await.unwrap().whole().unwrap_err();
    assert_eq!(error.class(), Class::Integrity, "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn gc_removes_nothing_while_it_cannot_tell_what_is_needed() {
    let world = World::new();
    world.write("v1", 1).await;
    world.write("v2", 2).await;
    world.remove("v1").await;
    world.collect(LATER).await;
    let before = world.paths("packs").await;
    world.faults.set(Wrong { flip: Some(("boots", 100)), ..Wrong::default() });
    assert_eq!(world.store.collect(NOW).await.unwrap_err().class(), Class::Integrity);
    world.faults.set(Wrong { always: Some((Operation::List, "tags")), ..Wrong::default() });
    assert_eq!(world.store.collect(NOW).await.unwrap_err().class(), Class::Failed);
    world.faults.set(Wrong::default());
    assert_eq!(world.paths("packs").await, before);
    assert_eq!(world.paths("collections").await, [""; 0]);
}

/// gc took a session for dead: it must not publish what may be gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_announcement_is_gone_does_not_publish() {
    let world = World::new();
    let session = world.session("v1", 1).await;
    for path in world.paths("sessions").await {
        world.objects.delete(&Path::from(path)).await.unwrap();
    }
    let error = publish(session, "v1").await.unwrap_err();
    assert!(matches!(error, Error::Lapsed { .. }), "{error:?}");
    assert!(world.is_gone("v1").await);
}

/// A machine that was stopped at whichever request, for so long that gc took its session for dead and has run twice: the
/// snapshot fails, or it is whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_taken_for_dead_at_every_request() {
    let (mut failed, mut published) = (0, 0);
    for pause in 0.. {
        let world = World::new();
        world.write("old", 1).await;
        world.remove("old").await;
        let faults = Arc::new(Faults::default());
        let objects = Arc::new(FaultyStore::new(world.objects.clone(), faults.clone()));
        let store = Store::from_objects(objects, "slow");
        let slow = World { store, objects: world.objects.clone(), faults: faults.clone() };
        faults.pause_at(pause);
        let writing = tokio::spawn(async move {
            let session = slow.session("new", 2).await;
            publish(session, "new").await
        });
        let stopped = tokio::select! {
            () = faults.paused() => true,
            () = async { while !writing.is_finished() { tokio::time::sleep(Duration::from_millis(1)).await } } => false,
        };
        for path in world.paths("sessions").await {
            world.objects.delete(&Path::from(path)).await.unwrap();
        }
        world.collect(NOW).await;
        world.collect(NOW).await;
        faults.go_on();
        match writing.await.unwrap() {
            Ok(_) => {
                published += 1;
                world.verify("new").await;
            }
            Err(error) => {
                failed += 1;
                assert!(matches!(error, Error::Lapsed { .. } | Error::Damaged { .. }), "{pause}: {error:?}");
                assert!(world.is_gone("new").await, "{pause}: a tag is left of {error:?}");
            }
        }
        if !stopped {
            break;
        }
    }
    assert!(failed > 5 && published > 2, "{failed} failed, {published} were published");
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_take_their_announcements_back() {
    let world = World::new();
    world.write("v1", 1).await;
    world.session("v2", 2).await.abort().await;
    assert_eq!(world.paths("sessions").await, [""; 0]);
    drop(world.session("v3", 3).await);
    let gone = async {
        while !world.paths("sessions").await.is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone).await.expect("a dropped session takes it back");
}
