//! Reads the image files that CRIU leaves in its image directory.
//!
//! An image file is one or two magic numbers and then records: a length of four bytes, little endian, and a protobuf
//! message. Some kinds have raw data behind a record. What is read here is the part that Rewarm decides by; CRIU's
//! messages have more fields, which are skipped. Image files come out of a store and are not trusted: sizes and numbers
//! are bounded before memory is taken for them.
//!
//! | module | files |
//! |---|---|
//! | [`inventory`] | `inventory.img`: CRIU's own facts about the dump |
//! | [`pstree`] | `pstree.img`: the tree of tasks |
//! | [`core`] | `core-TID.img`: credentials, seccomp, name of each thread |
//! | [`mm`] | `mm-PID.img`: mappings |
//! | [`files`] | `files.img`, `fdinfo-ID.img`, ghost files: everything that is open |
//! | [`memfd`] | `memfd.img`: files of shared memory |
//! | [`mounts`] | `mountpoints-ID.img` |
//! | [`namespaces`] | ids of namespaces, user namespaces, clocks |
//! | [`pagemap`] | `pagemap-PID.img`, `pagemap-shmem-ID.img`, also written here |
//! | [`seccomp`] | `seccomp.img`: filter programs |

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use prost::Message;

use crate::{Error, Fault};

pub mod core;
pub mod files;
pub mod inventory;
pub mod memfd;
pub mod mm;
pub mod mounts;
pub mod namespaces;
pub mod pagemap;
pub mod pstree;
pub mod seccomp;

/// First number of every image but the inventory.
const COMMON: u32 = 0x5456_4319;
/// First number of what is no image of a task, such as statistics.
const SERVICE: u32 = 0x5510_5940;

/// The largest image file that is read as a whole. `files.img` of a million open files has 100 MB; the pagemap of a
/// 128 GiB server with a hole in each 64 KiB has 33 MB.
const FILE_BYTES_MAX: u64 = 128 << 20;
/// The largest record of `mm-PID.img`, which has all mappings of a task in one: some 70 bytes for each of a million.
const MM_BYTES_MAX: u64 = 96 << 20;
/// The largest record of all other kinds. What it decodes to can be twenty times as large.
const RECORD_BYTES_MAX: u64 = 8 << 20;
/// The most records of one file, see [`FILE_BYTES_MAX`].
pub(crate) const RECORDS_MAX: usize = 8 << 20;

/// Kinds of image files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Inventory,
    Pstree,
    Core,
    Ids,
    Mm,
    Files,
    Fdinfo,
    Memfd,
    Mounts,
    Pagemap,
    GhostFile,
    RemapFilePath,
    Userns,
    Timens,
    Seccomp,
    Stats,
}

impl Kind {
    /// The magic numbers that a file of this kind starts with.
    fn magic(self) -> &'static [u32] {
        match self {
            Self::Inventory => &[0x5831_3116],
            Self::Pstree => &[COMMON, 0x5027_3030],
            Self::Core => &[COMMON, 0x5505_3847],
            Self::Ids => &[COMMON, 0x5443_2030],
            Self::Mm => &[COMMON, 0x5749_2820],
            Self::Files => &[COMMON, 0x5630_3138],
            Self::Fdinfo => &[COMMON, 0x5621_3732],
            Self::Memfd => &[COMMON, 0x4845_3499],
            Self::Mounts => &[COMMON, 0x5556_3928],
            Self::Pagemap => &[COMMON, 0x5608_4025],
            Self::GhostFile => &[COMMON, 0x5258_3605],
            Self::RemapFilePath => &[COMMON, 0x5913_3954],
            Self::Userns => &[COMMON, 0x5547_4906],
            Self::Timens => &[COMMON, 0x4311_4433],
            Self::Seccomp => &[COMMON, 0x6441_3049],
            Self::Stats => &[SERVICE, 0x5709_3306],
        }
    }

    fn check_record(self, seen: u64) -> Result<(), Fault> {
        let limit = if self == Self::Mm { MM_BYTES_MAX } else { RECORD_BYTES_MAX };
        if seen > limit { Err(Fault::Limit { what: "length of a record", seen, limit }) } else { Ok(()) }
    }
}

/// An image file in memory, cut into its records.
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    kind: Kind,
    bytes: Vec<u8>,
    records: Vec<Range<usize>>,
}

impl Image {
    /// Reads a whole file.
    pub(crate) fn read(path: &Path, kind: Kind) -> crate::Result<Self> {
        let bytes = read_bounded(path)?;
        let records = cut(&bytes, kind).map_err(Error::image(path))?;
        Ok(Self { path: path.to_owned(), kind, bytes, records })
    }

    /// The records in their order.
    pub(crate) fn records(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.records.iter().map(|range| &self.bytes[range.clone()])
    }

    /// Decodes each record and gives it to `take`.
    pub(crate) fn each<M: Message + Default>(
        &self,
        mut take: impl FnMut(M) -> Result<(), Fault>,
    ) -> crate::Result<()> {
        for (record, bytes) in self.records().enumerate() {
            let message = M::decode(bytes).map_err(|source| Fault::Decode { record, source });
            message.and_then(&mut take).map_err(Error::image(&self.path))?;
        }
        Ok(())
    }

    /// Writes the file again with the records that `change` gives a new form; `false` if there is none.
    pub(crate) fn rewrite(
        &self,
        mut change: impl FnMut(&[u8]) -> Result<Option<Vec<u8>>, &'static str>,
    ) -> crate::Result<bool> {
        let start = self.records.first().map_or(self.bytes.len(), |range| range.start - 4);
        let mut out = Vec::with_capacity(self.bytes.len() + 64);
        out.extend_from_slice(&self.bytes[..start]);
        let mut changed = false;
        for (record, bytes) in self.records().enumerate() {
            let new = change(bytes).map_err(|reason| Fault::Wire { record, reason }).and_then(|new| {
                put_record(&mut out, self.kind, new.as_deref().unwrap_or(bytes)).map(|()| new.is_some())
            });
            changed |= new.map_err(Error::image(&self.path))?;
        }
        if changed {
            replace(&self.path, &out)?;
        }
        Ok(changed)
    }
}

/// The only record of a file, or the first one where raw data follow: nothing behind it is read.
pub(crate) fn read_one<M: Message + Default>(path: &Path, kind: Kind) -> crate::Result<M> {
    let bytes = read_first(path, kind)?;
    M::decode(bytes.as_slice()).map_err(|source| Error::image(path)(Fault::Decode { record: 0, source }))
}

/// The bytes of the first record of a file.
pub(crate) fn read_first(path: &Path, kind: Kind) -> crate::Result<Vec<u8>> {
    let mut file = open(path)?;
    let end = file.metadata().map_err(Error::io("look at", path))?.len();
    let head_bytes = kind.magic().len() * 4 + 4;
    let mut head = vec![0; head_bytes];
    let fault = |fault| Error::image(path)(fault);
    match file.read_exact(&mut head) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(fault(Fault::Truncated { end, needed: head_bytes as u64 }));
        }
        other => other.map_err(Error::io("read", path))?,
    }
    check_magic(&head, kind).map_err(fault)?;
    let length = u64::from(word(&head, head_bytes - 4));
    kind.check_record(length).map_err(fault)?;
    let mut bytes = Vec::new();
    file.take(length).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if (bytes.len() as u64) < length {
        return Err(fault(Fault::Truncated { end, needed: head_bytes as u64 + length }));
    }
    Ok(bytes)
}

/// Opens a file for reading, whatever it is a name of: a fifo in a hostile image directory must not hang the reader.
fn open(path: &Path) -> crate::Result<File> {
    let mut options = fs::OpenOptions::new();
    options.read(true).custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK);
    options.open(path).map_err(Error::io("open", path))
}

fn read_bounded(path: &Path) -> crate::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        let fault =
            Fault::Limit { what: "size of the file", seen: bytes.len() as u64, limit: FILE_BYTES_MAX };
        return Err(Error::image(path)(fault));
    }
    Ok(bytes)
}

fn check_magic(bytes: &[u8], kind: Kind) -> Result<(), Fault> {
    for (at, &expected) in kind.magic().iter().enumerate() {
        let seen = word(bytes, at * 4);
        if seen != expected {
            return Err(Fault::Magic { seen, expected });
        }
    }
    Ok(())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("the slice has four bytes"))
}

fn cut(bytes: &[u8], kind: Kind) -> Result<Vec<Range<usize>>, Fault> {
    let end = bytes.len() as u64;
    let mut at = kind.magic().len() * 4;
    if bytes.len() < at {
        return Err(Fault::Truncated { end, needed: at as u64 });
    }
    check_magic(bytes, kind)?;
    let mut records = Vec::new();
    while at < bytes.len() {
        if bytes.len() - at < 4 {
            return Err(Fault::Truncated { end, needed: at as u64 + 4 });
        }
        let length = u64::from(word(bytes, at));
        let needed = at as u64 + 4 + length;
        kind.check_record(length)?;
        if needed > end {
            return Err(Fault::Truncated { end, needed });
        }
        if records.len() == RECORDS_MAX {
            let limit = RECORDS_MAX as u64;
            return Err(Fault::Limit { what: "number of records", seen: limit + 1, limit });
        }
        records.push(at + 4..at + 4 + length as usize);
        at += 4 + length as usize;
    }
    Ok(records)
}

fn put_record(out: &mut Vec<u8>, kind: Kind, record: &[u8]) -> Result<(), Fault> {
    kind.check_record(record.len() as u64)?;
    let length = record.len() as u32;
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(record);
    Ok(())
}

/// The start of a file of this kind.
pub(crate) fn head(kind: Kind) -> Vec<u8> {
    kind.magic().iter().flat_map(|magic| magic.to_le_bytes()).collect()
}

/// Appends a message as a record.
pub(crate) fn put(out: &mut Vec<u8>, message: &impl Message) {
    let bytes = message.encode_to_vec();
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(&bytes);
}

/// Puts a file in the place of another at once: CRIU never sees half of it.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> crate::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let written =
        options.open(&new).and_then(|mut file| file.write_all(bytes)).and_then(|()| fs::rename(&new, path));
    written.map_err(|error| {
        let _ = fs::remove_file(&new);
        Error::io("write", path)(error)
    })
}

/// Files of a directory whose names are `PREFIX` + a number in this radix + `.img`, in the order of the numbers.
pub(crate) fn numbered(directory: &Path, prefix: &str, radix: u32) -> crate::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(Error::io("list", directory))? {
        let entry = entry.map_err(Error::io("list", directory))?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(prefix)?.strip_suffix(".img"));
        if let Some(number) = number.and_then(|number| u64::from_str_radix(number, radix).ok()) {
            found.push((number, entry.path()));
        }
    }
    found.sort_unstable();
    Ok(found)
}
