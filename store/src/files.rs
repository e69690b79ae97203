//! A folder as a store, read through whoever may open its files: the process itself, or another one on its behalf.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    Attributes, CopyOptions, GetOptions, GetRange, GetResult, GetResultPayload, ListResult, MultipartUpload,
    ObjectMeta, ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult,
};

/// Opens and lists the files of one folder. Calls block.
pub trait Files: fmt::Debug + Send + Sync {
    /// Opens a file for reading by its path below the folder.
    ///
    /// # Errors
    /// What the system says.
    fn open(&self, path: &str) -> io::Result<File>;

    /// The files below a folder below the folder, with their lengths; none where it does not exist. An empty path means
    /// the folder itself, which must exist.
    ///
    /// # Errors
    /// What the system says.
    fn list(&self, folder: &str) -> io::Result<Vec<(String, u64)>>;

    /// The folder, where this process may work in it by itself.
    fn folder(&self) -> Option<&std::path::Path> {
        None
    }
}

/// The files of a folder, opened by this process.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// The folder at `path`.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }
}

impl Files for Folder {
    fn open(&self, path: &str) -> io::Result<File> {
        File::open(self.0.join(path))
    }

    fn list(&self, folder: &str) -> io::Result<Vec<(String, u64)>> {
        let mut found = Vec::new();
        let mut waiting = vec![self.0.join(folder)];
        while let Some(at) = waiting.pop() {
            let entries = match std::fs::read_dir(&at) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound && at != self.0 => continue,
                Err(error) => return Err(error),
            };
            for entry in entries {
                let entry = entry?;
                let metadata = entry.metadata()?;
                if metadata.is_dir() {
                    waiting.push(entry.path());
                } else if let Ok(path) = entry.path().strip_prefix(&self.0) {
                    // What is not text was not written by this program.
                    found.extend(path.to_str().map(|path| (path.to_owned(), metadata.len())));
                }
            }
        }
        Ok(found)
    }

    fn folder(&self) -> Option<&std::path::Path> {
        Some(&self.0)
    }
}

/// [`Files`] as an object store that can only be read.
#[derive(Debug)]
pub(crate) struct ReadFiles(pub(crate) Arc<dyn Files>);

impl fmt::Display for ReadFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("files")
    }
}

fn meta(location: &Path, size: u64) -> ObjectMeta {
    let last_modified = std::time::SystemTime::UNIX_EPOCH.into();
    ObjectMeta { location: location.clone(), last_modified, size, e_tag: None, version: None }
}

fn failed(path: &str, error: io::Error) -> object_store::Error {
    match error.kind() {
        io::ErrorKind::NotFound => {
            object_store::Error::NotFound { path: path.to_owned(), source: error.into() }
        }
        _ => object_store::Error::Generic { store: "LocalFileSystem", source: error.into() },
    }
}

fn read_only<T>() -> object_store::Result<T> {
    let source = io::Error::from(io::ErrorKind::ReadOnlyFilesystem).into();
    Err(object_store::Error::Generic { store: "LocalFileSystem", source })
}

#[async_trait]
impl ObjectStore for ReadFiles {
    async fn put_opts(&self, _: &Path, _: PutPayload, _: PutOptions) -> object_store::Result<PutResult> {
        read_only()
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        read_only()
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        let (files, path) = (self.0.clone(), location.clone());
        let open = move || {
            let file = files.open(path.as_ref())?;
            let size = file.metadata()?.len();
            let range = match options.range.filter(|_| !options.head) {
                None if options.head => 0..0,
                None => 0..size,
                Some(GetRange::Bounded(range)) => range.start.min(size)..range.end.min(size),
                Some(GetRange::Offset(start)) => start.min(size)..size,
                Some(GetRange::Suffix(length)) => size.saturating_sub(length)..size,
            };
            Ok((file, range, size))
        };
        let opened = tokio::task::spawn_blocking(open).await.expect("opening does not panic");
        let (file, range, size) = opened.map_err(|error| failed(location.as_ref(), error))?;
        // Memory is taken when the content is asked for: whoever finds the object too long does not.
        let (path, wanted) = (location.clone(), range.clone());
        let read = async move {
            let read = move || {
                let mut bytes =
                    vec![0; usize::try_from(wanted.end - wanted.start).map_err(io::Error::other)?];
                file.read_exact_at(&mut bytes, wanted.start)?;
                Ok(Bytes::from(bytes))
            };
            let read = tokio::task::spawn_blocking(read).await.expect("reading does not panic");
            read.map_err(|error| failed(path.as_ref(), error))
        };
        let payload = GetResultPayload::Stream(futures::stream::once(read).boxed());
        Ok(GetResult {
            payload,
            meta: meta(location, size),
            range,
            attributes: Attributes::default(),
            extensions: Default::default(),
        })
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        locations.map(|_| read_only()).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        let (files, prefix) = (self.0.clone(), prefix.map(ToString::to_string).unwrap_or_default());
        let listed = async move {
            let folder = prefix.clone();
            let listed = tokio::task::spawn_blocking(move || files.list(&folder));
            match listed.await.expect("listing does not panic") {
                Ok(found) => {
                    let found = found.into_iter().map(|(path, size)| Ok(meta(&Path::from(path), size)));
                    futures::stream::iter(found.collect::<Vec<_>>()).boxed()
                }
                Err(error) => futures::stream::once(async move { Err(failed(&prefix, error)) }).boxed(),
            }
        };
        futures::FutureExt::flatten_stream(listed).boxed()
    }

    async fn list_with_delimiter(&self, _: Option<&Path>) -> object_store::Result<ListResult> {
        let source = io::Error::from(io::ErrorKind::Unsupported).into();
        Err(object_store::Error::Generic { store: "LocalFileSystem", source })
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> object_store::Result<()> {
        read_only()
    }
}
