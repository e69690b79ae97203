//! The freeze: CRIU dumps into the receiver; delta and `/dev/shm` are copied before its end is voted for. What was received
//! streams into the store from the first page on.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::socket::{setsockopt, sockopt};
use rewarm_container::shim::DumpRequest;
use rewarm_container::tree::Tree;
use rewarm_criu::config::Config;
use rewarm_criu::page_server::{self, Fault};
use rewarm_criu::stats::{self, DumpStats};
use rewarm_gpu::carried::Carried;
use rewarm_report::Stage;
use rewarm_store::Session;
use tokio::sync::oneshot;

use crate::arena::Arena;
use crate::aside::Aside;
use crate::budget::Budget;
use crate::capture::{self, capture};
use crate::direct;
use crate::error::Cause;
use crate::own::Pairs;
use crate::pipeline::{Context, Replica, Request, blocking};
use crate::preflight::Findings;
use crate::receive::{AtVote, Intake, Receiver};
use crate::stream::Streamer;

/// From the start of runc to the first page: at least so much, with CRIU's cache of kernel features.
const START: Duration = Duration::from_millis(80);
/// How much later than the receiver the shim gives a dump up: the receiver knows what it waited for.
const SHIM_MARGIN: Duration = Duration::from_secs(2);
/// How long a failed dump waits for the failure of the store that may be behind it.
const STORE_MARGIN: Duration = Duration::from_millis(200);

/// A frozen server, received.
pub(crate) struct Dumped {
    /// Takes what was received into the store.
    pub(crate) streamer: Streamer,
    /// Bytes of pages that CRIU sent.
    pub(crate) received_bytes: u64,
    /// What the server wrote to its root file system.
    pub(crate) upper: Tree,
    /// Rewarm's own connections to it.
    pub(crate) own: Pairs,
    pub(crate) stats: DumpStats,
    /// When the server stood still, milliseconds since 1970.
    pub(crate) dumped_ms: u64,
    /// The highest limits that its processes had before.
    pub(crate) limits: BTreeMap<String, u64>,
    /// Device state of a server that uses CUDA; its copies are among the pages.
    pub(crate) device: Option<Carried>,
    /// Where its device memory is kept, if that went past it.
    pub(crate) kept: Option<File>,
}

/// What is copied inside the freeze, and when that was.
struct Copied {
    upper: Tree,
    own: Pairs,
    at: SystemTime,
}

/// Dumps the replica. It goes on afterwards, or stays frozen if it was frozen before.
pub(crate) async fn dump(
    replica: &Replica,
    findings: &Findings,
    budget: Budget,
    session: Arc<Session>,
    request: &Request,
    context: &Context,
) -> Result<Dumped, Cause> {
    let arena = Arena::new(budget.arena);
    let (batches, received) = channel();
    let (ours, theirs) = UnixStream::pair().map_err(Cause::io("make a socket pair for CRIU's pages"))?;
    keep_apart(&theirs);
    ours.set_read_timeout(Some(request.freeze_timeout)).map_err(Cause::io("set the deadline of the dump"))?;
    let ended = HangUp {
        socket: ours.try_clone().map_err(Cause::io("duplicate the receiver's socket"))?,
        arena: arena.clone(),
    };
    let [stream, receive, calls] = [Aside::start("stream")?, Aside::start("receive")?, Aside::start("dump")?];
    touch(&arena, budget.expected, replica).await;
    // From here on a server that uses CUDA stands still. The dump lets it go on.
    let kept = if request.gpu_direct { Some(direct::file()?) } else { None };
    let given = kept.as_ref().map(OwnedFd::try_clone).transpose();
    let given = given.map_err(Cause::io("duplicate the file for device memory"))?;
    let client = replica.client.clone();
    let device = blocking(move || client.suspend_devices(given.as_ref().map(AsFd::as_fd))).await?;
    let mut streamer = Streamer::start(stream, session, received, device.as_ref());
    let deadline = Instant::now() + request.freeze_timeout;
    let copied = Arc::new(Mutex::new(None));
    let at_vote = copy_at_vote(replica, findings, context, copied.clone());
    let intake = Intake::new(arena, deadline, batches);
    let receiving = receive.run(move || {
        let mut receiver = Receiver::new(intake, at_vote);
        let result = page_server::serve(&ours, &mut receiver);
        // Whatever went wrong, CRIU must notice: a dump has no deadline of its own.
        let _ = ours.shutdown(std::net::Shutdown::Both);
        (receiver.received_bytes(), receiver.take_failure(), result)
    });
    let asked = DumpRequest {
        criu: context.criu.clone(),
        // No plugins: what CRIU's own does for CUDA has been done, and the folder of logs holds none.
        config: Config::dump().skip_in_flight().plugins(&replica.client.paths().dump_work()).to_string(),
        tcp_established: true,
        file_locks: true,
        real_ids: findings.owner.map(|owner| (owner.uid, owner.gid)),
        timeout_ms: u64::try_from((request.freeze_timeout + SHIM_MARGIN).as_millis()).unwrap_or(u64::MAX),
    };
    let client = replica.client.clone();
    let dumping =
        calls.run(move || client.dump(asked, theirs)).await.expect("calls to the shim do not panic");
    drop(ended);
    let (received_bytes, failure, result) = receiving.await.expect("receiving does not panic");
    if failure.is_some() || dumping.is_err() || result.is_err() {
        let own = failed(failure, dumping.err(), result.err(), budget, request.freeze_timeout);
        return Err(streamer.failure(STORE_MARGIN).await.unwrap_or(own));
    }
    let copied = copied.lock().expect("no panic while copying").take();
    let Copied { upper, own, at: dumped_at } = copied.expect("CRIU succeeded, so it asked for the vote");
    let stats = stats::dump(&replica.client.inside().dump_work())?;
    let since_1970 = dumped_at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let dumped_ms = u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX);
    let (limits, kept) = (findings.limits.clone(), kept.map(File::from));
    Ok(Dumped { streamer, received_bytes, upper, own, stats, dumped_ms, limits, device, kept })
}

/// What CRIU may have sent before the receiver has taken it. These are pages of the server itself, not copies.
const SENT_BYTES: usize = 64 << 20;

/// Lets CRIU and the receiver work at the same time: with the usual 200 KiB between them each waits for the other after every
/// few pages (a server of 1.25 GiB was frozen for 0.60 s with that and for 0.38 s with 64 MiB).
fn keep_apart(socket: &UnixStream) {
    // Without CAP_NET_ADMIN as much as the system allows.
    if setsockopt(socket, sockopt::SndBufForce, &SENT_BYTES).is_err() {
        let _ = setsockopt(socket, sockopt::SndBuf, &SENT_BYTES);
    }
}

/// Touches the memory that will be needed, up to the part that can be touched while runc and CRIU start.
async fn touch(arena: &Arena, expected: u64, replica: &Replica) {
    let (arena, shm) = (arena.clone(), replica.client.inside().shm());
    let (nearly, is_nearly) = oneshot::channel::<()>();
    let work = move || {
        let touched = arena.touch(expected + capture::bytes(&shm), START, || drop(nearly));
        if let Err(error) = touched {
            tracing::debug!(%error, "memory for the server's pages is not there yet");
        }
    };
    // Without the thread, or ahead of it, memory is made as pages come: only the freeze is longer.
    if std::thread::Builder::new().name("snapshot-touch".to_owned()).spawn(work).is_ok() {
        let _ = is_nearly.await;
    }
}

/// Ends the receiver when it is dropped: CRIU then fails the dump and lets the server go on. It is dropped too when the
/// whole dump is given up in the middle.
struct HangUp {
    socket: UnixStream,
    arena: Arena,
}

impl Drop for HangUp {
    fn drop(&mut self) {
        // Ended already is as good.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        self.arena.close();
    }
}

/// The work of the vote: everything is frozen, so files have exactly the sizes that the images name, and connections are those
/// of the images.
fn copy_at_vote(
    replica: &Replica,
    findings: &Findings,
    context: &Context,
    copied: Arc<Mutex<Option<Copied>>>,
) -> AtVote {
    let inside = replica.client.inside();
    let clock = context.clock.clone();
    let (mut own, holders) = (findings.connections.clone(), findings.own.clone());
    let init = replica.record.pid.unwrap_or_default().cast_signed();
    Box::new(move |intake| {
        clock.stage_blocking(Stage::Delta, || {
            let upper = capture("upper", &inside.upper(), intake)?;
            capture("shm", &inside.shm(), intake)?;
            // Beside those that were there at the preflight: one of them may have been closed while the server was frozen.
            own.extend(holders.iter().flat_map(|holders| holders.connections(init)));
            *copied.lock().expect("no panic while copying") =
                Some(Copied { upper, own, at: SystemTime::now() });
            Ok(())
        })
    })
}

/// Why a dump failed. The receiver's own reason says more than CRIU's "broken pipe" after it, and CRIU's log more than
/// runc.
fn failed(
    at_vote: Option<io::Error>,
    dumping: Option<rewarm_container::Error>,
    receiving: Option<rewarm_criu::Error>,
    budget: Budget,
    limit: Duration,
) -> Cause {
    let sink = match receiving {
        Some(rewarm_criu::Error::PageServer(Fault::Deadline { .. })) => {
            return Cause::Deadline { seconds: limit.as_secs() };
        }
        Some(rewarm_criu::Error::PageServer(Fault::Sink { source, .. })) => Some(source),
        Some(error) if dumping.is_none() => return Cause::Criu(error),
        _ => None,
    };
    match (at_vote.or(sink), dumping) {
        (Some(error), _) if error.kind() == io::ErrorKind::TimedOut => {
            Cause::StoreBehind { seconds: limit.as_secs(), mib: budget.arena >> 20 }
        }
        (Some(error), _) => Cause::Receive(error),
        (None, Some(error)) => match error.log().and_then(|log| rewarm_criu::Error::of_log("dump", log)) {
            Some(refused) => Cause::Criu(refused),
            None => Cause::Container(error),
        },
        (None, None) => unreachable!("one of the three failed"),
    }
}
