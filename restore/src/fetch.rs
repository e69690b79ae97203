//! Puts what the fetcher brings into place: the images and files that CRIU insists on, for all replicas together.
//!
//! The fetcher's stream is memory that arrives block by block. This side only copies from it.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rewarm_container::tree::Applier;
use rewarm_criu::image::pagemap::{self, Pagemap};
use rewarm_criu::page_server::{Flags, Object};
use rewarm_fetcher::{BLOCK_BYTES, Layout, Stream};
use rewarm_report::{Progress, Stage};
use rewarm_store::WorkingSet;

use crate::blueprint::{Blueprint, Place};
use crate::error::Cause;
use crate::lazy::{Lazy, When};
use crate::pages::{PagesImage, Reads};
use crate::replica::Replica;

/// How long one block may take to arrive. The fetcher gives a store up long before.
pub(crate) const BLOCK_WITHIN: Duration = Duration::from_secs(600);

/// More threads than this do not copy faster: they meet in the page cache.
const THREADS_MAX: usize = 4;

/// What the fetcher brings and where it goes.
pub(crate) struct Fetching {
    /// What pagers are told.
    pub(crate) lazy: Arc<Lazy>,
    pub(crate) stream: Arc<Stream>,
    began: Instant,
    progress: Arc<dyn Progress>,
}

/// Takes a part of a region.
trait Destination: Send + Sync {
    /// The parts of the region that are wanted, in order.
    fn wanted(&self) -> Vec<Range<u64>>;
    /// Whether nobody else wants anything of the region.
    fn takes_all(&self) -> bool {
        true
    }
    /// Takes bytes that belong at `offset` of the region, and passes over those that are not wanted. Called by several threads.
    fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

/// Begins the fetch and puts all that CRIU insists on into place. Blocks.
pub(crate) fn begin(
    replicas: &[Arc<Replica>],
    blueprint: &Blueprint,
    stream: Arc<Stream>,
    when: When,
    progress: &Arc<dyn Progress>,
) -> Result<Fetching, Cause> {
    let images: Vec<_> = replicas.iter().map(|replica| replica.client.inside().images()).collect();
    for directory in &images {
        for (name, bytes) in &blueprint.images {
            let path = directory.join(name);
            new_file(&path)?
                .write_all_at(bytes, 0)
                .map_err(Cause::io(format!("write {}", path.display())))?;
        }
    }
    let lazy = Arc::new(Lazy::plan(blueprint, &images, stream.clone(), when)?);
    let trees = trees(replicas, blueprint)?;
    let mut places: Vec<(usize, Arc<dyn Destination>)> = Vec::new();
    places.extend(trees.iter().map(|(region, tree)| (*region, tree.clone() as _)));
    for (region, name, bytes) in &blueprint.files {
        let files =
            images.iter().map(|directory| new_file(&directory.join(name))).collect::<Result<_, _>>()?;
        places.push((*region, Arc::new(Files { files, bytes: *bytes })));
    }
    for object in &blueprint.objects {
        let later = matches!(object.object, Object::Task { .. });
        let reads = match lazy.shared().any(|region| region == object.region) {
            _ if later => Reads::NotLazy,
            true => Reads::Nothing,
            // CRIU has no userfaultfd for shared memory: what is not there before the tasks run would never be.
            false => Reads::All,
        };
        let image = PagesImage::plan(&object.layout, reads);
        let files = images.iter().map(|at| pages_file(at, object.object, object.pages_id, &image));
        let files = files.collect::<Result<_, _>>()?;
        places.push((object.region, Arc::new(Pages { image, files, shared: later })));
    }
    let fetching = Fetching { lazy, stream, began: Instant::now(), progress: progress.clone() };
    fetching.copy(&places)?;
    drop(places);
    for (_, tree) in trees {
        let tree = Arc::into_inner(tree).expect("the copy has ended");
        for applier in tree.appliers {
            applier.finish()?;
        }
    }
    Ok(fetching)
}

impl Fetching {
    /// Has everything fetched, what is copied here first, and copies it as it arrives.
    fn copy(&self, places: &[(usize, Arc<dyn Destination>)]) -> Result<(), Cause> {
        let mut jobs: Vec<(usize, Range<u64>)> = Vec::new();
        let mut first = Vec::new();
        for (index, (region, destination)) in places.iter().enumerate() {
            let base = self.stream.layout().base(*region);
            let wanted = destination.wanted();
            first.extend(wanted.iter().map(|part| (base + part.start, part.end - part.start)));
            jobs.extend(by_block(&wanted).into_iter().map(|part| (index, part)));
        }
        // Then shared and device memory, for which the whole server waits, then what is touched before the probe has ended.
        let layout = self.stream.layout();
        first.extend(
            self.lazy
                .shared()
                .chain(self.lazy.direct())
                .filter_map(|region| layout.regions().get(region).copied()),
        );
        first.extend(touched_first(self.stream.working_set(), self.lazy.is_eager(), layout));
        if self.lazy.is_passing() {
            self.stream.begin_passing(first)?;
        } else {
            self.stream.begin(first)?;
        }
        let (next, failed, failure) = (AtomicUsize::new(0), AtomicBool::new(false), Mutex::new(None));
        let work = || {
            while !failed.load(Ordering::Acquire)
                && let Some((index, part)) = jobs.get(next.fetch_add(1, Ordering::Relaxed))
            {
                let (region, destination) = &places[*index];
                if let Err(error) = self.copy_part(*region, &**destination, part) {
                    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    failed.store(true, Ordering::Release);
                }
            }
        };
        std::thread::scope(|scope| {
            let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
            for _ in 1..threads.min(jobs.len()) {
                scope.spawn(work);
            }
            work();
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    fn copy_part(&self, region: usize, to: &dyn Destination, part: &Range<u64>) -> Result<(), Cause> {
        let block = (self.stream.layout().base(region) + part.start) / BLOCK_BYTES;
        let bytes = self.stream.wait(block, BLOCK_WITHIN)?;
        let begin = part.start / BLOCK_BYTES * BLOCK_BYTES;
        let wanted = &bytes[(part.start - begin) as usize..(part.end - begin) as usize];
        to.put(part.start, wanted).map_err(Cause::io("put what was fetched into place"))?;
        if self.lazy.is_passing() && to.takes_all() {
            self.stream.release(block..block + 1);
        }
        self.tell();
        Ok(())
    }

    /// Waits until a block has arrived, whether its memory was given back meanwhile or not.
    fn wait(&self, block: u64) -> Result<(), Cause> {
        match self.stream.wait(block, BLOCK_WITHIN) {
            Err(_) if self.stream.reader().has_arrived(block) => Ok(()),
            other => Ok(other.map(drop)?),
        }
    }

    fn tell(&self) {
        let total = self.stream.layout().content_bytes();
        self.progress.bytes(Stage::Fetch, self.stream.reader().arrived_bytes().min(total), Some(total));
    }

    /// How long what is missing will take at the rate seen so far.
    pub(crate) fn remaining(&self) -> Duration {
        let total = self.stream.layout().content_bytes();
        let arrived = self.stream.reader().arrived_bytes().min(total);
        let rate = arrived as f64 / self.began.elapsed().as_secs_f64().max(0.001);
        Duration::try_from_secs_f64((total - arrived) as f64 / rate.max(1.0)).unwrap_or(Duration::MAX)
    }

    /// Waits until all of the stream has arrived. Blocks.
    pub(crate) fn all(&self) -> Result<(), Cause> {
        for block in self.stream.layout().blocks() {
            if !self.stream.reader().has_arrived(block) {
                self.wait(block)?;
            }
            self.tell();
        }
        Ok(())
    }
}

/// What is to come before the rest because the server touches it first. Nothing where all of its memory is filled before it runs:
/// that is filled in the order of the stream, and what came out of turn would take the room of what it waits for.
fn touched_first(set: Option<&WorkingSet>, eager: bool, layout: &Layout) -> Vec<(u64, u64)> {
    let known = set.filter(|_| !eager).map(|set| &set.extents[..]).unwrap_or_default();
    let place = |&(region, offset, bytes): &(u32, u64, u64)| {
        let (base, _) = layout.regions().get(region as usize)?;
        Some((base.saturating_add(offset), bytes))
    };
    known.iter().filter_map(place).collect()
}

/// For each block in which something is wanted, from the first to the last of that. One for each block: who has it copied may
/// give the block back, so nobody else may be about to.
fn by_block(wanted: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut blocks: Vec<Range<u64>> = Vec::new();
    for part in wanted {
        let mut at = part.start;
        while at < part.end {
            let end = ((at / BLOCK_BYTES + 1) * BLOCK_BYTES).min(part.end);
            match blocks.last_mut() {
                Some(last) if last.start / BLOCK_BYTES == at / BLOCK_BYTES => last.end = end,
                _ => blocks.push(at..end),
            }
            at = end;
        }
    }
    blocks
}

fn trees(replicas: &[Arc<Replica>], blueprint: &Blueprint) -> Result<Vec<(usize, Arc<Trees>)>, Cause> {
    let mut trees = Vec::new();
    for (region, place, tree) in &blueprint.trees {
        let begin = |replica: &Arc<Replica>| {
            let inside = replica.client.inside();
            let directory = if *place == Place::Upper { inside.upper() } else { inside.shm() };
            Applier::begin(&directory, tree.as_ref().clone())
        };
        let appliers = replicas.iter().map(begin).collect::<Result<Vec<_>, _>>()?;
        trees.push((*region, Arc::new(Trees { appliers, bytes: tree.stream_bytes() })));
    }
    Ok(trees)
}

/// Writes the pagemap of an object and makes its pages image, still empty.
fn pages_file(directory: &Path, object: Object, pages_id: u32, image: &PagesImage) -> Result<File, Cause> {
    let entries = image.entries().iter().map(|entry| {
        let lazy = if entry.lazy { Flags::LAZY } else { Flags::default() };
        let present = if entry.present { Flags::PRESENT } else { Flags::default() };
        pagemap::Entry { vaddr: entry.vaddr, pages: entry.pages, flags: lazy | present }
    });
    pagemap::write(directory, object, &Pagemap { pages_id, entries: entries.collect() })?;
    let path = pagemap::pages_path(directory, pages_id);
    let file = new_file(&path)?;
    file.set_len(image.file_bytes())
        .map_err(Cause::io(format!("make {} as long as it will be", path.display())))?;
    Ok(file)
}

fn new_file(path: &Path) -> Result<File, Cause> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    options.open(path).map_err(Cause::io(format!("make {}", path.display())))
}

struct Trees {
    appliers: Vec<Applier>,
    bytes: u64,
}

impl Destination for Trees {
    fn wanted(&self) -> Vec<Range<u64>> {
        std::iter::once(0..self.bytes).collect()
    }

    fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        for applier in &self.appliers {
            applier.put(offset, bytes)?;
        }
        Ok(())
    }
}

struct Files {
    files: Vec<File>,
    /// Length without the padding of the region.
    bytes: u64,
}

impl Destination for Files {
    fn wanted(&self) -> Vec<Range<u64>> {
        std::iter::once(0..self.bytes).collect()
    }

    fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        for file in &self.files {
            file.write_all_at(bytes, offset)?;
        }
        Ok(())
    }
}

struct Pages {
    image: PagesImage,
    files: Vec<File>,
    /// The pager takes the rest.
    shared: bool,
}

impl Destination for Pages {
    fn wanted(&self) -> Vec<Range<u64>> {
        self.image.wanted().collect()
    }

    fn takes_all(&self) -> bool {
        !self.shared
    }

    fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        for file in &self.files {
            self.image.place(offset, bytes, |at, part| file.write_all_at(part, at))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_block_is_copied_once_whatever_lies_in_it() {
        const B: u64 = BLOCK_BYTES;
        // Two parts that touch, as zero pages between them leave it; one in the next block; one over three.
        let wanted = [0..4096, 4096..8192, 20_480..B + 4096, B + 8192..B + 12_288, 2 * B + 4096..4 * B + 1];
        let expected = [0..B, B..B + 12_288, 2 * B + 4096..3 * B, 3 * B..4 * B, 4 * B..4 * B + 1];
        assert_eq!(by_block(&wanted), expected);
        assert_eq!(by_block(&[]), []);
    }

    #[test]
    fn what_is_touched_first_comes_first_unless_nothing_runs_before_all_is_there() {
        let layout = Layout::of(&[3 * BLOCK_BYTES, BLOCK_BYTES]).expect("it is short");
        let (base, _) = layout.regions()[1];
        // Of a region that the snapshot does not have, too: a working set is not signed.
        let set =
            WorkingSet { number: 1, extents: vec![(1, 8192, 4096), (0, BLOCK_BYTES, 12_288), (7, 0, 4096)] };
        assert_eq!(touched_first(Some(&set), false, &layout), [(base + 8192, 4096), (BLOCK_BYTES, 12_288)]);
        assert_eq!(touched_first(Some(&set), true, &layout), []);
        assert_eq!(touched_first(None, false, &layout), []);
    }
}
