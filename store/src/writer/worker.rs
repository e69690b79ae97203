//! The workers of a session: threads that hash and compress, one for each core.

use std::collections::HashSet;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytes::Bytes;
use tokio::sync::oneshot;

use crate::codec::{self, Codec};
use crate::digest::ChunkId;
use crate::format::index::Location;
use crate::limits::PAGE_BYTES;
use crate::writer::{Content, Shared};

/// Work for a worker. A reply that nobody waits for any more is dropped.
pub(crate) enum Job {
    /// Name chunks, and encode those that nobody has.
    Hash { contents: Vec<Content>, reply: oneshot::Sender<Vec<Hashed>> },
    /// Encode a chunk that is written although the store has it.
    Encode { content: Content, reply: oneshot::Sender<Encoded> },
}

/// A chunk with its id.
pub(crate) struct Hashed {
    pub(crate) id: ChunkId,
    pub(crate) raw_bytes: u32,
    pub(crate) body: Body,
}

/// What is known about a chunk.
pub(crate) enum Body {
    /// Nobody has it: here it is.
    New(Encoded),
    /// An older snapshot has it.
    Known(Location, Content),
    /// This session had it before, or has it in a batch that comes later.
    Repeated(Content),
}

/// A chunk as it will be stored.
pub(crate) struct Encoded {
    pub(crate) codec: Codec,
    pub(crate) content: Content,
}

/// Starts the workers. They end when the last sender of jobs is gone.
pub(crate) fn start(shared: &Arc<Shared>) -> Sender<Job> {
    let (sender, receiver) = channel();
    let receiver = Arc::new(Mutex::new(receiver));
    let seen = Arc::new(Mutex::new(HashSet::new()));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for _ in 0..cores {
        let (receiver, seen, shared) = (receiver.clone(), seen.clone(), Arc::downgrade(shared));
        std::thread::Builder::new()
            .name("store-worker".to_owned())
            .spawn(move || work(&receiver, &seen, &shared))
            .expect("the system has room for a thread");
    }
    sender
}

fn work(jobs: &Mutex<Receiver<Job>>, seen: &Mutex<HashSet<ChunkId>>, shared: &Weak<Shared>) {
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        // A session that is gone wants nothing any more.
        let (Ok(job), Some(shared)) = (job, shared.upgrade()) else { return };
        match job {
            Job::Hash { contents, reply } => {
                let hashed = contents.into_iter().map(|content| hash(&shared, seen, content)).collect();
                let _ = reply.send(hashed);
            }
            Job::Encode { content, reply } => {
                let _ = reply.send(encode(&shared, content));
            }
        }
    }
}

fn hash(shared: &Shared, seen: &Mutex<HashSet<ChunkId>>, content: Content) -> Hashed {
    let id = shared.key.id(content.parts.iter().map(|part| &part[..]));
    let raw_bytes = content.bytes;
    let first = seen.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
    let body = match shared.reuse.get(&id) {
        _ if !first => Body::Repeated(content),
        Some(location) => Body::Known(*location, content),
        None => Body::New(encode(shared, content)),
    };
    Hashed { id, raw_bytes, body }
}

fn encode(shared: &Shared, mut content: Content) -> Encoded {
    let (codec, stored) = codec::encode(shared.compression, shared.rate, &content.parts);
    if stored.is_none() && shared.copy_raw {
        content.parts = vec![Bytes::from(content.parts.concat())];
    }
    if let Some(stored) = stored {
        let pages = stored.len().div_ceil(PAGE_BYTES as usize);
        content.parts = vec![stored];
        // What compression saved is free for others at once.
        if let Some(kept) = content.memory.split(pages) {
            content.memory = kept;
        }
    }
    Encoded { codec, content }
}
