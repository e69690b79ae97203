//! One suite for every kind of store: folder, memory, a faulty one, and real servers of three protocols.

#[path = "contract/content.rs"]
mod content;
#[path = "contract/suite.rs"]
mod suite;

use std::sync::Arc;

use object_store::memory::InMemory;
use rewarm_store::{Store, StoreUrl};

#[tokio::test(flavor = "multi_thread")]
async fn folder() {
    let folder = tempfile::tempdir().unwrap();
    let url: StoreUrl = folder.path().join("not/yet there").to_str().unwrap().parse().unwrap();
    suite::run(&|| Store::open(&url)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory() {
    let objects = Arc::new(InMemory::new());
    suite::run(&|| std::future::ready(Ok(Store::from_objects(objects.clone(), "memory")))).await;
}
