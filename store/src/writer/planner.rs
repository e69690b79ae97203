//! The one place of a session where order matters: which chunk lies where.
//!
//! Deduplication must not cost locality. A region may be spread over as many ranges of packs as its length allows
//! ([`BYTES_PER_RANGE`]); a chunk that lies near a range in use is always reused, one that would begin another range only
//! while there are ranges left, and is written again otherwise.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::mpsc::Sender;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use uuid::Uuid;

use crate::digest::ChunkId;
use crate::error::Result;
use crate::format::index::Location;
use crate::format::manifest::RegionKind;
use crate::format::pack_path;
use crate::limits::{BYTES_PER_RANGE, GAP_BYTES, RANGES_FREE};
use crate::writer::pack::{Outcome, Pack, Sent};
use crate::writer::worker::{Body, Encoded, Hashed, Job};
use crate::writer::{Content, Shared};

/// What the planner is told, in order.
pub(crate) enum Step {
    Begin { region: u64, kind: RegionKind },
    Chunks { region: u64, hashed: oneshot::Receiver<Vec<Hashed>> },
    Finish { region: u64, meta: Bytes, reply: oneshot::Sender<usize> },
    Publish { reply: oneshot::Sender<Written> },
    Abort { reply: oneshot::Sender<()> },
}

/// What a session has written.
pub(crate) struct Written {
    pub(crate) regions: Vec<WrittenRegion>,
    /// Regions that were begun and not finished.
    pub(crate) unfinished: usize,
    /// Packs that this session wrote, with their lengths.
    pub(crate) packs: Vec<(Uuid, u64)>,
}

impl Written {
    /// Whether this session wrote the pack.
    pub(crate) fn wrote(&self, pack: &Uuid) -> bool {
        self.packs.iter().any(|(own, _)| own == pack)
    }
}

/// A finished region.
pub(crate) struct WrittenRegion {
    pub(crate) kind: RegionKind,
    pub(crate) meta: Bytes,
    pub(crate) chunks: Vec<(ChunkId, Location)>,
}

struct Region {
    kind: RegionKind,
    meta: Bytes,
    /// A chunk without location lies where its first occurrence will be put.
    chunks: Vec<(ChunkId, Option<Location>)>,
    ranges: Ranges,
}

/// Runs until the session publishes, aborts or is gone.
pub(crate) async fn run(shared: Arc<Shared>, jobs: Sender<Job>, mut steps: mpsc::Receiver<Step>) {
    let (cancel, cancelled) = watch::channel(false);
    let mut planner = Planner {
        shared: shared.clone(),
        jobs,
        cancelled,
        open: BTreeMap::new(),
        finished: Vec::new(),
        placed: HashMap::new(),
        pack: None,
        sent: Vec::new(),
    };
    let mut done = None;
    while let Some(step) = steps.recv().await {
        match step {
            Step::Publish { reply } => {
                match planner.publish().await {
                    Ok(written) => {
                        // Whoever asked may have gone: then nobody will refer to what was written.
                        if reply.send(written).is_ok() {
                            return;
                        }
                    }
                    Err(error) => shared.fail(error),
                }
                break;
            }
            Step::Abort { reply } => {
                done = Some(reply);
                break;
            }
            step => {
                if let Err(error) = planner.step(step).await {
                    shared.fail(error);
                    break;
                }
            }
        }
    }
    let _ = cancel.send(true);
    planner.clean().await;
    drop(steps);
    if let Some(done) = done {
        let _ = done.send(());
    }
}

struct Planner {
    shared: Arc<Shared>,
    jobs: Sender<Job>,
    cancelled: watch::Receiver<bool>,
    open: BTreeMap<u64, Region>,
    finished: Vec<Region>,
    placed: HashMap<ChunkId, Location>,
    pack: Option<Pack>,
    sent: Vec<Sent>,
}

impl Planner {
    async fn step(&mut self, step: Step) -> Result<()> {
        match step {
            Step::Begin { region, kind } => {
                let (meta, chunks, ranges) = (Bytes::new(), Vec::new(), Ranges::default());
                self.open.insert(region, Region { kind, meta, chunks, ranges });
            }
            Step::Chunks { region, hashed } => {
                let hashed = hashed.await.expect("a worker outlives its jobs");
                let mut state = self.open.remove(&region).expect("a region begins before its chunks");
                for chunk in hashed {
                    let location =
                        self.place(&mut state.ranges, &chunk.id, chunk.raw_bytes, chunk.body).await;
                    state.chunks.push((chunk.id, location));
                }
                self.open.insert(region, state);
                self.failures_of_uploads().await?;
            }
            Step::Finish { region, meta, reply } => {
                let mut state = self.open.remove(&region).expect("a region begins before it ends");
                state.meta = meta;
                self.finished.push(state);
                let _ = reply.send(self.finished.len() - 1);
            }
            Step::Publish { .. } | Step::Abort { .. } => unreachable!("handled by the caller"),
        }
        Ok(())
    }

    async fn place(&mut self, ranges: &mut Ranges, id: &ChunkId, raw: u32, body: Body) -> Option<Location> {
        ranges.bytes += u64::from(raw);
        let (known, content) = match body {
            Body::New(encoded) => return Some(self.write(ranges, id, raw, encoded)),
            Body::Known(location, content) => (location, content),
            Body::Repeated(content) => (*self.placed.get(id)?, content),
        };
        if ranges.take(&known) {
            self.placed.insert(*id, known);
            return Some(known);
        }
        let encoded = self.encode(content).await;
        Some(self.write(ranges, id, raw, encoded))
    }

    async fn encode(&self, content: Content) -> Encoded {
        let (reply, encoded) = oneshot::channel();
        self.jobs.send(Job::Encode { content, reply }).expect("a worker outlives its jobs");
        encoded.await.expect("a worker outlives its jobs")
    }

    fn write(&mut self, ranges: &mut Ranges, id: &ChunkId, raw: u32, encoded: Encoded) -> Location {
        let mut pack = match self.pack.take() {
            Some(pack) => pack,
            None => Pack::begin(&self.shared, &self.cancelled),
        };
        let location = pack.push(*id, raw, encoded);
        if pack.is_full() {
            self.sent.push(pack.finish());
        } else {
            self.pack = Some(pack);
        }
        self.placed.insert(*id, location);
        ranges.add(&location);
        location
    }

    /// Fails if an upload that has ended has failed.
    async fn failures_of_uploads(&mut self) -> Result<()> {
        for sent in &mut self.sent {
            if let Some(upload) = sent.upload.take_if(|upload| upload.is_finished()) {
                upload.await.expect("an upload does not panic")?;
            }
        }
        Ok(())
    }

    async fn publish(&mut self) -> Result<Written> {
        if let Some(pack) = self.pack.take() {
            self.sent.push(pack.finish());
        }
        let mut packs = Vec::with_capacity(self.sent.len());
        for sent in &mut self.sent {
            if let Some(upload) = sent.upload.take() {
                upload.await.expect("an upload does not panic")?;
            }
            packs.push((sent.id, sent.bytes));
        }
        let placed = &self.placed;
        let regions = std::mem::take(&mut self.finished).into_iter().map(|region| WrittenRegion {
            kind: region.kind,
            meta: region.meta,
            chunks: region
                .chunks
                .into_iter()
                .map(|(id, location)| {
                    (id, location.unwrap_or_else(|| *placed.get(&id).expect("every chunk is placed once")))
                })
                .collect(),
        });
        Ok(Written { regions: regions.collect(), unfinished: self.open.len(), packs })
    }

    /// Waits until uploads have ended or are aborted and removes packs that nothing will refer to.
    async fn clean(&mut self) {
        if let Some(pack) = self.pack.take() {
            self.sent.push(pack.give_up());
        }
        for sent in self.sent.drain(..) {
            let stored = match sent.upload {
                Some(upload) => matches!(upload.await, Ok(Ok(Outcome::Stored))),
                None => true,
            };
            if stored && let Err(error) = self.shared.objects.delete(&pack_path(sent.id)).await {
                tracing::debug!(pack = %sent.id, %error, "an unused pack stays for gc");
            }
        }
    }
}

/// The ranges of packs that a region is spread over.
#[derive(Debug, Default)]
struct Ranges {
    /// First and last byte of each range, by pack.
    ranges: BTreeMap<(Uuid, u64), u64>,
    /// Length of the region so far.
    bytes: u64,
}

impl Ranges {
    /// Adds a chunk of an older pack if it costs no range or there are ranges left.
    fn take(&mut self, location: &Location) -> bool {
        let allowed = RANGES_FREE + self.bytes / BYTES_PER_RANGE;
        let fits = self.near(location).is_some() || (self.ranges.len() as u64) < allowed;
        if fits {
            self.add(location);
        }
        fits
    }

    fn add(&mut self, location: &Location) {
        let (mut begin, mut end) = (location.offset, location.offset + u64::from(location.stored));
        while let Some(key) =
            self.near(&Location { offset: begin, stored: (end - begin) as u32, ..*location })
        {
            let other_end = self.ranges.remove(&key).expect("near gives what is there");
            begin = begin.min(key.1);
            end = end.max(other_end);
        }
        self.ranges.insert((location.pack, begin), end);
    }

    /// A range that a reader would join with the chunk.
    fn near(&self, location: &Location) -> Option<(Uuid, u64)> {
        let (begin, end) = (location.offset, location.offset + u64::from(location.stored));
        let last = (location.pack, end + GAP_BYTES);
        let (&key, &range_end) = self.ranges.range((location.pack, 0)..=last).next_back()?;
        (range_end + GAP_BYTES >= begin).then_some(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Codec;
    use crate::limits::MIB;

    fn at(pack: u128, offset: u64, stored: u64) -> Location {
        let stored = u32::try_from(stored).unwrap();
        Location { pack: Uuid::from_u128(pack), offset, stored, raw: 4096, codec: Codec::None }
    }

    #[test]
    fn chunks_near_each_other_are_one_range_whatever_their_order() {
        let mut ranges = Ranges::default();
        for offset in [0, 8 * MIB, 4 * MIB] {
            assert!(ranges.take(&at(1, offset, MIB)));
        }
        assert_eq!(ranges.ranges.len(), 3);
        assert!(ranges.take(&at(1, 2 * MIB - GAP_BYTES, MIB)));
        assert!(ranges.take(&at(1, MIB + 1000, 1000)));
        assert_eq!(ranges.ranges.len(), 3, "{ranges:?}");
        assert!(ranges.take(&at(1, 3 * MIB, GAP_BYTES)));
        assert_eq!(ranges.ranges.len(), 2, "{ranges:?}");
    }

    #[test]
    fn a_region_is_not_spread_over_more_ranges_than_its_length_allows() {
        let mut ranges = Ranges { bytes: 32 * MIB, ..Ranges::default() };
        let taken = (0..100u128).filter(|pack| ranges.take(&at(*pack, 0, 4096))).count();
        assert_eq!(taken as u64, RANGES_FREE + 4);
        assert!(ranges.take(&at(0, 4096, 4096)), "what costs no range is taken all the same");
        assert!(!ranges.take(&at(0, 4096 + 2 * GAP_BYTES, 4096)));
    }
}
