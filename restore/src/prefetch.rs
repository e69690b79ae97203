//! Brings a snapshot's content onto this machine before anybody restores it: the first replica then waits for no store and no decoder.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rewarm_fetcher::{Access, Fetcher, Presence, Status};
use rewarm_report::Stage;
use rewarm_store::{Reference, Target, Trust};

use crate::error::{Cause, Error, Result};
use crate::fetch::BLOCK_WITHIN;
use crate::request::Context;

/// How long the fetcher may take to call a stream complete of which every block has arrived.
const COMPLETE_WITHIN: Duration = Duration::from_secs(10);

/// Has the fetcher decode a snapshot, where that fits into what it may keep beside all that it keeps already; `None` where it does
/// not. Nobody holds it afterwards: it goes when something else needs the memory, or with the fetcher, which stays as long as what
/// is given back. Given up when the future is dropped.
///
/// # Errors
/// There is no such snapshot, it is not signed as it must be, or the store does not bring it.
pub async fn prefetch(
    source: &Reference,
    trust: Option<Trust>,
    context: &Context,
) -> Result<Option<Presence>> {
    let name = source.to_string();
    let wanted = Wanted::default();
    let (tell, hear) = tokio::sync::oneshot::channel();
    let work = {
        let (source, context, wanted) = (source.clone(), context.clone(), wanted.0.clone());
        move || {
            // Nobody may be waiting any more.
            let _ = tell.send(bring(&source, trust, &context, &wanted));
        }
    };
    // A thread of its own: it may wait for a store that brings nothing, and nobody is to wait for it.
    std::thread::spawn(work);
    let brought = hear.await.expect("bringing a snapshot does not panic");
    brought.map_err(|cause| Error { name, stage: Stage::Fetch, cause })
}

/// Says that nobody wants it any more, when it is dropped.
#[derive(Default)]
struct Wanted(Arc<AtomicBool>);

impl Drop for Wanted {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

fn bring(
    source: &Reference,
    trust: Option<Trust>,
    context: &Context,
    given_up: &AtomicBool,
) -> std::result::Result<Option<Presence>, Cause> {
    // Whoever asks again and again whether it is still here asks no store.
    if let Target::Digest(digest) = &source.target
        && Fetcher::status(context.state.dir())?
            .is_some_and(|status| is_complete(&status, &digest.to_string()))
    {
        return Ok(Some(context.fetcher.stay()?));
    }
    let access = Access::new(&source.store, context.env.clone());
    let found = context.fetcher.find(&access, source, trust)?;
    let Some(found) = found.first() else { return Ok(None) };
    let stream = context.fetcher.open(&access, found, context.patience)?;
    let Some(status) = Fetcher::status(context.state.dir())? else { return Ok(None) };
    let digest = stream.digest().to_string();
    let others = status.streams.iter().filter(|other| other.digest != digest);
    let kept: u64 = others.map(|other| other.bytes).sum();
    if kept.saturating_add(stream.layout().bytes()) > status.limit_bytes {
        return Ok(None);
    }
    stream.begin(Vec::new())?;
    let lease = stream.lease()?;
    let wanted = || !given_up.load(Ordering::Acquire);
    for block in stream.layout().blocks() {
        if !stream.reader().has_arrived(block) {
            lease.wait_while(stream.reader(), block, BLOCK_WITHIN, &wanted)?;
        }
    }
    // The fetcher finishes its books a moment after the last block, and keeps only what is complete.
    let deadline = Instant::now() + COMPLETE_WITHIN;
    while !Fetcher::status(context.state.dir())?.is_some_and(|status| is_complete(&status, &digest)) {
        if Instant::now() > deadline || given_up.load(Ordering::Acquire) {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(Some(context.fetcher.stay()?))
}

fn is_complete(status: &Status, digest: &str) -> bool {
    status.streams.iter().any(|stream| stream.digest == digest && stream.complete)
}
