//! Writing a snapshot: content streams in, packs stream out, and nothing is visible until it is published.
//!
//! ```text
//! RegionWriter -> cut -> [hash, look up, compress: one worker for each core] -> in order -> pack -> upload
//!   push waits for memory                                                        planner    one task a pack
//! ```
//!
//! Workers finish in any order; the planner takes their results in the order of the stream, decides whether a chunk
//! that the store has already is reused or written again, and fills packs. Content counts against the session's memory
//! from the push until the store has confirmed its pack, so a slow store makes `push` wait and nothing else.

mod pack;
mod planner;
mod publish;
mod reuse;
mod worker;

use std::collections::BTreeMap;
use std::mem;
use std::sync::{Arc, Mutex, OnceLock};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use uuid::Uuid;

use crate::chunk::Cutter;
use crate::codec::Compression;
use crate::digest::ChunkKey;
use crate::error::{Error, Result};
use crate::format::manifest::{Facts, RegionKind};
use crate::lease::{Announcement, Doing};
use crate::limits::{
    BATCH_BYTES, BATCHES_QUEUED, CONTENT_BYTES_LIMIT, PAGE_BYTES, PARTS_IN_FLIGHT, REGIONS_LIMIT,
    SESSION_MEMORY_BYTES, SESSION_MEMORY_BYTES_MIN, SKELETON_FILE_BYTES_LIMIT,
};
use crate::objects::Objects;
use crate::signature::SigningKey;
use crate::store::Store;
use crate::url::{Name, check_word};

pub use publish::Published;
pub(crate) use publish::{Base, next_index, now, take_tag};

/// How a snapshot is written.
#[derive(Debug, Clone, Default)]
pub struct SessionOptions {
    /// How chunks are stored.
    pub compression: Compression,
    /// Bytes a second at which it will be read, for [`Compression::Auto`]. If it is not given: from a folder as fast as
    /// memory, from a bucket 1.25 GB/s.
    pub rate: Option<u64>,
    /// Where the snapshot will be published. If it is given, publishing there fails when another snapshot was published
    /// there since the session began; otherwise since publishing began. It is also where chunks to reuse are looked for
    /// first.
    pub destination: Option<(Name, String)>,
    /// Signs the manifest.
    pub sign: Option<SigningKey>,
    /// Bytes of content that may be held until the store has them: at most, and without it, 256 MiB; two packs at least.
    pub memory_bytes: Option<u64>,
    /// Copies content that is stored raw, so that what was pushed is let go as soon as it has been looked at. For callers
    /// who would wait for their own buffers, which a pack holds until it is stored.
    pub copy_raw: bool,
}

/// A snapshot that is being written. Dropped before it is published, it leaves nothing that anybody sees: uploads are
/// aborted, and packs that are complete are referred to by nothing.
pub struct Session {
    shared: Arc<Shared>,
    planner: mpsc::Sender<planner::Step>,
    jobs: std::sync::mpsc::Sender<worker::Job>,
    skeleton: Mutex<BTreeMap<String, Bytes>>,
    regions: Mutex<u64>,
    base: Option<publish::Base>,
}

/// What all stages of a session share.
pub(crate) struct Shared {
    pub(crate) store: Store,
    pub(crate) objects: Objects,
    pub(crate) compression: Compression,
    pub(crate) rate: u64,
    pub(crate) copy_raw: bool,
    pub(crate) key: ChunkKey,
    pub(crate) sign: Option<SigningKey>,
    pub(crate) reuse: reuse::Reuse,
    /// Pages of content that may still be taken in.
    memory: Arc<Semaphore>,
    /// Parts that may still be sent at the same time.
    pub(crate) sending: Arc<Semaphore>,
    failure: OnceLock<Arc<Error>>,
    /// Tells gc that this session is at work; ends when everybody who shares it has let go.
    announcement: Mutex<Option<Announcement>>,
    /// Stands in the boot object.
    pub(crate) session: Uuid,
}

impl Shared {
    /// Keeps the first failure and lets everybody who waits for memory go.
    pub(crate) fn fail(&self, error: Error) {
        let _ = self.failure.set(Arc::new(error));
        self.memory.close();
    }

    pub(crate) fn check(&self) -> Result<()> {
        match self.failure.get() {
            Some(error) => Err(Error::Earlier(error.clone())),
            None => Ok(()),
        }
    }

    /// The failure that closed a channel or the semaphore.
    pub(crate) fn failure(&self) -> Error {
        self.check().expect_err("stages end before the session only by a failure")
    }

    async fn memory(&self, pages: u32) -> Result<OwnedSemaphorePermit> {
        self.memory.clone().acquire_many_owned(pages).await.map_err(|_| self.failure())
    }
}

/// Content of one chunk, in one or more pieces, and its claim on the session's memory.
pub(crate) struct Content {
    pub(crate) parts: Vec<Bytes>,
    pub(crate) bytes: u32,
    pub(crate) memory: OwnedSemaphorePermit,
}

impl Store {
    /// Begins to write a snapshot. A folder that is not there is made.
    ///
    /// Reads the indexes of at most sixteen snapshots, those of its own name first, so that their chunks are not written
    /// again; one that cannot be read is left out.
    ///
    /// # Errors
    /// What the store answers to the first requests: [`Error::NotFound`] for a missing bucket, [`Error::Denied`],
    /// [`Error::Unreachable`].
    pub async fn begin(&self, options: SessionOptions) -> Result<Session> {
        let objects = self.objects_for_writing().await?.clone();
        // Asked now and not before the tag is written: a store that cannot be written is found while nothing is frozen.
        self.conditional().await?;
        let base = match &options.destination {
            Some((name, tag)) => Some(publish::Base::read(self, name, tag).await?),
            None => None,
        };
        // In this order: what is found from here on stays until the session ends, or is marked as going.
        let announcement = Announcement::make(&objects, Doing::Session).await?;
        let doomed = self.doomed_packs().await?;
        let reuse =
            reuse::Reuse::load(self, options.destination.as_ref().map(|(name, _)| name), &doomed).await?;
        let memory = options.memory_bytes.map_or(SESSION_MEMORY_BYTES, |bytes| {
            bytes.clamp(SESSION_MEMORY_BYTES_MIN, SESSION_MEMORY_BYTES)
        });
        let shared = Arc::new(Shared {
            store: self.clone(),
            objects,
            compression: options.compression,
            rate: options.rate.unwrap_or_else(|| self.usual_rate()),
            copy_raw: options.copy_raw,
            key: ChunkKey::public(),
            sign: options.sign,
            reuse,
            memory: Arc::new(Semaphore::new((memory / PAGE_BYTES) as usize)),
            sending: Arc::new(Semaphore::new(PARTS_IN_FLIGHT)),
            failure: OnceLock::new(),
            session: announcement.id(),
            announcement: Mutex::new(Some(announcement)),
        });
        let (planner, steps) = mpsc::channel(BATCHES_QUEUED);
        let jobs = worker::start(&shared);
        tokio::spawn(planner::run(shared.clone(), jobs.clone(), steps));
        Ok(Session { shared, planner, jobs, skeleton: Mutex::default(), regions: Mutex::new(0), base })
    }
}

impl Session {
    /// Begins a region. Regions may be written at the same time; each is one stream.
    ///
    /// # Errors
    /// [`Error::Limit`] if there are too many, and the session's failure if it has failed.
    pub async fn region(&self, kind: RegionKind) -> Result<RegionWriter> {
        self.shared.check()?;
        let number = {
            let mut regions = self.regions.lock().expect("nothing panics while counting");
            *regions += 1;
            *regions - 1
        };
        if number >= REGIONS_LIMIT {
            return Err(Error::Limit { what: "regions", value: number + 1, limit: REGIONS_LIMIT });
        }
        self.send(planner::Step::Begin { region: number, kind }).await?;
        Ok(RegionWriter {
            shared: self.shared.clone(),
            planner: self.planner.clone(),
            jobs: self.jobs.clone(),
            region: number,
            cutter: Cutter::default(),
            chunk: Vec::new(),
            chunk_bytes: 0,
            batch: Vec::new(),
            batch_bytes: 0,
            bytes: 0,
        })
    }

    /// Adds a small file to the skeleton: CRIU's images, the OCI configuration. The same name again replaces it.
    ///
    /// # Errors
    /// [`Error::Limit`] if it is longer than [`crate::SKELETON_FILE_BYTES_LIMIT`]: such a file is a region of kind
    /// [`RegionKind::File`].
    pub fn skeleton(&self, name: &str, bytes: Bytes) -> Result<()> {
        let value = bytes.len() as u64;
        if value > SKELETON_FILE_BYTES_LIMIT {
            return Err(Error::Limit {
                what: "bytes of a skeleton file",
                value,
                limit: SKELETON_FILE_BYTES_LIMIT,
            });
        }
        self.skeleton.lock().expect("nothing panics while inserting").insert(name.to_owned(), bytes);
        Ok(())
    }

    /// Writes index, boot object, manifest and tag, in this order. Every region must be finished.
    ///
    /// # Errors
    /// [`Error::TagTaken`] if another snapshot was published there at the same time, and the session's failure.
    pub async fn publish(self, name: &Name, tag: &str, facts: Facts) -> Result<Published> {
        check_word(tag).map_err(|source| Error::Syntax { text: tag.to_owned(), kind: "tag", source })?;
        let (reply, answer) = oneshot::channel();
        self.send(planner::Step::Publish { reply }).await?;
        let written = answer.await.map_err(|_| self.shared.failure())?;
        let skeleton = mem::take(&mut *self.skeleton.lock().expect("nothing panics while inserting"));
        let base = match self.base {
            Some(base) if base.is(name, tag) => base,
            _ => publish::Base::read(&self.shared.store, name, tag).await?,
        };
        let announcement =
            self.shared.announcement.lock().expect("nothing panics while taking").take().expect("taken once");
        let published = publish::publish(&self.shared, &announcement, base, written, skeleton, facts).await;
        announcement.end().await;
        published
    }

    /// Ends the session as dropping it does, and waits until its uploads are aborted. Whoever pushes meanwhile fails.
    pub async fn abort(&self) {
        self.shared.fail(Error::Aborted);
        let announcement = self.shared.announcement.lock().expect("nothing panics while taking").take();
        let (reply, answer) = oneshot::channel();
        if self.planner.send(planner::Step::Abort { reply }).await.is_ok() {
            let _ = answer.await;
        }
        if let Some(announcement) = announcement {
            announcement.end().await;
        }
    }

    async fn send(&self, step: planner::Step) -> Result<()> {
        self.planner.send(step).await.map_err(|_| self.shared.failure())
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("store", &self.shared.store).finish_non_exhaustive()
    }
}

/// One region of a session, written as a stream.
pub struct RegionWriter {
    shared: Arc<Shared>,
    planner: mpsc::Sender<planner::Step>,
    jobs: std::sync::mpsc::Sender<worker::Job>,
    region: u64,
    cutter: Cutter,
    /// The chunk that is not ended yet.
    chunk: Vec<Bytes>,
    chunk_bytes: u32,
    /// Chunks that go to a worker together.
    batch: Vec<Content>,
    batch_bytes: u64,
    bytes: u64,
}

impl RegionWriter {
    /// Takes the next bytes of the stream, a multiple of 4096. Waits while the session holds as much as it may.
    ///
    /// The bytes are kept, not copied, until their pack is stored; give buffers of some MiB, not parts of one huge one.
    ///
    /// # Errors
    /// The session's failure, whichever stage it happened in.
    ///
    /// # Panics
    /// If the length is no multiple of 4096.
    pub async fn push(&mut self, bytes: Bytes) -> Result<()> {
        assert_eq!(bytes.len() as u64 % PAGE_BYTES, 0, "a region is made of whole pages");
        self.shared.check()?;
        self.bytes += bytes.len() as u64;
        if self.bytes > CONTENT_BYTES_LIMIT {
            let (value, limit) = (self.bytes, CONTENT_BYTES_LIMIT);
            return Err(Error::Limit { what: "bytes of a region", value, limit });
        }
        let page = PAGE_BYTES as usize;
        let mut begin = 0;
        for end in (page..=bytes.len()).step_by(page) {
            if self.cutter.ends_with(&bytes[end - page..end]) {
                self.extend(bytes.slice(begin..end));
                begin = end;
                self.end_chunk().await?;
            }
        }
        if begin < bytes.len() {
            self.extend(bytes.slice(begin..));
        }
        Ok(())
    }

    /// Ends the region. `meta` is stored with it and means nothing to the store. Gives the region's index.
    ///
    /// # Errors
    /// The session's failure, whichever stage it happened in.
    pub async fn finish(mut self, meta: Vec<u8>) -> Result<usize> {
        if self.chunk_bytes > 0 {
            self.end_chunk().await?;
        }
        self.end_batch().await?;
        let (reply, answer) = oneshot::channel();
        self.send(planner::Step::Finish { region: self.region, meta: meta.into(), reply }).await?;
        answer.await.map_err(|_| self.shared.failure())
    }

    /// Bytes that were pushed so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn extend(&mut self, part: Bytes) {
        self.chunk_bytes += u32::try_from(part.len()).expect("a cut comes before 4 GiB");
        self.chunk.push(part);
    }

    async fn end_chunk(&mut self) -> Result<()> {
        let bytes = mem::take(&mut self.chunk_bytes);
        let parts = mem::take(&mut self.chunk);
        let pages = bytes / PAGE_BYTES as u32;
        // A batch that waits here for memory would hold what others need to go on.
        let memory = match self.shared.memory.clone().try_acquire_many_owned(pages) {
            Ok(memory) => memory,
            Err(_) => {
                self.end_batch().await?;
                self.shared.memory(pages).await?
            }
        };
        self.batch.push(Content { parts, bytes, memory });
        self.batch_bytes += u64::from(bytes);
        if self.batch_bytes >= BATCH_BYTES { self.end_batch().await } else { Ok(()) }
    }

    async fn end_batch(&mut self) -> Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        self.batch_bytes = 0;
        let (reply, hashed) = oneshot::channel();
        let contents = mem::take(&mut self.batch);
        let job = worker::Job::Hash { contents, reply };
        self.jobs.send(job).map_err(|_| self.shared.failure())?;
        self.send(planner::Step::Chunks { region: self.region, hashed }).await
    }

    async fn send(&self, step: planner::Step) -> Result<()> {
        self.planner.send(step).await.map_err(|_| self.shared.failure())
    }
}

impl std::fmt::Debug for RegionWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegionWriter")
            .field("region", &self.region)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}
