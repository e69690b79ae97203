//! Finds in CRIU's log the line that names the cause of a failure.
//!
//! runc says no more than `criu failed: type NOTIFY errno 0`. The log has the cause, followed by what went wrong because
//! of it: the first error is the one to show. Some errors are no errors.

use std::collections::VecDeque;
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
const NO_CAUSE: &[&str] = &["Dumping FAILED", "Restoring FAILED", "Pre-dumping FAILED"];

/// The first line that names a cause, without time and pid, such as
/// `files-reg: File app/data has bad size 4096 (expect 0)`. `None` if there is no log or no error in it.
#[must_use]
pub fn cause(path: &Path) -> Option<String> {
    let mut fallback = None;
    let mut found = None;
    each_line(path, |line| {
        let Some((_, message)) = line.split_once("Error (") else { return true };
        let (place, text) = message.split_once("): ").unwrap_or(("", message));
        if HARMLESS.iter().any(|harmless| text.contains(harmless)) {
            return true;
        }
        let message = describe(place, text.trim());
        if NO_CAUSE.iter().any(|phrase| text.contains(phrase)) {
            fallback.get_or_insert(message);
            return true;
        }
        found = Some(message);
        false
    })?;
    found.or(fallback)
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

    #[test]
    fn the_first_real_error_is_the_cause() {
        let file = log(
            "(00.000023) Error (criu/rlimit.c:17): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n\
             (00.010000) Warn  (criu/kerndat.c:1290): Can't keep kdat cache on non-tempfs\n\
             (00.110000)      1: Error (criu/files-reg.c:2253): File app/out has bad size 12 (expect 0)\n\
             (00.120000) Error (criu/cr-restore.c:2605): Restoring FAILED.\n",
        );
        assert_eq!(cause(file.path()).as_deref(), Some("files-reg: File app/out has bad size 12 (expect 0)"));
    }

    #[test]
    fn a_place_is_not_named_twice() {
        let file =
            log("(00.1) Error (criu/uffd.c:100): uffd: connect to lazy-pages.socket failed: No such file\n");
        assert_eq!(
            cause(file.path()).as_deref(),
            Some("uffd: connect to lazy-pages.socket failed: No such file")
        );
    }

    #[test]
    fn a_failure_without_cause_is_better_than_nothing() {
        let file = log("(00.1) Error (criu/cr-dump.c:2098): Dumping FAILED.\n");
        assert_eq!(cause(file.path()).as_deref(), Some("cr-dump: Dumping FAILED."));
        assert_eq!(cause(log("(00.1) all well\n").path()), None);
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
