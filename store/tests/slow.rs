//! Networks that are slow, stand still, fail and let credentials expire: what comes is right, or an error says why not.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use object_store::memory::InMemory;
use rewarm_report::{Class, Classify};
use rewarm_store::fault::{Faults, FaultyStore, Wrong};
use rewarm_store::{Error, Facts, Name, Reference, RegionKind, SessionOptions, Store, Target};

#[path = "contract/content.rs"]
mod content;
#[path = "contract/kept.rs"]
mod kept;

const KIB: usize = 1 << 10;

struct World {
    faults: Arc<Faults>,
    store: Store,
    content: Bytes,
}

async fn world(bytes: usize) -> World {
    let faults = Arc::new(Faults::default());
    let objects = FaultyStore::new(Arc::new(InMemory::new()), faults.clone());
    let store = Store::from_objects(Arc::new(objects), "slow");
    let half = bytes / 2;
    let content = Bytes::from([content::random(half, 1), content::compressible(half, 2)].concat());
    let world = World { faults, store, content };
    world.write().await.unwrap();
    world
}

impl World {
    async fn write(&self) -> rewarm_store::Result<()> {
        let session = self.store.begin(SessionOptions::default()).await?;
        let mut region = session.region(RegionKind::Task { pid: 1 }).await?;
        for begin in (0..self.content.len()).step_by(64 * KIB) {
            region.push(self.content.slice(begin..begin + 64 * KIB)).await?;
        }
        region.finish(Vec::new()).await?;
        session.publish(&name(), "v1", Facts::default()).await.map(drop)
    }

    async fn read(&self) -> rewarm_store::Result<()> {
        let store = "unused".parse()?;
        let reference = Reference { store, name: name(), target: Target::Tag("v1".into()) };
        let boot = self.store.resolve(&reference).await?.boot().await?;
        let sink = Arc::new(kept::Kept::new(boot.regions()[0].bytes));
        boot.fetch(0, sink.clone(), 4).await?;
        assert!(sink.into_bytes() == self.content, "a wrong byte");
        Ok(())
    }
}

fn name() -> Name {
    "web".parse().unwrap()
}

#[tokio::test]
async fn a_store_at_50_kb_a_second_is_slow_and_right() {
    let world = world(128 * KIB).await;
    world.faults.set(Wrong { bytes_per_second: 50_000, ..Wrong::default() });
    world.read().await.unwrap();
}

#[tokio::test]
async fn a_store_that_stalls_for_30_s_is_waited_for() {
    let world = world(512 * KIB).await;
    // From here on time passes only while everybody waits.
    tokio::time::pause();
    world.faults.set(Wrong { delay: Duration::from_secs(30), ..Wrong::default() });
    let begun = tokio::time::Instant::now();
    world.read().await.unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(4 * 30), "tag, manifest, boot object and content");
}

#[tokio::test]
async fn every_third_request_fails_and_nobody_notices() {
    let world = world(4096 * KIB).await;
    tokio::time::pause();
    world.faults.set(Wrong { every: 3, ..Wrong::default() });
    world.read().await.unwrap();
    assert!(world.faults.failed() > 0);
}

/// At whichever request the credentials expire: an error that says so, or, where they last, the right bytes.
#[tokio::test]
async fn credentials_that_expire_in_the_middle() {
    let world = world(4096 * KIB).await;
    let mut refused = 0;
    for allowed in 0.. {
        world.faults.set(Wrong { allowed: Some(allowed), ..Wrong::default() });
        match world.read().await {
            Ok(()) => break,
            Err(error) => {
                assert!(matches!(error, Error::Denied { .. }), "after {allowed}: {error:?}");
                assert_eq!(error.class(), Class::Failed);
                refused += 1;
            }
        }
    }
    assert!(refused > 3, "a restore takes more than {refused} requests");
    // Writing is refused as well, and what was there stays.
    for allowed in [0, 2, 5, 8] {
        world.faults.set(Wrong { allowed: Some(allowed), ..Wrong::default() });
        assert!(world.write().await.is_err(), "after {allowed}");
    }
    world.faults.set(Wrong::default());
    world.read().await.unwrap();
}
