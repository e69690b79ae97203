//! Lists a directory. Nobody may change it meanwhile: its writers are frozen.

use std::collections::HashMap;
use std::fs::{File, Metadata, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::libc;
use nix::unistd::{Whence, lseek64};

use crate::error::{Context, Error, Refusal};
use crate::tree::format::{Carry, ENTRIES_MAX, bad, carry};
use crate::tree::{Entry, Extent, Kind, Time, Tree, Xattr};

/// Lists all that is in `dir`.
///
/// # Errors
/// `Refused` with the path for what cannot be carried (devices other than whiteouts); else what the kernel says.
pub fn scan(dir: &Path) -> Result<Tree, Error> {
    let mut scan = Scan { root: dir, entries: Vec::new(), links: HashMap::new() };
    scan.visit(b"")?;
    let tree = Tree { entries: scan.entries };
    tree.check()?;
    Ok(tree)
}

struct Scan<'a> {
    root: &'a Path,
    entries: Vec<Entry>,
    /// First path of each file that has more than one name.
    links: HashMap<(u64, u64), Vec<u8>>,
}

impl Scan<'_> {
    fn visit(&mut self, relative: &[u8]) -> Result<(), Error> {
        // Depth first with a list, not by recursion: the depth is chosen by the server.
        let mut waiting = vec![relative.to_vec()];
        while let Some(path) = waiting.pop() {
            if self.entries.len() >= ENTRIES_MAX {
                return Err(bad(&path, "more than a million entries"));
            }
            let full = join(self.root, &path);
            let metadata = full.symlink_metadata().context("look at", full.display())?;
            let entry = self.entry(&path, &full, &metadata)?;
            if entry.kind() == Kind::Directory {
                let mut names = Vec::new();
                for item in std::fs::read_dir(&full).context("read", full.display())? {
                    names.push(item.context("read", full.display())?.file_name());
                }
                names.sort_unstable();
                // The last pushed is the next visited.
                for name in names.into_iter().rev() {
                    let mut child = path.clone();
                    if !child.is_empty() {
                        child.push(b'/');
                    }
                    child.extend_from_slice(name.as_bytes());
                    waiting.push(child);
                }
            }
            self.entries.push(entry);
        }
        Ok(())
    }

    fn entry(&mut self, path: &[u8], full: &Path, metadata: &Metadata) -> Result<Entry, Error> {
        let kind = metadata.file_type();
        let mut entry = Entry {
            path: path.to_vec(),
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            modified: Some(Time {
                seconds: metadata.mtime(),
                nanoseconds: u32::try_from(metadata.mtime_nsec()).unwrap_or(0),
            }),
            ..Entry::default()
        };
        if !kind.is_dir() && metadata.nlink() > 1 {
            let id = (metadata.dev(), metadata.ino());
            if let Some(first) = self.links.get(&id) {
                entry.set_kind(Kind::Hardlink);
                entry.target.clone_from(first);
                return Ok(entry);
            }
            self.links.insert(id, path.to_vec());
        }
        let refuse =
            |kind| Err(Refusal::File { path: String::from_utf8_lossy(path).into_owned(), kind }.into());
        entry.set_kind(if kind.is_dir() {
            Kind::Directory
        } else if kind.is_file() {
            Kind::File
        } else if kind.is_symlink() {
            Kind::Symlink
        } else if kind.is_fifo() {
            Kind::Fifo
        } else if kind.is_socket() {
            Kind::Socket
        } else if kind.is_char_device() && metadata.rdev() == 0 {
            Kind::Whiteout
        } else if kind.is_block_device() {
            return refuse("block device");
        } else {
            return refuse("character device");
        });
        match entry.kind() {
            Kind::Symlink => {
                let target = std::fs::read_link(full).context("read", full.display())?;
                entry.target = target.as_os_str().as_bytes().to_vec();
            }
            Kind::File => {
                entry.bytes = metadata.len();
                entry.extents = extents(full, metadata.len())?;
            }
            _ => {}
        }
        entry.xattrs = xattrs(path, full)?;
        Ok(entry)
    }
}

pub(super) fn join(root: &Path, relative: &[u8]) -> std::path::PathBuf {
    if relative.is_empty() { root.into() } else { root.join(std::ffi::OsStr::from_bytes(relative)) }
}

pub(super) fn open_file(full: &Path) -> Result<File, Error> {
    // O_NOATIME keeps a scan from writing to what it reads.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let open = |flags| OpenOptions::new().read(true).custom_flags(flags).open(full);
    open(flags | libc::O_NOATIME).or_else(|_| open(flags)).context("open", full.display())
}

/// Where a file has data, as the file system tells it.
fn extents(full: &Path, bytes: u64) -> Result<Vec<Extent>, Error> {
    let mut extents: Vec<Extent> = Vec::new();
    if bytes == 0 {
        return Ok(extents);
    }
    let file = open_file(full)?;
    let mut at = 0;
    while at < bytes {
        let Some(start) = seek(&file, at, Whence::SeekData).context("seek in", full.display())? else {
            break;
        };
        let end = seek(&file, start, Whence::SeekHole).context("seek in", full.display())?.unwrap_or(bytes);
        let (start, end) = (start.min(bytes), end.min(bytes));
        if end > start {
            match extents.last_mut() {
                Some(last) if last.offset + last.bytes == start => last.bytes += end - start,
                _ => extents.push(Extent { offset: start, bytes: end - start }),
            }
        }
        at = end.max(at + 1);
    }
    Ok(extents)
}

/// `None` if there is no data behind `at`.
fn seek(file: &File, at: u64, whence: Whence) -> nix::Result<Option<u64>> {
    let at = i64::try_from(at).map_err(|_| nix::errno::Errno::EOVERFLOW)?;
    match lseek64(file.as_fd(), at, whence) {
        Ok(offset) => Ok(u64::try_from(offset).ok()),
        Err(nix::errno::Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn xattrs(path: &[u8], full: &Path) -> Result<Vec<Xattr>, Error> {
    let names = match xattr::list(full) {
        Ok(names) => names,
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(Vec::new()),
        Err(error) => return Err(error).context("list the attributes of", full.display()),
    };
    let mut xattrs = Vec::new();
    for name in names {
        match carry(name.as_bytes()) {
            Carry::LeaveOut => {}
            Carry::Refuse => return Err(bad(path, "an overlay attribute that points to another file")),
            Carry::Yes => {
                let value = xattr::get(full, &name).context("read an attribute of", full.display())?;
                xattrs.push(Xattr { name: name.as_bytes().to_vec(), value: value.unwrap_or_default() });
            }
        }
    }
    xattrs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(xattrs)
}
