//! The listening side of CRIU's lazy-pages protocol.
//!
//! CRIU, told to restore lazily, connects to `lazy-pages.socket` in its work directory. For each live task it sends the
//! pid and one userfaultfd, for each zombie the pid alone, at last the word that the restore is finished; nothing is
//! ever answered. [`Listener`] must exist before the restore starts, else the restore fails at once.
//!
//! ```text
//! pid > 0      4 bytes, then 1 byte that carries the userfaultfd
//! pid < 0      4 bytes: a zombie, no memory
//! 0x52535446   4 bytes: the tasks are about to run; then the connection ends
//! ```
//!
//! Faults can come before the last word and must be answered, or the restore hangs. A userfaultfd arrives before its
//! ranges are registered: filling fails with ENOENT until then.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rewarm_sys::fdpass;

use crate::Error;

/// Name that CRIU connects to.
const SOCKET: &str = "lazy-pages.socket";
/// Sent in the place of a pid when the tasks are about to run.
const FINISHED: i32 = 0x5253_5446;

/// What CRIU says.
#[derive(Debug)]
pub enum Message {
    /// A task and the userfaultfd of its memory.
    Task {
        /// Pid inside its pid namespace.
        pid: u32,
        /// Made by the task, non-blocking, with fork, remap, remove and unmap events.
        uffd: OwnedFd,
    },
    /// A task without memory.
    Zombie {
        /// Pid inside its pid namespace.
        pid: u32,
    },
    /// The tasks are about to run. Nothing comes after it.
    Finished,
}

/// Why messages cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The connection ended before the last word: the restore failed.
    #[error("connection closed after {tasks} tasks, before the restore was finished")]
    ClosedEarly {
        /// Tasks that had been announced.
        tasks: usize,
    },
    /// Nothing arrived within the timeout.
    #[error("nothing arrived before the deadline, after {tasks} tasks")]
    Deadline {
        /// Tasks that had been announced.
        tasks: usize,
    },
    /// A task came without its userfaultfd.
    #[error("task {pid} came with {fds} descriptors, expected 1")]
    Descriptors {
        /// Its pid.
        pid: i32,
        /// How many descriptors came.
        fds: usize,
    },
    /// The number is no pid.
    #[error("{word:#x} is neither a pid nor the last word")]
    Word {
        /// The number.
        word: i32,
    },
    /// Reading failed.
    #[error("connection failed after {tasks} tasks")]
    Stream {
        /// Tasks that had been announced.
        tasks: usize,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A socket at which CRIU finds the peer that fills memory. Who bound it removes its name in dropping it.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    bound: bool,
}

impl Listener {
    /// Binds the socket in CRIU's work directory, in the place of one that was left behind. The path may have any
    /// length: the socket is bound through a descriptor of the directory, whose name is short.
    ///
    /// # Errors
    /// [`Error::Io`] if the directory does not exist or the socket cannot be made.
    pub fn bind(work: &Path) -> crate::Result<Self> {
        let path = work.join(SOCKET);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io("remove", path)(error));
            }
            _ => {}
        }
        let directory = File::open(work).map_err(Error::io("open", work))?;
        let short = format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd());
        let socket = UnixListener::bind(short).map_err(Error::io("bind", &path))?;
        Ok(Self { socket, path, bound: true })
    }

    /// One that another process has bound in CRIU's work directory `work`, and removes.
    #[must_use]
    pub fn given(socket: OwnedFd, work: &Path) -> Self {
        Self { socket: socket.into(), path: work.join(SOCKET), bound: false }
    }

    /// Waits for CRIU, for ever; poll the descriptor for a deadline.
    ///
    /// # Errors
    /// [`Error::Io`] if the system refuses.
    pub fn accept(&self) -> crate::Result<Connection> {
        let (stream, _) = self.socket.accept().map_err(Error::io("accept at", &self.path))?;
        Ok(Connection { stream, tasks: 0 })
    }

    /// Makes [`Listener::accept`] fail with `WouldBlock` where it would wait.
    ///
    /// # Errors
    /// [`Error::Io`] if the system refuses.
    pub fn set_nonblocking(&self, nonblocking: bool) -> crate::Result<()> {
        self.socket.set_nonblocking(nonblocking).map_err(Error::io("set up", &self.path))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if self.bound {
            // The directory may be gone already, with the replica that it belonged to.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// CRIU's connection during one restore.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    tasks: usize,
}

impl Connection {
    /// Speaks over a stream that is connected already.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, tasks: 0 }
    }

    /// Gives up waiting for a message after this time. `None` waits for ever.
    ///
    /// # Errors
    /// [`Error::Io`] if the system refuses; a zero timeout is refused.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> crate::Result<()> {
        self.stream.set_read_timeout(timeout).map_err(Error::io("set up", SOCKET))
    }

    /// The next message. Do not call it again after [`Message::Finished`].
    ///
    /// # Errors
    /// [`Error::LazyPages`] if the connection ends early, stalls, or says what CRIU never says.
    pub fn message(&mut self) -> crate::Result<Message> {
        Ok(self.read()?)
    }

    fn read(&mut self) -> Result<Message, Fault> {
        // Exactly four bytes: the descriptor comes with the byte behind them, and a read beyond would lose it.
        let mut word = [0; 4];
        self.stream.read_exact(&mut word).map_err(|source| self.fault(source))?;
        let word = i32::from_le_bytes(word);
        if word == FINISHED {
            return Ok(Message::Finished);
        }
        self.tasks += 1;
        match word {
            1.. => self.task(word),
            i32::MIN..=-1 => Ok(Message::Zombie { pid: word.unsigned_abs() }),
            0 => Err(Fault::Word { word }),
        }
    }

    fn task(&mut self, pid: i32) -> Result<Message, Fault> {
        let mut byte = [0];
        let (bytes, mut fds) =
            fdpass::recv(&self.stream, &mut byte, 1).map_err(|source| self.fault(source))?;
        if bytes == 0 {
            return Err(Fault::ClosedEarly { tasks: self.tasks });
        }
        match (fds.pop(), fds.len()) {
            (Some(uffd), 0) => Ok(Message::Task { pid: pid.unsigned_abs(), uffd }),
            (last, more) => Err(Fault::Descriptors { pid, fds: more + usize::from(last.is_some()) }),
        }
    }

    fn fault(&self, source: io::Error) -> Fault {
        let tasks = self.tasks;
        match source.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => Fault::ClosedEarly { tasks },
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Fault::Deadline { tasks },
            _ => Fault::Stream { tasks, source },
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
