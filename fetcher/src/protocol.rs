//! What the three parties say to each other: frames of JSON with descriptors, bounded and versioned.
//!
//! A client asks, the keeper answers each request once, in order; [`Request::Want`] and [`Request::Release`] have none. The first request is
//! [`Request::Hello`]. A connection that opened or joined a stream is a lease on it. Between keeper and worker both sides
//! ask: what the keeper asks carries an id, which stands in the answer, and so does what the worker asks.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rewarm_store::{Digest, WorkingSet};
use rewarm_sys::fdpass;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::access::Access;
use crate::client::Status;
use crate::error::Failure;

/// Version of the protocol between clients and keeper; both sides must have the same.
pub(crate) const VERSION: u32 = 5;
/// Longest message in bytes: a working set of a hundred thousand extents, or the list of a folder with as many tags.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Most descriptors in one message.
const FDS_MAX: usize = 8;

/// A stretch of a stream: offset and length in bytes.
pub(crate) type Extent = (u64, u64);

/// What a client asks.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    Hello {
        version: u32,
        /// Bytes that decoded streams may take from now on altogether, those that are held too.
        bound: Option<u64>,
    },
    /// Which manifests does a reference mean? `target` is a tag or a digest.
    Find {
        access: Access,
        name: String,
        target: String,
    },
    /// A lease on the stream of a snapshot. The manifest object comes along as a file.
    Open {
        access: Access,
        digest: Digest,
        patience_ms: u64,
    },
    /// Fetch all of the opened stream, these parts first.
    Begin {
        first: Vec<Extent>,
        /// Only one pager will read it, and says what it is done with.
        passing: bool,
    },
    /// A lease on a stream that another connection has.
    Join {
        stream: u64,
    },
    /// Somebody waits for this block.
    Want {
        block: u64,
    },
    /// The only pager is done with so many blocks from `block` on.
    Release {
        block: u64,
        count: u64,
    },
    /// What a restore touched first. `save`: write it into the store too.
    Remember {
        set: WorkingSet,
        save: bool,
    },
    /// Why was the stream given up?
    Why,
    /// Drop streams that nobody holds until so many bytes of memory are free.
    Trim {
        free_bytes: u64,
    },
    /// Drop every stream that nobody holds, and what is kept on disk.
    Clear,
    Status,
}

/// What the keeper answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reply {
    Hello {
        version: u32,
    },
    Done,
    /// The objects lie one behind the other in the file that comes along.
    Found {
        manifests: Vec<(Digest, u64)>,
    },
    /// Files: boot object, content, table.
    Opened {
        stream: u64,
        regions: Vec<u64>,
        working_set: Option<WorkingSet>,
        /// Content that came from its store in a second, the last time.
        rate: Option<u64>,
    },
    Status(Status),
    Failed(Failure),
}

/// What the keeper tells a worker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ToWorker {
    /// The first message: the store, without the environment, which the worker has already. `later`: nobody waits for what it does.
    Serve { access: Access, later: bool },
    /// Answered by [`FromWorker::Found`].
    Find { id: u64, name: String, target: String },
    /// Answered by [`FromWorker::Booted`]. File: the manifest object.
    Boot { id: u64, digest: Digest },
    /// Answered by [`FromWorker::Saved`].
    Save { id: u64, digest: Digest, set: WorkingSet },
    /// Answered by [`FromWorker::Filled`]. Files: manifest object, boot object, content, table.
    /// `ahead`: not many more bytes than this are held before somebody is done with them.
    Fill { id: u64, digest: Digest, first: Vec<Extent>, patience_ms: u64, ahead: Option<u64> },
    /// Somebody waits for this block of the stream that the fill with this id fetches.
    Want { fill: u64, block: u64 },
    /// Nobody wants it any more.
    Stop { fill: u64 },
    /// Answers [`FromWorker::Open`]; the file comes along, or the system's error number stands here.
    Opened { id: u64, errno: Option<i32> },
    /// Answers [`FromWorker::List`].
    Listed { id: u64, files: Vec<(String, u64)>, errno: Option<i32> },
}

/// What a worker tells the keeper.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FromWorker {
    /// The objects lie one behind the other in the file that comes along.
    Found {
        id: u64,
        manifests: Vec<(Digest, u64)>,
    },
    /// The boot object comes along as a file.
    Booted {
        id: u64,
        regions: Vec<u64>,
        working_set: Option<WorkingSet>,
    },
    Saved {
        id: u64,
    },
    Filled {
        id: u64,
        read_bytes: u64,
        checked_bytes: u64,
    },
    Failed {
        id: u64,
        failure: Failure,
    },
    /// Open this file of the store's folder.
    Open {
        id: u64,
        path: String,
    },
    /// List what lies below this folder of the store's folder.
    List {
        id: u64,
        folder: String,
    },
    /// Open the file of a pack of this length on disk, for reading and writing. Answered by [`ToWorker::Opened`].
    Pack {
        id: u64,
        name: String,
        bytes: u64,
    },
    /// Something could not be kept on disk.
    NotKept {
        trouble: String,
    },
}

/// Sends one message.
pub(crate) fn send<T: Serialize>(socket: &UnixStream, message: &T, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    fdpass::send_frame(socket, &serde_json::to_vec(message)?, MESSAGE_BYTES_MAX, fds)
}

/// Receives one message; `None` if the peer has closed the connection between messages.
pub(crate) fn receive<T: DeserializeOwned>(socket: &UnixStream) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let Some((body, fds)) = fdpass::recv_frame(socket, MESSAGE_BYTES_MAX, FDS_MAX)? else { return Ok(None) };
    let message =
        serde_json::from_slice(&body).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    Ok(Some((message, fds)))
}

/// Bytes as a memory file, to be sent along.
pub(crate) fn memory_file(bytes: &[u8]) -> io::Result<OwnedFd> {
    use std::io::Write as _;
    let fd = nix::sys::memfd::memfd_create(c"rewarm-fetched", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(bytes)?;
    Ok(file.into())
}

/// The content of a file that came along, at most `limit` bytes. Read by offset: who sent it may share its position.
pub(crate) fn contents(file: &OwnedFd, limit: u64) -> io::Result<Vec<u8>> {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::from(file.try_clone()?);
    let length = file.metadata()?.len();
    if length > limit {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a file of {length} bytes is longer than {limit}"),
        ));
    }
    let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_message_and_its_file_arrive_together_and_nonsense_is_refused() {
        let (a, b) = UnixStream::pair().expect("a pair");
        let file = memory_file(b"hello").expect("a memory file");
        send(&a, &Request::Begin { first: vec![(1, 2)], passing: true }, &[file.as_fd()]).expect("sent");
        let (message, fds) = receive::<Request>(&b).expect("received").expect("a message");
        assert!(matches!(message, Request::Begin { first, passing: true } if first == [(1, 2)]));
        assert_eq!(contents(&fds[0], 5).expect("read"), b"hello");
        assert!(contents(&fds[0], 4).is_err());
        fdpass::send_frame(&a, b"{\"steal\":{}}", 100, &[]).expect("sent");
        assert_eq!(receive::<Request>(&b).expect_err("unknown").kind(), io::ErrorKind::InvalidData);
    }
}
