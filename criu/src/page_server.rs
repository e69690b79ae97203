//! The receiving side of CRIU's page-server protocol.
//!
//! While CRIU dumps, it sends the memory of each task and each shared segment over one byte stream. [`serve`] reads that
//! stream, checks it, and hands every run of pages to a [`PageSink`] with the reader itself, so that the sink reads
//! straight into its own memory. CRIU's last message asks for the result of the dump: the sink's [`PageSink::vote`]. The
//! server stays frozen until it is answered, and anything but 0 makes CRIU fail the dump and let the server run on.
//!
//! Every message is 32 bytes, little endian:
//!
//! ```text
//! 0        4        8                16               24               32
//! | command| ignored| number of pages| address        | object         |   + pages, if the run is present
//! ```
//!
//! `docs/protocols.md` has the tables. The peer is not trusted: lengths, addresses and the order of messages are checked
//! before anything is done with them. CRIU has no deadline of its own; the stream's read timeout is the deadline here.

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::ops::BitOr;

use crate::layout::PAGE_BYTES;

const HEADER_BYTES: usize = 32;

const ADD: u16 = 1;
const HOLE: u16 = 2;
const OPEN: u16 = 3;
const OPEN2: u16 = 4;
const PARENT: u16 = 5;
const ADD_F: u16 = 6;
const CLOSE: u16 = 0x1023;
const FORCE_CLOSE: u16 = 0x1024;

/// End of the largest user address space that Linux has on x86-64 (five levels of page tables). No run can go beyond it.
const ADDRESS_MAX: u64 = 1 << 56;
/// The most objects of one dump: the kernel's largest `pid_max` is 2^22, a replica has some hundred.
const OBJECTS_MAX: usize = 1 << 16;
/// What a sink leaves of a run is skipped in steps of this size.
const SKIP_BYTES: usize = 64 << 10;

/// What pages belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Object {
    /// The private memory of a task.
    Task {
        /// Pid inside its pid namespace, the number in `pagemap-PID.img`.
        pid: u32,
    },
    /// A shared segment: anonymous shared memory, memfd or System V shared memory.
    Shmem {
        /// CRIU's id of the segment, the number in `pagemap-shmem-ID.img`.
        id: u64,
    },
}

impl std::fmt::Display for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Task { pid } => write!(f, "task {pid}"),
            Self::Shmem { id } => write!(f, "shared segment {id}"),
        }
    }
}

/// Flags of a run of pages, the same in the protocol and in pagemap images.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Flags(u32);

impl Flags {
    /// The pages lie in a parent image (incremental dumps).
    pub const PARENT: Self = Self(1);
    /// The pages may be filled after the task runs again.
    pub const LAZY: Self = Self(2);
    /// The bytes of the pages follow (protocol) or lie in the pages image (pagemap).
    pub const PRESENT: Self = Self(4);

    /// The flags with these bits; `None` if a bit has no meaning.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Option<Self> {
        if bits & !7 == 0 { Some(Self(bits)) } else { None }
    }

    /// As the number in protocol and image.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Whether all of `other` are set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Flags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Takes the pages of a dump.
pub trait PageSink {
    /// An object begins. It ends with the next one or with the vote. No object is opened twice.
    ///
    /// # Errors
    /// Any error gives the dump up.
    fn open(&mut self, object: Object) -> io::Result<()>;

    /// `pages` pages of 4096 bytes begin at `vaddr` (address in a task, offset in a segment). `data` is the stream, cut
    /// off behind the run: a large read goes straight from the socket into the caller's buffer. What is not read is
    /// skipped. Inside an object addresses rise and runs do not overlap; a run may span adjacent mappings.
    ///
    /// # Errors
    /// Any error gives the dump up.
    fn run(&mut self, vaddr: u64, pages: u64, flags: Flags, data: &mut dyn Read) -> io::Result<()>;

    /// Everything has arrived and everything is still frozen. 0 lets the dump succeed; any other value makes CRIU fail
    /// it and let the tasks run on.
    fn vote(&mut self) -> i32;
}

/// What was received.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Tasks and shared segments.
    pub objects: usize,
    /// Runs of pages.
    pub runs: u64,
    /// Bytes of all pages.
    pub bytes: u64,
    /// What the sink voted, as CRIU was told.
    pub vote: i32,
}

/// Why receiving ended without a vote. CRIU fails the dump when the connection is closed after it.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The other side went away before it asked for the vote.
    #[error("connection closed after {bytes} bytes of pages, before the end of the dump")]
    ClosedEarly {
        /// Bytes of pages that had arrived.
        bytes: u64,
    },
    /// Nothing arrived within the stream's timeout.
    #[error("nothing arrived before the deadline, after {bytes} bytes of pages")]
    Deadline {
        /// Bytes of pages that had arrived.
        bytes: u64,
    },
    /// Reading or answering failed.
    #[error("connection failed after {bytes} bytes of pages")]
    Stream {
        /// Bytes of pages that had arrived.
        bytes: u64,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The sink gave up.
    #[error("take pages of {object}")]
    Sink {
        /// The object.
        object: Object,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A command that a dump does not use.
    #[error("unknown command {command:#x}")]
    Command {
        /// Its number.
        command: u16,
    },
    /// An object that is neither task nor shared segment, or too many of them.
    #[error("object id {id:#x} is neither a task nor a shared segment")]
    ObjectId {
        /// The id as it was sent.
        id: u64,
    },
    /// An object came twice; the second would replace the first.
    #[error("{object} was opened twice")]
    OpenedTwice {
        /// The object.
        object: Object,
    },
    /// More objects than a dump can have.
    #[error("more than {limit} objects")]
    TooManyObjects {
        /// The limit.
        limit: usize,
    },
    /// Pages came before any object was opened.
    #[error("pages at {vaddr:#x} belong to no object")]
    NoObject {
        /// Their address.
        vaddr: u64,
    },
    /// A run's address or length cannot be.
    #[error("run of {pages} pages at {vaddr:#x} of {object}: {reason}")]
    Run {
        /// The object.
        object: Object,
        /// Address of the first page.
        vaddr: u64,
        /// Number of pages.
        pages: u64,
        /// Which rule it breaks.
        reason: &'static str,
    },
}

/// Receives one dump: reads messages until CRIU asks for the vote, gives `sink`'s answer and returns.
///
/// The stream is left open; close it after an error, so that CRIU notices.
///
/// # Errors
/// [`crate::Error::PageServer`] if the stream ends, stalls beyond its read timeout or breaks the protocol, or if the
/// sink fails. No vote was cast then, or it did not arrive: the dump fails.
pub fn serve(stream: impl Read + Write, sink: &mut dyn PageSink) -> crate::Result<Summary> {
    let mut session = Session { stream, summary: Summary::default(), opened: HashSet::new(), current: None };
    Ok(session.run(sink)?)
}

struct Session<S> {
    stream: S,
    summary: Summary,
    opened: HashSet<Object>,
    /// The object that runs belong to, and the address behind its last run.
    current: Option<(Object, u64)>,
}

struct Header {
    command: u16,
    flags: u16,
    pages: u64,
    vaddr: u64,
    object: u64,
}

impl<S: Read + Write> Session<S> {
    fn run(&mut self, sink: &mut dyn PageSink) -> Result<Summary, Fault> {
        loop {
            let header = self.header()?;
            match header.command {
                OPEN => self.open(&header, sink)?,
                OPEN2 => {
                    self.open(&header, sink)?;
                    // One byte: 1 if a parent image has pages of this object. There never is one.
                    self.answer(&[0])?;
                }
                PARENT => self.answer(&0_i32.to_le_bytes())?,
                ADD => self.pages(&header, Flags::PRESENT, sink)?,
                HOLE => self.pages(&header, Flags::PARENT, sink)?,
                ADD_F => {
                    let flags = Flags::from_bits(u32::from(header.flags))
                        .ok_or_else(|| self.broken(&header, "unknown flags"))?;
                    self.pages(&header, flags, sink)?;
                }
                CLOSE | FORCE_CLOSE => return self.close(header.command, sink),
                command => return Err(Fault::Command { command }),
            }
        }
    }

    fn header(&mut self) -> Result<Header, Fault> {
        let mut bytes = [0; HEADER_BYTES];
        self.stream.read_exact(&mut bytes).map_err(|source| self.stream_fault(source))?;
        let [command, pages, vaddr, object] = [0, 8, 16, 24]
            .map(|at| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("the slice has eight bytes")));
        let [low, high, ..] = [command as u16, (command >> 16) as u16];
        Ok(Header { command: low, flags: high, pages, vaddr, object })
    }

    fn open(&mut self, header: &Header, sink: &mut dyn PageSink) -> Result<(), Fault> {
        let id = header.object;
        let object = match (id & 0xff, id >> 8) {
            (1, pid) => match u32::try_from(pid) {
                Ok(pid) if pid > 0 => Object::Task { pid },
                _ => return Err(Fault::ObjectId { id }),
            },
            (2, id) => Object::Shmem { id },
            _ => return Err(Fault::ObjectId { id }),
        };
        if self.opened.len() == OBJECTS_MAX {
            return Err(Fault::TooManyObjects { limit: OBJECTS_MAX });
        }
        if !self.opened.insert(object) {
            return Err(Fault::OpenedTwice { object });
        }
        self.summary.objects += 1;
        self.current = Some((object, 0));
        sink.open(object).map_err(|source| Fault::Sink { object, source })
    }

    fn pages(&mut self, header: &Header, flags: Flags, sink: &mut dyn PageSink) -> Result<(), Fault> {
        let Some((object, behind)) = self.current else {
            return Err(Fault::NoObject { vaddr: header.vaddr });
        };
        let bytes = header.pages.checked_mul(PAGE_BYTES);
        let end = bytes.and_then(|bytes| header.vaddr.checked_add(bytes));
        let (bytes, end) = match (bytes, end) {
            (Some(bytes), Some(end)) if end <= ADDRESS_MAX => (bytes, end),
            _ => return Err(self.broken(header, "it goes beyond the address space")),
        };
        if header.pages == 0 {
            return Err(self.broken(header, "it is empty"));
        }
        if !header.vaddr.is_multiple_of(PAGE_BYTES) {
            return Err(self.broken(header, "it begins inside a page"));
        }
        if header.vaddr < behind {
            return Err(self.broken(header, "it begins before the end of the run before"));
        }
        if !flags.contains(Flags::PRESENT) || flags.contains(Flags::PARENT) {
            // Its bytes would come from a parent image or from the dumped task itself: the snapshot would have a hole.
            return Err(self.broken(header, "its pages are not sent"));
        }
        let mut data = Run { stream: &mut self.stream, left: bytes, failure: None };
        let taken = sink.run(header.vaddr, header.pages, flags, &mut data);
        let rest = if taken.is_ok() { skip(&mut data) } else { Ok(()) };
        let (left, failure) = (data.left, data.failure);
        self.summary.bytes += bytes - left;
        if let Some(source) = failure {
            return Err(self.stream_fault(source));
        }
        taken.and(rest).map_err(|source| Fault::Sink { object, source })?;
        self.summary.runs += 1;
        self.current = Some((object, end));
        Ok(())
    }

    fn close(&mut self, command: u16, sink: &mut dyn PageSink) -> Result<Summary, Fault> {
        self.current = None;
        self.summary.vote = sink.vote();
        let vote = self.summary.vote.to_le_bytes();
        self.answer(&vote)?;
        if command == CLOSE {
            // CRIU made this connection itself and closes it; waiting for that keeps the port out of TIME_WAIT. What the
            // read returns makes no difference any more.
            let _ = self.stream.read(&mut [0]);
        }
        Ok(self.summary)
    }

    fn answer(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        self.stream
            .write_all(bytes)
            .and_then(|()| self.stream.flush())
            .map_err(|source| self.stream_fault(source))
    }

    fn stream_fault(&self, source: io::Error) -> Fault {
        let bytes = self.summary.bytes;
        match source.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                Fault::ClosedEarly { bytes }
            }
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Fault::Deadline { bytes },
            _ => Fault::Stream { bytes, source },
        }
    }

    fn broken(&self, header: &Header, reason: &'static str) -> Fault {
        match self.current {
            Some((object, _)) => Fault::Run { object, vaddr: header.vaddr, pages: header.pages, reason },
            None => Fault::NoObject { vaddr: header.vaddr },
        }
    }
}

/// The stream, cut off behind the current run. Remembers its own failure, so that it is not mistaken for the sink's.
struct Run<'a, S> {
    stream: &'a mut S,
    left: u64,
    failure: Option<io::Error>,
}

impl<S: Read> Read for Run<'_, S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if room == 0 {
            return Ok(0);
        }
        let result = loop {
            match self.stream.read(&mut buffer[..room]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        match result {
            Ok(0) => {
                self.failure = Some(io::ErrorKind::UnexpectedEof.into());
                Err(io::ErrorKind::UnexpectedEof.into())
            }
            Ok(read) => {
                self.left -= read as u64;
                Ok(read)
            }
            Err(error) => {
                self.failure = Some(io::Error::new(error.kind(), error.to_string()));
                Err(error)
            }
        }
    }
}

fn skip(data: &mut dyn Read) -> io::Result<()> {
    let mut buffer = [0; SKIP_BYTES];
    while data.read(&mut buffer)? > 0 {}
    Ok(())
}
