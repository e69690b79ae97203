//! `pagemap-PID.img` and `pagemap-shmem-ID.img` with `pages-N.img`: where the pages of a task or segment are.
//!
//! A pagemap has a head that names the pages file, then runs of pages. The pages file has no head: the bytes of the runs
//! that are present, one after another. A run that is lazy and not present has no bytes in it; CRIU leaves it to the
//! lazy-pages peer. **Restoring such an image without lazy pages makes CRIU spin for ever**: give it all bytes then.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use prost::Message;

use super::{Image, Kind, RECORDS_MAX, head, put, replace};
use crate::layout::PAGE_BYTES;
use crate::page_server::{Flags, Object};
use crate::{Error, Fault};

/// End of the largest user address space on x86-64.
const ADDRESS_MAX: u64 = 1 << 56;

/// A run of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Address of the first page, or offset in the segment.
    pub vaddr: u64,
    /// Number of pages.
    pub pages: u64,
    /// Where their bytes are.
    pub flags: Flags,
}

impl Entry {
    /// Bytes that it has in the pages file.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        if self.flags.contains(Flags::PRESENT) { self.pages * PAGE_BYTES } else { 0 }
    }
}

/// A pagemap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pagemap {
    /// The number N of `pages-N.img`, unique in an image directory.
    pub pages_id: u32,
    /// Runs by address, not overlapping.
    pub entries: Vec<Entry>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct PagemapHead {
    // Required by CRIU's reader, so a zero must be written too.
    #[prost(uint32, required, tag = "1")]
    pages_id: u32,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct PagemapEntry {
    #[prost(uint64, required, tag = "1")]
    vaddr: u64,
    /// The number of pages until CRIU 4.0; required, and ignored where the new one is.
    #[prost(uint32, required, tag = "2")]
    old_pages: u32,
    #[prost(bool, optional, tag = "3")]
    in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    pages: Option<u64>,
}

/// Path of the pagemap of an object.
#[must_use]
pub fn path(directory: &Path, object: Object) -> PathBuf {
    directory.join(match object {
        Object::Task { pid } => format!("pagemap-{pid}.img"),
        Object::Shmem { id } => format!("pagemap-shmem-{id}.img"),
    })
}

/// Path of a pages file.
#[must_use]
pub fn pages_path(directory: &Path, pages_id: u32) -> PathBuf {
    directory.join(format!("pages-{pages_id}.img"))
}

/// Reads the pagemap of an object.
///
/// # Errors
/// [`Error::Io`] if there is none, [`Error::Image`] if it is not what CRIU writes.
pub fn read(directory: &Path, object: Object) -> crate::Result<Pagemap> {
    let path = path(directory, object);
    let image = Image::read(&path, Kind::Pagemap)?;
    let decoded = decode(&image);
    decoded.map_err(Error::image(path))
}

fn decode(image: &Image) -> Result<Pagemap, Fault> {
    let mut records = image.records().enumerate();
    let (_, first) = records.next().ok_or(Fault::Absent { what: "head" })?;
    let head = PagemapHead::decode(first).map_err(|source| Fault::Decode { record: 0, source })?;
    let mut entries = Vec::with_capacity(records.len());
    let mut behind = 0;
    for (record, bytes) in records {
        let entry = PagemapEntry::decode(bytes).map_err(|source| Fault::Decode { record, source })?;
        let entry = convert(entry)?;
        if entry.vaddr < behind {
            let expected = "not below the end of the run before";
            return Err(Fault::Value { what: "address of a run", seen: entry.vaddr, expected });
        }
        behind = entry.vaddr + entry.pages * PAGE_BYTES;
        entries.push(entry);
    }
    Ok(Pagemap { pages_id: head.pages_id, entries })
}

fn convert(entry: PagemapEntry) -> Result<Entry, Fault> {
    let vaddr = entry.vaddr;
    let pages = entry.pages.unwrap_or(u64::from(entry.old_pages));
    let bits = match (entry.flags, entry.in_parent) {
        (Some(bits), _) => bits,
        (None, Some(true)) => Flags::PARENT.bits(),
        (None, _) => Flags::PRESENT.bits(),
    };
    let flags = Flags::from_bits(bits);
    let flags =
        flags.ok_or(Fault::Value { what: "flags of a run", seen: u64::from(bits), expected: "at most 7" })?;
    let end = pages.checked_mul(PAGE_BYTES).and_then(|bytes| vaddr.checked_add(bytes));
    if !vaddr.is_multiple_of(PAGE_BYTES) {
        return Err(Fault::Value { what: "address of a run", seen: vaddr, expected: "a page border" });
    }
    if pages == 0 || end.is_none_or(|end| end > ADDRESS_MAX) {
        return Err(Fault::Value {
            what: "pages of a run",
            seen: pages,
            expected: "some, inside the address space",
        });
    }
    Ok(Entry { vaddr, pages, flags })
}

/// Writes the pagemap of an object. The pages file is the caller's: it must exist, even if it is empty, and have exactly
/// the bytes of the entries that are present, in their order.
///
/// Entries must rise and not overlap, and lie inside the mappings of the task; neighbours may be merged.
///
/// # Errors
/// [`Error::Io`] if it cannot be written, [`Error::Image`] if the entries are not in order.
pub fn write(directory: &Path, object: Object, pagemap: &Pagemap) -> crate::Result<()> {
    let path = path(directory, object);
    let bytes = encode(pagemap).map_err(Error::image(&path))?;
    replace(&path, &bytes)
}

fn encode(pagemap: &Pagemap) -> Result<Vec<u8>, Fault> {
    let mut out = head(Kind::Pagemap);
    put(&mut out, &PagemapHead { pages_id: pagemap.pages_id });
    let limit = RECORDS_MAX as u64 - 1;
    if pagemap.entries.len() as u64 > limit {
        return Err(Fault::Limit { what: "number of runs", seen: pagemap.entries.len() as u64, limit });
    }
    let mut behind = 0;
    for entry in &pagemap.entries {
        let Entry { vaddr, pages, flags } = *entry;
        if vaddr < behind {
            let expected = "not below the end of the run before";
            return Err(Fault::Value { what: "address of a run", seen: vaddr, expected });
        }
        let message = PagemapEntry {
            vaddr,
            old_pages: 0,
            in_parent: None,
            flags: Some(flags.bits()),
            pages: Some(pages),
        };
        convert(message)?;
        put(&mut out, &message);
        behind = vaddr + pages * PAGE_BYTES;
    }
    Ok(out)
}

/// Turns the pages of an object that may come later into pages that must come later: takes their bytes out of the pages
/// file and gives them to `take`, with their address, in steps of at most 1 MiB. CRIU then leaves them to the
/// lazy-pages peer. Returns the number of bytes taken out.
///
/// A dump of CRIU 4 marks each lazy-able page as both lazy and present.
///
/// # Errors
/// [`Error::Io`] or [`Error::Image`]; the images are as they were then.
pub fn make_lazy(
    directory: &Path,
    object: Object,
    mut take: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> crate::Result<u64> {
    let mut pagemap = read(directory, object)?;
    let old_path = pages_path(directory, pagemap.pages_id);
    let new_path = old_path.with_extension("img.new");
    let mut old = File::open(&old_path).map_err(Error::io("open", &old_path))?;
    let mut new = BufWriter::new(File::create(&new_path).map_err(Error::io("create", &new_path))?);
    let mut taken = 0;
    let both = Flags::LAZY | Flags::PRESENT;
    let mut split = || {
        for entry in &mut pagemap.entries {
            let is_lazy = entry.flags.contains(both);
            copy(&mut old, entry.stored_bytes(), |offset, bytes| {
                if is_lazy { take(entry.vaddr + offset, bytes) } else { new.write_all(bytes) }
            })?;
            if is_lazy {
                taken += entry.stored_bytes();
                entry.flags = Flags::LAZY;
            }
        }
        new.flush()
    };
    if let Err(error) = split() {
        let _ = fs::remove_file(&new_path);
        return Err(Error::io("split", &old_path)(error));
    }
    // A pagemap that says "lazy" beside a pages file that still has the bytes reads wrong pages; the other way round
    // too. The directory belongs to one restore, and a crash between the two writes ends that restore.
    write(directory, object, &pagemap)?;
    fs::rename(&new_path, &old_path).map_err(Error::io("replace", &old_path))?;
    Ok(taken)
}

fn copy(from: &mut File, bytes: u64, mut take: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    const STEP: u64 = 1 << 20;
    let mut buffer = vec![0; bytes.min(STEP) as usize];
    let mut done = 0;
    while done < bytes {
        let step = (bytes - done).min(STEP) as usize;
        from.read_exact(&mut buffer[..step])?;
        take(done, &buffer[..step])?;
        done += step as u64;
    }
    Ok(())
}

/// Reads the bytes of the runs of an object that are present, in order, in steps of at most 1 MiB.
///
/// # Errors
/// [`Error::Io`] or [`Error::Image`] if the images cannot be read or `take` fails.
pub fn each_stored(
    directory: &Path,
    object: Object,
    mut take: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> crate::Result<()> {
    let pagemap = read(directory, object)?;
    let path = pages_path(directory, pagemap.pages_id);
    let mut file = File::open(&path).map_err(Error::io("open", &path))?;
    let mut all = || {
        file.seek(SeekFrom::Start(0))?;
        pagemap.entries.iter().try_for_each(|entry| {
            copy(&mut file, entry.stored_bytes(), |offset, bytes| take(entry.vaddr + offset, bytes))
        })
    };
    all().map_err(Error::io("read", &path))
}
