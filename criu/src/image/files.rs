//! `files.img`, `fdinfo-ID.img`, `remap-fpath.img` and ghost files: everything that tasks have open.
//!
//! `files.img` has each open file once, whoever shares it. `fdinfo-ID.img` says which descriptors of a table lead to
//! it. A file that has no name any more is either kept in a ghost file or found under another name.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use prost::Message;

use super::{Image, Kind, core, numbered, pstree, read_one};
use crate::{Error, Fault};

/// The most open files of a dump. The kernel's default `fs.file-max` is larger, but no server has this many.
const FILES_MAX: usize = 1 << 20;

/// Protocol number of TCP.
const IPPROTO_TCP: u32 = 6;
/// Protocol number of UDP.
const IPPROTO_UDP: u32 = 17;

/// One open file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenFile {
    /// Number by which descriptors and mappings refer to it.
    pub id: u32,
    /// What it is.
    pub kind: FileKind,
}

/// What is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileKind {
    /// Something in a file system: a file, folder or device.
    Regular(RegularFile),
    /// IPv4 or IPv6 socket.
    Inet(InetSocket),
    /// Timer descriptor.
    Timerfd(Timerfd),
    /// Unix socket.
    Unix(UnixSocket),
    /// An end of an unnamed pipe.
    Pipe {
        /// Number that its two ends share.
        pipe: u32,
    },
    /// Memory file.
    Memfd {
        /// Number of its content in `memfd.img`.
        inode: u32,
    },
    /// A namespace.
    Namespace {
        /// Its number.
        namespace: u32,
        /// `CLONE_NEW*` bit of its kind.
        kind: u32,
    },
    /// Known to a plugin of CRIU only.
    External,
    /// Raw packets of a network interface.
    Packet,
    /// Virtual network interface.
    Tun,
    /// Map of a BPF program.
    BpfMap,
    /// Any other kind by CRIU's number: event descriptors, terminals, netlink and so on.
    Other(u32),
}

/// Something in a file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegularFile {
    /// Absolute path in the mount namespace of the task.
    pub path: String,
    /// Size in bytes that CRIU insists on at restore, where it does.
    pub bytes: Option<u64>,
    /// Type and permissions, as `st_mode`.
    pub mode: Option<u32>,
    /// GNU build id of an ELF file, padded to words of four bytes.
    pub build_id: Option<Vec<u8>>,
    /// Mount that it is on, -1 where there is none.
    pub mount: i32,
    /// `O_*` flags.
    pub flags: u32,
    /// Not restored but handed in from outside.
    pub external: bool,
}

impl RegularFile {
    const TYPE: u32 = 0o170_000;

    /// A file with content, not a folder or device. CRIU does not say the type of a file that is only mapped: it is one.
    #[must_use]
    pub fn is_file(&self) -> bool {
        self.mode.is_none_or(|mode| mode & Self::TYPE == 0o100_000)
    }

    /// A folder.
    #[must_use]
    pub fn is_folder(&self) -> bool {
        self.mode.is_some_and(|mode| mode & Self::TYPE == 0o040_000)
    }

    /// A character or block device.
    #[must_use]
    pub fn is_device(&self) -> bool {
        self.mode.is_some_and(|mode| matches!(mode & Self::TYPE, 0o020_000 | 0o060_000))
    }
}

/// IPv4 or IPv6 socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InetSocket {
    /// Inode by which the socket's queues are named.
    pub inode: u32,
    /// Protocol.
    pub protocol: Protocol,
    /// State.
    pub state: SocketState,
    /// Own address.
    pub local: SocketAddr,
    /// Address of the other side; port 0 if it is not connected.
    pub remote: SocketAddr,
    /// Number of its network namespace.
    pub namespace: u32,
}

impl InetSocket {
    /// It has another side.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.remote.port() != 0
    }
}

/// Protocol of an IPv4 or IPv6 socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Any other by its number.
    Other(u32),
}

/// States of a socket with the kernel's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketState {
    /// Both sides can send.
    Established,
    /// Waits for the answer to its first packet.
    SynSent,
    /// Not connected.
    Closed,
    /// Accepts connections.
    Listen,
    /// One of the states in which a connection ends.
    Closing(u32),
}

impl SocketState {
    /// The kernel's number of [`SocketState::Closed`].
    pub(crate) const CLOSED: u32 = 7;

    /// The other side has ended the connection: CLOSE_WAIT, LAST_ACK or CLOSING.
    #[must_use]
    pub fn is_ended_by_peer(self) -> bool {
        matches!(self, Self::Closing(8 | 9 | 11))
    }

    fn from_number(number: u32) -> Result<Self, Fault> {
        match number {
            1 => Ok(Self::Established),
            2 => Ok(Self::SynSent),
            Self::CLOSED => Ok(Self::Closed),
            10 => Ok(Self::Listen),
            4 | 5 | 6 | 8 | 9 | 11 => Ok(Self::Closing(number)),
            _ => {
                let expected = "1 to 11, not SYN_RECV";
                Err(Fault::Value { what: "state of a socket", seen: u64::from(number), expected })
            }
        }
    }
}

/// Unix socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnixSocket {
    /// Inode.
    pub inode: u32,
    /// Inode of the other side, 0 where there is none.
    pub peer: u32,
    /// Name; begins with a zero byte in the abstract namespace, empty if it has none.
    pub name: Vec<u8>,
}

/// Timer descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timerfd {
    /// `CLOCK_*` number.
    pub clock: u32,
    /// Expirations that nobody has read yet.
    pub ticks: u64,
    /// Flags with which it was set; bit 0 says that the first time was an absolute one.
    pub settime_flags: u32,
    /// Time left until it expires, 0 if it is not armed.
    pub value: Duration,
    /// Period, 0 if it expires once.
    pub interval: Duration,
}

/// A descriptor of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Descriptor {
    /// Pid in the innermost namespace.
    pub pid: u32,
    /// Number of the descriptor.
    pub fd: u32,
}

#[derive(Clone, PartialEq, Message)]
struct FileEntry {
    #[prost(uint32, tag = "1")]
    kind: u32,
    #[prost(uint32, tag = "2")]
    id: u32,
    #[prost(message, optional, boxed, tag = "3")]
    regular: Option<Box<RegFileEntry>>,
    #[prost(message, optional, boxed, tag = "4")]
    inet: Option<Box<InetSkEntry>>,
    #[prost(message, optional, tag = "5")]
    namespace: Option<NsFileEntry>,
    #[prost(message, optional, boxed, tag = "12")]
    timerfd: Option<Box<TimerfdEntry>>,
    #[prost(message, optional, boxed, tag = "16")]
    unix: Option<Box<UnixSkEntry>>,
    #[prost(message, optional, tag = "18")]
    pipe: Option<PipeEntry>,
    #[prost(message, optional, tag = "20")]
    memfd: Option<MemfdFileEntry>,
}

#[derive(Clone, PartialEq, Message)]
struct RegFileEntry {
    #[prost(uint32, tag = "2")]
    flags: u32,
    #[prost(bytes, tag = "6")]
    name: Vec<u8>,
    #[prost(sint32, optional, tag = "7")]
    mount: Option<i32>,
    #[prost(uint64, optional, tag = "8")]
    bytes: Option<u64>,
    #[prost(bool, tag = "9")]
    external: bool,
    #[prost(uint32, optional, tag = "10")]
    mode: Option<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "11")]
    build_id: Vec<u32>,
}

#[derive(Clone, PartialEq, Message)]
struct InetSkEntry {
    #[prost(uint32, tag = "2")]
    inode: u32,
    #[prost(uint32, tag = "3")]
    family: u32,
    #[prost(uint32, tag = "5")]
    protocol: u32,
    #[prost(uint32, tag = "6")]
    state: u32,
    #[prost(uint32, tag = "7")]
    local_port: u32,
    #[prost(uint32, tag = "8")]
    remote_port: u32,
    #[prost(uint32, repeated, packed = "false", tag = "11")]
    local: Vec<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "12")]
    remote: Vec<u32>,
    #[prost(uint32, tag = "18")]
    namespace: u32,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct NsFileEntry {
    #[prost(uint32, tag = "2")]
    namespace: u32,
    #[prost(uint32, tag = "3")]
    kind: u32,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(crate) struct TimerfdEntry {
    #[prost(uint32, tag = "4")]
    clock: u32,
    #[prost(uint64, tag = "5")]
    ticks: u64,
    #[prost(uint32, tag = "6")]
    settime_flags: u32,
    #[prost(uint64, tag = "7")]
    value_s: u64,
    #[prost(uint64, tag = "8")]
    value_ns: u64,
    #[prost(uint64, tag = "9")]
    interval_s: u64,
    #[prost(uint64, tag = "10")]
    interval_ns: u64,
}

#[derive(Clone, PartialEq, Message)]
struct UnixSkEntry {
    #[prost(uint32, tag = "2")]
    inode: u32,
    #[prost(uint32, tag = "8")]
    peer: u32,
    #[prost(bytes, tag = "11")]
    name: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct PipeEntry {
    #[prost(uint32, tag = "2")]
    pipe: u32,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct MemfdFileEntry {
    #[prost(uint32, tag = "5")]
    inode: u32,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct FdinfoEntry {
    #[prost(uint32, tag = "1")]
    id: u32,
    #[prost(uint32, tag = "4")]
    fd: u32,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct RemapFilePathEntry {
    #[prost(uint32, tag = "1")]
    original: u32,
    #[prost(uint32, optional, tag = "3")]
    kind: Option<u32>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct GhostFileEntry {
    #[prost(uint32, tag = "3")]
    mode: u32,
    #[prost(uint64, optional, tag = "10")]
    bytes: Option<u64>,
}

/// A deleted file that is still open, kept in the images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ghost {
    /// Number in the file's name.
    pub id: u64,
    /// Type and permissions, as `st_mode`.
    pub mode: u32,
    /// Size in bytes, where CRIU says it.
    pub bytes: Option<u64>,
}

/// All open files of an image directory, in CRIU's order.
///
/// # Errors
/// [`Error::Io`] if there is no `files.img`, [`Error::Image`] if it is not what CRIU writes.
pub fn read(directory: &Path) -> crate::Result<Vec<OpenFile>> {
    let image = Image::read(&directory.join("files.img"), Kind::Files)?;
    let mut files = Vec::new();
    image.each(|entry: FileEntry| {
        if files.len() == FILES_MAX {
            let limit = FILES_MAX as u64;
            return Err(Fault::Limit { what: "number of open files", seen: limit + 1, limit });
        }
        files.push(OpenFile { id: entry.id, kind: kind(entry)? });
        Ok(())
    })?;
    Ok(files)
}

/// Which descriptors lead to which open file, by the file's id.
///
/// # Errors
/// [`Error::Io`] or [`Error::Image`] if the tree or a table of descriptors cannot be read.
pub fn descriptors(directory: &Path) -> crate::Result<BTreeMap<u32, Vec<Descriptor>>> {
    let mut found: BTreeMap<u32, Vec<Descriptor>> = BTreeMap::new();
    let mut tables: HashMap<u32, u32> = HashMap::new();
    let mut total = 0_usize;
    for task in pstree::read(directory)? {
        let Some(ids) = core::ids(directory, task.pid)? else { continue };
        // Tasks that share a table are listed under the first of them: one file, one time to read it.
        if tables.insert(ids.files, task.pid).is_some() {
            continue;
        }
        let path = directory.join(format!("fdinfo-{}.img", ids.files));
        let image = match Image::read(&path, Kind::Fdinfo) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        image.each(|entry: FdinfoEntry| {
            total += 1;
            if total > FILES_MAX {
                let limit = FILES_MAX as u64;
                return Err(Fault::Limit { what: "number of descriptors", seen: total as u64, limit });
            }
            found.entry(entry.id).or_default().push(Descriptor { pid: task.pid, fd: entry.fd });
            Ok(())
        })?;
    }
    Ok(found)
}

/// Ids of files that have no name: their content is in a ghost file or behind a link that CRIU made.
///
/// # Errors
/// [`Error::Image`] if the file is not what CRIU writes.
pub fn remapped(directory: &Path) -> crate::Result<HashSet<u32>> {
    let image = match Image::read(&directory.join("remap-fpath.img"), Kind::RemapFilePath) {
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(HashSet::new());
        }
        other => other?,
    };
    let mut ids = HashSet::new();
    image.each(|entry: RemapFilePathEntry| {
        ids.insert(entry.original);
        Ok(())
    })?;
    Ok(ids)
}

/// The deleted files that the images keep.
///
/// # Errors
/// [`Error::Image`] if one of them is not what CRIU writes.
pub fn ghosts(directory: &Path) -> crate::Result<Vec<Ghost>> {
    let mut ghosts = Vec::new();
    for (id, path) in numbered(directory, "ghost-file-", 16)? {
        let entry: GhostFileEntry = read_one(&path, Kind::GhostFile)?;
        ghosts.push(Ghost { id, mode: entry.mode, bytes: entry.bytes });
    }
    Ok(ghosts)
}

fn kind(entry: FileEntry) -> Result<FileKind, Fault> {
    const NO_BODY: Fault = Fault::Absent { what: "body of an open file" };
    Ok(match entry.kind {
        1 => FileKind::Regular(regular(*entry.regular.ok_or(NO_BODY)?)?),
        2 => FileKind::Pipe { pipe: entry.pipe.ok_or(NO_BODY)?.pipe },
        4 => FileKind::Inet(inet(*entry.inet.ok_or(NO_BODY)?)?),
        5 => {
            let UnixSkEntry { inode, peer, name } = *entry.unix.ok_or(NO_BODY)?;
            FileKind::Unix(UnixSocket { inode, peer, name })
        }
        10 => FileKind::Packet,
        14 => {
            let NsFileEntry { namespace, kind } = entry.namespace.ok_or(NO_BODY)?;
            FileKind::Namespace { namespace, kind }
        }
        15 => FileKind::Tun,
        16 => FileKind::External,
        17 => FileKind::Timerfd(timerfd(*entry.timerfd.ok_or(NO_BODY)?)?),
        18 => FileKind::Memfd { inode: entry.memfd.ok_or(NO_BODY)?.inode },
        19 => FileKind::BpfMap,
        other => FileKind::Other(other),
    })
}

fn regular(entry: RegFileEntry) -> Result<RegularFile, Fault> {
    // A name that is no UTF-8 cannot go into a manifest; it is shown with replacement characters and stays what it is
    // in the image.
    let name = String::from_utf8_lossy(&entry.name);
    if entry.build_id.len() > 64 {
        let seen = entry.build_id.len() as u64;
        return Err(Fault::Limit { what: "words of a build id", seen, limit: 64 });
    }
    let build_id: Vec<u8> = entry.build_id.iter().flat_map(|word| word.to_le_bytes()).collect();
    Ok(RegularFile {
        path: if name.starts_with('/') { name.into_owned() } else { format!("/{name}") },
        bytes: entry.bytes,
        mode: entry.mode,
        build_id: (!build_id.is_empty()).then_some(build_id),
        mount: entry.mount.unwrap_or(-1),
        flags: entry.flags,
        external: entry.external,
    })
}

fn inet(entry: InetSkEntry) -> Result<InetSocket, Fault> {
    let protocol = match entry.protocol {
        IPPROTO_TCP => Protocol::Tcp,
        IPPROTO_UDP => Protocol::Udp,
        other => Protocol::Other(other),
    };
    Ok(InetSocket {
        inode: entry.inode,
        protocol,
        state: SocketState::from_number(entry.state)?,
        local: address(entry.family, &entry.local, entry.local_port)?,
        remote: address(entry.family, &entry.remote, entry.remote_port)?,
        namespace: entry.namespace,
    })
}

/// Addresses are words whose bytes stand as in a packet; ports are numbers.
fn address(family: u32, words: &[u32], port: u32) -> Result<SocketAddr, Fault> {
    let seen = u64::from(port);
    let port = u16::try_from(port).map_err(|_| Fault::Value { what: "port", seen, expected: "16 bits" })?;
    let bytes: Vec<u8> = words.iter().take(4).flat_map(|word| word.to_le_bytes()).collect();
    let ip = match (family, bytes.len()) {
        (2, 4..) => IpAddr::V4(Ipv4Addr::from([bytes[0], bytes[1], bytes[2], bytes[3]])),
        (10, 16) => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).expect("sixteen bytes"))),
        _ => {
            let expected = "2 (IPv4) or 10 (IPv6) with an address of its length";
            return Err(Fault::Value { what: "family of a socket", seen: u64::from(family), expected });
        }
    };
    Ok(SocketAddr::new(ip, port))
}

fn timerfd(entry: TimerfdEntry) -> Result<Timerfd, Fault> {
    let time = |seconds: u64, nanoseconds: u64| match u32::try_from(nanoseconds) {
        Ok(nanoseconds @ ..1_000_000_000) => Ok(Duration::new(seconds, nanoseconds)),
        _ => Err(Fault::Value {
            what: "nanoseconds of a timer",
            seen: nanoseconds,
            expected: "less than 10^9",
        }),
    };
    Ok(Timerfd {
        clock: entry.clock,
        ticks: entry.ticks,
        settime_flags: entry.settime_flags,
        value: time(entry.value_s, entry.value_ns)?,
        interval: time(entry.interval_s, entry.interval_ns)?,
    })
}
