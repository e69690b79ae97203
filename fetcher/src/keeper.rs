//! The keeper: takes requests from root, holds the memory of decoded streams, and has workers fetch them.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rewarm_report::Class;
use rewarm_store::{Digest, WorkingSet};
use rewarm_sys::priority::{Priority, set_this_thread};
use rewarm_sys::shared::Owner;
use rewarm_sys::{confine, machine, process};

use crate::USER;
use crate::access::Access;
use crate::cache::{self, Entry};
use crate::client::{Status, StreamStatus};
use crate::disk::Disk;
use crate::error::Failure;
use crate::layout::{BLOCK_BYTES, Layout};
use crate::protocol::{self, Extent, FromWorker, Reply, Request, ToWorker};
use crate::start::{DISK_FD, FOLDER_FD, SOCKET_FD};
use crate::workers::{Worker, Workers};

mod later;

/// How often a worker may die without having brought a single block before the stream is given up.
const DEATHS_MAX: u32 = 20;
/// What is shorter says more about round trips than about the rate of a store.
const RATED_BYTES: u64 = 8 << 20;
/// So many bytes of a passing stream are held before its reader is done with any: what is decoded while CRIU works.
const AHEAD_BYTES: u64 = 256 << 20;
/// How often the keeper looks whether anybody still needs it.
const LOOK_AROUND: Duration = Duration::from_millis(250);

/// The hidden verb `fetcher`: serves until nobody has needed it for `idle`. `limit` bounds memory in bytes, `disk` what is
/// kept on disk. Gives the exit code. No thread may have been started yet.
#[must_use]
pub fn main(limit: u64, disk: u64, idle: Duration) -> u8 {
    match run(limit, disk, idle) {
        Ok(()) => 0,
        Err(error) => {
            tracing::error!(%error, "the fetcher failed");
            1
        }
    }
}

fn run(limit: u64, disk: u64, idle: Duration) -> io::Result<()> {
    let listener = UnixListener::from(process::take_inherited(SOCKET_FD)?);
    // Absent where the kernel gives no huge pages to a tmpfs.
    let folder = process::take_inherited(FOLDER_FD).ok();
    let disk =
        if disk > 0 { process::take_inherited(DISK_FD).ok().map(|fd| Disk::new(fd, disk)) } else { None };
    let disk = disk.map(Arc::new);
    confine::confine(USER, USER, Some(confine::READ_ANY_FILE))?;
    let keeper = Arc::new(Keeper {
        folder,
        workers: Workers::new(disk.clone()),
        disk,
        inner: Mutex::new(Inner { limit, ..Inner::default() }),
        changed: Condvar::new(),
        clock: AtomicU64::new(1),
        read_bytes: AtomicU64::new(0),
    });
    let accepting = keeper.clone();
    std::thread::Builder::new().name("accept".to_owned()).spawn(move || accept(&accepting, &listener))?;
    let mut needed = Instant::now();
    while needed.elapsed() < idle {
        std::thread::sleep(LOOK_AROUND.min(idle));
        keeper.workers.end_idle();
        if keeper.lock().clients > 0 {
            needed = Instant::now();
        }
    }
    Ok(())
}

fn accept(keeper: &Arc<Keeper>, listener: &UnixListener) {
    for socket in listener.incoming() {
        let Ok(socket) = socket else {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        keeper.lock().clients += 1;
        let serving = keeper.clone();
        let thread = std::thread::Builder::new().name("client".to_owned()).spawn(move || {
            if matches!(confine::peer_is_root(&socket), Ok(true)) {
                serving.serve(&socket);
            }
            serving.lock().clients -= 1;
        });
        if thread.is_err() {
            keeper.lock().clients -= 1;
        }
    }
}

/// One decoded stream.
#[derive(Debug)]
struct Stream {
    id: u64,
    digest: Digest,
    access: Access,
    patience_ms: u64,
    manifest: OwnedFd,
    boot: OwnedFd,
    regions: Vec<u64>,
    working_set: Mutex<Option<WorkingSet>>,
    owner: Owner,
    state: Mutex<Filling>,
    used: AtomicU64,
    /// Who decodes it while nobody wants it. Nobody gets it before it is complete.
    later: Option<Arc<Worker>>,
}

#[derive(Debug, Default)]
struct Filling {
    /// Connections that hold a lease.
    holders: usize,
    /// Restores that have opened it.
    restores: usize,
    /// Parts of it were dropped: nobody else can use it.
    released: bool,
    begun: bool,
    /// It need not stay: what its only reader is done with is dropped.
    passing: bool,
    /// It does not fit beside what is held: one restore has it for itself, and it may only pass.
    alone: bool,
    complete: bool,
    failure: Option<Failure>,
    /// Who fetches it, and the number of the fill there.
    worker: Option<(Arc<Worker>, u64)>,
    /// Bytes read from the store for it.
    read_bytes: u64,
    /// Bytes hashed, and decoded where they were encoded.
    checked_bytes: u64,
}

impl Stream {
    fn state(&self) -> MutexGuard<'_, Filling> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_all_arrived(&self) -> bool {
        self.owner.arrived_bytes() == self.regions.iter().sum::<u64>()
    }
}

impl Entry for Stream {
    /// What passes takes next to nothing beside the memory that it is put into.
    fn bytes(&self) -> u64 {
        let state = self.state();
        if state.released || state.alone { 0 } else { self.owner.content_bytes() }
    }

    fn is_held(&self) -> bool {
        self.state().holders > 0
    }

    fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }
}

#[derive(Debug, Default)]
struct Inner {
    streams: Vec<Arc<Stream>>,
    /// Bytes that streams may take.
    limit: u64,
    /// Also those that are held.
    bounded: bool,
    /// Content that came from a store in a second, the last time.
    rates: HashMap<Access, u64>,
    /// Digests whose stream is being made.
    opening: HashSet<Digest>,
    clients: usize,
}

impl Inner {
    /// Whether the content of a snapshot need not stay in memory while it is restored: the kernel holds the files of a folder
    /// already, and what stays is made when nobody waits ([`later`]). Where another restore of it is under way, more may follow.
    fn passes(&self, stream: &Stream) -> bool {
        let is_folder = stream.access.url().is_ok_and(|url| url.folder().is_some());
        let is_other = |other: &Stream| other.id != stream.id && other.digest == stream.digest;
        is_folder && !self.streams.iter().any(|other| is_other(other) && other.is_held())
    }
}

struct Keeper {
    folder: Option<OwnedFd>,
    workers: Workers,
    disk: Option<Arc<Disk>>,
    inner: Mutex<Inner>,
    changed: Condvar,
    clock: AtomicU64,
    read_bytes: AtomicU64,
}

/// An answer and the files that go along.
type Answer = (Reply, Vec<OwnedFd>);

/// The stream that a connection holds, until it is dropped.
struct Held {
    keeper: Arc<Keeper>,
    stream: Arc<Stream>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.keeper.let_go(&self.stream);
    }
}

impl Keeper {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(self: &Arc<Self>, socket: &UnixStream) {
        let mut held: Option<Held> = None;
        loop {
            let (request, fds) = match protocol::receive::<Request>(socket) {
                Ok(Some(request)) => request,
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(%error, "request");
                    return;
                }
            };
            match (&request, &held) {
                (Request::Want { block }, Some(held)) => want(&held.stream, *block),
                (Request::Release { block, count }, Some(held)) => {
                    self.release(&held.stream, *block, *count);
                }
                _ => {}
            }
            if matches!(request, Request::Want { .. } | Request::Release { .. }) {
                continue;
            }
            let (reply, files) = self
                .answer(request, fds, &mut held)
                .unwrap_or_else(|failure| (Reply::Failed(failure), Vec::new()));
            let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
            if protocol::send(socket, &reply, &fds).is_err() {
                return;
            }
        }
    }

    fn answer(
        self: &Arc<Self>,
        request: Request,
        fds: Vec<OwnedFd>,
        held: &mut Option<Held>,
    ) -> Result<Answer, Failure> {
        let done = Ok((Reply::Done, Vec::new()));
        match request {
            Request::Hello { bound, .. } => {
                if let Some(bytes) = bound {
                    self.bind(bytes);
                }
                Ok((Reply::Hello { version: protocol::VERSION }, Vec::new()))
            }
            Request::Find { access, name, target } => self.find(&access, &name, &target),
            Request::Open { access, digest, patience_ms } => {
                let manifest = fds.into_iter().next().ok_or_else(|| nonsense("open without a manifest"))?;
                let stream = self.open(access, digest, patience_ms, manifest)?;
                let rate = self.lock().rates.get(&stream.access).copied();
                let opened = opened(&stream, rate);
                *held = Some(Held { keeper: self.clone(), stream });
                opened
            }
            Request::Join { stream } => {
                let found = self.hold(|other| other.id == stream);
                let stream = found.ok_or_else(|| nonsense("no such stream"))?;
                *held = Some(Held { keeper: self.clone(), stream });
                done
            }
            Request::Begin { first, passing } => {
                let stream = &held.as_ref().ok_or_else(|| nonsense("no stream is open"))?.stream;
                if !passing {
                    self.await_room(stream)?;
                }
                let inner = self.lock();
                let mut state = stream.state();
                let begins = !std::mem::replace(&mut state.begun, true);
                state.passing |=
                    begins && passing && state.restores == 1 && (state.alone || inner.passes(stream));
                drop((state, inner));
                if begins {
                    let (keeper, stream) = (self.clone(), stream.clone());
                    let thread = std::thread::Builder::new().name("fill".to_owned());
                    thread.spawn(move || keeper.fill(&stream, &first)).map_err(|error| system(&error))?;
                }
                done
            }
            Request::Remember { set, save } => {
                let stream = &held.as_ref().ok_or_else(|| nonsense("no stream is open"))?.stream;
                if save {
                    let question = |id| ToWorker::Save { id, digest: stream.digest, set: set.clone() };
                    if let (FromWorker::Failed { failure, .. }, _) =
                        self.ask(&stream.access, question, &[])?
                    {
                        return Err(failure);
                    }
                }
                let next = WorkingSet { number: set.number + 1, ..set };
                *stream.working_set.lock().unwrap_or_else(PoisonError::into_inner) = Some(next);
                done
            }
            Request::Why => match held.as_ref().and_then(|held| held.stream.state().failure.clone()) {
                Some(failure) => Err(failure),
                None => done,
            },
            Request::Trim { free_bytes } => {
                self.trim(free_bytes);
                done
            }
            Request::Clear => {
                let gone = cache::make_room(&mut self.lock().streams, 0, 0);
                drop(gone);
                self.disk.as_ref().map_or(Ok(()), |disk| disk.clear()).map_err(|error| system(&error))?;
                done
            }
            Request::Status => Ok((Reply::Status(self.status()), Vec::new())),
            Request::Want { .. } | Request::Release { .. } => done,
        }
    }

    fn find(&self, access: &Access, name: &str, target: &str) -> Result<Answer, Failure> {
        let question = |id| ToWorker::Find { id, name: name.to_owned(), target: target.to_owned() };
        match self.ask(access, question, &[])? {
            (FromWorker::Found { manifests, .. }, Some(file)) => Ok((Reply::Found { manifests }, vec![file])),
            (FromWorker::Failed { failure, .. }, _) => Err(failure),
            _ => Err(nonsense("a worker's answer")),
        }
    }

    /// Asks the worker of a store, and the next one if it dies over the question.
    fn ask(
        &self,
        access: &Access,
        question: impl Fn(u64) -> ToWorker,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(FromWorker, Option<OwnedFd>), Failure> {
        for _ in 0..DEATHS_MAX {
            let worker = self.workers.of(access).map_err(|error| system(&error))?;
            if let Some(answer) = worker.ask(&question, fds).wait() {
                return Ok(answer);
            }
        }
        Err(died())
    }

    /// A lease on the stream of a snapshot, made if there is none.
    fn open(
        &self,
        access: Access,
        digest: Digest,
        patience_ms: u64,
        manifest: OwnedFd,
    ) -> Result<Arc<Stream>, Failure> {
        let mut inner = self.lock();
        loop {
            let usable = |stream: &Stream| {
                let state = stream.state();
                stream.digest == digest && !state.released && !state.alone && stream.is_usable(&state)
            };
            if let Some(stream) = self.hold_in(&inner, usable) {
                stream.state().restores += 1;
                return Ok(stream);
            }
            if inner.opening.insert(digest) {
                break;
            }
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.drop_later(&digest);
        drop(inner);
        let made = self.make(access, digest, patience_ms, manifest);
        let mut inner = self.lock();
        inner.opening.remove(&digest);
        self.changed.notify_all();
        let stream = Arc::new(made?);
        let (limit, bytes) = (inner.limit, stream.owner.content_bytes());
        // For what never fits, nothing has to go.
        let may_fit = !inner.bounded || bytes <= limit;
        let gone = if may_fit { cache::make_room(&mut inner.streams, limit, bytes) } else { Vec::new() };
        let alone = inner.bounded && !cache::fits(&inner.streams, limit, bytes);
        *stream.state() = Filling { holders: 1, restores: 1, alone, ..Filling::default() };
        inner.streams.push(stream.clone());
        drop(inner);
        drop(gone);
        Ok(stream)
    }

    /// From now on no more than this is taken, by what is held neither.
    fn bind(&self, bytes: u64) {
        let mut inner = self.lock();
        (inner.limit, inner.bounded) = (bytes, true);
        let gone = cache::make_room(&mut inner.streams, bytes, 0);
        self.changed.notify_all();
        drop(inner);
        drop(gone);
    }

    /// Waits until a stream that has to stay until all of it is in place fits beside what is held.
    fn await_room(&self, stream: &Stream) -> Result<(), Failure> {
        let (mut inner, bytes, mut gone) = (self.lock(), stream.owner.content_bytes(), Vec::new());
        while stream.state().alone {
            let limit = inner.limit;
            if bytes > limit {
                return Err(too_long(bytes, limit));
            }
            gone.extend(cache::make_room(&mut inner.streams, limit, bytes));
            if cache::fits(&inner.streams, limit, bytes) {
                stream.state().alone = false;
            } else {
                inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
            }
        }
        drop(inner);
        drop(gone);
        Ok(())
    }

    fn make(
        &self,
        access: Access,
        digest: Digest,
        patience_ms: u64,
        manifest: OwnedFd,
    ) -> Result<Stream, Failure> {
        let (regions, working_set, boot) =
            match self.ask(&access, |id| ToWorker::Boot { id, digest }, &[manifest.as_fd()])? {
                (FromWorker::Booted { regions, working_set, .. }, Some(boot)) => (regions, working_set, boot),
                (FromWorker::Failed { failure, .. }, _) => return Err(failure),
                _ => return Err(nonsense("a worker's answer")),
            };
        let layout = Layout::of(&regions).ok_or_else(|| nonsense("regions longer than any snapshot"))?;
        let folder = self.folder.as_ref().map(AsFd::as_fd);
        let owner = Owner::create(layout.bytes(), BLOCK_BYTES, folder).map_err(|error| system(&error))?;
        let (id, used) = (self.tick(), AtomicU64::new(self.tick()));
        let state = Mutex::default();
        let working_set = Mutex::new(working_set);
        Ok(Stream {
            id,
            digest,
            access,
            patience_ms,
            manifest,
            boot,
            regions,
            working_set,
            owner,
            state,
            used,
            later: None,
        })
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }

    fn hold(&self, which: impl Fn(&Stream) -> bool) -> Option<Arc<Stream>> {
        self.hold_in(&self.lock(), which)
    }

    fn hold_in(&self, inner: &Inner, which: impl Fn(&Stream) -> bool) -> Option<Arc<Stream>> {
        let stream = inner.streams.iter().find(|stream| which(stream) && stream.state().failure.is_none())?;
        stream.state().holders += 1;
        stream.used.store(self.tick(), Ordering::Relaxed);
        Some(stream.clone())
    }

    /// A lease ends. What nobody holds stays as far as the limit goes, unless it is not complete.
    fn let_go(self: &Arc<Self>, stream: &Arc<Stream>) {
        let mut inner = self.lock();
        let mut state = stream.state();
        state.holders -= 1;
        let (unheld, useless) = (state.holders == 0, !state.complete || state.released || state.alone);
        let has_passed = useless && state.passing && !state.alone && state.failure.is_none();
        let worker = state.worker.clone();
        drop(state);
        if unheld && useless {
            inner.streams.retain(|other| !Arc::ptr_eq(other, stream));
            if let Some((worker, fill)) = worker {
                worker.tell(&ToWorker::Stop { fill }, &[]);
            }
        }
        let limit = inner.limit;
        let gone = cache::make_room(&mut inner.streams, limit, 0);
        self.changed.notify_all();
        drop(inner);
        drop(gone);
        if unheld && has_passed && stream.has_all_arrived() {
            self.decode_later(stream.clone());
        }
    }

    /// Drops what the only reader of a passing stream is done with.
    fn release(&self, stream: &Arc<Stream>, block: u64, count: u64) {
        // Nobody opens it in between.
        let _inner = self.lock();
        let mut state = stream.state();
        if !state.passing || state.restores != 1 {
            return;
        }
        state.released = true;
        drop(state);
        if let Err(error) = stream.owner.release(block..block.saturating_add(count)) {
            tracing::debug!(stream = stream.id, %error, "memory is not given back");
        }
    }

    /// Drops streams that nobody holds until so much memory is free.
    fn trim(&self, free_bytes: u64) {
        loop {
            let free = machine::free_bytes().unwrap_or(u64::MAX);
            if free >= free_bytes {
                return;
            }
            let mut inner = self.lock();
            let total: u64 = inner.streams.iter().map(|stream| stream.bytes()).sum();
            let limit = total.saturating_sub((free_bytes - free).max(1));
            let gone = cache::make_room(&mut inner.streams, limit, 0);
            drop(inner);
            if gone.is_empty() {
                return;
            }
        }
    }

    /// Has a stream fetched, by one worker after another if they die.
    fn fill(&self, stream: &Arc<Stream>, first: &[Extent]) {
        let mut deaths = 0;
        loop {
            let (before, began) = (stream.owner.arrived_bytes(), Instant::now());
            let answer = match self.workers.of(&stream.access) {
                Ok(worker) => self.fill_by(&worker, stream, first),
                Err(error) => Some((FromWorker::Failed { id: 0, failure: system(&error) }, None)),
            };
            match answer {
                Some((FromWorker::Filled { read_bytes, checked_bytes, .. }, _)) => {
                    let bytes = stream.owner.arrived_bytes().saturating_sub(before);
                    let rate = bytes as f64 / began.elapsed().as_secs_f64().max(0.001);
                    if bytes >= RATED_BYTES {
                        self.lock().rates.insert(stream.access.clone(), rate as u64);
                    }
                    let mut state = stream.state();
                    state.complete = true;
                    state.worker = None;
                    state.read_bytes += read_bytes;
                    state.checked_bytes += checked_bytes;
                    self.read_bytes.fetch_add(read_bytes, Ordering::Relaxed);
                    drop(state);
                    // All of it has just arrived, so that servers want the processors; nobody waits for this, and this thread
                    // has nothing else to do. Where it stays as it is they only wait for it.
                    let _ = set_this_thread(Priority::Idle);
                    if let Err(error) = stream.owner.settle() {
                        tracing::debug!(stream = stream.id, %error, "memory is not given back");
                    }
                    return;
                }
                Some((FromWorker::Failed { failure, .. }, _)) => return self.give_up(stream, failure),
                Some(_) => return self.give_up(stream, nonsense("a worker's answer")),
                None if stream.state().holders == 0 => return,
                None => {
                    deaths = if stream.owner.arrived_bytes() > before { 1 } else { deaths + 1 };
                    tracing::warn!(stream = stream.id, deaths, "a worker died; another one goes on");
                    if deaths > DEATHS_MAX {
                        return self.give_up(stream, died());
                    }
                }
            }
        }
    }

    fn fill_by(
        &self,
        worker: &Arc<Worker>,
        stream: &Stream,
        first: &[Extent],
    ) -> Option<(FromWorker, Option<OwnedFd>)> {
        let [content, table] = stream.owner.files();
        let passing = stream.state().passing;
        if passing {
            stream.owner.pass();
        }
        let question = |id| ToWorker::Fill {
            id,
            digest: stream.digest,
            first: first.to_vec(),
            patience_ms: stream.patience_ms,
            ahead: passing.then_some(AHEAD_BYTES),
        };
        let asked = worker.ask(question, &[stream.manifest.as_fd(), stream.boot.as_fd(), content, table]);
        stream.state().worker = Some((worker.clone(), asked.id));
        asked.wait()
    }

    /// Nobody gets this stream any more, and who waits for it hears why.
    fn give_up(&self, stream: &Arc<Stream>, failure: Failure) {
        tracing::warn!(stream = stream.id, %failure, "a stream is given up");
        stream.state().failure = Some(failure);
        stream.owner.fail();
        self.lock().streams.retain(|other| !Arc::ptr_eq(other, stream));
    }

    fn status(&self) -> Status {
        let inner = self.lock();
        let one = |stream: &Arc<Stream>| {
            let state = stream.state();
            StreamStatus {
                digest: stream.digest.to_string(),
                store: stream.access.shown().to_owned(),
                bytes: stream.owner.content_bytes(),
                arrived_bytes: stream.owner.arrived_bytes(),
                read_bytes: state.read_bytes,
                checked_bytes: state.checked_bytes,
                complete: state.complete,
                holders: state.holders,
            }
        };
        Status {
            pid: std::process::id(),
            limit_bytes: inner.limit,
            bounded: inner.bounded,
            huge_pages: self.folder.is_some(),
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
            disk: self.disk.as_ref().and_then(|disk| disk.status().ok()),
            streams: inner.streams.iter().map(one).collect(),
        }
    }
}

fn opened(stream: &Stream, rate: Option<u64>) -> Result<Answer, Failure> {
    let copy = |fd: &OwnedFd| fd.try_clone();
    let [content, table] = stream.owner.for_reading().map_err(|error| system(&error))?;
    let boot = copy(&stream.boot).map_err(|error| system(&error))?;
    let working_set = stream.working_set.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let reply = Reply::Opened { stream: stream.id, regions: stream.regions.clone(), working_set, rate };
    Ok((reply, vec![boot, content, table]))
}

fn want(stream: &Stream, block: u64) {
    let worker = stream.state().worker.clone();
    if let Some((worker, fill)) = worker {
        worker.tell(&ToWorker::Want { fill, block }, &[]);
    }
}

fn system(error: &io::Error) -> Failure {
    Failure::of(error, Class::Failed)
}

fn nonsense(what: &str) -> Failure {
    Failure::of(&io::Error::other(format!("the fetcher cannot use {what}")), Class::Failed)
}

fn too_long(bytes: u64, limit: u64) -> Failure {
    let text = format!(
        "the snapshot's content takes {bytes} bytes while its device memory is put into place, and decoded snapshots may take {limit}: \
         raise cache in [serve]"
    );
    Failure::of(&io::Error::other(text), Class::Failed)
}

fn died() -> Failure {
    let text =
        "the processes that fetch from the store died again and again; see fetcher.log in the state folder";
    Failure::of(&io::Error::other(text), Class::Failed)
}
