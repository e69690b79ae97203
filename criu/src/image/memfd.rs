//! `memfd.img`: files of shared memory. Anonymous shared mappings are such files too, to the kernel and to CRIU.

use std::collections::BTreeMap;
use std::path::Path;

use prost::Message;

use super::files::{FileKind, OpenFile};
use super::{Image, Kind};
use crate::Error;

/// A file of shared memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memfd {
    /// Its number, to which [`FileKind::Memfd`] refers.
    pub inode: u32,
    /// The segment with its content: the number in `pagemap-shmem-ID.img`.
    pub segment: u32,
    /// Its pages are those of hugetlbfs.
    pub is_huge_tlb: bool,
}

#[derive(Clone, PartialEq, Message)]
struct MemfdInodeEntry {
    #[prost(uint32, tag = "5")]
    segment: u32,
    #[prost(uint64, tag = "7")]
    inode: u64,
    #[prost(uint32, tag = "8")]
    huge_tlb: u32,
}

/// Reads the files of shared memory of an image directory; none where there is no such image.
///
/// # Errors
/// [`Error::Io`] or [`Error::Image`] if it cannot be read.
pub fn read(directory: &Path) -> crate::Result<Vec<Memfd>> {
    let path = directory.join("memfd.img");
    let image = match Image::read(&path, Kind::Memfd) {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Vec::new());
        }
        read => read?,
    };
    let mut found = Vec::new();
    image.each(|entry: MemfdInodeEntry| {
        let MemfdInodeEntry { segment, inode, huge_tlb } = entry;
        // Those of open files have 32 bits: to a larger number nothing refers.
        if let Ok(inode) = u32::try_from(inode) {
            found.push(Memfd { inode, segment, is_huge_tlb: huge_tlb != 0 });
        }
        Ok(())
    })?;
    Ok(found)
}

/// The files of `files.img` that are shared memory in ordinary pages, by id, with their segments.
#[must_use]
pub fn segments(memfds: &[Memfd], files: &[OpenFile]) -> BTreeMap<u32, u32> {
    let segment = |inode| memfds.iter().find(|memfd| memfd.inode == inode && !memfd.is_huge_tlb);
    let of_file = |file: &OpenFile| match file.kind {
        FileKind::Memfd { inode } => Some((file.id, segment(inode)?.segment)),
        _ => None,
    };
    files.iter().filter_map(of_file).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_lead_to_their_segments() {
        let memfd = |inode, segment, is_huge_tlb| Memfd { inode, segment, is_huge_tlb };
        let memfds = [memfd(1, 100, false), memfd(2, 200, true), memfd(3, 300, false)];
        let file = |id, kind| OpenFile { id, kind };
        let files = [
            file(7, FileKind::Memfd { inode: 3 }),
            file(8, FileKind::Memfd { inode: 2 }),
            file(9, FileKind::Memfd { inode: 4 }),
            file(10, FileKind::Pipe { pipe: 1 }),
            file(11, FileKind::Memfd { inode: 3 }),
        ];
        assert_eq!(segments(&memfds, &files), BTreeMap::from([(7, 300), (11, 300)]));
    }

    #[test]
    fn an_image_as_criu_writes_it() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(read(folder.path()).expect("none"), []);
        // Name "x", 1 MiB, segment 88896, not sealed, inode 1, mode.
        let entry =
            b"\x0a\x01x\x10\x00\x18\x00\x20\x80\x80\x40\x28\xc0\xb6\x05\x30\x01\x38\x01\x48\xff\x83\x02";
        let mut bytes = super::super::head(Kind::Memfd);
        bytes.extend((entry.len() as u32).to_le_bytes());
        bytes.extend(entry);
        std::fs::write(folder.path().join("memfd.img"), bytes).expect("written");
        assert_eq!(
            read(folder.path()).expect("read"),
            [Memfd { inode: 1, segment: 88896, is_huge_tlb: false }]
        );
    }
}
