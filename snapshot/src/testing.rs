//! The memory of a task that nobody runs, stored as a dump stores it: for tests of those who fill memory again.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rewarm_criu::layout::PAGE_BYTES;
use rewarm_criu::page_server::{Flags, Object, PageSink};
use rewarm_report::Hidden;
use rewarm_store::{Memory, Session};

use crate::arena::Arena;
use crate::aside::Aside;
use crate::error::Cause;
use crate::receive::{Intake, Receiver};
use crate::stream::Streamer;

/// How long a part may take to find room.
const PATIENCE: Duration = Duration::from_secs(60);

/// Takes pages of a task as CRIU sends them, `runs` by address, and stores them in a region of their own.
///
/// # Errors
/// As a dump.
///
/// # Panics
/// If the receiver votes against it.
pub async fn dump(session: Arc<Session>, pid: u32, runs: Vec<(u64, Bytes)>) -> Result<Memory, Cause> {
    let (batches, received) = channel();
    let streamer = Streamer::start(Aside::start("stream")?, session, received, None);
    let total = runs.iter().map(|(_, bytes)| bytes.len() as u64).sum();
    let receiving = Aside::start("receive")?.run(move || {
        let intake = Intake::new(Arena::new(0), Instant::now() + PATIENCE, batches);
        let mut receiver = Receiver::new(intake, Box::new(|_| Ok(())));
        receiver.open(Object::Task { pid }).expect("nothing has been taken yet");
        for (vaddr, bytes) in runs {
            let pages = bytes.len() as u64 / PAGE_BYTES;
            let flags = Flags::from_bits(6).expect("present and lazy");
            receiver.run(vaddr, pages, flags, &mut &bytes[..]).expect("room");
        }
        assert_eq!(receiver.vote(), 0, "{:?}", receiver.take_failure());
    });
    receiving.await.expect("receiving does not panic");
    streamer.finish(total, &Hidden).await
}
