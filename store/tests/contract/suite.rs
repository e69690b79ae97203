//! What every store must do.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rewarm_report::{Class, Classify};
use rewarm_store::{
    Collect, Error, Facts, Name, Published, Reference, RegionKind, Session, SessionOptions, Snapshot, Store,
    Target,
};

use crate::content::{compressible, random};
use crate::kept::Kept;

const MIB: usize = 1 << 20;

/// Runs the suite; `open` opens the same store anew.
pub(crate) async fn run<F>(open: &dyn Fn() -> F)
where
    F: Future<Output = rewarm_store::Result<Store>>,
{
    what_is_written_is_read(&open().await.unwrap()).await;
    what_is_there_is_not_written_again(&open().await.unwrap()).await;
    dropping_a_session_leaves_nothing_visible(&open().await.unwrap()).await;
    of_two_snapshots_at_once_one_wins(&open().await.unwrap(), &open().await.unwrap()).await;
    unknown_references_are_not_found(&open().await.unwrap()).await;
    what_is_removed_is_collected_and_nothing_else(&open().await.unwrap()).await;
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn reference(name: &Name, tag: &str) -> Reference {
    Reference { store: "unused".parse().unwrap(), name: name.clone(), target: Target::Tag(tag.to_owned()) }
}

/// Options of a session that will publish `NAME@v1`.
pub(crate) fn destination(text: &str) -> SessionOptions {
    SessionOptions { destination: Some((name(text), "v1".to_owned())), ..SessionOptions::default() }
}

async fn write_region(session: &Session, kind: RegionKind, content: &Bytes, step: usize) {
    let mut region = session.region(kind).await.unwrap();
    for begin in (0..content.len()).step_by(step) {
        region.push(content.slice(begin..content.len().min(begin + step))).await.unwrap();
    }
    region.finish(b"meta".to_vec()).await.unwrap();
}

async fn read_region(snapshot: &Snapshot, region: usize) -> Vec<u8> {
    let boot = snapshot.boot().await.unwrap();
    let sink = Arc::new(Kept::new(boot.regions()[region].bytes));
    boot.fetch(region, sink.clone(), 4).await.unwrap();
    sink.into_bytes()
}

async fn publish_one(store: &Store, name: &Name, content: &Bytes) -> Published {
    let session = store.begin(destination(name.as_str())).await.unwrap();
    write_region(&session, RegionKind::Task { pid: 1 }, content, MIB).await;
    session.publish(name, "v1", Facts::default()).await.unwrap()
}

async fn what_is_written_is_read(store: &Store) {
    let web = name("web");
    let contents = [random(70 * MIB, 1), compressible(9 * MIB + 4096, 2), Bytes::new(), random(4096, 3)];
    let kinds = [
        RegionKind::Task { pid: 1 },
        RegionKind::Shmem { id: 7 },
        RegionKind::Tree { name: "upper".into() },
        RegionKind::File { name: "ghost".into() },
    ];
    let session = store.begin(destination("web")).await.unwrap();
    for (n, (content, kind)) in contents.iter().zip(&kinds).enumerate() {
        write_region(&session, kind.clone(), content, [MIB, 4096, MIB, 4096][n]).await;
    }
    session.skeleton("core-1.img", Bytes::from_static(b"core")).unwrap();
    let facts = Facts { kernel: "6.18.0".into(), ports: vec![80], ..Facts::default() };
    let published = session.publish(&web, "v1", facts.clone()).await.unwrap();
    assert_eq!(published.number, 1);
    assert_eq!(published.totals.content_bytes, contents.iter().map(|c| c.len() as u64).sum::<u64>());
    assert!(published.totals.new_bytes < published.totals.content_bytes);

    let snapshot = store.resolve(&reference(&web, "v1")).await.unwrap();
    assert_eq!(snapshot.digest(), published.digest);
    assert_eq!(snapshot.manifest().facts, facts);
    let boot = snapshot.boot().await.unwrap();
    assert_eq!(boot.skeleton()["core-1.img"], "core");
    let found: Vec<_> = boot.regions().iter().map(|region| region.kind.clone()).collect();
    assert_eq!(found, kinds);
    for (n, content) in contents.iter().enumerate() {
        assert_eq!(boot.regions()[n].meta, "meta");
        assert!(read_region(&snapshot, n).await == *content, "region {n} differs");
    }
    let map = boot.chunks(1).await.unwrap();
    for n in [0, map.len() / 2, map.len() - 1] {
        let chunk = map.get(n).unwrap();
        let begin = chunk.offset as usize;
        assert_eq!(boot.read_chunk(1, n).await.unwrap(), contents[1][begin..begin + chunk.bytes as usize]);
        assert_eq!(map.at(chunk.offset + 1), Some(n));
    }
    let verified = boot.verify(4).await.unwrap().whole().unwrap();
    assert_eq!(verified.bytes, published.totals.content_bytes);
    let listed = store.list().await.unwrap();
    assert!(listed.iter().any(|l| l.name == "web" && l.tag == "v1" && l.index.number == 1));
}

async fn what_is_there_is_not_written_again(store: &Store) {
    let again = name("again");
    let content = random(24 * MIB, 10);
    publish_one(store, &again, &content).await;
    let mut changed = content.to_vec();
    changed[5 * MIB..5 * MIB + 10].fill(9);
    changed.extend_from_slice(&random(4096, 11));
    let changed = Bytes::from(changed);
    let second = publish_one(store, &again, &changed).await;
    assert!(second.totals.new_bytes < 4 * MIB as u64, "{:?}", second.totals);
    assert_eq!(second.number, 2);
    let snapshot = store.resolve(&reference(&again, "v1")).await.unwrap();
    assert!(read_region(&snapshot, 0).await == changed);
}

async fn dropping_a_session_leaves_nothing_visible(store: &Store) {
    let lost = name("lost");
    let session = store.begin(destination("lost")).await.unwrap();
    write_region(&session, RegionKind::Task { pid: 1 }, &random(40 * MIB, 20), MIB).await;
    session.abort().await;
    let error = store.resolve(&reference(&lost, "v1")).await.unwrap_err();
    assert_eq!(error.class(), Class::NotFound);
    assert!(!store.list().await.unwrap().iter().any(|listed| listed.name == "lost"));
}

async fn of_two_snapshots_at_once_one_wins(first: &Store, second: &Store) {
    let race = name("race");
    let mut sessions = Vec::new();
    for (n, store) in [first, second].into_iter().enumerate() {
        let session = store.begin(destination("race")).await.unwrap();
        write_region(&session, RegionKind::Task { pid: 1 }, &random(MIB, 30 + n as u64), MIB).await;
        sessions.push(session);
    }
    let two = sessions.pop().unwrap().publish(&race, "v1", Facts::default());
    let one = sessions.pop().unwrap().publish(&race, "v1", Facts::default());
    let results: [_; 2] = tokio::join!(one, two).into();
    let won: Vec<_> = results.iter().filter_map(|result| result.as_ref().ok()).collect();
    assert_eq!(won.len(), 1, "{results:?}");
    let lost = results.iter().find_map(|result| result.as_ref().err()).unwrap();
    assert!(matches!(lost, Error::TagTaken { .. }), "{lost:?}");
    assert_eq!(lost.class(), Class::Failed);
    assert!(lost.to_string().contains("another snapshot took this tag at the same time"), "{lost}");
    let snapshot = first.resolve(&reference(&race, "v1")).await.unwrap();
    assert_eq!(snapshot.digest(), won[0].digest);
    snapshot.boot().await.unwrap().verify(2).await.unwrap().whole().unwrap();
}

/// Of `count` snapshots at once exactly one wins.
pub(crate) async fn race_of_many(store: &Store, text: &str, count: u64) {
    let race = name(text);
    let mut sessions = Vec::new();
    for n in 0..count {
        let session = store.begin(destination(text)).await.unwrap();
        write_region(&session, RegionKind::Task { pid: 1 }, &random(4096, 100 + n), 4096).await;
        sessions.push(session);
    }
    let mut publishing = Vec::new();
    for session in sessions {
        let race = race.clone();
        publishing.push(tokio::spawn(async move { session.publish(&race, "v1", Facts::default()).await }));
    }
    let mut won = Vec::new();
    for publishing in publishing {
        match publishing.await.unwrap() {
            Ok(published) => won.push(published.digest),
            Err(error) => assert!(matches!(error, Error::TagTaken { .. }), "{error:?}"),
        }
    }
    assert_eq!(won.len(), 1, "{text}");
    let snapshot = store.resolve(&reference(&race, "v1")).await.unwrap();
    assert_eq!(snapshot.digest(), won[0]);
    snapshot.boot().await.unwrap().verify(2).await.unwrap().whole().unwrap();
}

/// Removes one of two snapshots that share content, and copies the other before both are gone.
async fn what_is_removed_is_collected_and_nothing_else(store: &Store) {
    let [gone, kept] = ["gone", "kept"].map(name);
    let (shared, own) = (random(8 * MIB, 200), random(8 * MIB, 201));
    let both = Bytes::from([&shared[..], &own[..]].concat());
    publish_one(store, &kept, &shared).await;
    publish_one(store, &gone, &both).await;
    let listed = store.list().await.unwrap();
    let usage = store.usage(&listed).await.unwrap();
    let of = |name: &str| usage[listed.iter().position(|one| one.name == name).unwrap()];
    assert!(of("gone").unique_bytes > 7 * MIB as u64 && of("kept").unique_bytes < MIB as u64, "{usage:?}");
    store.remove(&gone, &Target::Tag("v1".into())).await.unwrap();
    let marked = store.collect(Collect { grace: Duration::from_secs(3600), dry_run: false }).await.unwrap();
    assert!(marked.marked.bytes > 7 * MIB as u64 && marked.removed.objects == 0, "{marked:?}");
    let removed = store.collect(Collect { grace: Duration::ZERO, dry_run: false }).await.unwrap();
    assert_eq!(removed.removed, marked.marked);
    assert_eq!(store.resolve(&reference(&gone, "v1")).await.unwrap_err().class(), Class::NotFound);
    let snapshot = store.resolve(&reference(&kept, "v1")).await.unwrap();
    let copied = store.copy_from(&snapshot, &name("copy"), "v1").await.unwrap();
    assert_eq!((copied.objects, copied.number), (0, 1));
    for listed in store.list().await.unwrap() {
        let reference = reference(&name(&listed.name), &listed.tag);
        let boot = store.resolve(&reference).await.unwrap().boot().await.unwrap();
        boot.verify(2).await.unwrap().whole().unwrap();
    }
}

async fn unknown_references_are_not_found(store: &Store) {
    let digest = rewarm_store::Digest::of(b"nothing");
    let by_digest = Reference { target: Target::Digest(digest), ..reference(&name("web"), "v1") };
    for unknown in [reference(&name("web"), "v9"), reference(&name("nobody"), "latest"), by_digest] {
        let error = store.resolve(&unknown).await.unwrap_err();
        assert_eq!(error.class(), Class::NotFound, "{unknown}: {error:?}");
    }
}
