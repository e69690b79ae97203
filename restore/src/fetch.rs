//! Puts what the store holds into place: each chunk is fetched, verified and decoded once, for all replicas together.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rewarm_container::tree::Applier;
use rewarm_criu::image::pagemap::{self, Pagemap};
use rewarm_criu::page_server::{Flags, Object};
use rewarm_report::{Progress, Stage};
use rewarm_store::{Boot, Chunk, Sink};

use crate::blueprint::{Blueprint, Place};
use crate::error::Cause;
use crate::lazy::Lazy;
use crate::pages::{PagesImage, Reads};
use crate::replica::Replica;

/// Requests to the store at the same time, over all regions.
const PARALLEL: usize = 32;

/// Counts what has arrived, for the progress bar.
struct Meter {
    progress: Arc<dyn Progress>,
    done: AtomicU64,
    total: u64,
}

impl Meter {
    fn add(&self, bytes: usize) {
        let done = self.done.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        self.progress.bytes(Stage::Fetch, done, Some(self.total));
    }
}

/// What is fetched before CRIU starts, and the rest that follows.
pub(crate) struct Fetching {
    /// The stream that pagers read; absent if CRIU reads everything itself.
    pub(crate) lazy: Option<Arc<Lazy>>,
    boot: Boot,
    /// Objects whose rest is still to come.
    rest: Vec<(usize, Arc<Pages>)>,
}

/// Fetches all that CRIU insists on for these replicas. With `Reads::All` that is everything.
pub(crate) async fn begin(
    replicas: &[Arc<Replica>],
    blueprint: &Blueprint,
    boot: &Boot,
    reads: Reads,
    progress: &Arc<dyn Progress>,
) -> Result<Fetching, Cause> {
    let total = blueprint.content_bytes();
    let meter = Arc::new(Meter { progress: progress.clone(), done: AtomicU64::new(0), total });
    let images: Vec<_> = replicas.iter().map(|replica| replica.client.inside().images()).collect();
    for directory in &images {
        for (name, bytes) in &blueprint.images {
            let path = directory.join(name);
            new_file(&path)?
                .write_all_at(bytes, 0)
                .map_err(Cause::io(format!("write {}", path.display())))?;
        }
    }
    trees(replicas, blueprint, boot, &meter).await?;
    for (region, name, bytes) in &blueprint.files {
        let files =
            images.iter().map(|directory| new_file(&directory.join(name))).collect::<Result<_, _>>()?;
        boot.fetch(*region, Arc::new(Files { files, bytes: *bytes, meter: meter.clone() }), PARALLEL).await?;
    }
    let lazy = match (reads, images.first()) {
        (Reads::NotLazy, Some(directory)) => Some(Arc::new(Lazy::plan(blueprint, directory)?)),
        _ => None,
    };
    let mut rest = Vec::new();
    for object in &blueprint.objects {
        // Shared memory is never filled later: CRIU has no userfaultfd for it.
        let lazy = lazy.clone().filter(|_| matches!(object.object, Object::Task { .. }));
        let reads = if lazy.is_some() { Reads::NotLazy } else { Reads::All };
        let image = PagesImage::plan(&object.layout, reads);
        let mut files = Vec::new();
        for directory in &images {
            files.push(pages_file(directory, object.object, object.pages_id, &image)?);
        }
        let sink = Arc::new(Pages { image, files, lazy, pages_id: object.pages_id, meter: meter.clone() });
        let first = |chunk: Chunk| sink.image.needs(chunk.offset, chunk.bytes.into());
        boot.fetch_where(object.region, first, sink.clone(), PARALLEL).await?;
        rest.push((object.region, sink));
    }
    Ok(Fetching { lazy, boot: boot.clone(), rest })
}

impl Fetching {
    /// Fetches what pagers still wait for. If it fails, they and their replicas give up.
    pub(crate) async fn finish(&self) -> Result<(), Cause> {
        let result = self.all().await;
        if let (Err(_), Some(lazy)) = (&result, &self.lazy) {
            lazy.fail();
        }
        result
    }

    async fn all(&self) -> Result<(), Cause> {
        for (region, sink) in &self.rest {
            let rest = |chunk: Chunk| !sink.image.needs(chunk.offset, chunk.bytes.into());
            self.boot.fetch_where(*region, rest, sink.clone(), PARALLEL).await?;
        }
        Ok(())
    }
}

async fn trees(
    replicas: &[Arc<Replica>],
    blueprint: &Blueprint,
    boot: &Boot,
    meter: &Arc<Meter>,
) -> Result<(), Cause> {
    for (region, place, tree) in &blueprint.trees {
        let begin = |replica: &Arc<Replica>| {
            let inside = replica.client.inside();
            let directory = if *place == Place::Upper { inside.upper() } else { inside.shm() };
            Applier::begin(&directory, tree.as_ref().clone())
        };
        let appliers = replicas.iter().map(begin).collect::<Result<Vec<_>, _>>()?;
        let sink = Arc::new(Trees { appliers, meter: meter.clone() });
        boot.fetch(*region, sink.clone(), PARALLEL).await?;
        let sink = Arc::into_inner(sink).expect("the fetch has ended");
        for applier in sink.appliers {
            applier.finish()?;
        }
    }
    Ok(())
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
    meter: Arc<Meter>,
}

impl Sink for Trees {
    fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        for applier in &self.appliers {
            applier.put(offset, bytes)?;
        }
        self.meter.add(bytes.len());
        Ok(())
    }
}

struct Files {
    files: Vec<File>,
    /// Length without the padding of the region.
    bytes: u64,
    meter: Arc<Meter>,
}

impl Sink for Files {
    fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let wanted = self.bytes.saturating_sub(offset).min(bytes.len() as u64) as usize;
        for file in &self.files {
            file.write_all_at(&bytes[..wanted], offset)?;
        }
        self.meter.add(wanted);
        Ok(())
    }
}

struct Pages {
    image: PagesImage,
    files: Vec<File>,
    lazy: Option<Arc<Lazy>>,
    pages_id: u32,
    meter: Arc<Meter>,
}

impl Sink for Pages {
    fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        for file in &self.files {
            self.image.place(offset, bytes, |at, part| file.write_all_at(part, at))?;
        }
        if let Some(lazy) = &self.lazy {
            lazy.put(self.pages_id, offset, bytes)?;
        }
        self.meter.add(bytes.len());
        Ok(())
    }
}
