//! Decoding for later: what has passed through a restore is decoded once more, into memory that stays, in time that nobody else wants.
//! The restore has not waited for that memory to be made, and the next one finds its content.
//!
//! A worker of its own does it, in the kernel's idle class, which a thread that may be wanted again could not leave. Nobody
//! gets the stream before it is complete: a restore that begins meanwhile does not wait for an idle process, it drops it.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rewarm_store::Digest;
use rewarm_sys::machine;
use rewarm_sys::shared::Owner;

use super::{Filling, Inner, Keeper, Stream};
use crate::cache;
use crate::layout::BLOCK_BYTES;
use crate::protocol::{FromWorker, ToWorker};
use crate::workers::Worker;

/// Part of the free memory that may be taken for what may never be wanted again.
const FREE_PART: u64 = 2;

impl Stream {
    /// Whether a restore may have it.
    pub(super) fn is_usable(&self, state: &Filling) -> bool {
        self.later.is_none() || state.complete
    }
}

impl Drop for Stream {
    /// What is still decoded for later is wanted no more. Its memory is free at once: an idle process may take long to end.
    fn drop(&mut self) {
        if let Some(worker) = &self.later
            && !self.state().complete
        {
            worker.end();
            if let Err(error) = self.owner.discard() {
                tracing::debug!(stream = self.id, %error, "memory is not given back");
            }
        }
    }
}

impl Inner {
    /// A restore wants this snapshot, and what is being decoded for later would keep it waiting.
    pub(super) fn drop_later(&mut self, digest: &Digest) {
        let is_unfinished = |stream: &Stream| stream.digest == *digest && !stream.is_usable(&stream.state());
        let gone: Vec<Arc<Stream>> = self.streams.extract_if(.., |stream| is_unfinished(stream)).collect();
        if !gone.is_empty() {
            // Memory is given back beside the restore, which does not need it to begin.
            std::thread::spawn(move || drop(gone));
        }
    }
}

impl Keeper {
    /// Decodes what has passed, where there is room for it beside what is held.
    pub(super) fn decode_later(self: &Arc<Self>, passed: Arc<Stream>) {
        let keeper = self.clone();
        let work = move || {
            if let Err(error) = keeper.decode_for_later(passed) {
                tracing::info!(%error, "nothing is decoded for later");
            }
        };
        // Without it the next restore is slower, that is all.
        let _ = std::thread::Builder::new().name("later".to_owned()).spawn(work);
    }

    fn decode_for_later(&self, passed: Arc<Stream>) -> io::Result<()> {
        let bytes = passed.owner.content_bytes();
        if bytes > machine::free_bytes()? / FREE_PART {
            return Ok(());
        }
        let worker = self.workers.for_later(&passed.access)?;
        let Some(stream) = self.enter(&passed, worker.clone())? else {
            worker.end();
            return Ok(());
        };
        let [content, table] = stream.owner.files();
        let files = [stream.manifest.as_fd(), stream.boot.as_fd(), content, table];
        let (digest, patience_ms) = (stream.digest, stream.patience_ms);
        let question = |id| ToWorker::Fill { id, digest, first: Vec::new(), patience_ms, ahead: None };
        let asked = worker.ask(question, &files);
        // Where it is dropped meanwhile, its worker ends.
        let noted = Arc::downgrade(&stream);
        drop((passed, stream));
        let answer = asked.wait();
        let Some(stream) = noted.upgrade() else { return Ok(()) };
        match answer {
            Some((FromWorker::Filled { read_bytes, checked_bytes, .. }, _)) => {
                let mut state = stream.state();
                (state.complete, state.read_bytes, state.checked_bytes) = (true, read_bytes, checked_bytes);
                self.read_bytes.fetch_add(read_bytes, Ordering::Relaxed);
            }
            other => {
                self.lock().streams.retain(|other| !Arc::ptr_eq(other, &stream));
                tracing::info!(stream = stream.id, ?other, "a stream is not decoded for later");
            }
        }
        Ok(())
    }

    /// An empty stream among the others, for the content of one that has passed; `None` where somebody has made one already or
    /// there is no room.
    fn enter(&self, passed: &Stream, worker: Arc<Worker>) -> io::Result<Option<Arc<Stream>>> {
        let (bytes, folder) = (passed.owner.content_bytes(), self.folder.as_ref().map(AsFd::as_fd));
        let set = passed.working_set.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let stream = Arc::new(Stream {
            id: self.tick(),
            digest: passed.digest,
            access: passed.access.clone(),
            patience_ms: passed.patience_ms,
            manifest: passed.manifest.try_clone()?,
            boot: passed.boot.try_clone()?,
            regions: passed.regions.clone(),
            working_set: Mutex::new(set),
            owner: Owner::create(bytes, BLOCK_BYTES, folder)?,
            state: Mutex::new(Filling { begun: true, ..Filling::default() }),
            used: AtomicU64::new(self.tick()),
            later: Some(worker),
        });
        let mut inner = self.lock();
        let is_made = inner.opening.contains(&passed.digest)
            || inner.streams.iter().any(|other| other.digest == passed.digest);
        let limit = inner.limit;
        // For what never fits, nothing has to go.
        let makes_room = !is_made && bytes <= limit;
        let gone = if makes_room { cache::make_room(&mut inner.streams, limit, bytes) } else { Vec::new() };
        let fits = !is_made && cache::fits(&inner.streams, limit, bytes);
        if fits {
            inner.streams.push(stream.clone());
        }
        drop(inner);
        drop(gone);
        Ok(fits.then_some(stream))
    }
}
