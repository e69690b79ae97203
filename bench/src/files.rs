//! Folders of the benchmark: linked copies, lengths, and the page cache.

use std::fs;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

/// Every file below a folder.
fn all(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => files.extend(all(&entry.path())?),
            false => files.push(entry.path()),
        }
    }
    Ok(files)
}

/// A copy by hard links: what is added to the copy later is not in the original.
pub(crate) fn link(from: &Path, to: &Path) -> io::Result<()> {
    for file in all(from)? {
        let target = to.join(file.strip_prefix(from).expect("below the folder"));
        fs::create_dir_all(target.parent().expect("a file has a folder"))?;
        fs::hard_link(&file, target)?;
    }
    Ok(())
}

/// Bytes of all files below a folder.
pub(crate) fn bytes(folder: &Path) -> io::Result<u64> {
    all(folder)?.iter().map(|file| Ok(fs::metadata(file)?.len())).sum()
}

/// Reads everything, so that the page cache holds it.
pub(crate) fn warm(folder: &Path) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    for file in all(folder)? {
        let mut file = File::open(file)?;
        while file.read(&mut buffer)? > 0 {}
    }
    Ok(())
}

/// Lets the page cache forget these files, and no others. What is not on the disk yet is written first.
pub(crate) fn cool(folder: &Path) -> io::Result<()> {
    for file in all(folder)? {
        let file = File::open(file)?;
        file.sync_data()?;
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linked_copy_holds_the_same_and_grows_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("a"), folder.path().join("b"));
        fs::create_dir_all(from.join("sub")).unwrap();
        fs::write(from.join("sub/file"), "12345").unwrap();
        link(&from, &to).unwrap();
        fs::write(to.join("more"), "123").unwrap();
        assert_eq!((bytes(&from).unwrap(), bytes(&to).unwrap()), (5, 8));
        cool(&to).unwrap();
        warm(&to).unwrap();
        assert_eq!(fs::read_to_string(to.join("sub/file")).unwrap(), "12345");
    }
}
