//! Opens the files of a store's folder for a worker that may not: below the folder that root named, nowhere else.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use rewarm_store::{Files, Folder};

/// The folder of one store.
#[derive(Debug)]
pub(crate) struct Broker {
    folder: PathBuf,
}

impl Broker {
    pub(crate) fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// Opens a regular file for reading.
    pub(crate) fn open(&self, path: &str) -> io::Result<OwnedFd> {
        // Opened anew each time: the folder may be moved away and come back.
        let folder = File::open(&self.folder)?;
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let file = openat2(&folder, path, how)?;
        if File::from(file.try_clone()?).metadata()?.is_file() {
            return Ok(file);
        }
        Err(io::ErrorKind::InvalidInput.into())
    }

    /// Lists what lies below a folder below the folder.
    pub(crate) fn list(&self, folder: &str) -> io::Result<Vec<(String, u64)>> {
        let plain = Path::new(folder).components().all(|part| matches!(part, Component::Normal(_)));
        if !plain {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let at = File::open(&self.folder)?;
        Folder::new(format!("/proc/self/fd/{}/", at.as_raw_fd())).list(folder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_outside_of_the_folder_can_be_had() {
        let outer = tempfile::tempdir().expect("a folder");
        let folder = outer.path().join("store");
        std::fs::create_dir_all(folder.join("tags/a")).expect("a folder");
        std::fs::write(folder.join("tags/a/1"), "x").expect("a file");
        std::fs::write(outer.path().join("secret"), "x").expect("a file");
        std::os::unix::fs::symlink("../secret", folder.join("link")).expect("a link");
        std::os::unix::fs::symlink("/etc", folder.join("etc")).expect("a link");
        let broker = Broker::new(&folder);
        broker.open("tags/a/1").expect("inside");
        for path in ["../secret", "link", "etc/passwd", "/etc/passwd", "tags/../../secret", "tags", ""] {
            broker.open(path).expect_err(path);
        }
        assert_eq!(broker.list("tags").expect("inside"), [("tags/a/1".to_owned(), 1)]);
        for path in ["..", "/etc", "tags/../.."] {
            broker.list(path).expect_err(path);
        }
    }

    #[test]
    fn a_missing_folder_is_told_as_such() {
        let broker = Broker::new(Path::new("/no/such/folder"));
        assert_eq!(broker.list("tags").expect_err("missing").kind(), io::ErrorKind::NotFound);
        assert_eq!(broker.open("x").expect_err("missing").kind(), io::ErrorKind::NotFound);
    }
}
