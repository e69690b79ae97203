//! Cuts what the receiver hands on into regions of the snapshot, from the first page of the dump on.
//!
//! ```text
//! CRIU -> receiver -> [arena] -> streamer -> writer (hash, look up, compress, pack, upload: its own threads)
//! ```
//!
//! Runs in a thread of its own beside the receiver. Zero pages are dropped here: they are noted in the layout and have no
//! bytes. Ends with the last batch, with the store's failure, or when it is given up.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use bytes::Bytes;
use rewarm_criu::layout::{Layout, PAGE_BYTES, Run};
use rewarm_criu::page_server::{Flags, Object};
use rewarm_report::{Progress, Stage};
use rewarm_store::{Memory, RegionKind, RegionWriter, Session, SharedMemory, TaskMemory};
use tokio::sync::oneshot;

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
    /// Starts the thread. It holds the session until it ends.
    pub(crate) fn start(session: Arc<Session>, batches: Receiver<Batch>) -> Result<Self, Cause> {
        let taken = Arc::<AtomicU64>::default();
        let (wanted, unwanted) = oneshot::channel::<()>();
        let (end, ended) = oneshot::channel();
        let runtime = tokio::runtime::Handle::current();
        let counter = taken.clone();
        let work = move || {
            let result = runtime.block_on(async {
                tokio::select! {
                    result = Streaming::new(&session, &counter).all(&batches) => result,
                    _ = unwanted => Err(Cause::Interrupted { signal: "the end of the dump" }),
                }
            });
            drop((batches, session));
            // Nobody listens any more if it was given up.
            let _ = end.send(result);
        };
        let thread = std::thread::Builder::new().name("snapshot-stream".to_owned()).spawn(work);
        thread.map_err(Cause::io("start a thread, for which memory or the limit of processes is short"))?;
        Ok(Self { ended, taken, _wanted: wanted })
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

struct Streaming<'a> {
    session: &'a Session,
    taken: &'a AtomicU64,
    memory: Memory,
    open: Option<Open>,
}

/// The region that is being written.
struct Open {
    writer: RegionWriter,
    content: Content,
}

enum Content {
    Object { object: Object, layout: Layout },
    Tree { meta: Vec<u8> },
}

impl<'a> Streaming<'a> {
    fn new(session: &'a Session, taken: &'a AtomicU64) -> Self {
        Self { session, taken, memory: Memory::default(), open: None }
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
                    let kind = match object {
                        Object::Task { pid } => RegionKind::Task { pid },
                        Object::Shmem { id } => RegionKind::Shmem { id },
                    };
                    self.begin(kind, Content::Object { object, layout: Layout::new() }).await?;
                }
                Item::Tree { name, meta } => {
                    self.begin(RegionKind::Tree { name: name.to_owned() }, Content::Tree { meta }).await?;
                }
                Item::Pages { vaddr, pages, flags } => {
                    let bytes = rest.split_to((pages * PAGE_BYTES) as usize);
                    self.pages(vaddr, flags, bytes, sparse).await?;
                }
                Item::Content { bytes } => {
                    let bytes = rest.split_to(bytes as usize);
                    self.writer().push(bytes).await?;
                }
            }
        }
        Ok(())
    }

    async fn begin(&mut self, kind: RegionKind, content: Content) -> Result<(), Cause> {
        self.end().await?;
        self.open = Some(Open { writer: self.session.region(kind).await?, content });
        Ok(())
    }

    async fn end(&mut self) -> Result<(), Cause> {
        let Some(Open { writer, content }) = self.open.take() else { return Ok(()) };
        let meta = match content {
            Content::Tree { meta } => meta,
            Content::Object { object, layout } => {
                let bytes = layout.logical_bytes();
                self.memory.logical_bytes += bytes;
                self.memory.zero_bytes += bytes - layout.stream_bytes();
                match object {
                    Object::Task { pid } => self.memory.tasks.push(TaskMemory { pid, bytes }),
                    Object::Shmem { id } => self.memory.shared.push(SharedMemory { id, bytes }),
                }
                layout.encode()
            }
        };
        writer.finish(meta).await?;
        Ok(())
    }

    async fn pages(&mut self, vaddr: u64, flags: Flags, mut bytes: Bytes, sparse: bool) -> Result<(), Cause> {
        let open = self.open.as_mut().expect("the protocol opens an object before its pages");
        let Content::Object { layout, .. } = &mut open.content else {
            unreachable!("pages follow their object")
        };
        self.taken.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let runs: Vec<Run> = alike(&bytes).collect();
        for run in runs {
            let part = bytes.split_to((run.pages * PAGE_BYTES) as usize);
            layout.push(Run { vaddr: vaddr + run.vaddr, lazy: flags.contains(Flags::LAZY), ..run });
            if !run.zero {
                // A few pages must not hold a whole segment of the arena until their chunk is stored.
                open.writer.push(if sparse { Bytes::copy_from_slice(&part) } else { part }).await?;
            }
        }
        Ok(())
    }

    fn writer(&mut self) -> &mut RegionWriter {
        &mut self.open.as_mut().expect("content follows the beginning of its tree").writer
    }
}

/// Splits pages into runs of zero and other ones, addresses counted from 0.
fn alike(bytes: &[u8]) -> impl Iterator<Item = Run> + '_ {
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
    fn a_batch_is_sparse_when_less_than_half_of_its_pages_have_content() {
        let mut bytes = vec![0; 4 * PAGE];
        bytes[3 * PAGE] = 1;
        assert!(is_sparse(&bytes));
        bytes[0] = 1;
        assert!(!is_sparse(&bytes));
        assert!(!is_sparse(&[]));
    }
}
