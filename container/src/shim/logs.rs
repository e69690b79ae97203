//! What the server writes to its standard output and error.
//!
//! The shim holds the other end of both pipes: a container whose output is a file of the host cannot be dumped. A log
//! file that has reached its size is renamed to `.1`, and a new one begins; so at most twice the size is kept.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::error::{Context, Error};
use crate::shim::Paths;

/// Reads both pipes until the last process that holds them is gone.
#[derive(Debug)]
pub(super) struct Pump {
    ended: mpsc::Receiver<()>,
}

impl Pump {
    /// Makes the pipes, gives them to `command` together with an empty standard input, and begins to read.
    pub(super) fn attach(command: &mut Command, paths: &Paths, limit: u64) -> Result<Self, Error> {
        let (sender, ended) = mpsc::channel();
        let open = |path: PathBuf| -> Result<Stdio, Error> {
            let (reader, writer) = io::pipe().context("make", "a pipe for the server's output")?;
            let mut log = Log::open(path.clone(), limit).context("open", path.display())?;
            let sender = sender.clone();
            let work = move || {
                log.pump(reader);
                // Nobody may be waiting.
                let _ = sender.send(());
            };
            let thread = std::thread::Builder::new().name("log".into()).stack_size(256 << 10);
            thread.spawn(work).context("start", "a thread for the server's output")?;
            Ok(writer.into())
        };
        let stdout = open(paths.stdout())?;
        command.stdin(Stdio::null()).stdout(stdout).stderr(open(paths.stderr())?);
        Ok(Self { ended })
    }

    /// Waits until everything that was written is in the log files.
    pub(super) fn finish(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        for _ in 0..2 {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.ended.recv_timeout(left) == Err(mpsc::RecvTimeoutError::Timeout) {
                tracing::warn!("somebody still holds the server's output, so its log may lack the end");
            }
        }
    }
}

#[derive(Debug)]
struct Log {
    path: PathBuf,
    file: File,
    bytes: u64,
    limit: u64,
}

impl Log {
    fn open(path: PathBuf, limit: u64) -> io::Result<Self> {
        let file = create(&path)?;
        let bytes = file.metadata()?.len();
        Ok(Self { path, file, bytes, limit })
    }

    fn pump(&mut self, mut reader: impl Read) {
        let mut buf = vec![0; 64 << 10];
        let mut dropped = 0;
        loop {
            match reader.read(&mut buf) {
                Ok(0) => break,
                // A full disk must not stop the server, which would block in its next write: what has no room is dropped.
                Ok(count) => {
                    if let Err(error) = self.write(&buf[..count]) {
                        if dropped == 0 {
                            tracing::warn!(%error, path = %self.path.display(), "output is dropped");
                        }
                        dropped += count;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::warn!(%error, path = %self.path.display(), "output can no longer be read");
                    break;
                }
            }
        }
        if dropped > 0 {
            tracing::warn!(dropped, path = %self.path.display(), "bytes of output were dropped");
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.bytes > 0 && self.bytes + bytes.len() as u64 > self.limit {
            let mut older = self.path.clone().into_os_string();
            older.push(".1");
            std::fs::rename(&self.path, older)?;
            self.file = create(&self.path)?;
            self.bytes = 0;
        }
        self.file.write_all(bytes)?;
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_most_two_files_of_the_limit_are_kept_and_they_hold_the_end() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("stdout.log");
        let mut log = Log::open(path.clone(), 100).expect("open");
        for number in 0..100 {
            log.write(format!("line {number:04}\n").as_bytes()).expect("write");
        }
        let new = std::fs::read_to_string(&path).expect("new");
        let old = std::fs::read_to_string(dir.path().join("stdout.log.1")).expect("old");
        assert!(new.ends_with("line 0099\n"));
        assert!(old.len() <= 100 && new.len() <= 100);
        assert_eq!(std::fs::read_dir(dir.path()).expect("dir").count(), 2);
    }

    #[test]
    fn an_end_of_the_pipe_ends_the_pump() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("stdout.log");
        Log::open(path.clone(), 100).expect("open").pump(&b"text"[..]);
        assert_eq!(std::fs::read_to_string(path).expect("read"), "text");
    }
}
