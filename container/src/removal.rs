//! Removes directories that a server filled, and never what is mounted below them.
//!
//! A replica's directory holds mount points: the overlay over the host's own files, and for moments what runc binds while
//! it restores, the user's volumes among it. A removal that walked into a mount would delete what is not ours. So mounts
//! are taken away first ([`unmount_below`]), and [`remove_tree`] refuses to cross into one that is left.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, RenameFlags, ResolveFlag, openat2, renameat2};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::error::{Context, Error};

/// Entries of a directory that are listed at once.
const BATCH: usize = 1024;

/// Takes away every mount of this process's namespace at or below `dir`, the latest first.
pub(crate) fn unmount_below(dir: &Path) -> Result<(), Error> {
    // More than once: what was mounted over another mount shows again when it is gone.
    for _ in 0..8 {
        let mounts = std::fs::read("/proc/self/mountinfo").context("read", "/proc/self/mountinfo")?;
        let mut targets: Vec<PathBuf> = mounts
            .split(|byte| *byte == b'\n')
            .filter_map(target)
            .filter(|target| target.starts_with(dir))
            .collect();
        if targets.is_empty() {
            return Ok(());
        }
        targets.reverse();
        for target in targets {
            if let Err(error) = rewarm_sys::mount::detach(&target) {
                tracing::debug!(%error, target = %target.display(), "unmount");
            }
        }
    }
    Err(Error::Deadline { operation: "unmounting what lies below a replica", seconds: 0 })
}

/// The fifth field of a line of mountinfo, with the kernel's octal escapes undone.
fn target(line: &[u8]) -> Option<PathBuf> {
    let field = line.split(|byte| *byte == b' ').nth(4)?;
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal =
            tail.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                path.push(byte);
                rest = &tail[3..];
            }
            None => {
                path.push(*first);
                rest = tail;
            }
        }
    }
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(&path)))
}

/// Removes a file, or a directory with all that is in it, if it exists.
///
/// Directories within are moved up before they are emptied: the depth is chosen by a server, and neither the stack nor
/// the number of open files may depend on it.
///
/// # Errors
/// `EXDEV` or `EBUSY` if something is mounted below; what lies in that mount is untouched.
pub(crate) fn remove_tree(path: &Path) -> Result<(), Error> {
    remove(path).context("remove", path.display())
}

fn remove(path: &Path) -> io::Result<()> {
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(metadata) if !metadata.is_dir() => return unless_gone(std::fs::remove_file(path)).map(drop),
        Ok(_) => {}
    }
    let parent = File::open(path.parent().unwrap_or(Path::new("/")))?;
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let Some(top) = unless_gone(open(&parent, name.as_bytes()))? else { return Ok(()) };
    let mut serial = 0u64;
    // A shim and the command that sweeps after it may remove the same tree at the same time: what the other has removed
    // already is no failure, and what it has moved to the top meanwhile is found in the next round.
    loop {
        // Directories are emptied into the top, so that theirs become entries of the top.
        for (entry, kind) in unless_gone(some(&top))?.unwrap_or_default() {
            if kind == Type::Directory {
                if let Some(dir) = unless_gone(open(&top, &entry))? {
                    empty(&dir, &top, &mut serial)?;
                }
                match unlinkat(&top, bytes(&entry), UnlinkatFlags::RemoveDir) {
                    Ok(()) | Err(Errno::ENOENT | Errno::ENOTEMPTY) => {}
                    Err(errno) => return Err(errno.into()),
                }
            } else {
                unlink(&top, &entry)?;
            }
        }
        match unlinkat(&parent, name, UnlinkatFlags::RemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => return Ok(()),
            Err(Errno::ENOTEMPTY) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// `None` if somebody else has removed it meanwhile.
fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn unlink(dir: &OwnedFd, name: &[u8]) -> io::Result<()> {
    match unlinkat(dir, bytes(name), UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Removes the files of a directory and moves its directories to `top`.
fn empty(dir: &OwnedFd, top: &OwnedFd, serial: &mut u64) -> io::Result<()> {
    loop {
        let entries = unless_gone(some(dir))?.unwrap_or_default();
        if entries.is_empty() {
            return Ok(());
        }
        for (entry, kind) in entries {
            if kind == Type::Directory {
                // A removal that was interrupted has left names of this kind behind.
                loop {
                    *serial += 1;
                    let moved = format!(".removed-{serial}");
                    match renameat2(dir, bytes(&entry), top, moved.as_str(), RenameFlags::RENAME_NOREPLACE) {
                        Err(Errno::EEXIST) => {}
                        Ok(()) | Err(Errno::ENOENT) => break,
                        Err(errno) => return Err(errno.into()),
                    }
                }
            } else {
                unlink(dir, &entry)?;
            }
        }
    }
}

fn bytes(name: &[u8]) -> &std::ffi::OsStr {
    std::ffi::OsStr::from_bytes(name)
}

/// Opens a directory that is not the root of a mount.
fn open(parent: impl AsFd, name: &[u8]) -> io::Result<OwnedFd> {
    let resolve =
        ResolveFlag::RESOLVE_NO_XDEV | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_BENEATH;
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(openat2(parent, bytes(name), OpenHow::new().flags(flags).resolve(resolve))?)
}

/// Some entries of a directory; none if it is empty.
fn some(dir: &OwnedFd) -> io::Result<Vec<(Vec<u8>, Type)>> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut listing = Dir::openat(dir, ".", flags, Mode::empty())?;
    let mut entries = Vec::new();
    for item in listing.iter() {
        let item = item?;
        let name = item.file_name().to_bytes().to_vec();
        if name == b"." || name == b".." {
            continue;
        }
        let kind = match item.file_type() {
            Some(kind) => kind,
            // A file system that does not tell: opening decides.
            None => match open(dir, &name) {
                Ok(_) => Type::Directory,
                Err(error) if error.raw_os_error() == Some(Errno::ENOTDIR as i32) => Type::File,
                Err(error) => return Err(error),
            },
        };
        entries.push((name, kind));
        if entries.len() == BATCH {
            break;
        }
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deep_tree_is_removed_and_a_link_is_not_followed() {
        let dir = tempfile::tempdir().expect("dir");
        let outside = dir.path().join("outside");
        std::fs::create_dir(&outside).expect("dir");
        std::fs::write(outside.join("file"), b"kept").expect("file");
        let tree = dir.path().join("tree");
        let mut deep = tree.clone();
        for _ in 0..1500 {
            deep.push("d");
        }
        std::fs::create_dir_all(&deep).expect("dirs");
        std::fs::write(tree.join("d/d/file"), b"gone").expect("file");
        std::os::unix::fs::symlink(&outside, tree.join("d/link")).expect("link");
        remove_tree(&tree).expect("remove");
        assert!(!tree.exists());
        assert_eq!(std::fs::read(outside.join("file")).expect("read"), b"kept");
        remove_tree(&tree).expect("nothing to remove");
    }

    #[test]
    fn two_who_remove_the_same_file_both_succeed() {
        let dir = tempfile::tempdir().expect("dir");
        let file = dir.path().join("file");
        for _ in 0..2000 {
            std::fs::write(&file, b"gone").expect("file");
            let together = std::sync::Barrier::new(2);
            std::thread::scope(|scope| {
                let both = [0, 1].map(|_| {
                    scope.spawn(|| {
                        together.wait();
                        remove_tree(&file)
                    })
                });
                both.into_iter().for_each(|one| one.join().expect("no panic").expect("removed"));
            });
        }
    }

    #[test]
    fn two_who_remove_the_same_tree_both_succeed() {
        for round in 0..20 {
            let dir = tempfile::tempdir().expect("dir");
            let tree = dir.path().join("tree");
            for branch in 0..8 {
                std::fs::create_dir_all(tree.join(format!("{branch}/a/b/c"))).expect("dirs");
                std::fs::write(tree.join(format!("{branch}/a/file")), b"gone").expect("file");
            }
            std::thread::scope(|scope| {
                let both = [0, 1].map(|_| scope.spawn(|| remove_tree(&tree)));
                both.into_iter().for_each(|one| one.join().expect("no panic").expect("removed"));
            });
            assert!(!tree.exists(), "round {round}");
        }
    }

    #[test]
    fn what_is_mounted_below_is_left_alone() {
        let dir = tempfile::tempdir().expect("dir");
        let (tree, volume) = (dir.path().join("tree"), dir.path().join("volume"));
        std::fs::create_dir_all(tree.join("a/mounted")).expect("dirs");
        std::fs::create_dir(&volume).expect("dir");
        std::fs::write(volume.join("file"), b"kept").expect("file");
        let (thread_tree, thread_volume) = (tree.clone(), volume.clone());
        // A thread has a mount namespace of its own for this, which ends with it.
        let mounted = std::thread::spawn(move || {
            use nix::mount::{MsFlags, mount};
            if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).is_err() {
                return None;
            }
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private");
            let target = thread_tree.join("a/mounted");
            mount(Some(&thread_volume), &target, none, MsFlags::MS_BIND, none).expect("bind");
            Some(remove_tree(&thread_tree).is_err())
        })
        .join()
        .expect("no panic");
        let Some(refused) = mounted else {
            let promised = std::env::var("REWARM_TEST_NEEDS").unwrap_or_default();
            assert!(!promised.split(',').any(|need| need == "root"), "root was promised");
            return;
        };
        assert!(refused, "a bind of the same file system is a border too");
        assert_eq!(std::fs::read(volume.join("file")).expect("read"), b"kept");
    }

    #[test]
    fn escapes_of_the_mount_table_are_undone() {
        let line = br"36 35 98:0 / /mnt/a\040b\134c rw,noatime - ext3 /dev/root rw";
        assert_eq!(target(line), Some(PathBuf::from("/mnt/a b\\c")));
        assert_eq!(target(b""), None);
    }
}
