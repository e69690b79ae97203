//! The keeper's folder of packs: which of them stay on disk, and who may write into them.
//!
//! What lies there is encoded as in the store, at its place in a sparse file for each pack. It must be checked when it is
//! read again, and checking means decoding: the decoded form would save nothing but zstd's time, take more of the disk, and
//! share nothing between snapshots. There is no index: a hole was never written, and what a crash left half written is
//! found by its hash.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{UnlinkatFlags, unlinkat};
use serde::{Deserialize, Serialize};

use crate::USER;

/// Packs in a folder, bounded in length.
#[derive(Debug)]
pub(crate) struct Disk {
    folder: OwnedFd,
    limit: u64,
    /// One at a time makes room.
    turn: Mutex<()>,
    trouble: Mutex<Option<String>>,
}

/// What lies on disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// Packs of which parts are there.
    pub packs: u64,
    /// Bytes that they take.
    pub bytes: u64,
    /// Bytes that they may take; 0 if no fetcher runs.
    pub limit_bytes: u64,
    /// Why something was not kept, the last time.
    pub trouble: Option<String>,
}

/// A file of the folder.
struct Kept {
    name: String,
    /// Length of the pack: more than the file takes as long as parts are missing.
    length: u64,
    taken: u64,
    used: SystemTime,
}

/// Makes the folder, for the keeper's user only, and opens it.
pub(crate) fn prepare(folder: &Path) -> io::Result<OwnedFd> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    std::os::unix::fs::chown(folder, Some(USER), Some(USER))?;
    Ok(File::open(folder)?.into())
}

/// What lies in a folder, looked at by who may.
///
/// # Errors
/// What the system says.
pub fn look_at(folder: &Path) -> io::Result<DiskStatus> {
    match File::open(folder) {
        Ok(folder) => Disk::new(folder.into(), 0).status(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(DiskStatus::default()),
        Err(error) => Err(error),
    }
}

/// Removes what lies in a folder. What a fetcher is reading meanwhile it goes on reading.
///
/// # Errors
/// What the system says.
pub fn clear(folder: &Path) -> io::Result<()> {
    match File::open(folder) {
        Ok(folder) => Disk::new(folder.into(), 0).clear(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

impl Disk {
    pub(crate) fn new(folder: OwnedFd, limit: u64) -> Self {
        Self { folder, limit, turn: Mutex::default(), trouble: Mutex::default() }
    }

    /// The file of a pack of this length, for reading and writing; room is made for all of it, at the price of the
    /// least recently used.
    pub(crate) fn open(&self, name: &str, length: u64) -> io::Result<OwnedFd> {
        let plain = name.parse::<uuid::Uuid>().is_ok_and(|id| id.to_string() == name);
        if !plain || length > self.limit {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kept = self.files()?;
        kept.retain(|file| file.name != name);
        kept.sort_by_key(|file| file.used);
        let mut total: u64 = kept.iter().map(|file| file.length).sum();
        for file in kept {
            if total.saturating_add(length) <= self.limit {
                break;
            }
            self.remove(&file.name)?;
            total -= file.length;
        }
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let file = File::from(openat(&self.folder, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?);
        // Its length says how much it may become; a cut copy of a pack with this number would be another pack.
        if file.metadata()?.len() != length {
            file.set_len(0)?;
            file.set_len(length)?;
        }
        let now = TimeSpec::UTIME_NOW;
        utimensat(&self.folder, name, &now, &now, UtimensatFlags::NoFollowSymlink)?;
        Ok(file.into())
    }

    /// Notes why something could not be kept.
    pub(crate) fn note(&self, trouble: String) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(trouble);
    }

    pub(crate) fn status(&self) -> io::Result<DiskStatus> {
        let files = self.files()?;
        Ok(DiskStatus {
            packs: files.len() as u64,
            bytes: files.iter().map(|file| file.taken).sum(),
            limit_bytes: self.limit,
            trouble: self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        })
    }

    pub(crate) fn clear(&self) -> io::Result<()> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.files()?.iter().try_for_each(|file| self.remove(&file.name))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.folder, name, UnlinkatFlags::NoRemoveDir) {
            Err(nix::errno::Errno::ENOENT) | Ok(()) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The packs in the folder; what else lies there is nobody's business.
    fn files(&self) -> io::Result<Vec<Kept>> {
        let folder = PathBuf::from(format!("/proc/self/fd/{}/", self.folder.as_fd().as_raw_fd()));
        let mut found = Vec::new();
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // Somebody else may have removed it.
            let Ok(file) = entry.metadata() else { continue };
            if file.is_file() && name.parse::<uuid::Uuid>().is_ok() {
                let (taken, used) = (file.blocks() * 512, file.modified()?);
                found.push(Kept { name, length: file.len(), taken, used });
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn disk(limit: u64) -> (tempfile::TempDir, Disk) {
        let folder = tempfile::tempdir().expect("a folder");
        let disk = Disk::new(File::open(folder.path()).expect("a folder").into(), limit);
        (folder, disk)
    }

    fn name(number: u128) -> String {
        uuid::Uuid::from_u128(number).to_string()
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).expect("a folder").flatten();
        let mut names: Vec<_> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_least_recently_used_makes_room() {
        let (folder, disk) = disk(250);
        let open = |number, length| {
            // Times of files are as coarse as the kernel's ticks.
            std::thread::sleep(std::time::Duration::from_millis(20));
            disk.open(&name(number), length)
        };
        for number in [1, 2, 1, 3] {
            open(number, 100).expect("room");
        }
        assert_eq!(names(folder.path()), [name(1), name(3)]);
        // It is there again, and what is larger than all that may be kept is not.
        open(2, 250).expect("room");
        assert_eq!(names(folder.path()), [name(2)]);
        assert_eq!(open(4, 251).expect_err("too long").kind(), io::ErrorKind::InvalidInput);
        disk.clear().expect("cleared");
        assert_eq!(names(folder.path()), [] as [String; 0]);
    }

    #[test]
    fn content_stays_and_only_what_was_written_counts() {
        let (folder, disk) = disk(1 << 30);
        let file = File::from(disk.open(&name(1), 1 << 20).expect("room"));
        file.write_all_at(b"kept", 8192).expect("written");
        assert!(disk.status().expect("status").bytes < 100_000);
        let again = File::from(disk.open(&name(1), 1 << 20).expect("room"));
        let mut bytes = [0; 4];
        again.read_exact_at(&mut bytes, 8192).expect("read");
        assert_eq!(&bytes, b"kept");
        // A pack of another length is another pack.
        let other = File::from(disk.open(&name(1), 1 << 19).expect("room"));
        other.read_exact_at(&mut bytes, 8192).expect("read");
        assert_eq!(bytes, [0; 4]);
        drop(folder);
    }

    #[test]
    fn names_that_are_no_packs_are_refused_and_left_alone() {
        let (folder, disk) = disk(1 << 30);
        std::fs::write(folder.path().join("precious"), "x").expect("our own folder");
        for bad in ["precious", "../precious", "", "/etc/passwd", "00000000000000000000000000000001"] {
            disk.open(bad, 10).expect_err(bad);
        }
        disk.clear().expect("cleared");
        assert_eq!(names(folder.path()), ["precious"]);
    }
}
