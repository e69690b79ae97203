//! A worker: reads one store, checks and decodes, and writes into the keeper's memory.
//!
//! It has no capability and no right to any file. Where its store is a folder, it asks the keeper for each file.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rewarm_report::Class;
use rewarm_store::{Digest, Fetched, Files, Found, Reference, Snapshot, Store, StoreUrl, Target};
use rewarm_sys::priority::{Priority, set_this_thread};
use rewarm_sys::shared::Writer;
use tokio::sync::OnceCell;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::access::Access;
use crate::error::Failure;
use crate::fill::{Fill, Word};
use crate::kept::{KeptPacks, Opener};
use crate::layout::Layout;
use crate::protocol::{self, Extent, FromWorker, ToWorker, memory_file};

/// The number under which a worker finds its socket to the keeper.
pub(crate) const SOCKET_FD: i32 = 3;

/// How nice a worker is.
const NICE: i32 = 5;

/// Longest object that is handed over as a file: the limit of the store's format for a boot object.
pub(crate) const OBJECT_BYTES_MAX: u64 = 256 << 20;

/// The hidden verb `fetcher --worker`: serves one store until the keeper closes the socket. Gives the exit code.
#[must_use]
pub fn main() -> u8 {
    match run() {
        Ok(()) => 0,
        Err(error) => {
            tracing::error!(%error, "the fetcher's worker failed");
            1
        }
    }
}

fn run() -> io::Result<()> {
    // The user was changed by the keeper; exec has made the process dumpable again.
    nix::sys::prctl::set_no_new_privs()?;
    nix::sys::prctl::set_dumpable(false)?;
    // A restored server that has something to do goes first: what it waits for is worked on all the same.
    rewarm_sys::priority::be_nicer(NICE)?;
    let socket = UnixStream::from(rewarm_sys::process::take_inherited(SOCKET_FD)?);
    let Some((ToWorker::Serve { access, later }, _)) = protocol::receive(&socket)? else {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the keeper's first word is not the store"));
    };
    if later {
        set_this_thread(Priority::Idle)?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let line = Arc::new(Line::new(socket));
    let kept = Arc::new(KeptPacks::new(line.clone()));
    let worker = Arc::new(Worker { access, line, kept, store: OnceCell::new(), fills: Mutex::default() });
    while let Some((message, fds)) = protocol::receive(&worker.line.socket)? {
        worker.take(message, fds, runtime.handle());
    }
    // Nobody is left who would read what is still being fetched.
    runtime.shutdown_background();
    Ok(())
}

/// The socket to the keeper and the questions that wait for its answers.
#[derive(Debug)]
struct Line {
    socket: UnixStream,
    sending: Mutex<()>,
    next: AtomicU64,
    asked: Mutex<HashMap<u64, Sender<Answer>>>,
}

/// What the keeper answered to a question about files.
#[derive(Debug)]
enum Answer {
    Opened(io::Result<OwnedFd>),
    Listed(io::Result<Vec<(String, u64)>>),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Line {
    fn new(socket: UnixStream) -> Self {
        Self { socket, sending: Mutex::default(), next: AtomicU64::new(1), asked: Mutex::default() }
    }

    fn tell(&self, message: &FromWorker, file: Option<&OwnedFd>) {
        let _turn = lock(&self.sending);
        let fds: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
        // A keeper that is gone closes the socket, which ends this process.
        let _ = protocol::send(&self.socket, message, &fds);
    }

    fn ask(&self, question: impl FnOnce(u64) -> FromWorker) -> io::Result<Answer> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = channel();
        lock(&self.asked).insert(id, sender);
        self.tell(&question(id), None);
        receiver.recv().map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn answered(&self, id: u64, answer: Answer) {
        if let Some(asked) = lock(&self.asked).remove(&id) {
            // Whoever asked has given up waiting.
            let _ = asked.send(answer);
        }
    }
}

impl Opener for Line {
    fn open(&self, name: String, bytes: u64) -> io::Result<File> {
        match self.ask(|id| FromWorker::Pack { id, name, bytes })? {
            Answer::Opened(file) => file.map(File::from),
            Answer::Listed(_) => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn note(&self, trouble: String) {
        self.tell(&FromWorker::NotKept { trouble }, None);
    }
}

/// The store's folder, opened by the keeper.
#[derive(Debug)]
struct Remote(Arc<Line>);

impl Files for Remote {
    fn open(&self, path: &str) -> io::Result<File> {
        match self.0.ask(|id| FromWorker::Open { id, path: path.to_owned() })? {
            Answer::Opened(file) => file.map(File::from),
            Answer::Listed(_) => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn list(&self, folder: &str) -> io::Result<Vec<(String, u64)>> {
        match self.0.ask(|id| FromWorker::List { id, folder: folder.to_owned() })? {
            Answer::Listed(files) => files,
            Answer::Opened(_) => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

struct Worker {
    access: Access,
    line: Arc<Line>,
    /// What is on disk of the packs of a store that lies behind a network.
    kept: Arc<KeptPacks>,
    /// Made when it is first needed, and kept for its connections.
    store: OnceCell<Store>,
    /// Where a running fill hears who waits for what.
    fills: Mutex<HashMap<u64, UnboundedSender<Word>>>,
}

impl Worker {
    fn take(self: &Arc<Self>, message: ToWorker, fds: Vec<OwnedFd>, runtime: &tokio::runtime::Handle) {
        match message {
            ToWorker::Serve { .. } => {}
            ToWorker::Opened { id, errno } => {
                let file = fds.into_iter().next();
                let opened = result(errno, file.ok_or_else(|| io::ErrorKind::InvalidData.into()));
                self.line.answered(id, Answer::Opened(opened));
            }
            ToWorker::Listed { id, files, errno } => {
                self.line.answered(id, Answer::Listed(result(errno, Ok(files))));
            }
            ToWorker::Want { fill, block } => self.word(fill, Word::Want(block)),
            ToWorker::Stop { fill } => self.word(fill, Word::Stop),
            ToWorker::Find { id, name, target } => {
                let worker = self.clone();
                runtime.spawn(async move {
                    let found = worker.find(id, &name, &target).await;
                    worker.answer(id, found);
                });
            }
            ToWorker::Boot { id, digest } => {
                let worker = self.clone();
                runtime.spawn(async move {
                    let booted = worker.boot(id, digest, &fds).await;
                    worker.answer(id, booted);
                });
            }
            ToWorker::Save { id, digest, set } => {
                let worker = self.clone();
                runtime.spawn(async move {
                    let saved = match worker.store().await {
                        Ok(store) => {
                            store.put_working_set(&digest, &set).await.map_err(|e| Failure::of_store(&e))
                        }
                        Err(failure) => Err(failure),
                    };
                    worker.answer(id, saved.map(|_| (FromWorker::Saved { id }, None)));
                });
            }
            ToWorker::Fill { id, digest, first, patience_ms, ahead } => {
                let worker = self.clone();
                let (words, hear) = unbounded_channel();
                lock(&self.fills).insert(id, words);
                runtime.spawn(async move {
                    let patience = Duration::from_millis(patience_ms);
                    let filled = worker.fill(digest, fds, (first, ahead), hear, patience).await;
                    lock(&worker.fills).remove(&id);
                    let kept = filled.as_ref().ok().filter(|_| ahead.is_none());
                    let kept = kept.map(|(_, writer)| writer.clone());
                    let filled = filled.map(|(Fetched { read_bytes, checked_bytes, .. }, _)| {
                        (FromWorker::Filled { id, read_bytes, checked_bytes }, None)
                    });
                    worker.answer(id, filled);
                    kept.into_iter().for_each(join_pages);
                });
            }
        }
    }

    fn word(&self, fill: u64, word: Word) {
        if let Some(words) = lock(&self.fills).get(&fill) {
            // It has just ended: nothing waits any more.
            let _ = words.send(word);
        }
    }

    fn answer(&self, id: u64, answer: Result<(FromWorker, Option<OwnedFd>), Failure>) {
        match answer {
            Ok((message, file)) => self.line.tell(&message, file.as_ref()),
            Err(failure) => self.line.tell(&FromWorker::Failed { id, failure }, None),
        }
    }

    async fn store(&self) -> Result<&Store, Failure> {
        self.store.get_or_try_init(|| self.open()).await
    }

    async fn open(&self) -> Result<Store, Failure> {
        let url: StoreUrl = self.access.url().map_err(|error| Failure::of_store(&error))?;
        let store = if url.folder().is_some() {
            let (files, shown) = (Arc::new(Remote(self.line.clone())), self.access.shown().to_owned());
            let opened = tokio::task::spawn_blocking(move || Store::from_files(files, &shown));
            opened.await.expect("opening a folder does not panic")
        } else {
            Store::open(&url).await.map(|store| store.cached(self.kept.clone()))
        };
        store.map_err(|error| Failure::of_store(&error))
    }

    async fn find(
        &self,
        id: u64,
        name: &str,
        target: &str,
    ) -> Result<(FromWorker, Option<OwnedFd>), Failure> {
        let store = self.store().await?;
        let failure = |error| Failure::of_store(&error);
        let target = match target.parse::<Digest>() {
            Ok(digest) => Target::Digest(digest),
            Err(_) => Target::Tag(target.to_owned()),
        };
        let url = self.access.url().map_err(failure)?;
        let reference = Reference { store: url, name: name.parse().map_err(failure)?, target };
        let found = store.find(&reference).await.map_err(failure)?;
        let manifests = found.iter().map(|found| (found.digest, found.bytes.len() as u64)).collect();
        let all: Vec<u8> = found.iter().flat_map(|found| found.bytes.iter().copied()).collect();
        let file = memory_file(&all).map_err(|error| Failure::of(&error, Class::Failed))?;
        Ok((FromWorker::Found { id, manifests }, Some(file)))
    }

    async fn snapshot(&self, digest: Digest, manifest: Option<&OwnedFd>) -> Result<Snapshot, Failure> {
        let bytes = object(manifest)?;
        let found = Found { digest, bytes: bytes.into() };
        Snapshot::decode(self.store().await?, &found).map_err(|error| Failure::of_store(&error))
    }

    async fn boot(
        &self,
        id: u64,
        digest: Digest,
        fds: &[OwnedFd],
    ) -> Result<(FromWorker, Option<OwnedFd>), Failure> {
        let failure = |error| Failure::of_store(&error);
        let snapshot = self.snapshot(digest, fds.first()).await?;
        let store = self.store().await?;
        let (bytes, set) = tokio::join!(snapshot.boot_bytes(), store.working_set(&digest));
        // Without it a restore is slower, that is all.
        let working_set = set.unwrap_or_else(|error| {
            tracing::warn!(%error, "the working set cannot be read");
            None
        });
        let bytes = bytes.map_err(failure)?;
        let boot = snapshot.decode_boot(&bytes).await.map_err(failure)?;
        let regions = boot.regions().iter().map(|region| region.bytes).collect();
        let file = memory_file(&bytes).map_err(|error| Failure::of(&error, Class::Failed))?;
        Ok((FromWorker::Booted { id, regions, working_set }, Some(file)))
    }

    async fn fill(
        &self,
        digest: Digest,
        fds: Vec<OwnedFd>,
        (first, ahead): (Vec<Extent>, Option<u64>),
        hear: UnboundedReceiver<Word>,
        patience: Duration,
    ) -> Result<(Fetched, Arc<Writer>), Failure> {
        let system = |error: io::Error| Failure::of(&error, Class::Failed);
        let snapshot = self.snapshot(digest, fds.first()).await?;
        let boot =
            snapshot.decode_boot(&object(fds.get(1))?).await.map_err(|error| Failure::of_store(&error))?;
        let lengths: Vec<u64> = boot.regions().iter().map(|region| region.bytes).collect();
        let missing = || system(io::ErrorKind::InvalidData.into());
        let layout = Layout::of(&lengths).ok_or_else(missing)?;
        let mut rest = fds.into_iter().skip(2);
        let (Some(content), Some(table)) = (rest.next(), rest.next()) else { return Err(missing()) };
        let writer = Writer::open(content, table, layout.regions(), ahead.is_some()).map_err(system)?;
        let writer = Arc::new(writer);
        self.kept.begin();
        let near = self.access.url().is_ok_and(|url| url.folder().is_some());
        let fill = Fill::new(boot, layout, writer.clone(), &first, ahead, near).await?;
        Ok((fill.run(hear, patience).await?, writer))
    }
}

/// What stays is laid into huge pages, in time that nobody else wants: each restore of it is sooner by a fault for every few
/// pages.
fn join_pages(writer: Arc<Writer>) {
    let work = move || {
        if set_this_thread(Priority::Idle).is_ok() {
            let bytes = writer.join_pages();
            tracing::debug!(bytes, "laid into huge pages");
        }
    };
    // Without the thread restores are slower, that is all.
    let _ = std::thread::Builder::new().name("join".to_owned()).spawn(work);
}

fn object(file: Option<&OwnedFd>) -> Result<Vec<u8>, Failure> {
    let read = file.ok_or_else(|| io::ErrorKind::InvalidData.into());
    let read = read.and_then(|file| protocol::contents(file, OBJECT_BYTES_MAX));
    read.map_err(|error| Failure::of(&error, Class::Failed))
}

fn result<T>(errno: Option<i32>, value: io::Result<T>) -> io::Result<T> {
    match errno {
        Some(errno) => Err(io::Error::from_raw_os_error(errno)),
        None => value,
    }
}
