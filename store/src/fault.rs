//! A store that fails, delays, truncates and corrupts on demand, for tests.
//!
//! Wraps any other store. [`Faults`] is shared with the test, which may change it while requests are under way.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, UploadPart,
};
use tokio::sync::watch;

/// What goes wrong. Nothing does by default.
#[derive(Debug, Default, Clone)]
pub struct Wrong {
    /// One request out of so many fails for this once; 0 for none.
    pub every: u64,
    /// Requests of this kind on objects whose path begins so fail always.
    pub always: Option<(Operation, &'static str)>,
    /// Every request takes so much longer.
    pub delay: Duration,
    /// Answers with the content of an object whose path begins so are this much shorter, in bytes.
    pub truncate: Option<(&'static str, usize)>,
    /// The lowest bit of this byte of an object whose path begins so is flipped on the way out.
    pub flip: Option<(&'static str, u64)>,
    /// Conditions of writes are ignored, as Garage does.
    pub unconditional: bool,
    /// Answers come at so many bytes a second; 0 for as fast as can be.
    pub bytes_per_second: u64,
    /// Credentials are good for so many requests more, counted from [`Faults::set`].
    pub allowed: Option<u64>,
    /// Of the next requests on objects whose path begins so the one with this number, from 0, is never answered.
    pub silent: Option<(&'static str, u64)>,
}

/// A kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Reading an object or a part of it, and looking at it.
    Get,
    /// Writing a whole object.
    Put,
    /// Any step of a multipart upload.
    Multipart,
    /// Listing.
    List,
    /// Removing.
    Delete,
}

/// What goes wrong in a [`FaultyStore`], and what was counted.
#[derive(Debug, Default)]
pub struct Faults {
    wrong: Mutex<Wrong>,
    requests: AtomicU64,
    failed: AtomicU64,
    aborted: AtomicU64,
    traffic: watch::Sender<Traffic>,
}

/// Whether requests pass.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Traffic {
    #[default]
    Flows,
    /// It stands still after so many requests more.
    StopsAfter(u64),
    Stands,
}

impl Faults {
    /// What goes wrong from here on.
    pub fn set(&self, wrong: Wrong) {
        *self.lock() = wrong;
    }

    /// After so many requests more all traffic stands still, until [`Faults::go_on`].
    pub fn pause_at(&self, requests: u64) {
        self.traffic.send_replace(Traffic::StopsAfter(requests));
    }

    /// Waits until the traffic stands still.
    pub async fn paused(&self) {
        let mut traffic = self.traffic.subscribe();
        let _ = traffic.wait_for(|traffic| *traffic == Traffic::Stands).await;
    }

    /// Lets the traffic flow again.
    pub fn go_on(&self) {
        self.traffic.send_replace(Traffic::Flows);
    }

    /// Waits while traffic stands still, and stops it if this is the request for that.
    async fn traffic(&self) {
        self.traffic.send_if_modified(|traffic| {
            let next = match *traffic {
                Traffic::StopsAfter(0) => Traffic::Stands,
                Traffic::StopsAfter(left) => Traffic::StopsAfter(left - 1),
                as_it_is => as_it_is,
            };
            std::mem::replace(traffic, next) != next
        });
        let mut traffic = self.traffic.subscribe();
        let _ = traffic.wait_for(|traffic| *traffic != Traffic::Stands).await;
    }

    /// Requests so far.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Requests that were made to fail.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// Multipart uploads that were aborted.
    #[must_use]
    pub fn aborted(&self) -> u64 {
        self.aborted.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Wrong> {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn pass(&self, operation: Operation, path: &Path) -> object_store::Result<()> {
        self.traffic().await;
        let number = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        let wrong = self.lock().clone();
        if !self.is_allowed() {
            self.failed.fetch_add(1, Ordering::Relaxed);
            return Err(object_store::Error::PermissionDenied {
                path: path.to_string(),
                source: "the credentials have expired".into(),
            });
        }
        if self.is_silent(path) {
            std::future::pending::<()>().await;
        }
        if !wrong.delay.is_zero() {
            tokio::time::sleep(wrong.delay).await;
        }
        let always =
            wrong.always.is_some_and(|(o, begins)| o == operation && path.as_ref().starts_with(begins));
        if always || (wrong.every > 0 && number.is_multiple_of(wrong.every)) {
            self.failed.fetch_add(1, Ordering::Relaxed);
            let source = format!("request {number} fails on demand").into();
            return Err(object_store::Error::Generic { store: "FaultyStore", source });
        }
        Ok(())
    }

    /// Takes one of the requests for which credentials are still good.
    fn is_allowed(&self) -> bool {
        match &mut self.lock().allowed {
            None => true,
            Some(0) => false,
            Some(left) => {
                *left -= 1;
                true
            }
        }
    }

    /// Whether this is the request that is never answered.
    fn is_silent(&self, path: &Path) -> bool {
        let silent = &mut self.lock().silent;
        match silent {
            Some((begins, left)) if path.as_ref().starts_with(*begins) => match left.checked_sub(1) {
                Some(less) => *left = less,
                None => {
                    *silent = None;
                    return true;
                }
            },
            _ => {}
        }
        false
    }

    /// Waits as long as a slow network takes for so many bytes.
    async fn transfer(&self, bytes: usize) {
        let rate = self.lock().bytes_per_second;
        if rate > 0 {
            tokio::time::sleep(Duration::from_secs_f64(bytes as f64 / rate as f64)).await;
        }
    }

    fn spoil(&self, path: &Path, range: &Range<u64>, bytes: Bytes) -> Bytes {
        let wrong = self.lock().clone();
        let mut bytes = bytes.to_vec();
        if let Some((begins, less)) = wrong.truncate
            && path.as_ref().starts_with(begins)
        {
            bytes.truncate(bytes.len().saturating_sub(less));
        }
        if let Some((begins, at)) = wrong.flip
            && path.as_ref().starts_with(begins)
            && range.contains(&at)
            && let Some(byte) = bytes.get_mut((at - range.start) as usize)
        {
            *byte ^= 1;
        }
        bytes.into()
    }
}

/// A store that does what [`Faults`] say.
#[derive(Debug)]
pub struct FaultyStore {
    inner: Arc<dyn ObjectStore>,
    faults: Arc<Faults>,
}

impl FaultyStore {
    /// Wraps a store.
    #[must_use]
    pub fn new(inner: Arc<dyn ObjectStore>, faults: Arc<Faults>) -> Self {
        Self { inner, faults }
    }
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultyStore({})", self.inner)
    }
}

#[async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        mut options: PutOptions,
    ) -> object_store::Result<PutResult> {
        self.faults.pass(Operation::Put, location).await?;
        if self.faults.lock().unconditional {
            options.mode = object_store::PutMode::Overwrite;
        }
        self.inner.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.faults.pass(Operation::Multipart, location).await?;
        let inner = self.inner.put_multipart_opts(location, options).await?;
        Ok(Box::new(FaultyUpload { inner, faults: self.faults.clone(), location: location.clone() }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.faults.pass(Operation::Get, location).await?;
        let head = options.head;
        let mut answer = self.inner.get_opts(location, options).await?;
        if head {
            return Ok(answer);
        }
        let (meta, range, attributes) =
            (answer.meta.clone(), answer.range.clone(), answer.attributes.clone());
        let bytes = self.faults.spoil(location, &range, answer.bytes().await?);
        self.faults.transfer(bytes.len()).await;
        let payload = GetResultPayload::Stream(futures::stream::once(async { Ok(bytes) }).boxed());
        answer = GetResult { payload, meta, range, attributes, extensions: Default::default() };
        Ok(answer)
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        let (inner, faults) = (self.inner.clone(), self.faults.clone());
        let one = move |location: object_store::Result<Path>| {
            let (inner, faults) = (inner.clone(), faults.clone());
            async move {
                let location = location?;
                faults.pass(Operation::Delete, &location).await?;
                let stream = futures::stream::iter([Ok(location.clone())]).boxed();
                inner.delete_stream(stream).next().await.unwrap_or(Ok(location))
            }
        };
        locations.then(one).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        let (inner, faults, prefix) = (self.inner.clone(), self.faults.clone(), prefix.cloned());
        let listed = async move {
            match faults.pass(Operation::List, &prefix.clone().unwrap_or(Path::ROOT)).await {
                Ok(()) => inner.list(prefix.as_ref()),
                Err(error) => futures::stream::once(async { Err(error) }).boxed(),
            }
        };
        listed.flatten_stream().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.faults.pass(Operation::List, prefix.unwrap_or(&Path::ROOT)).await?;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.faults.pass(Operation::Put, to).await?;
        self.inner.copy_opts(from, to, options).await
    }
}

#[derive(Debug)]
struct FaultyUpload {
    inner: Box<dyn MultipartUpload>,
    faults: Arc<Faults>,
    location: Path,
}

#[async_trait]
impl MultipartUpload for FaultyUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let part = self.inner.put_part(data);
        let (faults, location) = (self.faults.clone(), self.location.clone());
        Box::pin(async move {
            faults.pass(Operation::Multipart, &location).await?;
            part.await
        })
    }

    async fn complete(&mut self) -> object_store::Result<PutResult> {
        self.faults.pass(Operation::Multipart, &self.location).await?;
        self.inner.complete().await
    }

    async fn abort(&mut self) -> object_store::Result<()> {
        self.faults.aborted.fetch_add(1, Ordering::Relaxed);
        self.inner.abort().await
    }
}
