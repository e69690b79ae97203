//! Requests to a store: attempts with backoff, bounded answers, and errors that say what a caller can do.
//!
//! Everything above this file sees whole objects or whole ranges, or an [`Error`]; `object_store` is not used directly
//! elsewhere but for multipart uploads.

use std::error::Error as StdError;
use std::fmt::Display;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, TryStreamExt};
use object_store::client::{HttpError, HttpErrorKind};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutPayload};

use crate::cache::PackCache;
use crate::error::{Damage, Error, Result};
use crate::files::Files;
use crate::limits::{ATTEMPTS, BACKOFF, BACKOFF_MAX};

/// A store's objects.
#[derive(Debug, Clone)]
pub(crate) struct Objects {
    store: Arc<dyn ObjectStore>,
    /// The store as the user wrote it, for errors.
    name: Arc<str>,
    /// The files that objects are, if they are.
    files: Option<Arc<dyn Files>>,
    /// Copies of packs that are nearer, if there are any.
    cache: Option<Arc<dyn PackCache>>,
}

/// An object as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Dated {
    pub(crate) path: Path,
    pub(crate) bytes: u64,
    /// When it was last written, by the store's clock, in milliseconds since 1970.
    pub(crate) modified_ms: i64,
}

/// What became of a conditional write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Put {
    Written,
    /// An object of this name was there already.
    Exists,
}

impl Objects {
    pub(crate) fn new(store: Arc<dyn ObjectStore>, name: Arc<str>) -> Self {
        Self { store, name, files: None, cache: None }
    }

    /// The same store, whose objects are files and may be read as such.
    pub(crate) fn with_files(self, files: Arc<dyn Files>) -> Self {
        Self { files: Some(files), ..self }
    }

    /// The same store, of whose packs there are copies nearer.
    pub(crate) fn with_cache(self, cache: Arc<dyn PackCache>) -> Self {
        Self { cache: Some(cache), ..self }
    }

    /// Copies of packs that are nearer than the store, where the store is no folder itself.
    pub(crate) fn cache(&self) -> Option<&Arc<dyn PackCache>> {
        self.cache.as_ref()
    }

    /// Opens an object that a manifest refers to as a file; `None` where objects are no files. Blocks.
    pub(crate) fn open(&self, path: &Path) -> Option<Result<File>> {
        let file = self.files.as_ref()?.open(path.as_ref());
        Some(file.map_err(|error| self.file_error(path, error)))
    }

    /// Reads `buffer.len()` bytes at `offset` of a file that [`Objects::open`] opened. Blocks.
    pub(crate) fn read_file(&self, path: &Path, file: &File, offset: u64, buffer: &mut [u8]) -> Result<()> {
        file.read_exact_at(buffer, offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                let (found, expected) =
                    (file.metadata().map_or(0, |m| m.len()), offset + buffer.len() as u64);
                self.damaged(path, Damage::Length { found, expected })
            }
            _ => self.file_error(path, error),
        })
    }

    fn file_error(&self, path: &Path, error: io::Error) -> Error {
        let source = object_store::Error::Generic { store: "LocalFileSystem", source: error.into() };
        self.missing_is_damage(path, self.failed("read", path, 1, source))
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The store itself, for multipart uploads.
    pub(crate) fn store(&self) -> &dyn ObjectStore {
        &*self.store
    }

    /// An error that says that `object` is damaged.
    pub(crate) fn damaged(&self, object: impl Display, source: Damage) -> Error {
        Error::damaged(&self.name, &object.to_string(), source)
    }

    /// A whole object of at most `limit` bytes.
    pub(crate) async fn get(&self, path: &Path, limit: u64) -> Result<Bytes> {
        let size = |found| self.damaged(path, Damage::Bound { what: "bytes of the object", found, limit });
        let got = self
            .attempts("read", path, || {
                async move {
                    let answer = self.store.get(path).await?;
                    let bytes = answer.meta.size;
                    if bytes > limit { Ok(Err(bytes)) } else { Ok(Ok(answer.bytes().await?)) }
                }
                .boxed()
            })
            .await?;
        got.map_err(size)
    }

    /// Exactly `range` of an object that a manifest refers to: what is missing there is damage.
    pub(crate) async fn get_range(&self, path: &Path, range: Range<u64>) -> Result<Bytes> {
        let expected = range.end - range.start;
        let end = range.end;
        let options = GetOptions::new().with_range(Some(GetRange::Bounded(range)));
        let got = self
            .attempts("read", path, || {
                let options = options.clone();
                async move {
                    // A store answers a range beyond the end in its own way; ours is to look how long the object is.
                    match self.store.get_opts(path, options).await {
                        Ok(answer) => {
                            let bytes = answer.bytes().await?;
                            Ok(if bytes.len() as u64 == expected { Ok(bytes) } else { Err(None) })
                        }
                        Err(error) => match self.store.head(path).await {
                            Ok(meta) if meta.size < end => Ok(Err(Some(meta.size))),
                            _ => Err(error),
                        },
                    }
                }
                .boxed()
            })
            .await
            .map_err(|error| self.missing_is_damage(path, error))?;
        match got {
            Ok(bytes) => Ok(bytes),
            Err(size) => {
                let found = match size {
                    Some(size) => size,
                    None => self.size(path).await?.unwrap_or(0),
                };
                Err(self.damaged(path, Damage::Length { found, expected: end }))
            }
        }
    }

    /// A whole object that something refers to by its length: what is missing there is damage.
    pub(crate) async fn get_exact(&self, path: &Path, bytes: u64, limit: u64) -> Result<Bytes> {
        let got = self.get(path, limit).await.map_err(|error| self.missing_is_damage(path, error))?;
        if got.len() as u64 == bytes {
            return Ok(got);
        }
        Err(self.damaged(path, Damage::Length { found: got.len() as u64, expected: bytes }))
    }

    fn missing_is_damage(&self, path: &Path, error: Error) -> Error {
        match error {
            Error::NotFound { .. } => self.damaged(path, Damage::Missing),
            other => other,
        }
    }

    /// Length of an object in bytes; `None` if it is not there.
    pub(crate) async fn size(&self, path: &Path) -> Result<Option<u64>> {
        match self.attempts("look at", path, || async { self.store.head(path).await }.boxed()).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes an object, whatever is there.
    pub(crate) async fn put(&self, path: &Path, payload: PutPayload) -> Result<()> {
        self.attempts("write", path, || {
            let payload = payload.clone();
            async { self.store.put(path, payload).await }.boxed()
        })
        .await?;
        Ok(())
    }

    /// Writes an object if none of its name is there. After a lost answer an attempt may find its own object: whoever
    /// must know puts something of its own into it and reads it back.
    pub(crate) async fn put_new(&self, path: &Path, payload: PutPayload) -> Result<Put> {
        let answer = self
            .attempts("write", path, || {
                let payload = payload.clone();
                async {
                    use object_store::Error::{AlreadyExists, Precondition};
                    match self.store.put_opts(path, payload, PutMode::Create.into()).await {
                        Ok(_) => Ok(Put::Written),
                        Err(AlreadyExists { .. } | Precondition { .. }) => Ok(Put::Exists),
                        Err(error) => Err(error),
                    }
                }
                .boxed()
            })
            .await?;
        Ok(answer)
    }

    /// Removes an object; one that is not there is removed already.
    pub(crate) async fn delete(&self, path: &Path) -> Result<()> {
        match self.attempts("remove", path, || async { self.store.delete(path).await }.boxed()).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The objects below a folder, with their lengths.
    pub(crate) async fn list(&self, folder: &Path) -> Result<Vec<(Path, u64)>> {
        self.attempts("list", folder, || {
            self.store.list(Some(folder)).map_ok(|meta| (meta.location, meta.size)).try_collect().boxed()
        })
        .await
    }

    /// The objects below a folder, with the times of the store's clock.
    pub(crate) async fn list_dated(&self, folder: &Path) -> Result<Vec<Dated>> {
        self.attempts("list", folder, || self.store.list(Some(folder)).map_ok(dated).try_collect().boxed())
            .await
    }

    /// The time of the store's clock: that of an object that is written now. Read off a listing, as those are that it is
    /// compared with: a single object's is told in whole seconds.
    pub(crate) async fn now_ms(&self) -> Result<i64> {
        let path = Path::from(format!("probes/{}", uuid::Uuid::now_v7()));
        self.put(&path, PutPayload::from_static(b"now")).await?;
        let listed = self.list_dated(&Path::from("probes")).await;
        self.delete(&path).await?;
        let written = listed?.into_iter().find(|object| object.path == path);
        Ok(written.ok_or_else(|| self.damaged(&path, Damage::Missing))?.modified_ms)
    }

    /// Removes files of uploads that a crash cut short and that are older than `age`. A bucket's own rules do that there.
    pub(crate) fn remove_half_written(&self, folder: &str, age: Duration) -> Result<()> {
        let Some(root) = self.files.as_ref().and_then(|files| files.folder()) else { return Ok(()) };
        // A folder that is not there holds none.
        let Ok(entries) = std::fs::read_dir(root.join(folder)) else { return Ok(()) };
        for entry in entries.flatten() {
            let staged = entry.file_name().to_string_lossy().contains('#');
            let old = entry
                .metadata()
                .and_then(|file| file.modified())
                .is_ok_and(|modified| modified.elapsed().is_ok_and(|elapsed| elapsed > age));
            if staged && old {
                let path = Path::from(folder);
                std::fs::remove_file(entry.path()).map_err(|error| self.file_error(&path, error))?;
            }
        }
        Ok(())
    }

    /// Runs `request` until it succeeds, fails for good, or has failed [`ATTEMPTS`] times.
    async fn attempts<'a, T>(
        &'a self,
        action: &'static str,
        object: &'a Path,
        request: impl Fn() -> BoxFuture<'a, object_store::Result<T>>,
    ) -> Result<T> {
        let mut attempt = 1;
        loop {
            let error = match request().await {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            if attempt == ATTEMPTS || !may_pass(&error) {
                return Err(self.failed(action, object, attempt, error));
            }
            let wait = backoff(attempt);
            tracing::debug!(store = %self.name, %object, action, attempt, %error, ?wait, "trying again");
            tokio::time::sleep(wait).await;
            attempt += 1;
        }
    }

    /// Sorts a failure by what the caller can do about it.
    pub(crate) fn failed(
        &self,
        action: &'static str,
        object: &Path,
        attempts: u32,
        source: object_store::Error,
    ) -> Error {
        let store = self.name.to_string();
        let object = object.to_string();
        let cause = Cause::of(&source);
        match (source, cause) {
            (source @ object_store::Error::NotFound { .. }, _) | (source, Cause::NotFound) => {
                Error::NotFound { store, object, source: Some(source.into()) }
            }
            (source, Cause::NoCredentials) => Error::NoCredentials { store, source: source.into() },
            (source, Cause::Denied) => Error::Denied { store, action, object, source: source.into() },
            (source, Cause::Full) => Error::Full { store, action, object, source: source.into() },
            (source, Cause::Unreachable) => {
                Error::Unreachable { store, action, object, source: source.into() }
            }
            (source, Cause::Other) => {
                Error::Request { store, action, object, attempts, source: source.into() }
            }
        }
    }
}

fn dated(meta: object_store::ObjectMeta) -> Dated {
    Dated { path: meta.location, bytes: meta.size, modified_ms: meta.last_modified.timestamp_millis() }
}

/// Where machines of a cloud get credentials: the library asks there last. Elsewhere nobody answers, and asking again
/// would only take longer.
const METADATA_SERVICE: &str = "//169.254.169.254/";

/// Wait before the attempt that follows attempt number `attempt`.
fn backoff(attempt: u32) -> Duration {
    let full = BACKOFF.saturating_mul(1 << (attempt - 1).min(16)).min(BACKOFF_MAX);
    // The low bits of a fresh id are random; a dependency for one random byte would be too much.
    let jitter = f64::from(uuid::Uuid::new_v4().as_bytes()[15]) / 255.0;
    full.mul_f64(0.75 + 0.5 * jitter)
}

/// Whether the same request may succeed a moment later.
fn may_pass(error: &object_store::Error) -> bool {
    match error {
        object_store::Error::Generic { .. } | object_store::Error::JoinError { .. } => {
            matches!(Cause::of(error), Cause::Other | Cause::Unreachable)
        }
        _ => false,
    }
}

/// What lies at the bottom of a store's error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    NotFound,
    Denied,
    NoCredentials,
    Full,
    Unreachable,
    Other,
}

impl Cause {
    fn of(error: &object_store::Error) -> Self {
        match error {
            object_store::Error::NotFound { .. } => return Self::NotFound,
            object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
                return Self::Denied;
            }
            _ => {}
        }
        if error.to_string().contains(METADATA_SERVICE) {
            return Self::NoCredentials;
        }
        let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
        while let Some(error) = cause {
            if let Some(error) = error.downcast_ref::<io::Error>() {
                match error.kind() {
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => return Self::Full,
                    io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                        return Self::Denied;
                    }
                    io::ErrorKind::NotFound => return Self::NotFound,
                    _ => {}
                }
            }
            if let Some(error) = error.downcast_ref::<HttpError>()
                && error.kind() == HttpErrorKind::Connect
            {
                return Self::Unreachable;
            }
            match status(&error.to_string()) {
                Some(404) => return Self::NotFound,
                Some(401 | 403) => return Self::Denied,
                _ => {}
            }
            cause = error.source();
        }
        Self::Other
    }
}

/// The HTTP status in the text of an error. The library keeps the type that carries it to itself and sorts the answers
/// to some requests, listing above all, as generic; the contract suite runs this against real servers.
fn status(text: &str) -> Option<u16> {
    let (_, rest) = text.split_once("Server returned non-2xx status code: ")?;
    rest.get(..3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_limit() {
        for attempt in 1..ATTEMPTS {
            let wait = backoff(attempt);
            let full = BACKOFF.saturating_mul(1 << (attempt - 1)).min(BACKOFF_MAX);
            assert!(wait >= full.mul_f64(0.74) && wait <= full.mul_f64(1.26), "{attempt}: {wait:?}");
        }
        assert!(backoff(u32::MAX) <= BACKOFF_MAX.mul_f64(1.26));
    }

    #[test]
    fn a_full_disk_is_told_from_other_failures_and_is_not_tried_again() {
        let generic = |kind: io::ErrorKind| object_store::Error::Generic {
            store: "test",
            source: Box::new(io::Error::from(kind)),
        };
        assert_eq!(Cause::of(&generic(io::ErrorKind::StorageFull)), Cause::Full);
        assert!(!may_pass(&generic(io::ErrorKind::StorageFull)));
        assert_eq!(Cause::of(&generic(io::ErrorKind::ReadOnlyFilesystem)), Cause::Denied);
        assert!(may_pass(&generic(io::ErrorKind::ConnectionReset)));
    }
}
