//! The freeze: CRIU dumps into the receiver; delta and `/dev/shm` are copied before its end is voted for.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rewarm_container::shim::DumpRequest;
use rewarm_criu::config::Config;
use rewarm_criu::page_server;
use rewarm_criu::stats::{self, DumpStats};
use rewarm_report::Stage;

use crate::arena::Arena;
use crate::capture::{Captured, capture};
use crate::error::Cause;
use crate::pipeline::{Context, Replica, Request, blocking};
use crate::preflight::Findings;
use crate::receive::{Pages, Receiver};

/// Beside what the server is known to have, so that it may grow until the freeze.
const MARGIN_BYTES: u64 = 256 << 20;

/// A frozen server, copied.
pub(crate) struct Dumped {
    pub(crate) pages: Pages,
    pub(crate) upper: Captured,
    pub(crate) shm: Captured,
    pub(crate) stats: DumpStats,
    /// When the server stood still, milliseconds since 1970.
    pub(crate) dumped_ms: u64,
    /// The highest limits that its processes had before.
    pub(crate) limits: BTreeMap<String, u64>,
}

impl Dumped {
    pub(crate) fn received_bytes(&self) -> u64 {
        self.pages.received_bytes()
    }
}

/// What is copied inside the freeze: the upper layer and `/dev/shm`, and when that was.
type Copied = Option<(Captured, Captured, SystemTime)>;

/// Dumps the replica. It goes on afterwards, or stays frozen if it was frozen before.
pub(crate) async fn dump(
    replica: &Replica,
    findings: &Findings,
    request: &Request,
    context: &Context,
) -> Result<Dumped, Cause> {
    let budget = rewarm_sys::machine::free_bytes().map_err(Cause::io("look at free memory"))?;
    let expected = findings.memory_bytes;
    let touched =
        tokio::task::spawn_blocking(move || Arena::touched(expected, (expected + MARGIN_BYTES).min(budget)));
    let arena = touched
        .await
        .expect("touching memory does not panic")
        .map_err(Cause::io("set memory aside for the server's pages"))?;
    let copied = Arc::new(Mutex::new(Copied::default()));
    let at_vote = copy_at_vote(replica, context, budget.saturating_sub(expected), copied.clone());
    let (ours, theirs) = UnixStream::pair().map_err(Cause::io("make a socket pair for CRIU's pages"))?;
    ours.set_read_timeout(Some(request.freeze_timeout)).map_err(Cause::io("set the deadline of the dump"))?;
    let ended = HangUp(ours.try_clone().map_err(Cause::io("duplicate the receiver's socket"))?);
    let receiving = tokio::task::spawn_blocking(move || {
        let mut receiver = Receiver::new(arena, at_vote);
        let received = page_server::serve(&ours, &mut receiver);
        // Whatever went wrong, CRIU must notice: a dump has no deadline of its own.
        let _ = ours.shutdown(std::net::Shutdown::Both);
        (receiver, received)
    });
    let asked = DumpRequest {
        criu: context.criu.clone(),
        config: Config::dump().skip_in_flight().to_string(),
        tcp_established: true,
        file_locks: true,
        real_ids: findings.owner.map(|owner| (owner.uid, owner.gid)),
        timeout_ms: u64::try_from(request.freeze_timeout.as_millis()).unwrap_or(u64::MAX),
    };
    let client = replica.client.clone();
    let dumping = blocking(move || client.dump(asked, theirs)).await;
    drop(ended);
    let (mut receiver, received) = receiving.await.expect("receiving does not panic");
    if let Some(failure) = receiver.take_failure() {
        return Err(Cause::Receive(failure));
    }
    dumping.map_err(|error| explain(error, received.as_ref().err(), request.freeze_timeout))?;
    received?;
    let pages = receiver.finish().map_err(Cause::io("keep the server's pages"))?;
    let trees = copied.lock().expect("no panic while copying").take();
    let (upper, shm, dumped_at) = trees.expect("CRIU succeeded, so it asked for the vote");
    let stats = stats::dump(&replica.client.inside().dump_work())?;
    let since_1970 = dumped_at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let dumped_ms = u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX);
    Ok(Dumped { pages, upper, shm, stats, dumped_ms, limits: findings.limits.clone() })
}

/// Ends the receiver's connection when it is dropped: CRIU then fails the dump and lets the server go on. It is dropped
/// too when the whole dump is given up in the middle.
struct HangUp(UnixStream);

impl Drop for HangUp {
    fn drop(&mut self) {
        // Ended already is as good.
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

/// The work of the vote: everything is frozen, so files have exactly the sizes that the images name.
fn copy_at_vote(
    replica: &Replica,
    context: &Context,
    mut budget: u64,
    copied: Arc<Mutex<Copied>>,
) -> Box<dyn FnOnce() -> io::Result<()> + Send> {
    let inside = replica.client.inside();
    let clock = context.clock.clone();
    Box::new(move || {
        clock.stage_blocking(Stage::Delta, || {
            let upper = capture(&inside.upper(), &mut budget)?;
            let shm = capture(&inside.shm(), &mut budget)?;
            *copied.lock().expect("no panic while copying") = Some((upper, shm, SystemTime::now()));
            Ok(())
        })
    })
}

/// The receiver's own reason says more than CRIU's "broken pipe" after it, and CRIU's log more than runc.
fn explain(error: rewarm_container::Error, received: Option<&rewarm_criu::Error>, limit: Duration) -> Cause {
    match received {
        Some(rewarm_criu::Error::PageServer(page_server::Fault::Deadline { .. })) => {
            Cause::Deadline { seconds: limit.as_secs() }
        }
        _ => match error.log().and_then(|log| rewarm_criu::Error::of_log("dump", log)) {
            Some(refused) => Cause::Criu(refused),
            None => Cause::Container(error),
        },
    }
}
