//! Puts what the store holds into place: each chunk is fetched, verified and decoded once, for all replicas together.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rewarm_container::tree::Applier;
use rewarm_criu::image::pagemap::{self, Pagemap};
use rewarm_criu::page_server::Flags;
use rewarm_report::{Progress, Stage};
use rewarm_store::{Boot, Sink};

use crate::blueprint::{Blueprint, Place};
use crate::error::Cause;
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

/// Fetches everything for these replicas.
pub(crate) async fn into(
    replicas: &[Arc<Replica>],
    blueprint: &Blueprint,
    boot: &Boot,
    progress: &Arc<dyn Progress>,
) -> Result<(), Cause> {
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
    for (region, name, bytes) in &blueprint.files {
        let files =
            images.iter().map(|directory| new_file(&directory.join(name))).collect::<Result<_, _>>()?;
        boot.fetch(*region, Arc::new(Files { files, bytes: *bytes, meter: meter.clone() }), PARALLEL).await?;
    }
    for object in &blueprint.objects {
        let image = PagesImage::plan(&object.layout, Reads::All);
        let mut files = Vec::new();
        for directory in &images {
            files.push(pages_file(directory, object.object, object.pages_id, &image)?);
        }
        boot.fetch(object.region, Arc::new(Pages { image, files, meter: meter.clone() }), PARALLEL).await?;
    }
    Ok(())
}

/// Writes the pagemap of an object and makes its pages image, still empty.
fn pages_file(
    directory: &Path,
    object: rewarm_criu::page_server::Object,
    pages_id: u32,
    image: &PagesImage,
) -> Result<File, Cause> {
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
    meter: Arc<Meter>,
}

impl Sink for Pages {
    fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        for file in &self.files {
            self.image.place(offset, bytes, |at, part| file.write_all_at(part, at))?;
        }
        self.meter.add(bytes.len());
        Ok(())
    }
}
