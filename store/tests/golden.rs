//! A store that version 1 wrote: every later program reads it, byte for byte.
//!
//! `REWARM_GOLDEN=write` makes it anew, which is right only together with a new version of the format.

use std::path::Path;
use std::sync::Arc;

use rewarm_store::{Facts, Name, Reference, RegionKind, SessionOptions, Store, StoreUrl, Target};

#[path = "contract/content.rs"]
mod content;
#[path = "contract/kept.rs"]
mod kept;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/v1/store");

async fn write(url: &StoreUrl, name: &Name) {
    let store = Store::open(url).await.unwrap();
    let options = SessionOptions::default();
    let session = store.begin(options).await.unwrap();
    let contents = [content::random(32 << 10, 1), content::compressible(96 << 10, 2)];
    for (content, kind) in
        contents.into_iter().zip([RegionKind::Task { pid: 1 }, RegionKind::Shmem { id: 7 }])
    {
        let mut region = session.region(kind).await.unwrap();
        region.push(content).await.unwrap();
        region.finish(b"meta".to_vec()).await.unwrap();
    }
    session.skeleton("inventory.img", "inventory".into()).unwrap();
    let facts = Facts { kernel: "6.18.0".into(), ports: vec![8000], ..Facts::default() };
    session.publish(name, "v1", facts).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_of_version_1_is_read() {
    let url: StoreUrl = FOLDER.parse().unwrap();
    let name: Name = "web".parse().unwrap();
    if std::env::var_os("REWARM_GOLDEN").is_some_and(|value| value == "write") {
        if Path::new(FOLDER).exists() {
            std::fs::remove_dir_all(FOLDER).unwrap();
        }
        write(&url, &name).await;
    }
    let store = Store::open(&url).await.unwrap();
    let reference = Reference { store: url, name, target: Target::Tag("v1".into()) };
    let snapshot = store.resolve(&reference).await.unwrap();
    assert_eq!(snapshot.manifest().format, 1);
    assert_eq!(snapshot.manifest().facts.ports, [8000]);
    let boot = snapshot.boot().await.unwrap();
    assert_eq!(boot.skeleton()["inventory.img"], "inventory");
    let contents = [content::random(32 << 10, 1), content::compressible(96 << 10, 2)];
    for (n, content) in contents.iter().enumerate() {
        assert_eq!(boot.regions()[n].meta, "meta");
        let sink = Arc::new(kept::Kept::new(boot.regions()[n].bytes));
        boot.fetch(n, sink.clone(), 2).await.unwrap();
        assert!(sink.into_bytes() == *content, "region {n} differs");
    }
    boot.verify(2).await.unwrap().whole().unwrap();
}
