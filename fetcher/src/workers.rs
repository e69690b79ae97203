//! The keeper's side of its workers: starting one, asking it, opening files for it, and noticing its death.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::access::Access;
use crate::broker::Broker;
use crate::disk::Disk;
use crate::protocol::{self, FromWorker, ToWorker};
use crate::worker::SOCKET_FD;

/// A worker that has had nothing to do for so long is ended, and its credentials with it.
const IDLE: Duration = Duration::from_secs(20);

/// What a worker answered, with the file that came along.
pub(crate) type Answer = (FromWorker, Option<OwnedFd>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A child of the keeper that reads one store.
#[derive(Debug)]
pub(crate) struct Worker {
    socket: UnixStream,
    sending: Mutex<()>,
    next: AtomicU64,
    asked: Mutex<HashMap<u64, Sender<Answer>>>,
    dead: AtomicBool,
    used: Mutex<Instant>,
}

/// What the keeper opens for a worker.
#[derive(Debug)]
struct Reach {
    /// The store, where it is a folder.
    folder: Option<Broker>,
    /// What is kept on disk, where anything is.
    disk: Option<Arc<Disk>>,
}

/// A question under way.
#[derive(Debug)]
pub(crate) struct Asked {
    /// Its number.
    pub(crate) id: u64,
    answer: Receiver<Answer>,
}

impl Asked {
    /// Waits for the answer; `None` if the worker died before.
    pub(crate) fn wait(self) -> Option<Answer> {
        self.answer.recv().ok()
    }
}

impl Worker {
    fn start(access: &Access, disk: Option<Arc<Disk>>, later: bool) -> io::Result<Arc<Self>> {
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = Command::new("/proc/self/exe");
        command.args(["fetcher", "--worker"]).current_dir("/").stdin(Stdio::null());
        command.env_clear().envs(access.env().iter().map(|(name, value)| (name, value)));
        rewarm_sys::process::inherit(&mut command, vec![(theirs.into(), SOCKET_FD)])?;
        let mut child = command.spawn()?;
        drop(command);
        let worker = Arc::new(Self {
            socket: ours,
            sending: Mutex::default(),
            next: AtomicU64::new(1),
            asked: Mutex::default(),
            dead: AtomicBool::new(false),
            used: Mutex::new(Instant::now()),
        });
        worker.tell(&ToWorker::Serve { access: access.clone(), later }, &[]);
        let folder = access.url().ok().and_then(|url| url.folder().map(Broker::new));
        let listening = worker.clone();
        std::thread::Builder::new().name("worker".to_owned()).spawn(move || {
            listening.listen(&Reach { folder, disk });
            listening.dead.store(true, Ordering::Release);
            // Whoever waits for an answer hears that there is none.
            lock(&listening.asked).clear();
            let _ = child.kill();
            let status = child.wait();
            tracing::info!(?status, "a worker has ended");
        })?;
        Ok(worker)
    }

    fn listen(&self, reach: &Reach) {
        loop {
            match protocol::receive::<FromWorker>(&self.socket) {
                Ok(Some((message, fds))) => self.take(message, fds.into_iter().next(), reach),
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(%error, "a worker sent nonsense");
                    return;
                }
            }
        }
    }

    fn take(&self, message: FromWorker, file: Option<OwnedFd>, reach: &Reach) {
        let folder = reach.folder.as_ref();
        let missing = || io::Error::from_raw_os_error(nix::libc::EACCES);
        match message {
            FromWorker::Open { id, path } => {
                self.opened(id, folder.ok_or_else(missing).and_then(|folder| folder.open(&path)));
            }
            FromWorker::Pack { id, name, bytes } => {
                let disk = reach.disk.as_ref().ok_or_else(missing);
                self.opened(id, disk.and_then(|disk| disk.open(&name, bytes)));
            }
            FromWorker::NotKept { trouble } => {
                if let Some(disk) = &reach.disk {
                    disk.note(trouble);
                }
            }
            FromWorker::List { id, folder: path } => {
                let answer = match folder.ok_or_else(missing).and_then(|folder| folder.list(&path)) {
                    Ok(files) => ToWorker::Listed { id, files, errno: None },
                    Err(error) => ToWorker::Listed { id, files: Vec::new(), errno: Some(errno(&error)) },
                };
                self.tell(&answer, &[]);
            }
            FromWorker::Found { id, .. }
            | FromWorker::Booted { id, .. }
            | FromWorker::Saved { id }
            | FromWorker::Filled { id, .. }
            | FromWorker::Failed { id, .. } => {
                *lock(&self.used) = Instant::now();
                if let Some(asked) = lock(&self.asked).remove(&id) {
                    // Whoever asked has given up waiting.
                    let _ = asked.send((message, file));
                }
            }
        }
    }

    fn opened(&self, id: u64, file: io::Result<OwnedFd>) {
        match file {
            Ok(file) => self.tell(&ToWorker::Opened { id, errno: None }, &[file.as_fd()]),
            Err(error) => self.tell(&ToWorker::Opened { id, errno: Some(errno(&error)) }, &[]),
        }
    }

    /// Tells it something. A worker that cannot be told is dead, which its thread notices.
    pub(crate) fn tell(&self, message: &ToWorker, fds: &[BorrowedFd<'_>]) {
        let _turn = lock(&self.sending);
        if let Err(error) = protocol::send(&self.socket, message, fds) {
            tracing::info!(%error, "a worker cannot be told");
            self.end();
        }
    }

    /// Ends it; whoever waits for an answer hears that there is none.
    pub(crate) fn end(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// Asks it something.
    pub(crate) fn ask(&self, question: impl FnOnce(u64) -> ToWorker, fds: &[BorrowedFd<'_>]) -> Asked {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = channel();
        lock(&self.asked).insert(id, sender);
        *lock(&self.used) = Instant::now();
        self.tell(&question(id), fds);
        if self.dead.load(Ordering::Acquire) {
            // It died before the question was noted: nobody else would take it out.
            lock(&self.asked).remove(&id);
        }
        Asked { id, answer }
    }

    fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    fn is_idle(&self) -> bool {
        lock(&self.asked).is_empty() && lock(&self.used).elapsed() > IDLE
    }
}

/// All workers, by what they read.
#[derive(Debug)]
pub(crate) struct Workers {
    all: Mutex<HashMap<Access, Arc<Worker>>>,
    /// Those that do what nobody waits for.
    later: Mutex<Vec<Arc<Worker>>>,
    disk: Option<Arc<Disk>>,
}

impl Workers {
    /// None yet; what is fetched over a network is kept in `disk`.
    pub(crate) fn new(disk: Option<Arc<Disk>>) -> Self {
        Self { all: Mutex::default(), later: Mutex::default(), disk }
    }

    /// The worker of a store, started if there is none.
    pub(crate) fn of(&self, access: &Access) -> io::Result<Arc<Worker>> {
        let mut workers = lock(&self.all);
        workers.retain(|_, worker| !worker.is_dead());
        if let Some(worker) = workers.get(access) {
            return Ok(worker.clone());
        }
        let worker = Worker::start(access, self.disk.clone(), false)?;
        workers.insert(access.clone(), worker.clone());
        Ok(worker)
    }

    /// A worker of its own that runs only where nobody else wants the processors.
    pub(crate) fn for_later(&self, access: &Access) -> io::Result<Arc<Worker>> {
        let worker = Worker::start(access, self.disk.clone(), true)?;
        lock(&self.later).push(worker.clone());
        Ok(worker)
    }

    /// Ends those that have had nothing to do for a while.
    pub(crate) fn end_idle(&self) {
        let keeps = |worker: &Worker| {
            let keep = !worker.is_dead() && !worker.is_idle();
            if !keep {
                worker.end();
            }
            keep
        };
        lock(&self.all).retain(|_, worker| keeps(worker));
        lock(&self.later).retain(|worker| keeps(worker));
    }
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(match error.kind() {
        io::ErrorKind::NotFound => nix::libc::ENOENT,
        _ => nix::libc::EINVAL,
    })
}
