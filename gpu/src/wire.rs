//! What the helper is asked and what it answers.
//!
//! One message is a length (u32, little endian) and that many bytes of JSON. The client asks, the helper answers each
//! request once, in order. The first request is [`Call::Hello`]. Both ends come from one program, but the program may be
//! replaced while a helper runs: hence the version.

use std::io::{self, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rewarm_sys::fdpass;
use serde::{Deserialize, Serialize};

use crate::custom::Part;
use crate::driver::{Code, Version};
use crate::nvml::Machine;
use crate::states::{State, Step};
use crate::topology::{Device, Pair};

/// Version of this protocol; both ends must have the same.
pub const VERSION: u32 = 4;
/// Longest message in bytes.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// Most devices that a map may name; a machine has 16 at most today.
pub const PAIRS_MAX: usize = 64;

/// What a client may ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Call {
    /// Say which version of the protocol you speak and whether there is a driver.
    Hello {
        /// The client's version.
        version: u32,
    },
    /// Attach to the driver, which takes up to seconds. Everything but the version and NVML needs it.
    Attach,
    /// The devices that the driver shows.
    Devices,
    /// What NVML tells.
    Machine,
    /// The state of a process.
    State {
        /// The process, as the helper sees it.
        pid: i32,
    },
    /// The thread in a process that carries out restores.
    RestoreThread {
        /// The process.
        pid: i32,
    },
    /// A checkpoint whose device memory goes to the file that follows ([`send_fd`]).
    Store {
        /// The process.
        pid: i32,
        /// Where in the file.
        offset: u64,
    },
    /// A restore whose device memory comes from the descriptor that follows.
    Load {
        /// The process.
        pid: i32,
        /// What comes, in this order.
        parts: Vec<Part>,
        /// The descriptor is a file, in which a part lies at its offset.
        file: bool,
        /// The map; empty where every device stays.
        pairs: Vec<Pair>,
    },
    /// One step.
    Step {
        /// Which.
        step: Step,
        /// The process.
        pid: i32,
        /// How long a lock may wait for work that runs, in milliseconds; 0 elsewhere.
        lock_timeout_ms: u64,
        /// The map of a restore; empty where every device stays.
        pairs: Vec<Pair>,
    },
}

impl std::fmt::Display for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Hello { .. } => f.write_str("hello"),
            Self::Attach => f.write_str("attach"),
            Self::Devices => f.write_str("devices"),
            Self::Machine => f.write_str("NVML"),
            Self::State { pid } => write!(f, "state of process {pid}"),
            Self::RestoreThread { pid } => write!(f, "restore thread of process {pid}"),
            Self::Store { pid, .. } => write!(f, "checkpoint of process {pid} past its memory"),
            Self::Load { pid, .. } => write!(f, "restore of process {pid} past its memory"),
            Self::Step { step, pid, .. } => write!(f, "{step} of process {pid}"),
        }
    }
}

/// What the helper answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It speaks this version of the protocol; the driver's version, or why there is none.
    Hello {
        /// The helper's version.
        version: u32,
        /// The driver.
        driver: Result<Version, String>,
    },
    /// The devices.
    Devices(Vec<Device>),
    /// What NVML told.
    Machine(Machine),
    /// The state.
    State(State),
    /// The thread.
    RestoreThread(i32),
    /// The checkpoint was done and device memory written.
    Stored {
        /// Microseconds of the call and the copy.
        micros: u64,
        /// What was written.
        parts: Vec<Part>,
    },
    /// The step was done, by the driver's word, or the helper is attached; the call took so long.
    Done {
        /// Microseconds within the driver.
        micros: u64,
    },
    /// The driver refused with this result.
    Refused(Code),
    /// The helper cannot do what was asked, and why.
    Unable(String),
}

/// Sends the descriptor of a [`Call::Store`] or [`Call::Load`], behind it.
///
/// # Errors
/// The socket's.
pub fn send_fd(to: &UnixStream, fd: BorrowedFd<'_>) -> io::Result<()> {
    fdpass::send(to, &[0], &[fd])
}

/// Receives it.
///
/// # Errors
/// The socket's, and `InvalidData` where none came.
pub fn receive_fd(from: &UnixStream) -> io::Result<OwnedFd> {
    let (_, mut fds) = fdpass::recv(from, &mut [0], 1)?;
    fds.pop().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a descriptor was expected"))
}

/// Sends one message.
///
/// # Errors
/// The socket's, or `InvalidInput` for a message that is too long.
pub fn send<T: Serialize>(mut to: impl Write, message: &T) -> io::Result<()> {
    let body = serde_json::to_vec(message).map_err(io::Error::other)?;
    if body.len() > MESSAGE_BYTES_MAX {
        let text = format!("a message of {} bytes is longer than {MESSAGE_BYTES_MAX}", body.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let mut bytes = u32::try_from(body.len()).expect("bounded above").to_le_bytes().to_vec();
    bytes.extend_from_slice(&body);
    to.write_all(&bytes)
}

/// Receives one message; none where the peer has closed between two messages.
///
/// # Errors
/// `InvalidData` for what is too long or no message, `UnexpectedEof` for one that is cut off, and the socket's.
pub fn receive<T: for<'a> Deserialize<'a>>(mut from: impl Read) -> io::Result<Option<T>> {
    let mut head = [0; 4];
    let mut have = 0;
    while have < head.len() {
        match from.read(&mut head[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => have += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let length = u32::from_le_bytes(head) as usize;
    if length > MESSAGE_BYTES_MAX {
        let text = format!("a message of {length} bytes is longer than {MESSAGE_BYTES_MAX}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let mut body = vec![0; length];
    from.read_exact(&mut body)?;
    serde_json::from_slice(&body).map(Some).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(length: u32, body: &[u8]) -> Vec<u8> {
        [&length.to_le_bytes()[..], body].concat()
    }

    #[test]
    fn every_call_comes_back_as_it_was_sent() {
        let pairs = vec![Pair { old: crate::Uuid([1; 16]), new: crate::Uuid([255; 16]) }; PAIRS_MAX];
        for call in [
            Call::Hello { version: VERSION },
            Call::Attach,
            Call::Devices,
            Call::Machine,
            Call::State { pid: 1 },
            Call::RestoreThread { pid: i32::MAX },
            Call::Store { pid: 3, offset: u64::MAX },
            Call::Load {
                pid: 3,
                parts: vec![Part { gpu: crate::Uuid([7; 16]), offset: 1, bytes: u64::MAX }],
                file: true,
                pairs: pairs.clone(),
            },
            Call::Step { step: Step::Restore, pid: 7, lock_timeout_ms: u64::MAX, pairs },
        ] {
            let mut sent = Vec::new();
            send(&mut sent, &call).expect("fits");
            let got: Option<Call> = receive(&sent[..]).expect("whole");
            assert_eq!(got, Some(call));
        }
    }

    #[test]
    fn a_message_that_is_too_long_cut_off_or_nonsense_is_an_error() {
        let kind = |bytes: &[u8]| receive::<Call>(bytes).expect_err("malformed").kind();
        assert_eq!(kind(&bytes(u32::MAX, b"")), io::ErrorKind::InvalidData);
        assert_eq!(kind(&bytes(9, b"{")), io::ErrorKind::UnexpectedEof);
        assert_eq!(kind(&[1, 0]), io::ErrorKind::UnexpectedEof);
        assert_eq!(kind(&bytes(2, b"{}")), io::ErrorKind::InvalidData);
        assert!(receive::<Call>(&[][..]).expect("an end").is_none());
        let long = "x".repeat(MESSAGE_BYTES_MAX);
        assert_eq!(send(Vec::new(), &long).expect_err("long").kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_number_that_nobody_knows_is_an_ordinary_answer() {
        for answer in [Answer::State(State(99)), Answer::Refused(Code(4_000_000_000))] {
            let mut sent = Vec::new();
            send(&mut sent, &answer).expect("fits");
            assert_eq!(receive(&sent[..]).expect("whole"), Some(answer));
        }
    }
}
