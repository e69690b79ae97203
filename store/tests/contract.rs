//! One suite for every kind of store: folder, memory, a faulty one, and real servers of three protocols.

#![expect(clippy::print_stderr, reason = "a skipped test says so")]

#[path = "contract/content.rs"]
mod content;
#[path = "contract/kept.rs"]
mod kept;
#[path = "contract/servers.rs"]
mod servers;
#[path = "contract/suite.rs"]
mod suite;

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use object_store::memory::InMemory;
use rewarm_report::{Class, Classify};
use rewarm_store::fault::{Faults, FaultyStore, Wrong};
use rewarm_store::{Error, Store, StoreUrl};

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

/// Every fifth request fails once: the suite must not notice.
#[tokio::test(flavor = "multi_thread")]
async fn faulty() {
    let faults = Arc::new(Faults::default());
    let objects = Arc::new(FaultyStore::new(Arc::new(InMemory::new()), faults.clone()));
    faults.set(Wrong { every: 5, ..Wrong::default() });
    suite::run(&|| std::future::ready(Ok(Store::from_objects(objects.clone(), "faulty")))).await;
    assert!(faults.failed() > 10, "{faults:?}");
}

/// The claims on a tag's numbers take the place of conditional writes.
#[tokio::test(flavor = "multi_thread")]
async fn without_conditions() {
    let faults = Arc::new(Faults::default());
    let objects = Arc::new(FaultyStore::new(Arc::new(InMemory::new()), faults.clone()));
    faults.set(Wrong { unconditional: true, delay: Duration::from_millis(1), ..Wrong::default() });
    suite::run(&|| std::future::ready(Ok(Store::from_objects(objects.clone(), "unconditional")))).await;
    for round in 0..20 {
        suite::race_of_many(
            &Store::from_objects(objects.clone(), "unconditional"),
            &format!("race{round}"),
            4,
        )
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn garage() {
    let Some(server) = servers::garage() else { return };
    run_on(&server).await;
    let wrong = server.with_options(&[("secret_access_key", "wrong")]);
    refused(&wrong).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn azurite() {
    let Some(server) = servers::azurite() else { return };
    run_on(&server).await;
    let wrong = server.with_options(&[("account_key", "d3Jvbmc=")]);
    refused(&wrong).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gcs() {
    let Some(server) = servers::gcs() else { return };
    run_on(&server).await;
}

async fn run_on(server: &servers::Server) {
    let url = server.url();
    suite::run(&|| Store::open(&url)).await;
    let missing = Store::open(&server.other_bucket()).await.unwrap();
    for error in
        [missing.begin(suite::destination("x")).await.unwrap_err(), missing.list().await.unwrap_err()]
    {
        assert_eq!(error.class(), Class::NotFound, "{error:?}");
    }
}

async fn refused(url: &StoreUrl) {
    let store = Store::open(url).await.unwrap();
    let begun = Instant::now();
    for error in [store.begin(suite::destination("x")).await.unwrap_err(), store.list().await.unwrap_err()] {
        assert!(matches!(error, Error::Denied { .. }), "{error:?}");
        assert_eq!(error.class(), Class::Failed);
    }
    assert!(begun.elapsed() < Duration::from_secs(5), "took {:?}", begun.elapsed());
}

/// The library asks the metadata service of a cloud last, which gives nothing on a machine of no cloud.
#[tokio::test(flavor = "multi_thread")]
async fn no_credentials() {
    let given = || {
        std::env::vars_os().map(|(name, _)| name).filter(|name| name.as_encoded_bytes().starts_with(b"AWS_"))
    };
    if given().next().is_some() {
        // Somebody's own: the same again without them.
        let mut without = Command::new(std::env::current_exe().unwrap());
        for name in given() {
            without.env_remove(name);
        }
        let told = without.args(["--exact", "no_credentials"]).output().unwrap();
        let text = String::from_utf8_lossy(&told.stdout);
        assert!(told.status.success() && text.contains("1 passed"), "{told:?}");
        return;
    }
    let url = "s3://b?endpoint=http://127.0.0.1:9&connect_timeout=1%20s";
    let store = Store::open(&url.parse().unwrap()).await.unwrap();
    let error = store.list().await.unwrap_err();
    assert!(matches!(error, Error::NoCredentials { .. }), "{error:?}");
    assert_eq!(error.class(), Class::Failed);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_listens() {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let url = format!("s3://b?endpoint=http://127.0.0.1:{port}&access_key_id=a&secret_access_key=b");
    let store = Store::open(&url.parse().unwrap()).await.unwrap();
    let begun = Instant::now();
    let error = store.list().await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert_eq!(error.class(), Class::Failed);
    assert!(begun.elapsed() < Duration::from_secs(15), "took {:?}", begun.elapsed());
}
