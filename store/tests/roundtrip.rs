//! Random snapshots come back as they were, and reuse of older ones keeps its promise of locality.

use std::sync::Arc;

use bytes::Bytes;
use object_store::memory::InMemory;
use proptest::prelude::*;
use rewarm_store::{Compression, Facts, Name, Reference, RegionKind, SessionOptions, Store, Target};

#[path = "contract/content.rs"]
mod content;
#[path = "contract/kept.rs"]
mod kept;

const PAGE: usize = 4096;
const MIB: usize = 1 << 20;

/// A stretch of a region: which content, from which page of it, and how many pages.
#[derive(Debug, Clone)]
struct Stretch {
    compressible: bool,
    seed: u64,
    from: usize,
    pages: usize,
}

fn any_region() -> impl Strategy<Value = Vec<Stretch>> {
    let stretch = (any::<bool>(), 0..3u64, 0..300usize, 1..700usize)
        .prop_map(|(compressible, seed, from, pages)| Stretch { compressible, seed, from, pages });
    prop::collection::vec(stretch, 0..5)
}

fn bytes_of(region: &[Stretch]) -> Bytes {
    let mut out = Vec::new();
    for stretch in region {
        let make = if stretch.compressible { content::compressible } else { content::random };
        let whole = make(1000 * PAGE, stretch.seed);
        out.extend_from_slice(&whole[stretch.from * PAGE..(stretch.from + stretch.pages) * PAGE]);
    }
    out.into()
}

async fn write(store: &Store, tag: &str, regions: &[Bytes], step: usize, compression: Compression) -> u64 {
    let name: Name = "web".parse().unwrap();
    let destination = Some((name.clone(), tag.to_owned()));
    let session =
        store.begin(SessionOptions { compression, destination, ..SessionOptions::default() }).await.unwrap();
    for (n, content) in regions.iter().enumerate() {
        let mut region = session.region(RegionKind::Task { pid: n as u32 }).await.unwrap();
        for begin in (0..content.len()).step_by(step) {
            region.push(content.slice(begin..content.len().min(begin + step))).await.unwrap();
        }
        region.finish(Vec::new()).await.unwrap();
    }
    session.publish(&name, tag, Facts::default()).await.unwrap().totals.new_bytes
}

/// Checks every region and gives the requests that each took.
async fn check(store: &Store, tag: &str, regions: &[Bytes]) -> Vec<u64> {
    let target = Target::Tag(tag.to_owned());
    let reference = Reference { store: "unused".parse().unwrap(), name: "web".parse().unwrap(), target };
    let boot = store.resolve(&reference).await.unwrap().boot().await.unwrap();
    assert_eq!(boot.regions().len(), regions.len());
    let mut requests = Vec::new();
    for (n, content) in regions.iter().enumerate() {
        assert_eq!(boot.regions()[n].bytes, content.len() as u64);
        let sink = Arc::new(kept::Kept::new(content.len() as u64));
        requests.push(boot.fetch(n, sink.clone(), 3).await.unwrap().requests);
        assert!(sink.into_bytes() == *content, "region {n} of {tag} differs");
    }
    boot.verify(2).await.unwrap().whole().unwrap();
    requests
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn snapshots_read_back(
        first in prop::collection::vec(any_region(), 0..4),
        second in prop::collection::vec(any_region(), 0..4),
        step in 1..300usize,
        compression in prop_oneof![Just(Compression::Auto), Just(Compression::None), Just(Compression::Zstd(1))],
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let store = Store::from_objects(Arc::new(InMemory::new()), "memory");
            let first: Vec<Bytes> = first.iter().map(|region| bytes_of(region)).collect();
            let second: Vec<Bytes> = second.iter().map(|region| bytes_of(region)).collect();
            write(&store, "first", &first, step * PAGE, compression).await;
            write(&store, "second", &second, step * PAGE, compression).await;
            check(&store, "first", &first).await;
            check(&store, "second", &second).await;
        });
    }
}

/// Every fourth piece of 512 KiB of an older snapshot, with new content between them: reuse would spread the region over
/// 96 ranges, 2 MiB from each other. It may be spread over 128 for a GiB and 16 more, on top of what new content takes.
#[tokio::test(flavor = "multi_thread")]
async fn reuse_does_not_cost_locality() {
    let store = Store::from_objects(Arc::new(InMemory::new()), "memory");
    let old = content::random(192 * MIB, 1);
    write(&store, "old", std::slice::from_ref(&old), MIB, Compression::None).await;
    let fresh = content::random(96 * MIB / 4, 2);
    let mut mixed = Vec::new();
    for n in 0..96 {
        mixed.extend_from_slice(&old[n * 2 * MIB..][..MIB / 2]);
        mixed.extend_from_slice(&fresh[n * MIB / 4..][..MIB / 4]);
    }
    let mixed = Bytes::from(mixed);
    write(&store, "mixed", std::slice::from_ref(&mixed), MIB, Compression::None).await;
    let requests = check(&store, "mixed", std::slice::from_ref(&mixed)).await[0];
    let length = mixed.len() as u64;
    let allowed = 16 + length / (8 * MIB as u64);
    // Requests of 8 MiB for what is read on top.
    let plain = length.div_ceil(8 * MIB as u64) + 2 * length.div_ceil(32 * MIB as u64);
    assert!(
        requests <= allowed + plain,
        "{requests} requests, {allowed} ranges and {plain} for the length are allowed"
    );
}

/// A server that has changed a little between two snapshots.
#[tokio::test(flavor = "multi_thread")]
async fn what_has_not_changed_is_not_written_again() {
    let store = Store::from_objects(Arc::new(InMemory::new()), "memory");
    let before = content::random(128 * MIB, 1);
    write(&store, "before", std::slice::from_ref(&before), MIB, Compression::None).await;
    let mut after = before.to_vec();
    for n in 0..12 {
        let at = n * 10 * MIB + n * 13 * PAGE;
        after[at..at + 100].fill(n as u8);
    }
    let after = Bytes::from(after);
    let new_bytes = write(&store, "after", std::slice::from_ref(&after), MIB, Compression::None).await;
    assert!(new_bytes < 128 * MIB as u64 / 20, "{new_bytes} bytes are new");
    check(&store, "after", std::slice::from_ref(&after)).await;
}

/// Two processes of a tree that share what they hold, and one that holds it twice: stored once, and read back everywhere.
#[tokio::test(flavor = "multi_thread")]
async fn what_several_processes_hold_is_stored_once() {
    let store = Store::from_objects(Arc::new(InMemory::new()), "memory");
    let shared = content::random(8 * MIB, 1);
    let own = content::random(MIB, 2);
    let twice = Bytes::from([&shared[..], &own[..], &shared[..]].concat());
    let regions = [shared.clone(), shared.clone(), twice];
    let new_bytes = write(&store, "tree", &regions, MIB, Compression::None).await;
    let once = (shared.len() + own.len()) as u64;
    assert!(
        (once..once + once / 20).contains(&new_bytes),
        "{new_bytes} bytes are new, of {once} that differ"
    );
    check(&store, "tree", &regions).await;
}
