//! Finds in CRIU's log the line that names the cause of a failure.
//!
//! runc says no more than `criu failed: type NOTIFY errno 0`. The log has the cause, followed by what went wrong because
//! of it: the first error is the one to show. Some errors are no errors.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// A log at level 4 has 4 to 6 MB for each GiB of sparse memory; beyond this it is cut off.
const LOG_BYTES_MAX: u64 = 256 << 20;
/// A longer line is not CRIU's.
const LINE_BYTES_MAX: u64 = 8 << 10;
/// Lines that [`tail`] keeps.
const TAIL_LINES: usize = 50;

/// What CRIU reports as an error although the operation goes on.
const HARMLESS: &[&str] = &[
    // Without CAP_SYS_RESOURCE.
    "Can't setup RLIMIT_NOFILE for self",
    // A socket pair has no TCP options.
    "Unable to set TCP_CORK",
    "Unable to set TCP_NODELAY",
    // A probe of what the kernel can do.
    "Can't keep kdat cache",
];
/// What only says that something failed, not why.
const NO_CAUSE: &[&str] =
    &["Dumping FAILED", "Restoring FAILED", "Pre-dumping FAILED", "killed by signal 9", "failed with -1"];

/// Why CRIU failed, in its own words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// The line without time and pid, such as `files-reg: File app/data has bad size 4096 (expect 0)`.
    pub text: String,
    /// The process it is about, where CRIU says so: at a dump as the host counts, at a restore as the replica does.
    pub pid: Option<u32>,
    /// False where the line says only that it failed, or what followed from it.
    pub certain: bool,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(pid) = self.pid {
            write!(f, "process {pid}: ")?;
        }
        f.write_str(&self.text)
    }
}

/// The first line that names a cause. `None` if there is no log or no error in it.
#[must_use]
pub fn cause(path: &Path) -> Option<Cause> {
    let mut fallback = None;
    let mut found: Option<Cause> = None;
    each_line(path, |line| {
        let Some((before, message)) = line.split_once("Error (") else { return true };
        let (place, text) = message.split_once("): ").unwrap_or(("", message));
        if HARMLESS.iter().any(|harmless| text.contains(harmless)) {
            return true;
        }
        let pid = named_pid(text).or_else(|| prefixed_pid(before));
        // What fails because of the first error often says in which process: `Dump files (pid: 17) failed with -1`.
        if let Some(found) = &mut found {
            found.pid = found.pid.or(pid);
            return found.pid.is_none();
        }
        let certain = !NO_CAUSE.iter().any(|phrase| text.contains(phrase));
        let cause = Cause { text: describe(place, text.trim()), pid, certain };
        if !certain {
            fallback.get_or_insert(cause);
            return true;
        }
        found = Some(cause);
        found.as_ref().is_some_and(|found| found.pid.is_none())
    })?;
    found.or(fallback)
}

/// The number in `(pid: 17 comm: python3)` or `(pid: 17)`.
fn named_pid(text: &str) -> Option<u32> {
    let (_, rest) = text.split_once("(pid: ")?;
    rest.split(|letter: char| !letter.is_ascii_digit()).next()?.parse().ok()
}

/// The number in `(00.110000)     17: `, which is what a task of a restore writes before its lines.
fn prefixed_pid(before: &str) -> Option<u32> {
    let (_, rest) = before.rsplit_once(')')?;
    rest.trim().strip_suffix(':')?.trim().parse().ok()
}

/// The last lines of the log, at most 50. Empty if there is no log.
#[must_use]
pub fn tail(path: &Path) -> Vec<String> {
    let mut lines = VecDeque::with_capacity(TAIL_LINES);
    each_line(path, |line| {
        if lines.len() == TAIL_LINES {
            lines.pop_front();
        }
        lines.push_back(line.to_owned());
        true
    });
    lines.into()
}

/// `criu/files-reg.c:2253` and a text become `files-reg: text`, unless the text says where it comes from already.
fn describe(place: &str, text: &str) -> String {
    let file = place.rsplit('/').next().unwrap_or(place);
    let part = file.split('.').next().unwrap_or(file);
    if part.is_empty() || text.starts_with(&format!("{part}:")) {
        text.to_owned()
    } else {
        format!("{part}: {text}")
    }
}

/// Gives each line to `take` until it returns false. `None` if the file cannot be read.
fn each_line(path: &Path, mut take: impl FnMut(&str) -> bool) -> Option<()> {
    let mut reader = BufReader::new(File::open(path).ok()?.take(LOG_BYTES_MAX));
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line).ok()?;
        if read == 0 {
            return Some(());
        }
        let text = String::from_utf8_lossy(&line);
        if !take(text.trim_end()) {
            return Some(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn log(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(text.as_bytes()).expect("written");
        file
    }

    fn told(text: &str) -> Option<String> {
        cause(log(text).path()).map(|cause| cause.to_string())
    }

    #[test]
    fn the_first_real_error_is_the_cause_with_its_process() {
        let text = "(00.000023) Error (criu/rlimit.c:17): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n\
             (00.010000) Warn  (criu/kerndat.c:1290): Can't keep kdat cache on non-tempfs\n\
             (00.110000)      1: Error (criu/files-reg.c:2253): File app/out has bad size 12 (expect 0)\n\
             (00.120000) Error (criu/cr-restore.c:2605): Restoring FAILED.\n";
        assert_eq!(
            told(text).as_deref(),
            Some("process 1: files-reg: File app/out has bad size 12 (expect 0)")
        );
    }

    #[test]
    fn a_dump_names_the_process_in_a_later_line() {
        let text = "(00.111180) Error (criu/files-ext.c:94): Can't dump file 3 of that type [600] (anon anon_inode:[userfaultfd])\n\
             (00.111196) Error (criu/cr-dump.c:1545): Dump files (pid: 3274) failed with -1\n\
             (00.116847) Error (criu/cr-dump.c:1975): Dumping FAILED.\n";
        let expected =
            "process 3274: files-ext: Can't dump file 3 of that type [600] (anon anon_inode:[userfaultfd])";
        assert_eq!(told(text).as_deref(), Some(expected));
    }

    #[test]
    fn a_place_is_not_named_twice() {
        let text =
            "(00.1) Error (criu/uffd.c:100): uffd: connect to lazy-pages.socket failed: No such file\n";
        assert_eq!(told(text).as_deref(), Some("uffd: connect to lazy-pages.socket failed: No such file"));
    }

    #[test]
    fn a_failure_without_cause_is_better_than_nothing() {
        let text = "(00.1) Error (criu/cr-dump.c:2098): Dumping FAILED.\n";
        assert_eq!(told(text).as_deref(), Some("cr-dump: Dumping FAILED."));
        assert_eq!(told("(00.1) all well\n"), None);
        assert_eq!(cause(Path::new("/nonexistent/dump.log")), None);
    }

    #[test]
    fn the_tail_is_short_and_survives_bytes_that_are_no_text() {
        let mut text = "x\n".repeat(200);
        text.push_str("last \u{fffd}\n");
        let file = log(&text);
        let lines = tail(file.path());
        assert_eq!(lines.len(), 50);
        assert_eq!(lines.last().map(String::as_str), Some("last \u{fffd}"));
    }
}
