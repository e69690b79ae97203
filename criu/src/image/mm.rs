//! `mm-PID.img`: the mappings of a task.

use std::path::{Path, PathBuf};

use prost::Message;

use super::{Kind, read_first};
use crate::wire;
use crate::{Error, Fault};

/// The most mappings of a task. The kernel's default limit is 65,530; some databases ask for 2^18.
const VMAS_MAX: usize = 1 << 20;
/// Field of the message that holds one mapping.
pub(crate) const VMA_FIELD: u32 = 14;

const MAP_SHARED: u32 = 1;
const MAP_PRIVATE: u32 = 2;
const MAP_ANONYMOUS: u32 = 0x20;
const MAP_LOCKED: u32 = 0x2000;
const MAP_HUGETLB: u32 = 0x4_0000;

const PROT_WRITE: u32 = 2;

const VSYSCALL: u32 = 1 << 2;
const VDSO: u32 = 1 << 3;
const FILE_PRIVATE: u32 = 1 << 6;
const FILE_SHARED: u32 = 1 << 7;
const VVAR: u32 = 1 << 12;

/// Bit of `madv` for `MADV_HUGEPAGE`.
pub const MADV_HUGEPAGE: u64 = 1 << 14;
/// Bit of `madv` for `MADV_NOHUGEPAGE`.
pub const MADV_NOHUGEPAGE: u64 = 1 << 15;

/// A mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// Offset in the file or segment, in bytes.
    pub offset: u64,
    /// Id of the file in `files.img` for file mappings, of the segment for shared memory.
    pub id: u64,
    /// `PROT_*` bits.
    pub protection: u32,
    /// `MAP_*` bits.
    pub flags: u32,
    /// CRIU's bits: what kind of mapping this is.
    pub status: u32,
    /// Advice: bit n is advice number n of madvise.
    pub madv: u64,
}

impl Vma {
    /// Bytes of it.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.end - self.start
    }

    /// Private memory of no file: what a server allocates.
    #[must_use]
    pub fn is_private_anonymous(&self) -> bool {
        self.flags & (MAP_PRIVATE | MAP_ANONYMOUS) == MAP_PRIVATE | MAP_ANONYMOUS
    }

    /// CRIU registers it with userfaultfd when it restores lazily.
    #[must_use]
    pub fn can_be_lazy(&self) -> bool {
        self.is_private_anonymous()
            && self.flags & (MAP_LOCKED | MAP_HUGETLB) == 0
            && self.status & (VSYSCALL | VDSO | VVAR) == 0
    }

    /// The task may write through it.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.protection & PROT_WRITE != 0
    }

    /// Its pages are those of hugetlbfs.
    #[must_use]
    pub fn is_huge_tlb(&self) -> bool {
        self.flags & MAP_HUGETLB != 0
    }

    /// It maps the file with this id.
    #[must_use]
    pub fn file(&self) -> Option<u32> {
        let is_file = self.status & (FILE_PRIVATE | FILE_SHARED) != 0;
        if is_file { u32::try_from(self.id).ok() } else { None }
    }

    /// It maps the shared segment with this id: anonymous shared memory, memfd or System V shared memory.
    #[must_use]
    pub fn segment(&self) -> Option<u64> {
        let is_segment = self.flags & MAP_SHARED != 0 && self.file().is_none() && self.id != 0;
        is_segment.then_some(self.id)
    }
}

/// The address space of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressSpace {
    /// Id of the program's file in `files.img`.
    pub exe: u32,
    /// Mappings by address; they do not overlap.
    pub vmas: Vec<Vma>,
}

#[derive(Clone, PartialEq, Message)]
struct MmEntry {
    #[prost(uint32, tag = "12")]
    exe: u32,
    #[prost(message, repeated, tag = "14")]
    vmas: Vec<VmaEntry>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(crate) struct VmaEntry {
    #[prost(uint64, tag = "1")]
    pub(crate) start: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) end: u64,
    #[prost(uint64, tag = "3")]
    offset: u64,
    #[prost(uint64, tag = "4")]
    id: u64,
    #[prost(uint32, tag = "5")]
    protection: u32,
    #[prost(uint32, tag = "6")]
    flags: u32,
    #[prost(uint32, tag = "7")]
    status: u32,
    #[prost(uint64, tag = "9")]
    madv: u64,
}

impl From<VmaEntry> for Vma {
    fn from(entry: VmaEntry) -> Self {
        let VmaEntry { start, end, offset, id, protection, flags, status, madv } = entry;
        Self { start, end, offset, id, protection, flags, status, madv }
    }
}

pub(crate) fn path(directory: &Path, pid: u32) -> PathBuf {
    directory.join(format!("mm-{pid}.img"))
}

/// Reads the mappings of a task.
///
/// # Errors
/// [`crate::Error::Io`] if there is no such file, [`crate::Error::Image`] if it is not what CRIU writes.
pub fn read(directory: &Path, pid: u32) -> crate::Result<AddressSpace> {
    let path = path(directory, pid);
    let bytes = read_first(&path, Kind::Mm)?;
    decode(&bytes).map_err(Error::image(path))
}

fn decode(bytes: &[u8]) -> Result<AddressSpace, Fault> {
    // Counted before decoding: two bytes of message can become eighty bytes of memory.
    let vmas = wire::count(bytes, VMA_FIELD).map_err(|reason| Fault::Wire { record: 0, reason })?;
    if vmas > VMAS_MAX {
        return Err(Fault::Limit { what: "number of mappings", seen: vmas as u64, limit: VMAS_MAX as u64 });
    }
    let entry = MmEntry::decode(bytes).map_err(|source| Fault::Decode { record: 0, source })?;
    let mut behind = 0;
    for vma in &entry.vmas {
        if vma.start < behind || vma.start % 4096 != 0 {
            return Err(Fault::Value {
                what: "start of a mapping",
                seen: vma.start,
                expected: "rising page borders",
            });
        }
        if vma.end <= vma.start || vma.end % 4096 != 0 {
            return Err(Fault::Value {
                what: "end of a mapping",
                seen: vma.end,
                expected: "a page border behind its start",
            });
        }
        behind = vma.end;
    }
    Ok(AddressSpace { exe: entry.exe, vmas: entry.vmas.into_iter().map(Vma::from).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limited;

    #[test]
    fn as_many_mappings_as_a_process_can_have_are_read() {
        let mut message = Vec::new();
        for page in 1..=VMAS_MAX as u64 {
            let mut vma = Vec::new();
            wire::put_number(&mut vma, 1, page * 4096);
            wire::put_number(&mut vma, 2, page * 4096 + 4096);
            wire::put_bytes(&mut message, VMA_FIELD, &vma);
        }
        assert_eq!(decode(&message).expect("as many as are allowed").vmas.len(), VMAS_MAX);
        wire::put_bytes(&mut message, VMA_FIELD, &[]);
        let more = decode(&message).expect_err("one more");
        assert!(matches!(more, Fault::Limit { what: "number of mappings", .. }), "{more:?}");
    }

    #[test]
    fn too_many_mappings_are_refused_before_memory_is_taken() {
        limited::to(
            100 << 20,
            "image::mm::tests::too_many_mappings_are_refused_before_memory_is_taken",
            || {
                let mut empty = Vec::new();
                wire::put_bytes(&mut empty, VMA_FIELD, &[]);
                let refused = decode(&empty.repeat(16 << 20)).expect_err("sixteen million");
                assert!(matches!(refused, Fault::Limit { what: "number of mappings", .. }), "{refused:?}");
            },
        );
    }
}
