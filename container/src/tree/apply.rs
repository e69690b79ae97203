//! Writes a tree into an empty directory.
//!
//! All names are made first, with no rights for anybody but root; content may then arrive in any order; owners, modes,
//! attributes and times come last, because a write would take capabilities and times away again. Every path is resolved
//! beneath the directory, without following any link.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, fchmodat, mkdirat, mknodat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat, linkat, symlinkat};

use crate::error::{Context, Error};
use crate::tree::format::bad;
use crate::tree::{Entry, Kind, Tree};

/// Open files that are kept between two [`Applier::put`]. Chunks of one file follow each other as a rule.
const OPEN_FILES_MAX: usize = 128;

/// A tree that is being written. [`Applier::put`] may be called from several threads.
#[derive(Debug)]
pub struct Applier {
    root: OwnedFd,
    dir: PathBuf,
    tree: Tree,
    /// Where each extent begins in the stream, with its entry and its number in it; sorted.
    extents: Vec<Piece>,
    stream_bytes: u64,
    open: Mutex<HashMap<usize, Arc<File>>>,
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    stream: u64,
    entry: usize,
    offset: u64,
    bytes: u64,
}

impl Applier {
    /// Makes all names of the tree in `dir`, which must be an empty directory. Files have their length and no content.
    ///
    /// # Errors
    /// [`Error::Tree`] if the tree is malformed or the directory is not empty; else what the kernel says.
    pub fn begin(dir: &Path, tree: Tree) -> Result<Self, Error> {
        tree.check()?;
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_RDONLY;
        let root = nix::fcntl::open(dir, flags, Mode::empty()).context("open", dir.display())?;
        let mut listing = Dir::openat(&root, ".", flags, Mode::empty()).context("read", dir.display())?;
        if listing.iter().flatten().any(|item| !matches!(item.file_name().to_bytes(), b"." | b"..")) {
            return Err(bad(dir.as_os_str().as_bytes(), "the directory is not empty"));
        }
        let mut extents = Vec::new();
        let mut stream = 0;
        for (entry, item) in tree.entries.iter().enumerate() {
            for extent in &item.extents {
                extents.push(Piece { stream, entry, offset: extent.offset, bytes: extent.bytes });
                stream += extent.stream_bytes();
            }
        }
        let applier =
            Self { root, dir: dir.into(), tree, extents, stream_bytes: stream, open: Mutex::default() };
        for entry in &applier.tree.entries {
            applier.make(entry)?;
        }
        Ok(applier)
    }

    /// Length of the content stream in bytes.
    #[must_use]
    pub fn stream_bytes(&self) -> u64 {
        self.stream_bytes
    }

    /// Writes a part of the content stream: it may span extents and files, and parts may come in any order.
    ///
    /// # Errors
    /// `InvalidInput` for what lies beyond the stream's end; else what the kernel says, for example a full disk.
    pub fn put(&self, mut stream: u64, mut bytes: &[u8]) -> io::Result<()> {
        if stream.checked_add(bytes.len() as u64).is_none_or(|end| end > self.stream_bytes) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{} bytes at {stream} lie beyond the content of {} bytes",
                    bytes.len(),
                    self.stream_bytes
                ),
            ));
        }
        let mut index = self.extents.partition_point(|piece| piece.stream <= stream).saturating_sub(1);
        while !bytes.is_empty() {
            let piece = self.extents[index];
            let next = self.extents.get(index + 1).map_or(self.stream_bytes, |next| next.stream);
            let here = usize::try_from(next - stream).unwrap_or(usize::MAX).min(bytes.len());
            // What lies between the extent's end and the next one is padding.
            let inside = stream - piece.stream;
            let data = usize::try_from(piece.bytes.saturating_sub(inside)).unwrap_or(usize::MAX).min(here);
            if data > 0 {
                self.file(piece.entry)?.write_all_at(&bytes[..data], piece.offset + inside)?;
            }
            bytes = &bytes[here..];
            stream += here as u64;
            index += 1;
        }
        Ok(())
    }

    /// Gives everything its owner, mode, attributes and times. Call it when all content has arrived.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn finish(self) -> Result<(), Error> {
        self.open.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clear();
        // From the last to the first, so that a directory's time is set after all that is in it.
        for entry in self.tree.entries.iter().rev() {
            if entry.kind() != Kind::Hardlink {
                self.settle(entry)?;
            }
        }
        Ok(())
    }

    fn make(&self, entry: &Entry) -> Result<(), Error> {
        if entry.path.is_empty() {
            return Ok(());
        }
        let (parent, name) = self.parent(&entry.path)?;
        let private = Mode::S_IRUSR | Mode::S_IWUSR;
        let result = match entry.kind() {
            Kind::Directory => mkdirat(&parent, name, Mode::S_IRWXU),
            Kind::File => nix::fcntl::openat(
                &parent,
                name,
                OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW,
                private,
            )
            .and_then(|fd| nix::unistd::ftruncate(&fd, entry.bytes.cast_signed())),
            Kind::Symlink => symlinkat(std::ffi::OsStr::from_bytes(&entry.target), &parent, name),
            Kind::Fifo => mknodat(&parent, name, SFlag::S_IFIFO, private, 0),
            Kind::Socket => mknodat(&parent, name, SFlag::S_IFSOCK, private, 0),
            Kind::Whiteout => mknodat(&parent, name, SFlag::S_IFCHR, Mode::empty(), 0),
            Kind::Hardlink => {
                let (old_parent, old_name) = self.parent(&entry.target)?;
                linkat(&old_parent, old_name, &parent, name, AtFlags::empty())
            }
            Kind::Unknown => return Err(bad(&entry.path, "a kind that does not exist")),
        };
        result.context("create", self.show(entry))
    }

    fn settle(&self, entry: &Entry) -> Result<(), Error> {
        let shown = self.show(entry);
        let node = self.beneath(&entry.path, OFlag::O_PATH | OFlag::O_NOFOLLOW)?;
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        fchownat(&node, "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)
            .context("change the owner of", &shown)?;
        // A node that was opened by path alone is changed through this name; it is the node itself, links included.
        let through = PathBuf::from(format!("/proc/self/fd/{}", node.as_raw_fd()));
        if !matches!(entry.kind(), Kind::Symlink) {
            let mode = Mode::from_bits_truncate(entry.mode);
            fchmodat(nix::fcntl::AT_FDCWD, &through, mode, nix::sys::stat::FchmodatFlags::FollowSymlink)
                .context("change the mode of", &shown)?;
        }
        for attribute in &entry.xattrs {
            xattr::set_deref(&through, std::ffi::OsStr::from_bytes(&attribute.name), &attribute.value)
                .context("set an attribute of", &shown)?;
        }
        if let Some(time) = entry.modified {
            let time = TimeSpec::new(time.seconds, i64::from(time.nanoseconds));
            let (parent, name) = match entry.path.is_empty() {
                true => (self.root.as_fd().try_clone_to_owned().context("open", &shown)?, Path::new(".")),
                false => self.parent(&entry.path)?,
            };
            utimensat(&parent, name, &time, &time, UtimensatFlags::NoFollowSymlink)
                .context("set the time of", &shown)?;
        }
        Ok(())
    }

    /// The directory of an entry, opened beneath the root, and the entry's own name.
    fn parent<'a>(&self, path: &'a [u8]) -> Result<(OwnedFd, &'a Path), Error> {
        let (parent, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(at) => (&path[..at], &path[at + 1..]),
            None => (&b""[..], path),
        };
        let parent = self.beneath(parent, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        Ok((parent, Path::new(std::ffi::OsStr::from_bytes(name))))
    }

    fn beneath(&self, path: &[u8], flags: OFlag) -> Result<OwnedFd, Error> {
        let path = if path.is_empty() { &b"."[..] } else { path };
        let resolve = ResolveFlag::RESOLVE_BENEATH
            | ResolveFlag::RESOLVE_NO_SYMLINKS
            | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        // O_NOFOLLOW alone would let the last part be a link that is refused by RESOLVE_NO_SYMLINKS, unless O_PATH is set.
        let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve);
        openat2(&self.root, std::ffi::OsStr::from_bytes(path), how)
            .context("open", self.dir.join(std::ffi::OsStr::from_bytes(path)).display())
    }

    fn file(&self, entry: usize) -> io::Result<Arc<File>> {
        let mut open = self.open.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(file) = open.get(&entry) {
            return Ok(file.clone());
        }
        let fd = self
            .beneath(&self.tree.entries[entry].path, OFlag::O_WRONLY | OFlag::O_NOFOLLOW)
            .map_err(io::Error::other)?;
        if open.len() >= OPEN_FILES_MAX {
            open.clear();
        }
        let file = Arc::new(File::from(fd));
        open.insert(entry, file.clone());
        Ok(file)
    }

    fn show(&self, entry: &Entry) -> String {
        self.dir.join(std::ffi::OsStr::from_bytes(&entry.path)).display().to_string()
    }
}
