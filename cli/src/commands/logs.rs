//! `rewarm logs`
//!
//! What the server wrote to stdout comes out on stdout, what it wrote to stderr on stderr. The shim rotates each file: its
//! older part has the suffix `.1`. A file that is followed is therefore opened anew when another one has its name.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rewarm_container::{Error, Name, State};

use crate::args::{Global, Logs};
use crate::failure::Cause;
use crate::replicas;

/// Lines appear in a person's time.
const POLL: Duration = Duration::from_millis(100);
const READ_BYTES: usize = 64 << 10;

/// Where lines go.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Stream {
    Stdout,
    Stderr,
}

pub(crate) fn run(args: &Logs, global: &Global) -> Result<u8, Cause> {
    let state = replicas::open(global)?;
    let unknown = || Error::UnknownName { name: args.name.clone() };
    state.entry(&args.name)?.ok_or_else(unknown)?;
    let paths = state.paths(&args.name);
    let mut logs = [
        Log::open(Stream::Stdout, paths.stdout(), global.json),
        Log::open(Stream::Stderr, paths.stderr(), global.json),
    ];
    for log in &mut logs {
        log.print_past(args.tail)?;
    }
    if args.follow {
        follow(&state, &args.name, &mut logs)?;
    }
    for log in &mut logs {
        log.print_rest()?;
    }
    Ok(0)
}

/// Prints what is written until the replica has ended.
fn follow(state: &State, name: &Name, logs: &mut [Log]) -> Result<(), Cause> {
    loop {
        // Asked before the files are read: what was written before the end is then read after it.
        let over = ended(state, name)?;
        let mut more = false;
        for log in logs.iter_mut() {
            more |= log.print_new()?;
        }
        if over {
            return Ok(());
        }
        if !more {
            std::thread::sleep(POLL);
        }
    }
}

fn ended(state: &State, name: &Name) -> Result<bool, Cause> {
    // A replica that was removed, or whose name was used again, is over too.
    Ok(state.entry(name)?.is_none_or(|entry| entry.exit.is_some()))
}

struct Log {
    stream: Stream,
    path: PathBuf,
    file: Option<File>,
    json: bool,
    /// The beginning of a line whose end is not written yet; used for JSON only.
    part: Vec<u8>,
}

impl Log {
    fn open(stream: Stream, path: PathBuf, json: bool) -> Self {
        let file = File::open(&path).ok();
        Self { stream, path, file, json, part: Vec::new() }
    }

    /// Prints what was written so far, the older part included: the last `lines` of it, where that is given.
    fn print_past(&mut self, lines: Option<usize>) -> Result<(), Cause> {
        let older = self.path.with_file_name(older_name(&self.path));
        let mut past = match std::fs::read(&older) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(Cause::File { doing: "read", path: older, source }),
        };
        if let Some(file) = &mut self.file {
            file.read_to_end(&mut past).map_err(|source| self.read_error(source))?;
        }
        let from = lines.map_or(0, |lines| last_lines(&past, lines));
        self.write(&past[from..])
    }

    /// Prints what was written since; whether there was something.
    fn print_new(&mut self) -> Result<bool, Cause> {
        let mut some = self.print_to_end()?;
        if self.was_rotated() {
            self.file = File::open(&self.path).ok();
            some |= self.print_to_end()?;
        }
        Ok(some)
    }

    fn print_to_end(&mut self) -> Result<bool, Cause> {
        let mut buffer = vec![0; READ_BYTES];
        let mut some = false;
        loop {
            let Some(file) = &mut self.file else { return Ok(some) };
            let count = file.read(&mut buffer).map_err(|source| self.read_error(source))?;
            if count == 0 {
                return Ok(some);
            }
            some = true;
            self.write(&buffer[..count])?;
        }
    }

    fn was_rotated(&self) -> bool {
        let there = std::fs::metadata(&self.path).ok();
        let here = self.file.as_ref().and_then(|file| file.metadata().ok());
        match (here, there) {
            (Some(here), Some(there)) => (here.dev(), here.ino()) != (there.dev(), there.ino()),
            (None, Some(_)) => true,
            (_, None) => false,
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Cause> {
        if !self.json {
            return write(self.stream, bytes).map_err(Cause::Stdout);
        }
        self.part.extend_from_slice(bytes);
        while let Some(end) = self.part.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.part.drain(..=end).collect();
            self.write_json(&line[..end])?;
        }
        Ok(())
    }

    /// Prints a last line that has no end.
    fn print_rest(&mut self) -> Result<(), Cause> {
        let rest = std::mem::take(&mut self.part);
        if rest.is_empty() { Ok(()) } else { self.write_json(&rest) }
    }

    fn write_json(&self, line: &[u8]) -> Result<(), Cause> {
        let stream = match self.stream {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        };
        let object = serde_json::json!({ "stream": stream, "line": String::from_utf8_lossy(line) });
        write(Stream::Stdout, format!("{object}\n").as_bytes()).map_err(Cause::Stdout)
    }

    fn read_error(&self, source: io::Error) -> Cause {
        Cause::File { doing: "read", path: self.path.clone(), source }
    }
}

fn write(stream: Stream, bytes: &[u8]) -> io::Result<()> {
    match stream {
        Stream::Stdout => {
            let mut stdout = io::stdout().lock();
            stdout.write_all(bytes).and_then(|()| stdout.flush())
        }
        Stream::Stderr => io::stderr().write_all(bytes),
    }
}

fn older_name(path: &Path) -> String {
    format!("{}.1", path.file_name().unwrap_or_default().to_string_lossy())
}

/// Where the last `lines` lines of a text begin.
fn last_lines(text: &[u8], lines: usize) -> usize {
    if lines == 0 {
        return text.len();
    }
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    let ends = body.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n');
    ends.map(|(at, _)| at + 1).nth(lines - 1).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_with_and_without_a_final_line_end() {
        assert_eq!(last_lines(b"a\nb\nc\n", 2), 2);
        assert_eq!(last_lines(b"a\nb\nc", 2), 2);
        assert_eq!(last_lines(b"a\nb\n", 9), 0);
        assert_eq!(last_lines(b"a\nb\n", 0), 4);
        assert_eq!(last_lines(b"", 3), 0);
    }

    #[test]
    fn a_file_is_followed_through_its_rotation() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("stdout.log");
        std::fs::write(&path, "one\n").expect("writes");
        let mut log = Log::open(Stream::Stdout, path.clone(), false);
        assert!(log.print_new().expect("reads"));
        assert!(!log.print_new().expect("reads"));
        std::fs::rename(&path, folder.path().join("stdout.log.1")).expect("renames");
        assert!(!log.print_new().expect("reads"));
        std::fs::write(&path, "two\n").expect("writes");
        assert!(log.print_new().expect("reads"));
        assert!(!log.print_new().expect("reads"));
    }
}
