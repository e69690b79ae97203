//! Packs on their way into the store.
//!
//! A pack is sent in parts while it is being filled. Its bytes are kept until the store has confirmed all of it: if a
//! part fails for good, the pack is sent once more as a whole, which can be tried again where a part cannot.

use std::mem;
use std::sync::Arc;

use bytes::Bytes;
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStoreExt, PutPayload};
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use uuid::Uuid;

use crate::codec::Codec;
use crate::digest::ChunkId;
use crate::error::Result;
use crate::format::frame::{self, Magic};
use crate::format::index::Location;
use crate::format::{pack, pack_path};
use crate::limits::{PACK_BYTES_TARGET, PART_BYTES};
use crate::writer::Shared;
use crate::writer::worker::Encoded;

/// A pack that is being filled.
pub(crate) struct Pack {
    id: Uuid,
    bytes: u64,
    chunks: Vec<(ChunkId, Location)>,
    part: Vec<Bytes>,
    part_bytes: u64,
    memory: Vec<OwnedSemaphorePermit>,
    parts: mpsc::UnboundedSender<Part>,
    upload: JoinHandle<Result<Outcome>>,
}

/// A pack that is filled and may still be on its way.
pub(crate) struct Sent {
    pub(crate) id: Uuid,
    pub(crate) bytes: u64,
    /// `None` once it has been waited for and the pack is stored.
    pub(crate) upload: Option<JoinHandle<Result<Outcome>>>,
}

/// How an upload ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Stored,
    Aborted,
}

struct Part {
    payload: PutPayload,
    /// Held until the whole pack is stored.
    memory: Vec<OwnedSemaphorePermit>,
    last: bool,
}

impl Pack {
    pub(crate) fn begin(shared: &Arc<Shared>, cancelled: &watch::Receiver<bool>) -> Self {
        let id = Uuid::now_v7();
        let (parts, receiver) = mpsc::unbounded_channel();
        let upload = tokio::spawn(upload(shared.clone(), pack_path(id), receiver, cancelled.clone()));
        let mut pack = Self {
            id,
            bytes: 0,
            chunks: Vec::new(),
            part: Vec::new(),
            part_bytes: 0,
            memory: Vec::new(),
            parts,
            upload,
        };
        pack.append(Bytes::copy_from_slice(&frame::header(Magic::Pack, Codec::None)));
        pack
    }

    /// Adds a chunk and says where it lies.
    pub(crate) fn push(&mut self, id: ChunkId, raw: u32, encoded: Encoded) -> Location {
        let stored: usize = encoded.content.parts.iter().map(Bytes::len).sum();
        let stored = u32::try_from(stored).expect("a chunk is shorter than 4 GiB");
        let location = Location { pack: self.id, offset: self.bytes, stored, raw, codec: encoded.codec };
        self.chunks.push((id, location));
        self.memory.push(encoded.content.memory);
        for part in encoded.content.parts {
            self.append(part);
        }
        location
    }

    pub(crate) fn is_full(&self) -> bool {
        self.bytes >= PACK_BYTES_TARGET
    }

    pub(crate) fn finish(mut self) -> Sent {
        let ending = pack::ending(&self.chunks);
        self.append(Bytes::from(ending));
        self.send_part(true);
        Sent { id: self.id, bytes: self.bytes, upload: Some(self.upload) }
    }

    /// Gives up; the upload is aborted once `cancelled` says so or the parts end.
    pub(crate) fn give_up(self) -> Sent {
        Sent { id: self.id, bytes: 0, upload: Some(self.upload) }
    }

    fn append(&mut self, mut bytes: Bytes) {
        self.bytes += bytes.len() as u64;
        while self.part_bytes + bytes.len() as u64 > PART_BYTES {
            let room = (PART_BYTES - self.part_bytes) as usize;
            self.part.push(bytes.split_to(room));
            self.send_part(false);
        }
        self.part_bytes += bytes.len() as u64;
        self.part.push(bytes);
    }

    fn send_part(&mut self, last: bool) {
        self.part_bytes = 0;
        let payload = PutPayload::from_iter(mem::take(&mut self.part));
        let memory = mem::take(&mut self.memory);
        // The receiver is gone only if the session is, whose failure is seen elsewhere.
        let _ = self.parts.send(Part { payload, memory, last });
    }
}

async fn upload(
    shared: Arc<Shared>,
    path: Path,
    parts: mpsc::UnboundedReceiver<Part>,
    mut cancelled: watch::Receiver<bool>,
) -> Result<Outcome> {
    let mut sending = Sending {
        shared: &shared,
        path: &path,
        asked: None,
        multipart: None,
        whole: Vec::new(),
        memory: Vec::new(),
    };
    let result = tokio::select! {
        result = sending.all(parts) => result,
        _ = cancelled.wait_for(|cancelled| *cancelled) => Ok(Outcome::Aborted),
    };
    if !matches!(result, Ok(Outcome::Stored)) {
        sending.abort().await;
    }
    result
}

struct Sending<'a> {
    shared: &'a Shared,
    path: &'a Path,
    /// A multipart upload that the store has not named yet. Giving up waits for its name, or it would stay for ever.
    asked: Option<JoinHandle<object_store::Result<Box<dyn MultipartUpload>>>>,
    multipart: Option<Box<dyn MultipartUpload>>,
    whole: Vec<Bytes>,
    memory: Vec<OwnedSemaphorePermit>,
}

impl Sending<'_> {
    async fn all(&mut self, mut parts: mpsc::UnboundedReceiver<Part>) -> Result<Outcome> {
        let mut tasks = JoinSet::new();
        let mut in_parts = true;
        loop {
            let Some(part) = parts.recv().await else { return Ok(Outcome::Aborted) };
            let only = part.last && self.whole.is_empty();
            self.whole.extend(part.payload.iter().cloned());
            self.memory.extend(part.memory);
            in_parts = in_parts && !only && self.send(part.payload, &mut tasks).await;
            if part.last {
                break;
            }
        }
        while let Some(sent) = tasks.join_next().await {
            in_parts = in_parts && matches!(sent, Ok(Ok(())));
        }
        if in_parts && self.complete().await {
            return Ok(Outcome::Stored);
        }
        self.abort().await;
        let whole = PutPayload::from_iter(self.whole.iter().cloned());
        self.shared.objects.put(self.path, whole).await?;
        Ok(Outcome::Stored)
    }

    /// Sends a part in the background. False if the store takes no parts of this object.
    async fn send(&mut self, payload: PutPayload, tasks: &mut JoinSet<object_store::Result<()>>) -> bool {
        if self.multipart.is_none() {
            let (objects, path) = (self.shared.objects.clone(), self.path.clone());
            let asking = tokio::spawn(async move { objects.store().put_multipart(&path).await });
            let answer = self.asked.insert(asking).await.expect("asking a store does not panic");
            self.asked = None;
            match answer {
                Ok(multipart) => self.multipart = Some(multipart),
                Err(error) => {
                    tracing::debug!(path = %self.path, %error, "no multipart upload");
                    return false;
                }
            }
        }
        let Some(multipart) = &mut self.multipart else { return false };
        let turn = self.shared.sending.clone().acquire_owned().await;
        let part = multipart.put_part(payload);
        tasks.spawn(async move {
            let sent = part.await;
            drop(turn);
            sent
        });
        true
    }

    async fn complete(&mut self) -> bool {
        let Some(multipart) = &mut self.multipart else { return false };
        match multipart.complete().await {
            Ok(_) => {
                self.multipart = None;
                true
            }
            Err(error) => {
                tracing::debug!(path = %self.path, %error, "multipart upload was not completed");
                false
            }
        }
    }

    async fn abort(&mut self) {
        if let Some(asked) = self.asked.take()
            && let Ok(Ok(multipart)) = asked.await
        {
            self.multipart = Some(multipart);
        }
        if let Some(mut multipart) = self.multipart.take()
            && let Err(error) = multipart.abort().await
        {
            tracing::debug!(path = %self.path, %error, "multipart upload was not aborted");
        }
    }
}
