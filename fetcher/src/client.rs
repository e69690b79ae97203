//! The command's side: what a restore asks the fetcher. All calls block.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rewarm_store::{Boot, Digest, Reference, Snapshot, Store, Target, Trust, WorkingSet};
use rewarm_sys::shared::{Missing, Reader};
use serde::{Deserialize, Serialize};

use crate::access::Access;
use crate::disk::DiskStatus;
use crate::error::{Error, Failure, Result};
use crate::layout::{BLOCK_BYTES, Layout};
use crate::protocol::{self, Extent, Reply, Request, memory_file};
use crate::start::{self, Settings};
use crate::worker::OBJECT_BYTES_MAX;

/// Attempts to find a fetcher: one that ends for lack of work may be met in its last moment.
const ATTEMPTS: u32 = 3;

/// What the fetcher holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Process number of the keeper.
    pub pid: u32,
    /// Bytes that streams may take while nobody holds them.
    pub limit_bytes: u64,
    /// Whether that holds for those that are held, too.
    pub bounded: bool,
    /// Whether their memory has huge pages.
    pub huge_pages: bool,
    /// Bytes read from stores since it was started, for streams that are complete or were.
    pub read_bytes: u64,
    /// What is kept on disk, where anything is.
    pub disk: Option<DiskStatus>,
    /// The streams.
    pub streams: Vec<StreamStatus>,
}

/// A decoded stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamStatus {
    /// Digest of the snapshot's manifest.
    pub digest: String,
    /// The store that it came from.
    pub store: String,
    /// Bytes of memory that it takes when it is complete.
    pub bytes: u64,
    /// Bytes that have arrived.
    pub arrived_bytes: u64,
    /// Bytes that were read from the store for it.
    pub read_bytes: u64,
    /// Bytes of it that were hashed, and decoded where they were stored encoded.
    pub checked_bytes: u64,
    /// Whether it is complete.
    pub complete: bool,
    /// Connections that hold it: commands and pagers.
    pub holders: usize,
}

/// The fetcher of a state folder, by way of one connection for each stream.
#[derive(Debug, Clone)]
pub struct Fetcher {
    settings: Settings,
}

/// A manifest object that a reference means, decoded and checked.
#[derive(Debug, Clone)]
pub struct Found {
    /// The snapshot. Its store holds nothing: content comes from the fetcher.
    pub snapshot: Snapshot,
    object: rewarm_store::Found,
}

impl Fetcher {
    /// The fetcher that `settings` describe. Nothing is started yet.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { settings }
    }

    /// Asks for the manifests that a reference means, the newest first. Where `trust` is given, each must be signed by one
    /// of its keys; that is checked here and not by the fetcher.
    ///
    /// # Errors
    /// What the store says, a missing signature, and [`Error::Start`] if no fetcher can be had.
    pub fn find(&self, access: &Access, reference: &Reference, trust: Option<Trust>) -> Result<Vec<Found>> {
        let target = match &reference.target {
            Target::Tag(tag) => tag.clone(),
            Target::Digest(digest) => digest.to_string(),
        };
        let name = reference.name.to_string();
        let request = Request::Find { access: access.clone(), name, target };
        let (reply, mut files) = self.connect()?.ask("find a snapshot", &request, &[])?;
        let (Reply::Found { manifests }, Some(file)) = (&reply, files.pop()) else {
            return Err(unexpected("find a snapshot", &reply));
        };
        let all = protocol::contents(&file, OBJECT_BYTES_MAX);
        let all = all.map_err(|source| Error::Gone { request: "hand over manifests", source })?;
        let mut store = Store::nowhere(access.shown());
        if let Some(trust) = trust {
            store = store.requiring(trust);
        }
        let mut rest = &all[..];
        let mut found = Vec::new();
        for &(digest, length) in manifests {
            let split = usize::try_from(length).ok().and_then(|length| rest.split_at_checked(length));
            let Some((bytes, after)) = split else { return Err(unexpected("find a snapshot", &reply)) };
            rest = after;
            let object = rewarm_store::Found { digest, bytes: bytes.to_vec().into() };
            let snapshot = Snapshot::decode(&store, &object).map_err(|error| Failure::of_store(&error))?;
            found.push(Found { snapshot, object });
        }
        Ok(found)
    }

    /// A lease on the decoded stream of a snapshot. Nothing is fetched but the boot object, until [`Stream::begin`].
    /// A store that fails later is asked again until nothing has arrived for `patience`.
    ///
    /// # Errors
    /// What the store says.
    pub fn open(&self, access: &Access, found: &Found, patience: Duration) -> Result<Stream> {
        const REQUEST: &str = "open a snapshot";
        let gone = |source| Error::Gone { request: REQUEST, source };
        let connection = self.connect()?;
        let manifest = memory_file(&found.object.bytes).map_err(gone)?;
        let request = Request::Open {
            access: access.clone(),
            digest: found.object.digest,
            patience_ms: u64::try_from(patience.as_millis()).unwrap_or(u64::MAX),
        };
        let (reply, files) = connection.ask(REQUEST, &request, &[manifest.as_fd()])?;
        let (Reply::Opened { stream, regions, working_set, rate }, Ok([boot, content, table])) =
            (&reply, <[OwnedFd; 3]>::try_from(files))
        else {
            return Err(unexpected(REQUEST, &reply));
        };
        let layout = Layout::of(regions).ok_or_else(|| unexpected(REQUEST, &reply))?;
        let boot = protocol::contents(&boot, OBJECT_BYTES_MAX).map_err(gone)?;
        let files = [content.try_clone().map_err(gone)?, table.try_clone().map_err(gone)?];
        let reader = Reader::open(content, table).map_err(gone)?;
        if reader.content_bytes() != layout.bytes() || reader.block_bytes() != BLOCK_BYTES {
            return Err(unexpected(REQUEST, &reply));
        }
        Ok(Stream {
            fetcher: self.clone(),
            id: *stream,
            digest: found.object.digest,
            lease: Lease { connection: Arc::new(connection) },
            boot,
            layout,
            working_set: working_set.clone(),
            rate: *rate,
            reader,
            files,
        })
    }

    /// Has streams dropped that nobody holds, until so many bytes of memory are free.
    ///
    /// # Errors
    /// If no fetcher can be had.
    pub fn trim(&self, free_bytes: u64) -> Result<()> {
        self.connect()?.done("drop what is not needed", &Request::Trim { free_bytes })
    }

    /// Has everything dropped that nobody holds, in memory and on disk. False if no fetcher runs: then
    /// [`crate::disk::clear`] does it.
    ///
    /// # Errors
    /// If it does not answer as it should, or something cannot be removed.
    pub fn clear(state: &std::path::Path) -> Result<bool> {
        let Some(connection) = running(state)? else { return Ok(false) };
        connection.done("drop all that is kept", &Request::Clear)?;
        Ok(true)
    }

    /// What the fetcher holds; `None` if none runs.
    ///
    /// # Errors
    /// If it does not answer as it should.
    pub fn status(state: &std::path::Path) -> Result<Option<Status>> {
        let Some(connection) = running(state)? else { return Ok(None) };
        match connection.ask("tell its status", &Request::Status, &[])?.0 {
            Reply::Status(status) => Ok(Some(status)),
            other => Err(unexpected("tell its status", &other)),
        }
    }

    /// Keeps the fetcher here though nobody needs it, and so what it keeps in memory; starts one where none runs.
    ///
    /// # Errors
    /// If no fetcher can be had.
    pub fn stay(&self) -> Result<Presence> {
        Ok(Presence { _connection: self.connect()? })
    }

    fn connect(&self) -> Result<Connection> {
        let mut attempt = 1;
        loop {
            let connected = start::connect_or_start(&self.settings)
                .and_then(|socket| Connection::over(socket, self.settings.bound_bytes));
            match connected {
                Err(Error::Gone { .. }) if attempt < ATTEMPTS => attempt += 1,
                other => return other,
            }
        }
    }
}

/// A connection to the fetcher that runs. One that goes before it has greeted was just about to end for being idle.
fn running(state: &std::path::Path) -> Result<Option<Connection>> {
    let Ok(socket) = start::connect(state) else { return Ok(None) };
    match Connection::over(socket, None) {
        Err(Error::Gone { .. }) => Ok(None),
        other => other.map(Some),
    }
}

/// A snapshot's decoded stream as it arrives.
#[derive(Debug)]
pub struct Stream {
    fetcher: Fetcher,
    id: u64,
    digest: Digest,
    lease: Lease,
    boot: Vec<u8>,
    layout: Layout,
    working_set: Option<WorkingSet>,
    rate: Option<u64>,
    reader: Reader,
    files: [OwnedFd; 2],
}

impl Stream {
    /// The boot object, checked and decoded.
    ///
    /// # Errors
    /// If it is not what the manifest says.
    pub async fn boot(&self, found: &Found) -> Result<Boot> {
        let boot = found.snapshot.decode_boot(&self.boot).await.map_err(|error| Failure::of_store(&error))?;
        let lengths: Vec<u64> = boot.regions().iter().map(|region| region.bytes).collect();
        if Layout::of(&lengths).as_ref() == Some(&self.layout) {
            return Ok(boot);
        }
        Err(Error::Protocol { request: "open a snapshot", answer: "regions that are not its own".to_owned() })
    }

    /// Digest of the snapshot's manifest.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Where its regions lie.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What earlier restores touched first, if that is known.
    #[must_use]
    pub fn working_set(&self) -> Option<&WorkingSet> {
        self.working_set.as_ref()
    }

    /// Bytes of content that came from its store in a second when the last snapshot was fetched from there, if one was
    /// while this fetcher runs.
    #[must_use]
    pub fn usual_rate(&self) -> Option<u64> {
        self.rate
    }

    /// Tells what a restore touched first, for the next ones. `save`: have it written into the store too.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn remember(&self, set: WorkingSet, save: bool) -> Result<()> {
        self.lease.connection.done("remember a working set", &Request::Remember { set, save })
    }

    /// Its content as it arrives.
    #[must_use]
    pub fn reader(&self) -> &Reader {
        &self.reader
    }

    /// Content and table for [`Reader::open`] in another process, which can only read them.
    #[must_use]
    pub fn files(&self) -> [BorrowedFd<'_>; 2] {
        [self.files[0].as_fd(), self.files[1].as_fd()]
    }

    /// Has all of it fetched, these parts first and in this order. Has no effect if that has begun already. Where streams
    /// have a bound it waits until there is room.
    ///
    /// # Errors
    /// If the fetcher is gone, or the stream is longer than that bound.
    pub fn begin(&self, first: Vec<Extent>) -> Result<()> {
        self.lease.connection.done("fetch a snapshot", &Request::Begin { first, passing: false })
    }

    /// As [`Stream::begin`], where only one further lease will be asked for: what its holder [releases](Lease::release) is
    /// dropped, and not much is fetched ahead of it. A stream that others have opened too, or that is worth keeping, stays.
    ///
    /// # Errors
    /// If the fetcher is gone.
    pub fn begin_passing(&self, first: Vec<Extent>) -> Result<()> {
        self.lease.connection.done("fetch a snapshot", &Request::Begin { first, passing: true })
    }

    /// Why nothing more will arrive, if the fetcher is gone and something is missing.
    #[must_use]
    pub fn lost(&self) -> Option<Error> {
        if self.lease.is_alive() {
            return None;
        }
        let missing = self.layout.blocks().find(|block| !self.reader.has_arrived(*block))?;
        Some(Error::Missing(Missing::Abandoned { block: missing }))
    }

    /// One more lease, for a process that goes on when this one has ended.
    ///
    /// # Errors
    /// If the fetcher is gone.
    pub fn lease(&self) -> Result<Lease> {
        let connection = self.fetcher.connect()?;
        connection.done("share a snapshot", &Request::Join { stream: self.id })?;
        Ok(Lease { connection: Arc::new(connection) })
    }

    /// As [`Lease::release`].
    pub fn release(&self, blocks: Range<u64>) {
        self.lease.release(blocks);
    }

    /// Waits for a block of the stream and gives its bytes.
    ///
    /// # Errors
    /// Why the stream was given up, or that the fetcher is gone.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn wait(&self, block: u64, limit: Duration) -> Result<&[u8]> {
        self.lease.wait(&self.reader, block, limit)
    }
}

/// Keeps a stream in the fetcher's memory.
#[derive(Debug, Clone)]
pub struct Lease {
    connection: Arc<Connection>,
}

impl Lease {
    /// A lease that another process has made.
    #[must_use]
    pub fn over(socket: OwnedFd) -> Self {
        Self { connection: Arc::new(Connection { socket: socket.into(), turn: Mutex::default() }) }
    }

    /// Whether the fetcher is still there.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(self.connection.socket.as_fd(), PollFlags::empty())];
        // A hang-up is always told.
        !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
    }

    /// Says that somebody waits for a block.
    pub fn want(&self, block: u64) {
        let _turn = self.connection.turn();
        // A fetcher that is gone is noticed by who waits.
        let _ = protocol::send(&self.connection.socket, &Request::Want { block }, &[]);
    }

    /// Says that nobody will ask for these blocks any more. Whether the fetcher drops them is its own affair.
    pub fn release(&self, blocks: Range<u64>) {
        let _turn = self.connection.turn();
        let request = Request::Release { block: blocks.start, count: blocks.end - blocks.start };
        // A fetcher that is gone has dropped them.
        let _ = protocol::send(&self.connection.socket, &request, &[]);
    }

    /// Waits for a block of the stream that this lease is on.
    ///
    /// # Errors
    /// Why the stream was given up, or that the fetcher is gone.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn wait<'a>(&self, reader: &'a Reader, block: u64, limit: Duration) -> Result<&'a [u8]> {
        self.wait_while(reader, block, limit, &|| true)
    }

    /// The same, as long as the block is wanted: it is asked a few times a second.
    ///
    /// # Errors
    /// As [`Lease::wait`], and where it is not wanted any more.
    ///
    /// # Panics
    /// As [`Lease::wait`].
    pub fn wait_while<'a>(
        &self,
        reader: &'a Reader,
        block: u64,
        limit: Duration,
        wanted: &dyn Fn() -> bool,
    ) -> Result<&'a [u8]> {
        reader.wait(block, limit, &|| wanted() && self.is_alive()).map_err(|missing| self.explain(missing))
    }

    fn explain(&self, missing: Missing) -> Error {
        if let Missing::Failed { .. } = missing
            && let Err(error @ Error::Store(_)) = self.connection.done("say why", &Request::Why)
        {
            return error;
        }
        Error::Missing(missing)
    }
}

impl AsFd for Lease {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.socket.as_fd()
    }
}

impl AsRawFd for Lease {
    fn as_raw_fd(&self) -> i32 {
        self.connection.socket.as_raw_fd()
    }
}

/// While it lives the fetcher does not end by itself. It holds none of its memory: what nobody needs goes when there is need for it.
#[derive(Debug)]
pub struct Presence {
    _connection: Connection,
}

#[derive(Debug)]
struct Connection {
    socket: UnixStream,
    turn: Mutex<()>,
}

impl Connection {
    fn over(socket: UnixStream, bound: Option<u64>) -> Result<Self> {
        let connection = Self { socket, turn: Mutex::default() };
        let hello = Request::Hello { version: protocol::VERSION, bound };
        match connection.ask("say hello", &hello, &[])?.0 {
            Reply::Hello { version: protocol::VERSION } => Ok(connection),
            other => Err(unexpected("say hello", &other)),
        }
    }

    fn turn(&self) -> std::sync::MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn done(&self, what: &'static str, request: &Request) -> Result<()> {
        match self.ask(what, request, &[])?.0 {
            Reply::Done => Ok(()),
            other => Err(unexpected(what, &other)),
        }
    }

    fn ask(
        &self,
        what: &'static str,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>)> {
        let gone = |source| Error::Gone { request: what, source };
        let _turn = self.turn();
        protocol::send(&self.socket, request, fds).map_err(gone)?;
        match protocol::receive(&self.socket).map_err(gone)? {
            Some((Reply::Failed(failure), _)) => Err(Error::Store(failure)),
            Some(answer) => Ok(answer),
            None => Err(gone(io::ErrorKind::UnexpectedEof.into())),
        }
    }
}

fn unexpected(request: &'static str, reply: &Reply) -> Error {
    Error::Protocol { request, answer: format!("{reply:?}") }
}

/// A snapshot's digest is what its stream is found by.
impl Found {
    /// Digest of the manifest object.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.object.digest
    }
}
