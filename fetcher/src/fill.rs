//! The order in which one stream is fetched: what somebody waits for, what was said to come first, the rest.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use rewarm_report::Class;
use rewarm_store::{Boot, ChunkMap, Error, Fetched, Hedges, Request, Room, Sink};
use rewarm_sys::shared::{self, Writer};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::error::Failure;
use crate::layout::{BLOCK_BYTES, Layout};
use crate::protocol::Extent;

/// Requests to the store at the same time: at 8 MiB each they fill a connection of 10 Gbit/s over 200 ms.
const PARALLEL: usize = 32;
/// Requests for what somebody waits for may come on top of that.
const PARALLEL_WANTED: usize = 32;
/// Content that is joined to requests in one go: keeps the wanted order where it is not that of the packs.
const BATCH_BYTES: u64 = 16 << 20;
/// Length of a request, about.
const REQUEST_BYTES: u64 = 8 << 20;
/// When enough is held, one more request is made after this time: whoever holds it up may be waiting for just that.
const AHEAD_PAUSE: Duration = Duration::from_millis(5);
/// Wait before a failed request is made again; the store's own attempts with their backoff lie before it.
const AGAIN: Duration = Duration::from_millis(300);

/// What a fill is told while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Word {
    /// Somebody waits for this block.
    Want(u64),
    /// Nobody waits any more.
    Stop,
}

/// Chunks of one region and which of them are in place.
struct Region {
    chunks: Arc<ChunkMap>,
    sink: Arc<Placing>,
}

/// Puts the chunks of one region where they belong, each once.
struct Placing {
    base: u64,
    chunks: Arc<ChunkMap>,
    writer: Arc<Writer>,
    done: Vec<AtomicBool>,
}

impl Placing {
    fn has(&self, chunk: usize) -> bool {
        self.done[chunk].load(Ordering::Acquire)
    }
}

impl Sink for Placing {
    fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let chunk = self.chunks.at(offset).ok_or(io::ErrorKind::InvalidInput)?;
        // Two requests may bring the same: one that was made in advance and one for who waits.
        if self.done[chunk].swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.writer.put(self.base + offset, bytes)
    }

    fn room(&self, offset: u64, bytes: u64) -> Option<Box<dyn Room + '_>> {
        let done = &self.done[self.chunks.at(offset)?];
        if done.swap(true, Ordering::AcqRel) {
            return None;
        }
        let Some(room) = self.writer.room(self.base + offset, bytes) else {
            done.store(false, Ordering::Release);
            return None;
        };
        Some(Box::new(Place { done, room: Some(room) }))
    }
}

/// The place of one chunk, which nobody else fills meanwhile.
struct Place<'a> {
    done: &'a AtomicBool,
    room: Option<shared::Room<'a>>,
}

impl Room for Place<'_> {
    fn parts(&mut self) -> Vec<&mut [u8]> {
        self.room.as_mut().map(shared::Room::parts).unwrap_or_default()
    }

    fn done(mut self: Box<Self>) -> io::Result<()> {
        self.room.take().map_or(Ok(()), shared::Room::done)
    }
}

impl Drop for Place<'_> {
    /// Given up: whoever brings the chunk next puts it.
    fn drop(&mut self) {
        if self.room.is_some() {
            self.done.store(false, Ordering::Release);
        }
    }
}

/// A request and why it is made.
#[derive(Debug, Clone)]
struct Ask {
    region: usize,
    request: Request,
    /// It brings what was said to come first.
    first: bool,
}

type Running = FuturesUnordered<BoxFuture<'static, (Ask, Result<Fetched, Error>)>>;

/// One stream that is being fetched.
pub(crate) struct Fill {
    boot: Boot,
    layout: Layout,
    writer: Arc<Writer>,
    /// Bytes to hold at most before readers are done with them, if they say so at all.
    ahead: Option<u64>,
    regions: Vec<Region>,
    queue: VecDeque<Ask>,
    /// What comes first is not disturbed by what follows: a store on this machine answers at once, so requests that wait beside
    /// each other save nothing, and only take the processors from each other.
    near: bool,
    /// Requests under way that bring what comes first.
    first: usize,
    wanted: HashSet<u64>,
    cores: Arc<Semaphore>,
    /// For what somebody waits for: it does not stand behind all that was asked for in advance.
    cores_wanted: Arc<Semaphore>,
    hedges: Arc<Hedges>,
}

impl Fill {
    /// Plans the fetch of what is not in place yet, `first` before the rest. `near`: the store is on this machine.
    pub(crate) async fn new(
        boot: Boot,
        layout: Layout,
        writer: Arc<Writer>,
        first: &[Extent],
        ahead: Option<u64>,
        near: bool,
    ) -> Result<Self, Failure> {
        let mut regions = Vec::new();
        for (index, &(base, _)) in layout.regions().iter().enumerate() {
            let chunks = boot.chunks(index).await.map_err(|error| Failure::of_store(&error))?;
            let has = |n| {
                let chunk = chunks.get(n).expect("it is below the length");
                AtomicBool::new(writer.has_all(base + chunk.offset, chunk.bytes.into()))
            };
            let done = (0..chunks.len()).map(has).collect();
            let sink = Arc::new(Placing { base, chunks: chunks.clone(), writer: writer.clone(), done });
            regions.push(Region { chunks, sink });
        }
        let (queue, wanted) = (VecDeque::new(), HashSet::new());
        let (cores, cores_wanted) = (Boot::cores(), Boot::cores());
        let mut fill = Self {
            boot,
            layout,
            writer,
            ahead,
            regions,
            queue,
            near,
            first: 0,
            wanted,
            cores,
            cores_wanted,
            hedges: Arc::default(),
        };
        fill.plan(first).await?;
        Ok(fill)
    }

    async fn plan(&mut self, first: &[Extent]) -> Result<(), Failure> {
        let mut planned: Vec<Vec<bool>> =
            self.regions.iter().map(|region| vec![false; region.chunks.len()]).collect();
        let mut take = |region: usize, chunk: usize, sink: &Placing| {
            !sink.has(chunk) && !std::mem::replace(&mut planned[region][chunk], true)
        };
        let mut order: Vec<(usize, usize)> = Vec::new();
        for &(offset, bytes) in first {
            // Whole blocks: readers see nothing of a block before all of it is there.
            let start = offset / BLOCK_BYTES * BLOCK_BYTES;
            let end = offset.saturating_add(bytes).checked_next_multiple_of(BLOCK_BYTES).unwrap_or(u64::MAX);
            for (region, chunk) in self.chunks_of(start, end - start) {
                if take(region, chunk, &self.regions[region].sink) {
                    order.push((region, chunk));
                }
            }
        }
        self.enqueue(&order).await?;
        for region in 0..self.regions.len() {
            let sink = self.regions[region].sink.clone();
            let rest = (0..self.regions[region].chunks.len()).filter(|&chunk| take(region, chunk, &sink));
            let rest: Vec<usize> = rest.collect();
            let requests = self.requests(region, rest).await?;
            self.queue.extend(requests.into_iter().map(|request| Ask { region, request, first: false }));
        }
        Ok(())
    }

    /// Joins chunks to requests; the order is kept from batch to batch.
    async fn enqueue(&mut self, order: &[(usize, usize)]) -> Result<(), Failure> {
        let mut batch: Vec<usize> = Vec::new();
        let mut bytes = 0;
        for (index, &(region, chunk)) in order.iter().enumerate() {
            batch.push(chunk);
            bytes += u64::from(self.regions[region].chunks.get(chunk).map_or(0, |chunk| chunk.bytes));
            let last = order.get(index + 1).is_none_or(|(next, _)| *next != region);
            if last || bytes >= BATCH_BYTES {
                let requests = self.requests(region, std::mem::take(&mut batch)).await?;
                self.queue.extend(requests.into_iter().map(|request| Ask { region, request, first: true }));
                bytes = 0;
            }
        }
        Ok(())
    }

    async fn requests(&self, region: usize, chunks: Vec<usize>) -> Result<Vec<Request>, Failure> {
        self.boot.requests(region, chunks).await.map_err(|error| Failure::of_store(&error))
    }

    /// The chunks that a part of the stream touches, with their regions.
    fn chunks_of(&self, offset: u64, bytes: u64) -> Vec<(usize, usize)> {
        let end = offset.saturating_add(bytes).min(self.layout.bytes());
        let mut found = Vec::new();
        let mut at = offset;
        while at < end {
            let place = self.layout.locate(at).and_then(|(region, inside)| {
                let chunks = &self.regions[region].chunks;
                let number = chunks.at(inside)?;
                Some((region, number, chunks.get(number)?))
            });
            match place {
                Some((region, number, chunk)) => {
                    found.push((region, number));
                    at = self.layout.base(region) + chunk.offset + u64::from(chunk.bytes);
                }
                // The gap behind a region ends with its block.
                None => at = (at / BLOCK_BYTES + 1) * BLOCK_BYTES,
            }
        }
        found
    }

    /// Fetches all of it; tells what that took. A store that fails is asked again until nothing has arrived for `patience`; an
    /// answer that is late is asked for once more.
    pub(crate) async fn run(
        mut self,
        mut words: UnboundedReceiver<Word>,
        patience: Duration,
    ) -> Result<Fetched, Failure> {
        let mut running = Running::new();
        let (mut all, mut arrived) = (Fetched::default(), Instant::now());
        let mut one_more = false;
        loop {
            while running.len() < PARALLEL
                && (one_more || !self.is_ahead(running.len()))
                && self.queue.front().is_some_and(|ask| ask.first || !self.near || self.first == 0)
                && let Some(ask) = self.queue.pop_front()
            {
                one_more = false;
                self.first += usize::from(ask.first);
                self.start(&mut running, ask, Duration::ZERO, &self.cores);
            }
            if running.is_empty() && self.queue.is_empty() {
                return Ok(all);
            }
            let waits = !self.queue.is_empty() && self.is_ahead(running.len());
            tokio::select! {
                biased;
                word = words.recv() => match word {
                    Some(Word::Want(block)) => self.want(block, &mut running).await?,
                    Some(Word::Stop) | None => {
                        let stopped = io::Error::other("nobody wants the stream any more");
                        return Err(Failure::of(&stopped, Class::Failed));
                    }
                },
                () = tokio::time::sleep(AHEAD_PAUSE), if waits => one_more = true,
                Some((ask, outcome)) = running.next() => match outcome {
                    Ok(fetched) => {
                        self.first -= usize::from(ask.first);
                        all = all + fetched;
                        arrived = Instant::now();
                    }
                    Err(error) if may_pass(&error) && arrived.elapsed() < patience => {
                        tracing::info!(%error, "trying again");
                        self.start(&mut running, ask, AGAIN, &self.cores);
                    }
                    Err(error) => return Err(Failure::of_store(&error)),
                },
            }
        }
    }

    /// Whether enough is held or under way.
    fn is_ahead(&self, running: usize) -> bool {
        let coming = REQUEST_BYTES * running as u64;
        self.ahead.is_some_and(|ahead| self.writer.held_bytes() + coming > ahead)
    }

    fn start(&self, running: &mut Running, ask: Ask, wait: Duration, cores: &Arc<Semaphore>) {
        let sink = self.regions[ask.region].sink.clone();
        let there = ask.request.chunks().iter().all(|&chunk| sink.has(chunk));
        let (boot, cores, hedges) = (self.boot.clone(), cores.clone(), self.hedges.clone());
        let work = async move {
            if there {
                return (ask, Ok(Fetched::default()));
            }
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
            let outcome = boot.fetch_one(ask.region, ask.request.clone(), sink, cores, hedges).await;
            (ask, outcome)
        };
        running.push(tokio::spawn(work).map(|ended| ended.expect("fetching does not panic")).boxed());
    }

    /// Asks for the chunks of a block at once, even if a longer request that brings them is under way.
    async fn want(&mut self, block: u64, running: &mut Running) -> Result<(), Failure> {
        if !self.wanted.insert(block) {
            return Ok(());
        }
        for (region, chunk) in self.chunks_of(block.saturating_mul(BLOCK_BYTES), BLOCK_BYTES) {
            if self.regions[region].sink.has(chunk) {
                continue;
            }
            for request in self.requests(region, vec![chunk]).await? {
                let ask = Ask { region, request, first: false };
                if running.len() < PARALLEL + PARALLEL_WANTED {
                    self.start(running, ask, Duration::ZERO, &self.cores_wanted);
                } else {
                    self.queue.push_front(ask);
                }
            }
        }
        Ok(())
    }
}

/// Whether asking again may help.
fn may_pass(error: &Error) -> bool {
    matches!(
        error,
        Error::Request { .. }
            | Error::Unreachable { .. }
            | Error::Denied { .. }
            | Error::NoCredentials { .. }
    )
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;
    use rewarm_store::fault::{Faults, FaultyStore, Wrong};
    use rewarm_store::{Facts, Name, Reference, RegionKind, SessionOptions, Store, StoreUrl, Target};
    use rewarm_sys::shared::Owner;

    use super::*;

    /// Content without repetitions.
    fn noise(bytes: u64) -> Vec<u8> {
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        };
        (0..bytes).map(|_| next()).collect()
    }

    /// A snapshot of one region, so many bytes of noise, and a stream for it. The folder is its store.
    async fn noisy(length: u64) -> (tempfile::TempDir, Boot, Layout, Owner, Arc<Writer>) {
        let folder = tempfile::tempdir().expect("a folder");
        let url: StoreUrl = folder.path().to_str().expect("a plain path").parse().expect("a store");
        let store = Store::open(&url).await.expect("the folder is there");
        let (boot, layout, owner, writer) = noisy_in(&store, url, length).await;
        (folder, boot, layout, owner, writer)
    }

    /// The same in a store that does what `Faults` say.
    async fn faulty(length: u64) -> (Arc<Faults>, Boot, Layout, Owner, Arc<Writer>) {
        let faults = Arc::new(Faults::default());
        let objects = FaultyStore::new(Arc::new(InMemory::new()), faults.clone());
        let store = Store::from_objects(Arc::new(objects), "faulty");
        let url = "unused".parse().expect("a store");
        let (boot, layout, owner, writer) = noisy_in(&store, url, length).await;
        (faults, boot, layout, owner, writer)
    }

    async fn noisy_in(store: &Store, url: StoreUrl, length: u64) -> (Boot, Layout, Owner, Arc<Writer>) {
        let session = store.begin(SessionOptions::default()).await.expect("it can be written");
        let mut region = session.region(RegionKind::Task { pid: 1 }).await.expect("a region");
        region.push(noise(length).into()).await.expect("room");
        region.finish(Vec::new()).await.expect("room");
        let name: Name = "noise".parse().expect("a name");
        session.publish(&name, "latest", Facts::default()).await.expect("room");
        let reference = Reference { store: url, name, target: Target::Tag("latest".to_owned()) };
        let boot = store.resolve(&reference).await.expect("published").boot().await.expect("whole");

        let layout = Layout::of(&[length]).expect("it is short");
        let owner = Owner::create(layout.bytes(), BLOCK_BYTES, None).expect("memory");
        let [content, table] = owner.files().map(|file| file.try_clone_to_owned().expect("a descriptor"));
        let writer = Writer::open(content, table, layout.regions(), false).expect("a stream");
        (boot, layout, owner, Arc::new(writer))
    }

    /// One request of the thirteen or so is lost on its way. Time passes only while everybody waits.
    #[tokio::test]
    async fn a_request_that_is_never_answered_holds_nobody_up() {
        let length = 200 * BLOCK_BYTES;
        let (faults, boot, layout, owner, writer) = faulty(length).await;
        tokio::time::pause();
        for silent in [0, 5, 12] {
            let delay = Duration::from_millis(50);
            faults.set(Wrong { silent: Some(("packs/", silent)), delay, ..Wrong::default() });
            let (boot, layout) = (boot.clone(), layout.clone());
            let owner = Owner::create(layout.bytes(), BLOCK_BYTES, None).expect("memory");
            let [content, table] = owner.files().map(|file| file.try_clone_to_owned().expect("a descriptor"));
            let writer = Writer::open(content, table, layout.regions(), false).expect("a stream");
            let fill = Fill::new(boot, layout, Arc::new(writer), &[], None, false).await.expect("a plan");
            let (_words, hear) = tokio::sync::mpsc::unbounded_channel();
            let begun = tokio::time::Instant::now();
            let filled = tokio::time::timeout(Duration::from_secs(60), fill.run(hear, Duration::ZERO));
            let filled = filled.await.expect("it is asked once more").expect("the store is there");
            assert!(begun.elapsed() < Duration::from_secs(2), "number {silent}: {:?}", begun.elapsed());
            assert_eq!((owner.arrived_bytes(), filled.hedges), (length, 1));
            assert!(filled.read_bytes <= length + length / 10, "{} of {length}", filled.read_bytes);
        }
        drop((owner, writer));
    }

    /// A store that is slow altogether gets no more to do, and a folder is read once.
    #[tokio::test]
    async fn what_is_answered_as_soon_as_anything_is_asked_for_once() {
        let length = 64 * BLOCK_BYTES;
        let (faults, boot, layout, _owner, writer) = faulty(length).await;
        tokio::time::pause();
        faults.set(Wrong { delay: Duration::from_secs(20), bytes_per_second: 1 << 20, ..Wrong::default() });
        let fill = Fill::new(boot, layout, writer, &[], None, false).await.expect("a plan");
        let (_words, hear) = tokio::sync::mpsc::unbounded_channel();
        let filled = fill.run(hear, Duration::ZERO).await.expect("slow, but there");
        assert_eq!((filled.read_bytes, filled.hedges), (length, 0));

        let (_folder, boot, layout, _owner, writer) = noisy(length).await;
        let fill = Fill::new(boot, layout, writer, &[], None, true).await.expect("a plan");
        let (_words, hear) = tokio::sync::mpsc::unbounded_channel();
        let filled = fill.run(hear, Duration::ZERO).await.expect("the store is there");
        let Fetched { bytes, checked_bytes, read_bytes, hedges, .. } = filled;
        assert_eq!((bytes, checked_bytes, read_bytes, hedges), (length, length, length, 0));
    }

    /// Whoever is done with nothing yet may be waiting for what was not fetched.
    #[tokio::test]
    async fn what_is_held_back_comes_all_the_same() {
        let (_folder, boot, layout, owner, writer) = noisy(100 * BLOCK_BYTES).await;
        let fill = Fill::new(boot, layout, writer, &[], Some(BLOCK_BYTES), true).await.expect("a plan");
        let (_words, hear) = tokio::sync::mpsc::unbounded_channel();
        fill.run(hear, Duration::ZERO).await.expect("the store is there");
        assert_eq!(owner.arrived_bytes(), 100 * BLOCK_BYTES);
    }

    /// It is read straight into the memory of readers, who must not see it.
    #[tokio::test]
    async fn what_is_damaged_does_not_arrive_and_may_come_again() {
        let (folder, boot, layout, owner, writer) = noisy(8 * BLOCK_BYTES).await;
        let packs = std::fs::read_dir(folder.path().join("packs")).expect("a folder");
        let pack = packs.flatten().max_by_key(|pack| pack.metadata().map_or(0, |file| file.len()));
        let pack = pack.expect("there is a pack").path();
        let whole = std::fs::read(&pack).expect("a file");
        let mut damaged = whole.clone();
        damaged[whole.len() / 2] ^= 1;
        std::fs::write(&pack, &damaged).expect("room");
        let fill = Fill::new(boot.clone(), layout.clone(), writer.clone(), &[], None, true);
        let fill = fill.await.expect("a plan");
        let sink = fill.regions[0].sink.clone();
        let (_words, hear) = tokio::sync::mpsc::unbounded_channel();
        assert!(fill.run(hear, Duration::ZERO).await.is_err());
        assert!(owner.arrived_bytes() < 8 * BLOCK_BYTES);
        assert!((0..sink.done.len()).any(|chunk| !sink.has(chunk)), "the damaged one can be put again");

        std::fs::write(&pack, &whole).expect("room");
        let [content, table] = owner.files().map(|file| file.try_clone_to_owned().expect("a descriptor"));
        let writer = Writer::open(content, table, layout.regions(), false).expect("a stream");
        let fill = Fill::new(boot, layout, Arc::new(writer), &[], None, true).await.expect("a plan");
        let (_words, hear) = tokio::sync::mpsc::unbounded_channel();
        fill.run(hear, Duration::ZERO).await.expect("all of it is whole");
        assert_eq!(owner.arrived_bytes(), 8 * BLOCK_BYTES);
        let files = owner.for_reading().expect("descriptors");
        let [content, table] = files;
        let reader = rewarm_sys::shared::Reader::open(content, table).expect("a stream");
        let expected = noise(8 * BLOCK_BYTES);
        for (block, expected) in (0..).zip(expected.chunks(BLOCK_BYTES as usize)) {
            let seen = reader.wait(block, Duration::ZERO, &|| true).expect("arrived");
            assert!(seen == expected, "block {block} has other bytes");
        }
    }

    /// A reader waits for whole blocks: a block of which only some chunks come first comes last.
    #[tokio::test]
    async fn what_comes_first_comes_in_whole_blocks() {
        let (_folder, boot, layout, _owner, writer) = noisy(24 * BLOCK_BYTES).await;
        let wanted = (17 * BLOCK_BYTES + 4096, 4096);
        let fill = Fill::new(boot, layout, writer, &[wanted], None, true).await.expect("a plan");
        let front = fill.queue.front().expect("something is to be fetched");
        assert!(front.first && !fill.queue.back().expect("there is more").first);
        for (_, chunk) in fill.chunks_of(17 * BLOCK_BYTES, BLOCK_BYTES) {
            assert!(front.request.chunks().contains(&chunk), "chunk {chunk} of the block comes later");
        }
        assert!(fill.queue.len() > 1, "the rest comes later");
    }
}
