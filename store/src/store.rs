//! Opening a store, listing what is in it, and finding the manifest that a reference means.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ClientConfigKey, ObjectStore, RetryConfig};
use tokio::sync::OnceCell;

use crate::cache::PackCache;
use crate::codec;
use crate::digest::Digest;
use crate::error::{Damage, Error, Result};
use crate::files::{Files, Folder, ReadFiles};
use crate::format::manifest::{Manifest, Seal};
use crate::format::tag::{self, TagIndex};
use crate::format::{manifest, manifest_path, tag_folder, tag_number, tag_path};
use crate::limits::{
    BACKOFF, BACKOFF_MAX, CONNECT_TIMEOUT, MANIFEST_BYTES_LIMIT, READ_TIMEOUT, REQUEST_TIMEOUT,
    TAG_BYTES_LIMIT,
};
use crate::objects::Objects;
use crate::signature::{PublicKey, Trust};
use crate::url::{Name, Place, Provider, Reference, StoreUrl, Target, check_word};

/// Tags whose newest index object is read at the same time.
const TAGS_IN_FLIGHT: usize = 16;

/// A place that holds snapshots. Clones share connections.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
    /// Whose snapshots are read; everybody's if nothing is said.
    trust: Option<Arc<Trust>>,
}

struct Inner {
    url: Option<StoreUrl>,
    name: Arc<str>,
    /// Made when it is first needed: a folder may be missing until something is written.
    objects: OnceCell<Objects>,
    /// Whether the store honours writes under a condition; probed before the first publishing.
    conditional: OnceCell<bool>,
}

/// A manifest that was read and checked.
pub(crate) struct ReadManifest {
    pub(crate) manifest: Manifest,
    pub(crate) seal: Seal,
    /// The object as it is stored.
    pub(crate) bytes: Bytes,
    /// Who signed it, where a signature is required.
    pub(crate) signer: Option<PublicKey>,
}

/// A name, a tag, and the variants that the tag means.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Listed {
    /// Name of the snapshot.
    pub name: String,
    /// Its tag.
    pub tag: String,
    /// Newest index object of the tag.
    pub index: TagIndex,
}

/// What a tag takes in a store. Gc gives back whole objects, so that is what is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Usage {
    /// Bytes of all objects that its variants need.
    pub object_bytes: u64,
    /// Bytes of those that no other tag needs: what removing the tag and gc give back.
    pub unique_bytes: u64,
}

impl Store {
    /// Opens a store. Nothing is asked of it yet: a missing folder or bucket shows when it is first used.
    ///
    /// # Errors
    /// [`Error::Open`] if an option or a variable of the environment is malformed.
    pub async fn open(url: &StoreUrl) -> Result<Self> {
        let name: Arc<str> = url.to_string().into();
        let objects = match url.place() {
            Place::Folder(_) => OnceCell::new(),
            Place::Bucket { provider, bucket, prefix } => {
                let store = open_bucket(*provider, bucket, url.options())
                    .map_err(|source| Error::Open { store: name.to_string(), source: source.into() })?;
                let store: Arc<dyn ObjectStore> = if prefix.is_empty() {
                    store
                } else {
                    Arc::new(PrefixStore::new(store, prefix.as_str()))
                };
                OnceCell::new_with(Some(Objects::new(store, name.clone())))
            }
        };
        Ok(Self {
            inner: Arc::new(Inner { url: Some(url.clone()), name, objects, conditional: OnceCell::new() }),
            trust: None,
        })
    }

    /// A store over any other implementation of `object_store`; `name` stands in errors.
    #[must_use]
    pub fn from_objects(store: Arc<dyn ObjectStore>, name: &str) -> Self {
        let name: Arc<str> = name.into();
        let objects = OnceCell::new_with(Some(Objects::new(store, name.clone())));
        let inner = Inner { url: None, name, objects, conditional: OnceCell::new() };
        Self { inner: Arc::new(inner), trust: None }
    }

    /// The same store, of which no snapshot is read that none of these keys signed.
    #[must_use]
    pub fn requiring(self, trust: Trust) -> Self {
        Self { trust: Some(Arc::new(trust)), ..self }
    }

    /// The same store, read through copies of its packs that are nearer. A folder needs none.
    #[must_use]
    pub fn cached(self, cache: Arc<dyn PackCache>) -> Self {
        let Some(objects) = self.inner.objects.get() else { return self };
        let objects = OnceCell::new_with(Some(objects.clone().with_cache(cache)));
        let (url, name) = (self.inner.url.clone(), self.inner.name.clone());
        let inner = Inner { url, name, objects, conditional: OnceCell::new() };
        Self { inner: Arc::new(inner), ..self }
    }

    /// A store that holds nothing: `name` stands in the errors of what another process fetched and this one decodes.
    #[must_use]
    pub fn nowhere(name: &str) -> Self {
        Self::from_objects(Arc::new(object_store::memory::InMemory::new()), name)
    }

    /// A store in a folder whose files somebody else opens. It can only be read.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is no such folder.
    pub fn from_files(files: Arc<dyn Files>, name: &str) -> Result<Self> {
        let store = Self::from_objects(Arc::new(ReadFiles(files.clone())), name);
        files.list("tags").map_err(|error| store.folder_error("open", error))?;
        let objects = Objects::new(Arc::new(ReadFiles(files.clone())), store.inner.name.clone());
        let objects = OnceCell::new_with(Some(objects.with_files(files)));
        let inner =
            Inner { url: None, name: store.inner.name.clone(), objects, conditional: OnceCell::new() };
        Ok(Self { inner: Arc::new(inner), trust: None })
    }

    /// The objects of a store that must be there.
    pub(crate) async fn objects(&self) -> Result<&Objects> {
        self.inner.objects.get_or_try_init(|| async { self.open_folder() }).await
    }

    /// The objects of a store that is made if it is a folder that is not there.
    pub(crate) async fn objects_for_writing(&self) -> Result<&Objects> {
        let make = || match self.folder() {
            Some(path) => std::fs::create_dir_all(path).map_err(|error| self.folder_error("make", error)),
            None => Ok(()),
        };
        if !self.inner.objects.initialized() {
            make()?;
        }
        self.objects().await
    }

    /// Bytes a second at which content of such a store is read.
    pub(crate) fn usual_rate(&self) -> u64 {
        if self.folder().is_some() { codec::FOLDER_RATE } else { codec::BUCKET_RATE }
    }

    fn folder(&self) -> Option<&std::path::Path> {
        self.inner.url.as_ref().and_then(StoreUrl::folder)
    }

    fn open_folder(&self) -> Result<Objects> {
        let path = self.folder().expect("a bucket is open from the start");
        // The library hides the reason why a folder cannot be opened.
        std::fs::read_dir(path).map_err(|error| self.folder_error("open", error))?;
        let fsync =
            self.inner.url.as_ref().is_some_and(|url| {
                url.options().iter().any(|(name, value)| name == "fsync" && value == "true")
            });
        let store = LocalFileSystem::new_with_prefix(path)
            .map_err(|source| Error::Open { store: self.inner.name.to_string(), source: source.into() })?
            .with_fsync(fsync);
        Ok(Objects::new(Arc::new(store), self.inner.name.clone()).with_files(Arc::new(Folder::new(path))))
    }

    fn folder_error(&self, action: &'static str, error: std::io::Error) -> Error {
        let source = match error.kind() {
            std::io::ErrorKind::NotFound => {
                object_store::Error::NotFound { path: self.inner.name.to_string(), source: error.into() }
            }
            _ => object_store::Error::Generic { store: "LocalFileSystem", source: error.into() },
        };
        let objects = Objects::new(Arc::new(object_store::memory::InMemory::new()), self.inner.name.clone());
        match objects.failed(action, &Path::ROOT, 1, source) {
            Error::NotFound { store, source, .. } => Error::NotFound { object: store.clone(), store, source },
            other => other,
        }
    }

    /// Every tag of every name, sorted by both, but those that were removed.
    ///
    /// # Errors
    /// [`Error::NotFound`] if the folder or bucket is missing, and what reading the objects may give.
    pub async fn list(&self) -> Result<Vec<Listed>> {
        let indexes = self.indexes().await?.into_iter().filter(|index| !index.variants.is_empty());
        Ok(indexes.map(|index| Listed { name: index.name.clone(), tag: index.tag.clone(), index }).collect())
    }

    /// What the tags of [`Store::list`] take in the store.
    ///
    /// # Errors
    /// [`Error::Damaged`] if a manifest or a boot object is.
    pub async fn usage(&self, listed: &[Listed]) -> Result<Vec<Usage>> {
        let digests: BTreeSet<Digest> =
            listed.iter().flat_map(|one| &one.index.variants).map(|variant| variant.manifest).collect();
        let needs: HashMap<Digest, Vec<(Path, u64)>> = stream::iter(digests)
            .map(|digest| async move { Ok::<_, Error>((digest, self.needs(&digest).await?)) })
            .buffer_unordered(TAGS_IN_FLIGHT)
            .try_collect()
            .await?;
        let objects_of = |one: &Listed| -> HashMap<Path, u64> {
            one.index.variants.iter().flat_map(|variant| needs[&variant.manifest].iter().cloned()).collect()
        };
        let mut users = HashMap::<Path, u64>::new();
        for path in listed.iter().flat_map(|one| objects_of(one).into_keys()) {
            *users.entry(path).or_default() += 1;
        }
        let usage = |one: &Listed| {
            let objects = objects_of(one);
            let unique = objects.iter().filter(|(path, _)| users[*path] == 1).map(|(_, bytes)| bytes).sum();
            Usage { object_bytes: objects.values().sum(), unique_bytes: unique }
        };
        Ok(listed.iter().map(usage).collect())
    }

    /// The newest index object of every tag, of those that were removed too, by name and tag.
    pub(crate) async fn indexes(&self) -> Result<Vec<TagIndex>> {
        let objects = self.objects().await?;
        let mut newest = std::collections::BTreeMap::<(String, String), u64>::new();
        for (path, _) in objects.list(&Path::from("tags")).await? {
            let parts: Vec<_> = path.parts().map(|part| part.as_ref().to_owned()).collect();
            let [_, name, tag, file] = parts.as_slice() else { continue };
            if let (Ok(()), Ok(()), Some(number)) = (check_word(name), check_word(tag), tag_number(file)) {
                let highest = newest.entry((name.clone(), tag.clone())).or_default();
                *highest = number.max(*highest);
            }
        }
        stream::iter(newest)
            .map(|((name, tag), number)| async move {
                let index = self.tag_at(&name.parse()?, &tag, number).await?;
                // Where it lies counts, and not what it says of itself.
                Ok(TagIndex { name, tag, number, ..index })
            })
            .buffered(TAGS_IN_FLIGHT)
            .try_collect()
            .await
    }

    /// The newest index object of a tag, without variants if it was removed; `None` if it never existed.
    pub(crate) async fn tag(&self, name: &Name, tag: &str) -> Result<Option<TagIndex>> {
        match self.tag_newest(name, tag).await? {
            0 => Ok(None),
            number => self.tag_at(name, tag, number).await.map(Some),
        }
    }

    /// The highest number of a tag; 0 if the tag does not exist.
    pub(crate) async fn tag_newest(&self, name: &Name, tag: &str) -> Result<u64> {
        let listed = self.objects().await?.list(&tag_folder(name, tag)).await?;
        Ok(listed.iter().filter_map(|(path, _)| tag_number(path.filename()?)).max().unwrap_or(0))
    }

    pub(crate) async fn tag_at(&self, name: &Name, tag: &str, number: u64) -> Result<TagIndex> {
        let objects = self.objects().await?;
        let path = tag_path(name, tag, number);
        let bytes = objects.get(&path, TAG_BYTES_LIMIT).await?;
        tag::decode(&bytes, objects.name(), path.as_ref())
    }

    /// The variants that `reference` means, the newest first; one without facts if it names a digest.
    ///
    /// # Errors
    /// [`Error::NotFound`] if the store, the name or the tag does not exist.
    pub async fn variants(&self, reference: &Reference) -> Result<Vec<Digest>> {
        match &reference.target {
            Target::Digest(digest) => Ok(vec![*digest]),
            Target::Tag(tag) => match self.tag(&reference.name, tag).await? {
                Some(index) if !index.variants.is_empty() => {
                    Ok(index.variants.iter().map(|variant| variant.manifest).collect())
                }
                _ => Err(Error::NotFound {
                    store: self.inner.name.to_string(),
                    object: format!("{}@{tag}", reference.name),
                    source: None,
                }),
            },
        }
    }

    /// Reads and checks a manifest.
    pub(crate) async fn manifest(&self, digest: &Digest) -> Result<ReadManifest> {
        let bytes = self.manifest_bytes(digest).await?;
        self.decode_manifest(digest, bytes)
    }

    /// Reads a manifest object and compares it with its digest.
    pub(crate) async fn manifest_bytes(&self, digest: &Digest) -> Result<Bytes> {
        let objects = self.objects().await?;
        let bytes = objects.get(&manifest_path(digest), MANIFEST_BYTES_LIMIT).await?;
        self.check_manifest(digest, &bytes)?;
        Ok(bytes)
    }

    fn check_manifest(&self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        let found = Digest::of(bytes);
        if found == *digest {
            return Ok(());
        }
        let (found, expected) = (found.to_string(), digest.to_string());
        let object = manifest_path(digest).to_string();
        Err(Error::damaged(&self.inner.name, &object, Damage::Digest { found, expected }))
    }

    /// Checks and decodes a manifest object, its signature first where one is required.
    pub(crate) fn decode_manifest(&self, digest: &Digest, bytes: Bytes) -> Result<ReadManifest> {
        self.check_manifest(digest, &bytes)?;
        let path = manifest_path(digest);
        let signer = match &self.trust {
            Some(trust) => Some(trust.check(&bytes).map_err(|source| Error::Untrusted {
                store: self.inner.name.to_string(),
                object: path.to_string(),
                source,
            })?),
            None => None,
        };
        let (manifest, seal) = manifest::decode(&bytes, &self.inner.name, path.as_ref())?;
        Ok(ReadManifest { manifest, seal, bytes, signer })
    }

    /// Whether the store refuses to write over an object when it is told to. Garage 2.5 does not.
    pub(crate) async fn conditional(&self) -> Result<bool> {
        self.inner.conditional.get_or_try_init(|| self.probe_conditions()).await.copied()
    }

    async fn probe_conditions(&self) -> Result<bool> {
        use crate::objects::Put;
        let objects = self.objects().await?;
        let path = Path::from(format!("probes/{}", uuid::Uuid::now_v7()));
        objects.put_new(&path, "1".into()).await?;
        let second = objects.put_new(&path, "2".into()).await?;
        objects.delete(&path).await?;
        Ok(second == Put::Exists)
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Store").field(&self.inner.name).finish()
    }
}

impl std::fmt::Display for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.inner.name)
    }
}

/// Two attempts here and [`crate::limits::ATTEMPTS`] above: the library repeats what it can repeat cheaply.
fn retry() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig { init_backoff: BACKOFF, max_backoff: BACKOFF_MAX, base: 2.0 },
        max_retries: 2,
        retry_timeout: REQUEST_TIMEOUT,
    }
}

/// Whether an endpoint was given that speaks plain HTTP, which the library wants to be allowed.
fn plain_http(options: &[(String, String)], variables: &[&str]) -> bool {
    let plain = |value: &str| value.starts_with("http://");
    options.iter().any(|(_, value)| plain(value))
        || variables.iter().any(|name| std::env::var(name).is_ok_and(|value| plain(&value)))
}

/// Waits of the client, where the environment does not say otherwise by a variable with this prefix.
fn client_settings(prefix: &str, plain: bool) -> Vec<(ClientConfigKey, String)> {
    let seconds = |wait: Duration| format!("{} s", wait.as_secs());
    let mut settings = vec![
        (ClientConfigKey::ConnectTimeout, seconds(CONNECT_TIMEOUT)),
        (ClientConfigKey::ReadTimeout, seconds(READ_TIMEOUT)),
        (ClientConfigKey::Timeout, seconds(REQUEST_TIMEOUT)),
    ];
    if plain {
        settings.push((ClientConfigKey::AllowHttp, "true".to_owned()));
    }
    let unset = |key: &ClientConfigKey| {
        std::env::var_os(format!("{prefix}_{}", key.as_ref().to_ascii_uppercase())).is_none()
    };
    settings.into_iter().filter(|(key, _)| unset(key)).collect()
}

fn open_bucket(
    provider: Provider,
    bucket: &str,
    options: &[(String, String)],
) -> object_store::Result<Arc<dyn ObjectStore>> {
    // The three builders share no trait.
    macro_rules! build {
        ($builder:expr, $key:ty, $prefix:literal, $endpoints:expr) => {{
            let mut builder = $builder.with_retry(retry());
            for (key, value) in client_settings($prefix, plain_http(options, $endpoints)) {
                builder = builder.with_config(<$key>::Client(key), value);
            }
            for (name, value) in options {
                builder = builder.with_config(name.parse()?, value);
            }
            Arc::new(builder.build()?)
        }};
    }
    Ok(match provider {
        Provider::Aws => build!(
            AmazonS3Builder::from_env().with_bucket_name(bucket),
            AmazonS3ConfigKey,
            "AWS",
            &["AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"]
        ),
        Provider::Google => build!(
            GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket),
            GoogleConfigKey,
            "GOOGLE",
            &["GOOGLE_BASE_URL"]
        ),
        Provider::Azure => build!(
            MicrosoftAzureBuilder::from_env().with_container_name(bucket),
            AzureConfigKey,
            "AZURE",
            &["AZURE_ENDPOINT", "AZURE_STORAGE_ENDPOINT"]
        ),
    })
}
