//! A worker's side of the packs on disk: the keeper opens their files, the worker reads and writes them.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::unistd::{Whence, lseek64};
use rewarm_store::PackCache;
use uuid::Uuid;

/// Files that are open at the same time.
const FILES_MAX: usize = 256;

/// Opens the file of a pack, by its name and length.
pub(crate) trait Opener: std::fmt::Debug + Send + Sync {
    fn open(&self, name: String, bytes: u64) -> io::Result<File>;
    /// Says why nothing is kept any more.
    fn note(&self, trouble: String);
}

/// The packs on disk as one fill uses them.
#[derive(Debug)]
pub(crate) struct KeptPacks {
    opener: Arc<dyn Opener>,
    /// Those that cannot be had are `None`, and not asked for again.
    files: Mutex<HashMap<Uuid, Option<Arc<File>>>>,
    /// The disk is full or broken: nothing is kept any more.
    given_up: AtomicBool,
}

impl KeptPacks {
    pub(crate) fn new(opener: Arc<dyn Opener>) -> Self {
        Self { opener, files: Mutex::default(), given_up: AtomicBool::new(false) }
    }

    /// A fill begins: files are opened anew, which tells the keeper that they are used.
    pub(crate) fn begin(&self) {
        self.files.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.given_up.store(false, Ordering::Relaxed);
    }

    fn file(&self, pack: Uuid, bytes: u64) -> Option<Arc<File>> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = files.get(&pack) {
            return file.clone();
        }
        if files.len() >= FILES_MAX {
            files.clear();
        }
        let opened = self.opener.open(pack.to_string(), bytes);
        let file = opened.inspect_err(|error| tracing::debug!(%pack, %error, "no copy on disk")).ok();
        files.entry(pack).or_insert(file.map(Arc::new)).clone()
    }
}

impl PackCache for KeptPacks {
    fn read(&self, pack: Uuid, bytes: u64, range: Range<u64>) -> Option<Vec<u8>> {
        let file = self.file(pack, bytes)?;
        let start = i64::try_from(range.start).ok()?;
        // A hole was never written. What lies beside it in its block is found by its hash.
        let hole = lseek64(&*file, start, Whence::SeekHole).ok()?;
        if u64::try_from(hole).ok()? < range.end {
            return None;
        }
        let mut content = vec![0; usize::try_from(range.end - range.start).ok()?];
        file.read_exact_at(&mut content, range.start).ok()?;
        Some(content)
    }

    fn keep(&self, pack: Uuid, bytes: u64, offset: u64, content: &[u8]) {
        if self.given_up.load(Ordering::Relaxed) {
            return;
        }
        let Some(file) = self.file(pack, bytes) else { return };
        if let Err(error) = file.write_all_at(content, offset)
            && !self.given_up.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(%pack, %error, "what was fetched cannot be kept on disk");
            self.opener.note(format!("write a pack: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Folder(tempfile::TempDir, Mutex<Vec<String>>);

    impl Opener for Folder {
        fn open(&self, name: String, bytes: u64) -> io::Result<File> {
            let mut options = File::options();
            let file =
                options.read(true).write(true).create(true).truncate(false).open(self.0.path().join(name))?;
            file.set_len(bytes)?;
            Ok(file)
        }

        fn note(&self, trouble: String) {
            self.1.lock().expect("no panic").push(trouble);
        }
    }

    #[derive(Debug)]
    struct Full(Mutex<Vec<String>>);

    impl Opener for Full {
        fn open(&self, _name: String, _bytes: u64) -> io::Result<File> {
            File::options().read(true).write(true).open("/dev/full")
        }

        fn note(&self, trouble: String) {
            self.0.lock().expect("no panic").push(trouble);
        }
    }

    #[test]
    fn what_was_kept_can_be_read_and_what_was_not_cannot() {
        let folder = Arc::new(Folder(tempfile::tempdir().expect("a folder"), Mutex::default()));
        let packs = KeptPacks::new(folder.clone());
        let (pack, bytes) = (Uuid::from_u128(1), 1 << 20);
        assert_eq!(packs.read(pack, bytes, 0..4096), None);
        packs.keep(pack, bytes, 65_536, &[7; 8192]);
        packs.begin();
        assert_eq!(packs.read(pack, bytes, 65_536..73_728), Some(vec![7; 8192]));
        assert_eq!(packs.read(pack, bytes, 69_632..77_824), None, "it reaches into a hole");
        assert_eq!(*folder.1.lock().expect("no panic"), [] as [String; 0]);
    }

    #[test]
    fn a_full_disk_is_told_once() {
        let full = Arc::new(Full(Mutex::default()));
        let packs = KeptPacks::new(full.clone());
        for number in 0..3 {
            packs.keep(Uuid::from_u128(number), 1 << 20, 0, b"content");
        }
        let told = full.0.lock().expect("no panic").clone();
        assert_eq!(told.len(), 1);
        assert!(told[0].contains("No space left"), "{told:?}");
    }
}
