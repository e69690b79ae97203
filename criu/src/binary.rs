//! Finds the CRIU program and refuses one that cannot work.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::{Error, kdat};

/// Where distributions put it, looked at after the `PATH` (which often lacks the folders of administration).
const USUAL: &[&str] = &["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin"];

/// The oldest versions that work, by the kernel from which on they are needed.
const OLDEST: &[(Kernel, Version, &str, &str)] = &[
    (
        (0, 0),
        Version { major: 4, minor: 1, patch: 0 },
        "4.1",
        "it does not know the memory layout of 6.x kernels and does not start on them",
    ),
    // The kernel answers EOPNOTSUPP to a question about SO_PASSCRED at an inet socket, which CRIU 4.1 takes for a failure.
    (
        (6, 16),
        Version { major: 4, minor: 2, patch: 0 },
        "4.2",
        "it cannot dump network sockets on Linux 6.16 and newer",
    ),
];

/// First two numbers of a kernel release.
type Kernel = (u32, u32);

/// Lines of standard error that an error keeps.
const STDERR_LINES: usize = 50;

/// A version of CRIU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number, 0 where it has none.
    pub patch: u32,
}

impl Version {
    /// Reads `4.2.1`, `4.1` or `4.2-dev`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.trim().split('.').map(|part| {
            let digits = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            part[..digits].parse::<u32>().ok()
        });
        let major = numbers.next()??;
        let minor = numbers.next()??;
        let patch = numbers.next().flatten().unwrap_or(0);
        Some(Self { major, minor, patch })
    }

    /// Whether it carries over mappings that are `MAP_DROPPABLE`. An older CRIU restores them as something else, and
    /// with glibc 2.41 or newer clones would share the state of the vDSO's random generator.
    #[must_use]
    pub fn knows_droppable(self) -> bool {
        self >= Self { major: 4, minor: 2, patch: 0 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        if self.patch > 0 { write!(f, ".{}", self.patch) } else { Ok(()) }
    }
}

/// A CRIU program that is new enough.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binary {
    /// Absolute path.
    pub path: PathBuf,
    /// Version that it prints.
    pub version: Version,
}

impl Binary {
    /// Finds the program: `explicit` if given and nothing else; otherwise `sbin/criu` below the folder `cache`, then the
    /// folders of `PATH` and the usual ones. The first that is new enough is taken.
    ///
    /// # Errors
    /// [`Error::Missing`] if there is none, [`Error::TooOld`] if there are only older ones, [`Error::Command`] or
    /// [`Error::Io`] if none of them can say its version.
    pub fn find(explicit: Option<&Path>, cache: Option<&Path>) -> crate::Result<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        Self::find_in(&candidates(explicit, cache, &path))
    }

    fn find_in(candidates: &[PathBuf]) -> crate::Result<Self> {
        let mut refused = None;
        for path in candidates.iter().filter(|path| is_program(path)) {
            match Self::at(path) {
                Ok(binary) => return Ok(binary),
                Err(error) => {
                    refused.get_or_insert(error);
                }
            }
        }
        Err(refused.unwrap_or_else(|| Error::Missing { searched: candidates.to_vec() }))
    }

    /// As [`Binary::find`], without starting a program whose version is written in the file `known`: of the same file, on the
    /// same kernel. Starting it takes 5 to 8 ms, which every restore would wait for. What is found is written there.
    ///
    /// # Errors
    /// Those of [`Binary::find`]. A file that cannot be read or written costs time only.
    pub fn find_known(explicit: Option<&Path>, cache: Option<&Path>, known: &Path) -> crate::Result<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let candidates = candidates(explicit, cache, &path);
        let first =
            candidates.iter().find(|path| is_program(path)).and_then(|path| std::path::absolute(path).ok());
        let Some((path, identity)) = first.and_then(|path| Some((path.clone(), identity(&path)?))) else {
            return Self::find_in(&candidates);
        };
        let text = std::fs::read_to_string(known).unwrap_or_default();
        if let Some((version, of)) = text.split_once('\n')
            && of == identity
            && let Some(version) = Version::parse(version)
        {
            return Ok(Self { path, version });
        }
        let found = Self::find_in(&candidates)?;
        if found.path == path
            && let Err(error) = kdat::replace(known, format!("{}\n{identity}", found.version).as_bytes())
        {
            tracing::debug!(%error, "CRIU's version is not remembered; it is asked each time");
        }
        Ok(found)
    }

    /// The program at a path, asked for its version.
    ///
    /// # Errors
    /// [`Error::TooOld`], or [`Error::Command`] or [`Error::Io`] if it does not say its version.
    pub fn at(path: &Path) -> crate::Result<Self> {
        let path = std::path::absolute(path).map_err(Error::io("find", path))?;
        let mut command = Command::new(&path);
        let output =
            command.arg("--version").stdin(Stdio::null()).output().map_err(Error::io("run", &path))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.lines().find_map(|line| line.strip_prefix("Version:")).and_then(Version::parse);
        let Some(version) = version else { return Err(failed(&command, &output)) };
        if let Some((needed, reason)) = refusal(version, kernel()) {
            return Err(Error::TooOld { path, version: version.to_string(), needed, reason });
        }
        Ok(Self { path, version })
    }

    /// Runs `criu check`: whether this kernel has what a dump and a restore need. Takes some 50 ms and needs root.
    ///
    /// # Errors
    /// [`Error::Command`] with what is missing.
    pub fn check(&self) -> crate::Result<()> {
        let mut command = Command::new(&self.path);
        let output =
            command.arg("check").stdin(Stdio::null()).output().map_err(Error::io("run", &self.path))?;
        if output.status.success() { Ok(()) } else { Err(failed(&command, &output)) }
    }
}

/// What tells one build of a program at a path from another, and the kernel that it was found good for.
fn identity(path: &Path) -> Option<String> {
    let file = std::fs::metadata(path).ok()?;
    let changed = file.ctime() * 1_000_000_000 + file.ctime_nsec();
    let ((major, minor), path) = (kernel(), path.display());
    Some(format!("{}:{} {} {changed} linux {major}.{minor} {path}\n", file.dev(), file.ino(), file.size()))
}

/// Why a version does not work on a kernel: the oldest that does, and what goes wrong.
fn refusal(version: Version, kernel: Kernel) -> Option<(&'static str, &'static str)> {
    let too_old = |&&(from, oldest, ..): &&(Kernel, Version, _, _)| kernel >= from && version < oldest;
    OLDEST.iter().find(too_old).map(|&(_, _, needed, reason)| (needed, reason))
}

/// The running kernel; the newest that there can be if its name is not understood.
fn kernel() -> Kernel {
    let parse = |release: &str| Version::parse(release).map(|release| (release.major, release.minor));
    let name = nix::sys::utsname::uname().ok();
    name.and_then(|name| name.release().to_str().and_then(parse)).unwrap_or((u32::MAX, 0))
}

/// The error for a command that ran and failed.
pub(crate) fn failed(command: &Command, output: &Output) -> Error {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = text.lines().collect();
    Error::Command {
        command: words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" "),
        status: output.status.to_string(),
        stderr: lines[lines.len().saturating_sub(STDERR_LINES)..].join("\n"),
    }
}

fn candidates(explicit: Option<&Path>, cache: Option<&Path>, path: &OsStr) -> Vec<PathBuf> {
    if let Some(explicit) = explicit {
        return vec![explicit.to_owned()];
    }
    let mut all = Vec::new();
    let cached = cache.map(|cache| cache.join("sbin/criu"));
    let on_path =
        std::env::split_paths(path).filter(|folder| folder.is_absolute()).map(|folder| folder.join("criu"));
    let usual = USUAL.iter().map(|folder| Path::new(folder).join("criu"));
    for candidate in cached.into_iter().chain(on_path).chain(usual) {
        if !all.contains(&candidate) {
            all.push(candidate);
        }
    }
    all
}

fn is_program(path: &Path) -> bool {
    let executable =
        |metadata: std::fs::Metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0;
    std::fs::metadata(path)
        .map(executable)
        .unwrap_or_else(|error: io::Error| error.kind() != io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn program(folder: &Path, says: &str) -> PathBuf {
        let path = folder.join("criu");
        fs::create_dir_all(folder).expect("a folder");
        fs::write(&path, format!("#!/bin/sh\n{says}\n")).expect("a script");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
        path
    }

    #[test]
    fn versions_are_read_and_compared() {
        assert_eq!(Version::parse("4.2.1"), Some(Version { major: 4, minor: 2, patch: 1 }));
        assert_eq!(Version::parse(" 4.1\n").map(|version| version.to_string()).as_deref(), Some("4.1"));
        assert_eq!(Version::parse("4.3-dev"), Some(Version { major: 4, minor: 3, patch: 0 }));
        assert_eq!(Version::parse("four"), None);
        let version = |text| Version::parse(text).expect("a version");
        assert!(version("3.17.1") < version("4.1") && version("10.0") > version("4.2.1"));
        assert!(!version("4.1.1").knows_droppable() && version("4.2.1").knows_droppable());
    }

    #[test]
    fn the_oldest_version_depends_on_the_kernel() {
        let needed = |text, kernel| {
            refusal(Version::parse(text).expect("a version"), kernel).map(|(needed, _)| needed)
        };
        assert_eq!(needed("3.17.1", (5, 10)), Some("4.1"));
        assert_eq!(needed("4.1.1", (6, 12)), None);
        assert_eq!(needed("4.1.1", (6, 16)), Some("4.2"));
        assert_eq!(needed("4.1.1", (7, 0)), Some("4.2"));
        assert_eq!(needed("4.2", (6, 18)), None);
    }

    #[test]
    fn an_old_one_is_refused_with_the_reason() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = program(folder.path(), "echo Version: 3.17.1");
        // A program that another thread's fork still holds open for writing cannot be started for a moment (ETXTBSY).
        let text =
            std::iter::repeat_with(|| Binary::find(Some(&path), None).expect_err("too old").to_string())
                .take(1000)
                .find(|text| text.contains("is version"))
                .expect("it can be started");
        assert!(text.ends_with(
            "is version 3.17.1, 4.1 or newer is needed: it does not know the memory layout of 6.x kernels and does not \
             start on them"
        ));
    }

    #[test]
    fn a_newer_one_further_down_is_taken() {
        let folder = tempfile::tempdir().expect("a folder");
        let old = program(&folder.path().join("old"), "echo Version: 3.17.1");
        let new = program(&folder.path().join("new"), "echo Version: 4.2.1; echo GitID: 0");
        let found = Binary::find_in(&[folder.path().join("none"), old, new.clone()]).expect("found");
        assert_eq!(found, Binary { path: new, version: Version { major: 4, minor: 2, patch: 1 } });
    }

    #[test]
    fn a_known_one_is_not_started_until_it_changes() {
        let folder = tempfile::tempdir().expect("a folder");
        let known = folder.path().join("known");
        let starts = || fs::read_to_string(folder.path().join("starts")).unwrap_or_default().len();
        let says =
            |version| format!("printf x >>{}/starts; echo Version: {version}", folder.path().display());
        let find = |path: &Path| {
            // See above: a program that was just written may be busy for a moment.
            let tried = std::iter::repeat_with(|| Binary::find_known(Some(path), None, &known)).take(1000);
            let found = tried.filter_map(Result::ok).next().expect("found");
            found.version.to_string()
        };
        let path = program(folder.path(), &says("4.2.1"));
        assert_eq!((find(&path), starts()), ("4.2.1".into(), 1));
        assert_eq!((find(&path), starts()), ("4.2.1".into(), 1));
        fs::remove_file(&path).expect("there");
        let path = program(folder.path(), &says("4.3"));
        assert_eq!((find(&path), starts()), ("4.3".into(), 2));
        fs::write(&known, "nonsense").expect("written");
        assert_eq!((find(&path), starts()), ("4.3".into(), 3));
        let other = program(&folder.path().join("other"), &says("4.2.2"));
        assert_eq!((find(&other), starts()), ("4.2.2".into(), 4));
    }

    #[test]
    fn what_fails_is_reported_with_its_last_words() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = program(folder.path(), "echo cannot start >&2; exit 3");
        let error = Binary::at(&path).expect_err("no version");
        assert!(error.to_string().ends_with("--version ended with exit status: 3: cannot start"), "{error}");
        let missing = Binary::find(Some(&folder.path().join("none")), None).expect_err("missing");
        assert!(missing.to_string().starts_with("no criu program at /"), "{missing}");
    }

    #[test]
    fn the_cache_comes_before_the_path() {
        let all = candidates(None, Some(Path::new("/cache/criu")), OsStr::new("/a:b:/usr/sbin"));
        assert_eq!(all[..3], ["/cache/criu/sbin/criu", "/a/criu", "/usr/sbin/criu"].map(PathBuf::from));
    }
}
