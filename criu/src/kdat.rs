//! Makes CRIU's cache of kernel features where CRIU cannot keep it itself.
//!
//! Each start of CRIU probes the kernel for some 45 ms, unless `/run/criu.kdat` has the results. It saves that file only
//! where `/run` is a tmpfs, but loads it from any file system. Where `/run` is none, [`ensure`] lets CRIU write the file
//! into a tmpfs that exists for one command only and copies it out. It is good for one boot and one CRIU program, which
//! CRIU itself checks only in part; so a file beside it says for which it was made.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use crate::Error;
use crate::binary::{Binary, failed};

const RUN: &str = "/run";
const CACHE: &str = "criu.kdat";
/// CRIU opens this one exclusively and gives up saving if it exists, so one that was left behind stops it for ever.
const STALE: &str = "criu.kdat.tmp";
/// Says for which boot and program the cache was made.
const KEY: &str = "criu.kdat.for";
/// The cache has a few hundred bytes.
const CACHE_BYTES_MAX: usize = 64 << 10;
/// A save by CRIU takes less than a second; a younger temporary file may be in use.
const STALE_SECONDS: u64 = 60;

/// Run in a mount namespace of its own, with the program as `$1`.
const SCRIPT: &str =
    r#"mount -t tmpfs -o mode=700,size=1m rewarm-kdat /run && "$1" check >&2 && cat /run/criu.kdat"#;

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// `/run` is a tmpfs: CRIU keeps the cache itself.
    ByCriu,
    /// The cache of this boot and program was there.
    Kept,
    /// The cache was made.
    Made,
}

/// Sees to it that CRIU finds its cache. Costs 60 ms once per boot, otherwise nothing. Needs root.
///
/// Without a cache everything works, only slower: a caller may go on after an error.
///
/// # Errors
/// [`Error::Command`] if CRIU cannot check this kernel in a private mount namespace, [`Error::Io`] if files below `/run`
/// cannot be written.
pub fn ensure(binary: &Binary) -> crate::Result<Outcome> {
    let run = Path::new(RUN);
    remove_stale(run)?;
    let on_tmpfs = statfs(run).map_err(io::Error::from).map_err(Error::io("look at", run))?.filesystem_type()
        == TMPFS_MAGIC;
    if on_tmpfs {
        return Ok(Outcome::ByCriu);
    }
    let key = key(binary)?;
    let (cache, key_path) = (run.join(CACHE), run.join(KEY));
    if cache.exists() && fs::read_to_string(&key_path).is_ok_and(|made_for| made_for == key) {
        return Ok(Outcome::Kept);
    }
    let bytes = probe(binary)?;
    // The key goes first and comes last: a cache is never taken for one that it is not.
    remove(&key_path)?;
    replace(&cache, &bytes)?;
    replace(&key_path, key.as_bytes())?;
    Ok(Outcome::Made)
}

/// Boot, and what tells one build of CRIU from another.
fn key(binary: &Binary) -> crate::Result<String> {
    let boot = Path::new("/proc/sys/kernel/random/boot_id");
    let boot = fs::read_to_string(boot).map_err(Error::io("read", boot))?;
    let file = fs::metadata(&binary.path).map_err(Error::io("look at", &binary.path))?;
    let (path, version) = (binary.path.display(), binary.version);
    let (device, inode, bytes, changed) = (file.dev(), file.ino(), file.size(), file.mtime());
    Ok(format!("boot {}\ncriu {version} {device}:{inode} {bytes} {changed} {path}\n", boot.trim()))
}

fn probe(binary: &Binary) -> crate::Result<Vec<u8>> {
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", SCRIPT, "sh"]).arg(&binary.path).stdin(Stdio::null());
    let output = command.output().map_err(Error::io("run", "unshare"))?;
    let usable = output.status.success() && (1..=CACHE_BYTES_MAX).contains(&output.stdout.len());
    if usable { Ok(output.stdout) } else { Err(failed(&command, &output)) }
}

fn remove_stale(run: &Path) -> crate::Result<()> {
    let path = run.join(STALE);
    match fs::metadata(&path).and_then(|metadata| metadata.modified()) {
        Ok(changed) if changed.elapsed().is_ok_and(|age| age.as_secs() >= STALE_SECONDS) => remove(&path),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io("look at", path)(error)),
    }
}

fn remove(path: &Path) -> crate::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Writes under another name first: a CRIU that starts meanwhile must not load half of it.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> crate::Result<()> {
    static WRITES: AtomicU32 = AtomicU32::new(0);
    let write = WRITES.fetch_add(1, Ordering::Relaxed);
    let new = PathBuf::from(format!("{}.{}.{write}", path.display(), std::process::id()));
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let written =
        options.open(&new).and_then(|mut file| file.write_all(bytes)).and_then(|()| fs::rename(&new, path));
    written.map_err(|error| {
        let _ = fs::remove_file(&new);
        Error::io("write", path)(error)
    })
}
