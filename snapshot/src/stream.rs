//! Cuts what the receiver hands on into regions of the snapshot, from the first page of the dump on.
//!
//! ```text
//! CRIU -> receiver -> [arena] -> streamer -> writer (hash, look up, compress, pack, upload: its own threads)
//! ```
//!
//! Runs in a thread of its own beside the receiver. Zero pages are dropped here: they are noted in the layout and have no
//! bytes. Ends with the last batch, with the store's failure, or when it is given up.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use bytes::Bytes;
use rewarm_criu::layout::{Layout, PAGE_BYTES, Run};
use rewarm_criu::page_server::{Flags, Object};
use rewarm_gpu::carried::Carried;
use rewarm_gpu::order::Process;
use rewarm_report::{Progress, Stage};
use rewarm_store::{Memory, RegionKind, RegionWriter, Session, SharedMemory, TaskMemory};
use tokio::sync::oneshot;

use crate::aside::Aside;
use crate::error::Cause;
use crate::receive::{Batch, Item};

/// Between two looks at how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// A streamer at work. Dropping it gives it up.
pub(crate) struct Streamer {
    ended: oneshot::Receiver<Result<Memory, Cause>>,
    /// Bytes of pages that were taken so far.
    taken: Arc<AtomicU64>,
    _wanted: oneshot::Sender<()>,
}

impl Streamer {
    /// Starts streaming. The thread holds the session until it ends.
    pub(crate) fn start(
        thread: Aside,
        session: Arc<Session>,
        batches: Receiver<Batch>,
        device: Option<&Carried>,
    ) -> Self {
        let taken = Arc::<AtomicU64>::default();
        let (wanted, unwanted) = oneshot::channel::<()>();
        let runtime = tokio::runtime::Handle::current();
        let counter = taken.clone();
        let copies = Copies::of(device);
        let ended = thread.run(move || {
            let result = runtime.block_on(async {
                tokio::select! {
                    result = Streaming::new(&session, &counter, copies).all(&batches) => result,
                    _ = unwanted => Err(Cause::Interrupted { signal: "the end of the dump" }),
                }
            });
            drop((batches, session));
            result
        });
        Self { ended, taken, _wanted: wanted }
    }

    /// Waits until everything that was received has gone to the store's writer; tells how far it is meanwhile.
    pub(crate) async fn finish(mut self, total: u64, progress: &dyn Progress) -> Result<Memory, Cause> {
        loop {
            progress.bytes(Stage::Upload, self.taken.load(Ordering::Relaxed), Some(total));
            match tokio::time::timeout(PROGRESS_INTERVAL, &mut self.ended).await {
                Ok(result) => {
                    progress.bytes(Stage::Upload, total, Some(total));
                    return result.expect("streaming does not panic");
                }
                Err(_) => continue,
            }
        }
    }

    /// The failure with which it ends within `patience`, if it does.
    pub(crate) async fn failure(&mut self, patience: Duration) -> Option<Cause> {
        match tokio::time::timeout(patience, &mut self.ended).await {
            Ok(Ok(Err(cause))) => Some(cause),
            _ => None,
        }
    }
}

/// Where the driver's copies of device memory lie, by process: a region of its own for each that has some.
#[derive(Debug, Default)]
struct Copies(BTreeMap<u32, CopiesOf>);

/// Those of one process.
#[derive(Debug, Default)]
struct CopiesOf {
    /// The device, where there is only one that they can be of.
    gpu: Option<String>,
    /// In order of address.
    ranges: Vec<(u64, u64)>,
}

impl Copies {
    fn of(device: Option<&Carried>) -> Self {
        let Some(carried) = device else { return Self::default() };
        let of_process = |process: &Process| CopiesOf {
            gpu: carried.gpu_of(process.pid).map(|gpu| gpu.to_string()),
            ranges: process.copies.iter().map(|range| (range.start, range.end)).collect(),
        };
        let processes = carried.processes.iter();
        Self(processes.map(|process| (process.pid.unsigned_abs(), of_process(process))).collect())
    }

    fn gpu(&self, pid: u32) -> Option<String> {
        self.0.get(&pid)?.gpu.clone()
    }

    /// Cuts a run of pages of a process where a copy begins or ends; says of each part whether it is one.
    fn cut(&self, pid: u32, run: Run) -> Vec<(Run, bool)> {
        let mut parts = Vec::new();
        let mut rest = run;
        let ranges = self.0.get(&pid).map(|copies| &copies.ranges[..]).unwrap_or_default();
        for &(start, end) in ranges.iter().filter(|(start, end)| *start < run.end() && *end > run.vaddr) {
            rest = split(&mut parts, rest, start.max(rest.vaddr), false);
            rest = split(&mut parts, rest, end.min(rest.end()), true);
        }
        let end = rest.end();
        split(&mut parts, rest, end, false);
        parts
    }
}

/// Takes what lies before `at` off a run, and gives what is left of it.
fn split(parts: &mut Vec<(Run, bool)>, run: Run, at: u64, copy: bool) -> Run {
    let pages = (at - run.vaddr) / PAGE_BYTES;
    if pages > 0 {
        parts.push((Run { pages, ..run }, copy));
    }
    Run { vaddr: at, pages: run.pages - pages, ..run }
}

struct Streaming<'a> {
    session: &'a Session,
    taken: &'a AtomicU64,
    copies: Copies,
    memory: Memory,
    open: Option<Open>,
    /// Beside the region of a process, that of its device memory.
    device: Option<Pages>,
}

/// The region that is being written.
enum Open {
    Object(Object, Pages),
    Tree { writer: RegionWriter, meta: Vec<u8> },
}

/// A region of pages.
pub(crate) struct Pages {
    writer: RegionWriter,
    layout: Layout,
}

impl Pages {
    pub(crate) async fn begin(session: &Session, kind: RegionKind) -> Result<Self, Cause> {
        Ok(Self { writer: session.region(kind).await?, layout: Layout::new() })
    }

    pub(crate) async fn push(&mut self, run: Run, bytes: Bytes) -> Result<(), Cause> {
        self.layout.push(run);
        if !run.zero {
            self.writer.push(bytes).await?;
        }
        Ok(())
    }

    /// Ends it; gives its bytes with and without zero pages.
    pub(crate) async fn finish(self) -> Result<(u64, u64), Cause> {
        let sizes = (self.layout.logical_bytes(), self.layout.stream_bytes());
        self.writer.finish(self.layout.encode()).await?;
        Ok(sizes)
    }
}

impl<'a> Streaming<'a> {
    fn new(session: &'a Session, taken: &'a AtomicU64, copies: Copies) -> Self {
        Self { session, taken, copies, memory: Memory::default(), open: None, device: None }
    }

    async fn all(mut self, batches: &Receiver<Batch>) -> Result<Memory, Cause> {
        // Waiting for a batch blocks this thread, which does nothing else.
        while let Ok(batch) = batches.recv() {
            self.batch(batch).await?;
        }
        self.end().await?;
        Ok(self.memory)
    }

    async fn batch(&mut self, batch: Batch) -> Result<(), Cause> {
        let sparse = is_sparse(&batch.bytes);
        let mut rest = batch.bytes;
        for item in batch.items {
            match item {
                Item::Object(object) => {
                    self.end().await?;
                    let kind = match object {
                        Object::Task { pid } => RegionKind::Task { pid },
                        Object::Shmem { id } => RegionKind::Shmem { id },
                    };
                    self.open = Some(Open::Object(object, self.region(kind).await?));
                }
                Item::Tree { name, meta } => {
                    self.end().await?;
                    let writer = self.session.region(RegionKind::Tree { name: name.to_owned() }).await?;
                    self.open = Some(Open::Tree { writer, meta });
                }
                Item::Pages { vaddr, pages, flags } => {
                    let bytes = rest.split_to((pages * PAGE_BYTES) as usize);
                    self.pages(vaddr, flags, bytes, sparse).await?;
                }
                Item::Content { bytes } => {
                    let bytes = rest.split_to(bytes as usize);
                    match &mut self.open {
                        Some(Open::Tree { writer, .. }) => writer.push(bytes).await?,
                        _ => unreachable!("content follows the beginning of its tree"),
                    }
                }
            }
        }
        Ok(())
    }

    async fn region(&self, kind: RegionKind) -> Result<Pages, Cause> {
        Pages::begin(self.session, kind).await
    }

    async fn end(&mut self) -> Result<(), Cause> {
        match self.open.take() {
            None => {}
            Some(Open::Tree { writer, meta }) => {
                writer.finish(meta).await?;
            }
            Some(Open::Object(object, pages)) => {
                let (mut bytes, mut stream) = pages.finish().await?;
                if let Some(device) = self.device.take() {
                    let (more, of_it) = device.finish().await?;
                    (bytes, stream) = (bytes + more, stream + of_it);
                }
                self.memory.logical_bytes += bytes;
                self.memory.zero_bytes += bytes - stream;
                match object {
                    Object::Task { pid } => self.memory.tasks.push(TaskMemory { pid, bytes }),
                    Object::Shmem { id } => self.memory.shared.push(SharedMemory { id, bytes }),
                }
            }
        }
        Ok(())
    }

    async fn pages(&mut self, vaddr: u64, flags: Flags, mut bytes: Bytes, sparse: bool) -> Result<(), Cause> {
        let Some(Open::Object(object, _)) = &self.open else { unreachable!("pages follow their object") };
        let object = *object;
        self.taken.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let runs: Vec<Run> = alike(&bytes).collect();
        for run in runs {
            let run = Run { vaddr: vaddr + run.vaddr, lazy: flags.contains(Flags::LAZY), ..run };
            // What CRIU insists on reading itself stays with the process.
            let parts = match object {
                Object::Task { pid } if run.lazy => self.copies.cut(pid, run),
                _ => vec![(run, false)],
            };
            for (run, copy) in parts {
                let part = bytes.split_to((run.pages * PAGE_BYTES) as usize);
                // A few pages must not hold a whole segment of the arena until their chunk is stored.
                let part = if sparse && !run.zero { Bytes::copy_from_slice(&part) } else { part };
                self.put(object, run, part, copy).await?;
            }
        }
        Ok(())
    }

    async fn put(&mut self, object: Object, run: Run, bytes: Bytes, copy: bool) -> Result<(), Cause> {
        if let (true, Object::Task { pid }) = (copy, object) {
            if self.device.is_none() {
                let kind = RegionKind::Device { pid, gpu: self.copies.gpu(pid), direct: false };
                self.device = Some(self.region(kind).await?);
            }
            return self.device.as_mut().expect("just begun").push(run, bytes).await;
        }
        match &mut self.open {
            Some(Open::Object(_, pages)) => pages.push(run, bytes).await,
            _ => unreachable!("pages follow their object"),
        }
    }
}

/// Splits pages into runs of zero and other ones, addresses counted from 0.
pub(crate) fn alike(bytes: &[u8]) -> impl Iterator<Item = Run> + '_ {
    let mut pages = bytes.chunks_exact(PAGE_BYTES as usize).map(is_zero).peekable();
    let mut vaddr = 0;
    std::iter::from_fn(move || {
        let zero = pages.next()?;
        let mut run = Run { vaddr, pages: 1, zero, lazy: false };
        while pages.next_if_eq(&zero).is_some() {
            run.pages += 1;
        }
        vaddr = run.end();
        Some(run)
    })
}

/// Whether less than half of a batch's pages are other than zero.
fn is_sparse(bytes: &[u8]) -> bool {
    let pages = bytes.chunks_exact(PAGE_BYTES as usize);
    let all = pages.len();
    pages.filter(|page| !is_zero(page)).count() * 2 < all
}

/// Whether a page is all zero: it equals itself moved by one byte, which `memcmp` decides at memory speed.
fn is_zero(page: &[u8]) -> bool {
    page[0] == 0 && page[1..] == page[..page.len() - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = PAGE_BYTES as usize;

    #[test]
    fn zero_pages_are_told_from_pages_that_end_with_something() {
        let mut bytes = vec![1; 2 * PAGE];
        bytes.extend(vec![0; PAGE]);
        bytes.extend(vec![0; PAGE - 1]);
        bytes.push(5);
        let runs: Vec<_> = alike(&bytes).map(|run| (run.vaddr, run.pages, run.zero)).collect();
        assert_eq!(runs, [(0, 2, false), (2 * PAGE_BYTES, 1, true), (3 * PAGE_BYTES, 1, false)]);
    }

    #[test]
    fn a_run_is_cut_where_copies_begin_and_end() {
        let page = PAGE_BYTES;
        let ranges = vec![(10 * page, 12 * page), (14 * page, 20 * page)];
        let copies = Copies([(7, CopiesOf { gpu: None, ranges })].into());
        let run = |vaddr: u64, pages| Run { vaddr: vaddr * page, pages, zero: false, lazy: true };
        let cut = |pid, run| -> Vec<(u64, u64, bool)> {
            copies.cut(pid, run).iter().map(|(run, copy)| (run.vaddr / page, run.pages, *copy)).collect()
        };
        assert_eq!(cut(7, run(8, 8)), [(8, 2, false), (10, 2, true), (12, 2, false), (14, 2, true)]);
        assert_eq!(cut(7, run(15, 2)), [(15, 2, true)]);
        assert_eq!(cut(7, run(18, 4)), [(18, 2, true), (20, 2, false)]);
        assert_eq!(cut(7, run(1, 9)), [(1, 9, false)]);
        assert_eq!(cut(8, run(8, 8)), [(8, 8, false)]);
    }

    #[test]
    fn a_batch_is_sparse_when_less_than_half_of_its_pages_have_content() {
        let mut bytes = vec![0; 4 * PAGE];
        bytes[3 * PAGE] = 1;
        assert!(is_sparse(&bytes));
        bytes[0] = 1;
        assert!(!is_sparse(&bytes));
        assert!(!is_sparse(&[]));
    }
}
