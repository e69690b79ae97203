//! Content on its way back: few long requests, many short checks, and the receiver sees only what was checked.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use tokio::sync::Semaphore;
use uuid::Uuid;

use crate::codec::{self, Codec};
use crate::error::{Damage, Error, Result};
use crate::format::index::ChunkRef;
use crate::format::pack_path;
use crate::limits::{DECODE_BYTES, GAP_BYTES, REQUEST_BYTES};
use crate::reader::hedge::{Answer, Hedges};
use crate::reader::{Boot, BootInner, Chunk, ChunkMap};

/// Receives the content of a region.
pub trait Sink: Send + Sync {
    /// Takes checked bytes that belong at `offset` of the region's stream. Called from several threads at once, in any
    /// order, for each byte of the stream exactly once.
    ///
    /// # Errors
    /// An error ends the fetch.
    fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Memory of the receiver for so many bytes at `offset`, where it has some: what is stored as it is is read into it and checked
    /// there, instead of being put. `None`: they are put.
    fn room(&self, offset: u64, bytes: u64) -> Option<Box<dyn Room + '_>> {
        let _ = (offset, bytes);
        None
    }
}

/// Memory of a receiver. Dropped before [`Room::done`], it holds nothing.
pub trait Room {
    /// The memory, in the order of the stream; together as long as was asked for.
    fn parts(&mut self) -> Vec<&mut [u8]>;

    /// What was read into it is checked: the receiver has it now.
    ///
    /// # Errors
    /// An error ends the fetch.
    fn done(self: Box<Self>) -> io::Result<()>;
}

/// What a fetch did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fetched {
    /// Bytes given to the sink.
    pub bytes: u64,
    /// Bytes that were hashed, and decoded where they are stored encoded: a chunk that stands at several places counts once for a
    /// request.
    pub checked_bytes: u64,
    /// Bytes read from the store, gaps included; not those of a copy nearby. What was asked for twice counts twice.
    pub read_bytes: u64,
    /// Requests made for them.
    pub requests: u64,
    /// Second requests among them, for an answer that was late.
    pub hedges: u64,
}

impl std::ops::Add for Fetched {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            bytes: self.bytes + other.bytes,
            checked_bytes: self.checked_bytes + other.checked_bytes,
            read_bytes: self.read_bytes + other.read_bytes,
            requests: self.requests + other.requests,
            hedges: self.hedges + other.hedges,
        }
    }
}

/// One request: a stretch of a pack and the chunks of a region that are wanted from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pack: u32,
    range: Range<u64>,
    /// Numbers of chunks, by their offset in the pack. The same chunk may stand at several places of the stream.
    chunks: Vec<usize>,
}

impl Request {
    /// The numbers of the chunks that it brings.
    #[must_use]
    pub fn chunks(&self) -> &[usize] {
        &self.chunks
    }
}

impl Boot {
    /// Fetches a region with up to `parallel` requests at once and gives it to `sink`.
    ///
    /// # Errors
    /// [`Error::Damaged`] if a pack is missing or too short or a chunk is not what the index says, [`Error::Sink`] if the
    /// receiver fails. Parts of the stream may have been put by then.
    ///
    /// # Panics
    /// If there is no such region.
    pub async fn fetch(&self, region: usize, sink: Arc<dyn Sink>, parallel: usize) -> Result<Fetched> {
        self.fetch_where(region, |_| true, sink, parallel).await
    }

    /// Fetches those chunks of a region that `wanted` names, as [`Boot::fetch`] does: for content that is needed before
    /// the rest.
    ///
    /// # Errors
    /// As [`Boot::fetch`].
    ///
    /// # Panics
    /// If there is no such region.
    pub async fn fetch_where(
        &self,
        region: usize,
        wanted: impl Fn(Chunk) -> bool,
        sink: Arc<dyn Sink>,
        parallel: usize,
    ) -> Result<Fetched> {
        let map = self.chunks(region).await?;
        let chosen =
            (0..map.len()).filter(|&n| wanted(map.get(n).expect("it is below the length"))).collect();
        let requests = self.requests(region, chosen).await?;
        let (cores, hedges) = (Self::cores(), Arc::new(Hedges::default()));
        let fetched = stream::iter(requests)
            .map(|request| self.fetch_one(region, request, sink.clone(), cores.clone(), hedges.clone()))
            .buffer_unordered(parallel.max(1))
            .try_fold(Fetched::default(), |sum, one| async move { Ok(sum + one) })
            .await?;
        Ok(fetched)
    }

    /// Joins chunks of a region (by their numbers) that lie near each other to requests, in the order of the packs.
    ///
    /// # Errors
    /// As [`Boot::chunks`].
    ///
    /// # Panics
    /// If there is no such region or chunk.
    pub async fn requests(&self, region: usize, chunks: Vec<usize>) -> Result<Vec<Request>> {
        Ok(plan(self.chunks(region).await?.refs(), chunks))
    }

    /// As many permits as there are processors: what checks and decodes takes one. Shared by the requests of a fetch.
    #[must_use]
    pub fn cores() -> Arc<Semaphore> {
        Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from)))
    }

    /// Makes one request of a region and gives what it brings to `sink`. Where the store is late, compared with the other
    /// requests that share `hedges`, it is asked once more.
    ///
    /// # Errors
    /// As [`Boot::fetch`]. Chunks may have been put by then.
    pub async fn fetch_one(
        &self,
        region: usize,
        request: Request,
        sink: Arc<dyn Sink>,
        cores: Arc<Semaphore>,
        hedges: Arc<Hedges>,
    ) -> Result<Fetched> {
        let map = self.chunks(region).await?;
        let job = Job { boot: self.inner.clone(), map, region, sink };
        run(Arc::new(job), cores, &hedges, request).await
    }

    /// Fetches chunk number `n` of a region alone.
    ///
    /// # Errors
    /// [`Error::Damaged`] if the pack is missing or too short or the chunk is not what the index says.
    ///
    /// # Panics
    /// If there is no such region or chunk.
    pub async fn read_chunk(&self, region: usize, n: usize) -> Result<Bytes> {
        let map = self.chunks(region).await?;
        let chunk = map.refs()[n];
        let (pack, _) = self.inner.packs[chunk.pack as usize];
        let end = chunk.offset + u64::from(chunk.stored);
        let stored = self.inner.objects.get_range(&pack_path(pack), chunk.offset..end).await?;
        let inner = self.inner.clone();
        let decoded = tokio::task::spawn_blocking(move || {
            let mut raw = Vec::new();
            inner.check(pack, &chunk, &stored, &mut raw)?;
            Ok(if chunk.codec == Codec::None { stored } else { Bytes::from(raw) })
        });
        decoded.await.expect("decoding does not panic")
    }
}

/// Joins chunks that lie near each other in a pack to requests of about [`REQUEST_BYTES`].
fn plan(refs: &[ChunkRef], mut order: Vec<usize>) -> Vec<Request> {
    order.sort_by_key(|&n| (refs[n].pack, refs[n].offset));
    let mut requests: Vec<Request> = Vec::new();
    for n in order {
        let chunk = &refs[n];
        let range = chunk.offset..chunk.offset + u64::from(chunk.stored);
        match requests.last_mut() {
            Some(last)
                if last.pack == chunk.pack
                    && range.start <= last.range.end + GAP_BYTES
                    && (range.end <= last.range.end || last.range.end - last.range.start < REQUEST_BYTES) =>
            {
                last.range.end = last.range.end.max(range.end);
                last.chunks.push(n);
            }
            _ => requests.push(Request { pack: chunk.pack, range, chunks: vec![n] }),
        }
    }
    requests
}

/// What all requests of a fetch share.
struct Job {
    boot: Arc<BootInner>,
    map: Arc<ChunkMap>,
    region: usize,
    sink: Arc<dyn Sink>,
}

/// Where the stored bytes of a request's chunks come from.
#[derive(Clone)]
enum Source {
    /// One answer of the store, which begins at this offset of the pack.
    Answer(Bytes, u64),
    /// A file, read chunk by chunk into memory that is in the cache of the core that hashes it.
    File(Arc<File>),
}

async fn run(job: Arc<Job>, cores: Arc<Semaphore>, hedges: &Hedges, request: Request) -> Result<Fetched> {
    let (pack, length) = job.boot.packs[request.pack as usize];
    let path = pack_path(pack);
    let asked = request.range.end - request.range.start;
    if let Some(file) = job.boot.objects.open(&path) {
        let put = put_all(&job, &cores, &request, Source::File(Arc::new(file?))).await?;
        return Ok(Fetched { read_bytes: asked, requests: 1, ..put });
    }
    let cache = job.boot.objects.cache().cloned();
    if let Some(cache) = cache.clone() {
        let range = request.range.clone();
        let read = tokio::task::spawn_blocking(move || cache.read(pack, length, range));
        if let Some(near) = read.await.expect("reading a copy does not panic") {
            let source = Source::Answer(near.into(), request.range.start);
            match put_all(&job, &cores, &request, source).await {
                Ok(put) => return Ok(put),
                // The store has it whole, unless that says otherwise.
                Err(error @ Error::Damaged { .. }) => tracing::info!(%error, "a copy nearby is damaged"),
                Err(error) => return Err(error),
            }
        }
    }
    let Answer { content, hedged } = hedges.get(&job.boot.objects, &path, request.range.clone()).await?;
    let requests = 1 + u64::from(hedged);
    let read_bytes = content.len() as u64 * requests;
    let source = Source::Answer(content.clone(), request.range.start);
    let put = put_all(&job, &cores, &request, source).await?;
    if let Some(cache) = cache {
        let offset = request.range.start;
        let keep = tokio::task::spawn_blocking(move || cache.keep(pack, length, offset, &content));
        keep.await.expect("keeping a copy does not panic");
    }
    Ok(Fetched { read_bytes, requests, hedges: u64::from(hedged), ..put })
}

/// Checks, decodes and puts the chunks of a request. Returns the bytes of content, and those that were checked for it.
async fn put_all(
    job: &Arc<Job>,
    cores: &Arc<Semaphore>,
    request: &Request,
    source: Source,
) -> Result<Fetched> {
    let (pack, _) = job.boot.packs[request.pack as usize];
    let parts = batches(&job.map, &request.chunks);
    let works = parts.into_iter().map(|chunks| {
        let (job, source, cores) = (job.clone(), source.clone(), cores.clone());
        async move {
            let turn = cores.acquire_owned().await.expect("nobody closes it");
            let work = tokio::task::spawn_blocking(move || {
                let done = BUFFERS.with_borrow_mut(|buffers| job.put(pack, &source, &chunks, buffers));
                drop(turn);
                done
            });
            work.await.expect("decoding does not panic")
        }
    });
    let done: Vec<Fetched> = futures::future::try_join_all(works).await?;
    Ok(done.into_iter().fold(Fetched::default(), std::ops::Add::add))
}

thread_local! {
    /// Kept between batches: fresh memory costs a page fault for each page, more than the hash of it.
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

/// Memory for one chunk, stored and decoded.
#[derive(Default)]
struct Buffers {
    stored: Vec<u8>,
    raw: Vec<u8>,
}

/// Splits chunks into batches of about [`DECODE_BYTES`], never between two places of the same chunk.
fn batches(map: &ChunkMap, chunks: &[usize]) -> Vec<Vec<usize>> {
    let refs = map.refs();
    let mut batches: Vec<Vec<usize>> = Vec::new();
    let mut bytes = DECODE_BYTES;
    let mut last = None;
    for &n in chunks {
        let place = (refs[n].offset, refs[n].id);
        if bytes >= DECODE_BYTES && last != Some(place) {
            batches.push(Vec::new());
            bytes = 0;
        }
        if last != Some(place) {
            bytes += u64::from(refs[n].raw);
        }
        last = Some(place);
        batches.last_mut().expect("the first chunk begins a batch").push(n);
    }
    batches
}

impl Job {
    /// Checks, decodes and puts chunks of one pack.
    fn put(&self, pack: Uuid, source: &Source, chunks: &[usize], buffers: &mut Buffers) -> Result<Fetched> {
        let path = pack_path(pack);
        let mut held: Option<ChunkRef> = None;
        let mut done = Fetched::default();
        for (index, &n) in chunks.iter().enumerate() {
            let chunk = self.map.refs()[n];
            let length = chunk.stored as usize;
            let fresh = held != Some(chunk);
            let again = chunks.get(index + 1).is_some_and(|&next| self.map.refs()[next] == chunk);
            if let Source::File(file) = source
                && fresh
                && !again
                && self.read_in_place(pack, file, n)?
            {
                done.bytes += u64::from(chunk.raw);
                done.checked_bytes += u64::from(chunk.raw);
                continue;
            }
            let stored = match source {
                Source::Answer(bytes, begin) => &bytes[(chunk.offset - begin) as usize..][..length],
                Source::File(file) => {
                    buffers.stored.resize(length, 0);
                    if fresh {
                        self.boot.objects.read_file(&path, file, chunk.offset, &mut buffers.stored)?;
                    }
                    &buffers.stored[..]
                }
            };
            if fresh {
                self.boot.check(pack, &chunk, stored, &mut buffers.raw)?;
                held = Some(chunk);
                done.checked_bytes += u64::from(chunk.raw);
            }
            let content = if chunk.codec == Codec::None { stored } else { &buffers.raw[..] };
            let (offset, bytes) = (self.map.offset(n), content.len());
            self.sink.put(offset, content).map_err(|source| self.refused(offset, bytes, source))?;
            done.bytes += bytes as u64;
        }
        Ok(done)
    }

    /// Reads a chunk that is stored as it is into the receiver's own memory and checks it there, if the receiver has any.
    fn read_in_place(&self, pack: Uuid, file: &File, n: usize) -> Result<bool> {
        let (chunk, offset) = (self.map.refs()[n], self.map.offset(n));
        if chunk.codec != Codec::None || chunk.stored != chunk.raw {
            return Ok(false);
        }
        let Some(mut room) = self.sink.room(offset, chunk.raw.into()) else { return Ok(false) };
        let (path, mut parts) = (pack_path(pack), room.parts());
        let mut at = chunk.offset;
        for part in &mut parts {
            self.boot.objects.read_file(&path, file, at, part)?;
            at += part.len() as u64;
        }
        self.boot.check_id(pack, &chunk, parts.iter().map(|part| &**part))?;
        drop(parts);
        room.done().map_err(|source| self.refused(offset, chunk.raw as usize, source))?;
        Ok(true)
    }

    fn refused(&self, offset: u64, bytes: usize, source: io::Error) -> Error {
        Error::Sink { region: self.region, offset, bytes, source }
    }
}

impl BootInner {
    /// Checks a chunk. Its content is in `raw` afterwards, unless it is stored raw: then it is `stored` itself.
    pub(crate) fn check(&self, pack: Uuid, chunk: &ChunkRef, stored: &[u8], raw: &mut Vec<u8>) -> Result<()> {
        let damaged = |source| self.objects.damaged(pack_path(pack), source);
        let content = if chunk.codec == Codec::None {
            if stored.len() != chunk.raw as usize {
                let (found, expected) = (stored.len() as u64, u64::from(chunk.raw));
                return Err(damaged(Damage::Length { found, expected }));
            }
            stored
        } else {
            raw.resize(chunk.raw as usize, 0);
            codec::decode(chunk.codec, stored, raw).map_err(|source| {
                damaged(Damage::Codec { offset: chunk.offset, expected: u64::from(chunk.raw), source })
            })?;
            raw
        };
        self.check_id(pack, chunk, [content])
    }

    /// Compares content with the chunk's id.
    fn check_id<'a>(
        &self,
        pack: Uuid,
        chunk: &ChunkRef,
        content: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<()> {
        let found = self.key.id(content);
        if found == chunk.id {
            return Ok(());
        }
        let damage = Damage::Chunk { offset: chunk.offset, found, expected: chunk.id };
        Err(self.objects.damaged(pack_path(pack), damage))
    }
}
