//! The shim's main thread, its listening socket and one thread for each connection.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rewarm_report::Classify;

use crate::error::{Context, Error, remote};
use crate::removal::remove_tree;
use crate::shim::protocol::{self, Reply, Request};
use crate::shim::replica::{Asker, ConnectionId, LEASE, Replica};
use crate::shim::{LEASE_FD, LOCK_FD, Paths};
use crate::spec::Name;

/// How long clients that wait for the end get to read the answer.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// The hidden verb `shim`: owns the replica until its end, and gives the exit code. The caller has started no thread yet.
///
/// `patience`: how long a call of the CUDA driver may take; as long as what it moves justifies if absent.
#[must_use]
pub fn main(state_dir: &Path, name: &Name, patience: Option<Duration>) -> u8 {
    let subscriber = tracing_subscriber::fmt().with_writer(io::stderr).with_ansi(false);
    // Somebody else's subscriber does as well.
    let _ = subscriber.try_init();
    match run(state_dir, name, patience) {
        Ok(()) => 0,
        Err(error) => {
            let chain = remote(&error);
            tracing::error!(chain = ?chain.chain(), "the shim failed");
            1
        }
    }
}

fn run(state_dir: &Path, name: &Name, patience: Option<Duration>) -> Result<(), Error> {
    let lock = rewarm_sys::process::take_inherited(LOCK_FD).context("find", "the lock file")?;
    let lease = rewarm_sys::process::take_inherited(LEASE_FD).context("find", "the lease")?;
    let lease = UnixStream::from(lease);
    match own(state_dir, name, patience) {
        Ok((replica, listener)) => {
            serve(&replica, lease, listener)?;
            replica.live();
            // The lock goes with the process, as the very last.
            drop(lock);
            Ok(())
        }
        Err(error) => {
            // The command waits for an answer to its hello.
            let _ = protocol::send(&lease, &failed(&error), &[]);
            remove_tree(&state_dir.join("replicas").join(name.as_str()))?;
            Err(error)
        }
    }
}

fn own(
    state_dir: &Path,
    name: &Name,
    patience: Option<Duration>,
) -> Result<(Arc<Replica>, UnixListener), Error> {
    rewarm_sys::process::block_child_signal().context("block", "SIGCHLD")?;
    rewarm_sys::process::become_subreaper().context("become", "subreaper")?;
    // Without CAP_SYS_RESOURCE the shim is as mortal as others.
    if let Err(error) = rewarm_sys::process::set_oom_score_adj(-999) {
        tracing::debug!(%error, "oom_score_adj");
    }
    rewarm_sys::mount::private_namespace().context("make", "a mount namespace")?;
    let paths = Paths::new(state_dir.join("replicas").join(name.as_str()));
    let listener = listen(&paths)?;
    let replica = Arc::new(Replica::new(name.clone(), paths, state_dir.join("runc"), patience));
    let children = replica.children.clone();
    std::thread::Builder::new()
        .name("reap".into())
        .spawn(move || children.reap())
        .context("start", "the reaping thread")?;
    Ok((replica, listener))
}

/// Binds by way of the directory's descriptor: the address of a Unix socket holds 107 bytes only.
fn listen(paths: &Paths) -> Result<UnixListener, Error> {
    let directory = std::fs::File::open(paths.dir()).context("open", paths.dir().display())?;
    let short = PathBuf::from(format!("/proc/self/fd/{}/{}", directory.as_raw_fd(), Paths::SOCKET));
    UnixListener::bind(short).context("listen on", paths.socket().display())
}

fn serve(replica: &Arc<Replica>, lease: UnixStream, listener: UnixListener) -> Result<(), Error> {
    let serve_one = |replica: Arc<Replica>, id, socket| {
        let thread = std::thread::Builder::new().name(format!("connection-{id}"));
        thread.spawn(move || connection(&replica, Asker { id, socket: &socket }))
    };
    serve_one(replica.clone(), LEASE, lease).context("start", "the lease's thread")?;
    let replica = replica.clone();
    let next = AtomicU64::new(LEASE + 1);
    let accept = move || {
        for socket in listener.incoming() {
            let id: ConnectionId = next.fetch_add(1, Ordering::Relaxed);
            let result = socket.and_then(|socket| serve_one(replica.clone(), id, socket).map(drop));
            if let Err(error) = result {
                tracing::warn!(%error, "accept");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    };
    std::thread::Builder::new()
        .name("accept".into())
        .spawn(accept)
        .context("start", "the accepting thread")?;
    Ok(())
}

fn connection(replica: &Arc<Replica>, asker: Asker<'_>) {
    match asker.socket.try_clone() {
        Ok(socket) => replica.change(|inner| drop(inner.clients.insert(asker.id, socket))),
        Err(error) => tracing::warn!(%error, connection = asker.id, "its end will be seen late"),
    }
    loop {
        let (request, fds) = match protocol::receive::<Request>(asker.socket) {
            Ok(Some(request)) => request,
            Ok(None) => break,
            Err(error) => {
                tracing::warn!(%error, connection = asker.id, "request");
                break;
            }
        };
        replica.change(|inner| inner.asking += 1);
        let (reply, fds) = answer(replica, asker, request, fds);
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let sent = protocol::send(asker.socket, &reply, &fds);
        replica.change(|inner| inner.asking -= 1);
        if sent.is_err() {
            break;
        }
    }
    replica.drop_leases(asker);
    if asker.id == LEASE {
        replica.lease_lost();
    }
    replica.go_on(asker);
    replica.change(|inner| inner.clients.remove(&asker.id));
}

fn answer(
    replica: &Arc<Replica>,
    asker: Asker<'_>,
    request: Request,
    fds: Vec<OwnedFd>,
) -> (Reply, Vec<OwnedFd>) {
    if let Request::Dial { port, timeout_ms } = request {
        return match dial(replica, port, timeout_ms) {
            Ok(socket) => (Reply::Done, vec![socket]),
            Err(error) => (failed(&error), Vec::new()),
        };
    }
    (carry_out(replica, asker, request, fds).unwrap_or_else(|error| failed(&error)), Vec::new())
}

fn carry_out(
    replica: &Arc<Replica>,
    asker: Asker<'_>,
    request: Request,
    mut fds: Vec<OwnedFd>,
) -> Result<Reply, Error> {
    let done = |()| Reply::Done;
    let wait = |timeout_ms| Duration::from_millis(timeout_ms);
    match request {
        Request::Hello { .. } => Ok(Reply::Hello { version: protocol::VERSION, pid: std::process::id() }),
        Request::Prepare(prepare) => {
            replica.require_lease("prepare", asker)?;
            if prepare.devices {
                replica.attach();
            }
            replica.prepare(*prepare).map(|prepared| Reply::Prepared(Box::new(prepared)))
        }
        Request::Start { timeout_ms } => {
            replica.require_lease("start", asker)?;
            replica.start(asker, wait(timeout_ms)).map(|pid| Reply::Started { pid })
        }
        Request::Restore(request) => {
            replica.require_lease("restore", asker)?;
            replica.restore(asker, &request, fds).map(|pid| Reply::Started { pid })
        }
        Request::Commit => {
            replica.require_lease("commit", asker)?;
            replica.commit().map(done)
        }
        Request::ExamineDevices { direct } => {
            replica.examine_devices(asker, direct).map(|device_bytes| Reply::Examined { device_bytes })
        }
        Request::SuspendDevices => {
            replica.suspend_devices(asker, fds.pop()).map(|carried| Reply::Suspended(carried.map(Box::new)))
        }
        Request::Dump(request) => match fds.pop() {
            Some(socket) => replica.dump(asker, &request, socket).map(done),
            None => Err(Error::Malformed {
                what: "dump",
                value: "no descriptor".into(),
                expected: "the page server's socket",
            }),
        },
        Request::GiveUpDump => {
            replica.give_up_dump();
            Ok(Reply::Done)
        }
        Request::ReleaseDump => replica.release_dump().map(done),
        Request::Freeze => replica.freeze(asker).map(done),
        Request::Thaw => replica.thaw(asker).map(done),
        Request::Drain(resume) => replica.drain(asker, resume).map(done),
        Request::Resumed { whole } => replica.resumed(asker.id, whole).map(done),
        Request::Pause { lock_timeout_ms } => replica.pause(asker, wait(lock_timeout_ms)).map(Reply::Paused),
        Request::Wake => replica.wake(asker).map(Reply::Woken),
        Request::Exec(request) => replica.exec(asker, &request, fds).map(Reply::Exec),
        // To a command that has just ended; its answer is on the way.
        Request::Signal { .. } => Err(Error::Abandoned { operation: "signal" }),
        Request::Stop { timeout_ms } => replica.stop(asker, wait(timeout_ms)).map(Reply::Exit),
        Request::Kill { reason } => Ok(Reply::Exit(replica.kill(asker, reason))),
        Request::Wait => replica.await_end(asker).map(Reply::Exit),
        Request::Status => replica.status().map(|record| Reply::Status(Box::new(record))),
        Request::Dial { .. } => unreachable!("answered by the caller, because it carries a descriptor"),
    }
}

fn dial(replica: &Replica, port: u16, timeout_ms: u64) -> Result<OwnedFd, Error> {
    let parts = replica.parts("dial")?;
    let timeout = Duration::from_millis(timeout_ms.max(1));
    let socket = parts.network.dial(port, timeout).context("connect to", format_args!("port {port}"))?;
    Ok(socket.into())
}

fn failed(error: &Error) -> Reply {
    Reply::Failed { class: error.class(), error: remote(error) }
}

impl Replica {
    /// Gives clients that wait for the end time to read it.
    pub(super) fn last_answers(&self) {
        self.wait_until(Some(LAST_ANSWERS), |inner| inner.asking == 0);
    }
}
