//! What a command and a shim say to each other.
//!
//! One message is a length (u32, little endian) and that many bytes of JSON; descriptors travel with its first byte.
//! The client asks, the shim answers each request once, in order. The only message that a client may send while it waits
//! for an answer is [`Request::Signal`], to a running [`Request::Exec`]. The first request is [`Request::Hello`].
//!
//! A connection is also a lease: see [`crate::shim`].

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use rewarm_gpu::Pair;
use rewarm_gpu::carried::Carried;
use rewarm_probe::Resume;
use rewarm_report::{Class, Remote};
use rewarm_sys::fdpass;
use serde::{Deserialize, Serialize};

use crate::record::{Exit, Origin, Record};
use crate::spec::{Publish, Spec, User};

/// Version of this protocol; both sides must have the same.
pub const VERSION: u32 = 7;
/// Longest message in bytes. The largest are the captured output of a hook and a specification with a long environment.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// Most descriptors in one message.
pub const FDS_MAX: usize = 64;

/// Asks the shim to lay everything out for a replica, without starting anything.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prepare {
    /// What the replica is made of.
    pub spec: Spec,
    /// Cold or restored.
    pub origin: Origin,
    /// 0 for a cold start; the snapshot's generation and one for a restore.
    pub generation: u64,
    /// The CUDA driver will be called for it: the helper attaches to it meanwhile, which takes up to seconds.
    #[serde(default)]
    pub devices: bool,
}

/// What was laid out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prepared {
    /// The record as it was written down.
    pub record: Record,
    /// Published ports; a host port of 0 is replaced by the one that the kernel chose.
    pub published: Vec<Publish>,
}

/// Asks for a dump of a server that uses no device, or whose devices this connection has suspended. It goes on afterwards (or
/// stays frozen, if this connection froze it).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpRequest {
    /// The CRIU program.
    pub criu: PathBuf,
    /// Lines of CRIU's configuration file. The page server's socket is descriptor [`DumpRequest::SOCKET`].
    pub config: String,
    /// Dump established TCP connections.
    pub tcp_established: bool,
    /// Dump file locks.
    pub file_locks: bool,
    /// Give the dump up after this time, in milliseconds.
    pub timeout_ms: u64,
    /// Real user and group number of runc and CRIU, which stay root in effect: the kernel lets a process without
    /// CAP_SYS_RESOURCE read the limits of those processes only that belong to its real user and group.
    #[serde(default)]
    pub real_ids: Option<(u32, u32)>,
}

impl DumpRequest {
    /// The number under which CRIU finds the socket of the page server: the config file says `ps-socket 20`.
    pub const SOCKET: i32 = 20;
}

/// Asks for a restore into what was prepared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreRequest {
    /// The CRIU program.
    pub criu: PathBuf,
    /// Lines of CRIU's configuration file.
    pub config: String,
    /// Restore established TCP connections.
    pub tcp_established: bool,
    /// Restore file locks.
    pub file_locks: bool,
    /// Memory comes from a resident that listens on `lazy-pages.socket` in the work directory.
    pub lazy_pages: bool,
    /// The first descriptor of this request is a detached mount that holds the images.
    pub images_attached: bool,
    /// Children of the shim that the replica cannot do without, started beside runc: what CRIU connects to must be bound already.
    pub residents: Vec<ResidentRequest>,
    /// Give up after this time, in milliseconds.
    pub timeout_ms: u64,
    /// CRIU leaves the server stopped (`leave-stopped` in its configuration), and it may not be asked anything before a resident says
    /// that it may run.
    #[serde(default)]
    pub waits: bool,
    /// Threads, by their ids in the replica, in which the images block SIGCHLD until a server goes on that comes back stopped.
    #[serde(default)]
    pub unblock: Vec<u32>,
    /// Device state of the server, which CRIU leaves stopped in this case (`leave-stopped` in its configuration).
    #[serde(default)]
    pub device: Option<DeviceRequest>,
}

/// Device state that goes back to devices. Where it went past the processes, the last descriptor of the request is a socket from
/// which it comes, in the order of [`Carried::processes`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRequest {
    /// What the snapshot keeps.
    pub carried: Carried,
    /// Which device takes whose place; empty where all are the same.
    pub pairs: Vec<Pair>,
}

/// A child of the shim; see [`crate::shim::resident`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResidentRequest {
    /// What it is called in messages, for example `pager`.
    pub name: String,
    /// The program; the shim's own if absent.
    pub program: Option<PathBuf>,
    /// Its arguments.
    pub args: Vec<String>,
    /// How many of the request's descriptors it gets: from [`crate::shim::resident::FIRST_FD`] up, in order.
    pub fds: usize,
    /// How long it may take until it is ready, in milliseconds.
    pub ready_timeout_ms: u64,
}

/// Runs a command inside the replica.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// The command line.
    pub args: Vec<String>,
    /// Environment beside the replica's own, as `K=V`.
    pub env: Vec<String>,
    /// Working directory, if not the replica's own.
    pub workdir: Option<PathBuf>,
    /// Who runs it, if not the replica's own user; names are those of the replica's own `/etc/passwd`.
    pub user: Option<User>,
    /// Kill it after this time, in milliseconds.
    pub timeout_ms: Option<u64>,
    /// The request carries three descriptors for stdin, stdout and stderr; else the output is captured.
    pub stdio: bool,
}

/// What a command did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecOutput {
    /// Its exit code, or 128 and the signal that killed it.
    pub code: i32,
    /// It was killed because it took too long.
    pub timed_out: bool,
    /// The first [`ExecOutput::BYTES_MAX`] bytes of its standard output, unless it had descriptors of its own.
    pub stdout: String,
    /// The same of its standard error.
    pub stderr: String,
}

impl ExecOutput {
    /// How much of each stream is kept; the rest is read and dropped.
    pub const BYTES_MAX: usize = 256 << 10;
}

/// What a pause did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paused {
    /// Bytes of device memory that were moved to the host.
    pub device_bytes: u64,
    /// Time of the whole.
    pub took: Duration,
    /// Time of it within the driver.
    pub in_driver: Duration,
    /// How long waking will take, as far as is known.
    pub wakes_in: Duration,
}

/// What a wake did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Woken {
    /// Bytes of device memory that were moved back.
    pub device_bytes: u64,
    /// Time of the whole.
    pub took: Duration,
    /// Time of it within the driver.
    pub in_driver: Duration,
}

/// What a client may ask.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "each is the method of the same name of `Client`")]
pub enum Request {
    Hello {
        version: u32,
    },
    Prepare(Box<Prepare>),
    Start {
        timeout_ms: u64,
    },
    Restore(RestoreRequest),
    Commit,
    ExamineDevices {
        direct: bool,
    },
    /// With a file where device memory goes past the processes.
    SuspendDevices,
    Dump(DumpRequest),
    GiveUpDump,
    ReleaseDump,
    Freeze,
    Thaw,
    Drain(Resume),
    Resumed {
        whole: bool,
    },
    Pause {
        lock_timeout_ms: u64,
    },
    Wake,
    Dial {
        port: u16,
        timeout_ms: u64,
    },
    Exec(ExecRequest),
    Signal {
        signal: i32,
    },
    Stop {
        timeout_ms: u64,
    },
    Kill {
        reason: String,
    },
    Wait,
    Status,
}

/// What the shim answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "each is the result of the request of the same name")]
pub enum Reply {
    Hello { version: u32, pid: u32 },
    Done,
    Prepared(Box<Prepared>),
    Examined { device_bytes: u64 },
    Suspended(Option<Box<Carried>>),
    Started { pid: u32 },
    Exec(ExecOutput),
    Paused(Paused),
    Woken(Woken),
    Exit(Exit),
    Status(Box<Record>),
    Failed { class: Class, error: Remote },
}

/// Sends one message.
pub(crate) fn send<T: Serialize>(socket: &UnixStream, message: &T, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let body = serde_json::to_vec(message).map_err(io::Error::other)?;
    fdpass::send_frame(socket, &body, MESSAGE_BYTES_MAX, fds)
}

/// Receives one message; `None` if the peer has closed the connection between messages.
pub(crate) fn receive<T: for<'a> Deserialize<'a>>(
    socket: &UnixStream,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let Some((body, fds)) = fdpass::recv_frame(socket, MESSAGE_BYTES_MAX, FDS_MAX)? else { return Ok(None) };
    let message = serde_json::from_slice(&body).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
    Ok(Some((message, fds)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_message_longer_than_the_limit_is_refused_before_it_is_read() {
        let (mut a, b) = UnixStream::pair().expect("pair");
        a.write_all(&u32::MAX.to_le_bytes()).expect("write");
        let error = receive::<Request>(&b).expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_message_cut_off_in_the_middle_is_an_error_and_between_messages_an_end() {
        let (mut a, b) = UnixStream::pair().expect("pair");
        send(&a, &Request::Status, &[]).expect("send");
        a.write_all(&[9, 0, 0, 0, b'{']).expect("write");
        drop(a);
        assert!(matches!(receive::<Request>(&b), Ok(Some((Request::Status, _)))));
        let error = receive::<Request>(&b).expect_err("cut off");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let (a, b) = UnixStream::pair().expect("pair");
        drop(a);
        assert!(receive::<Request>(&b).expect("end").is_none());
    }
}
