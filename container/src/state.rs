//! The directory in which replicas are found by name.
//!
//! ```text
//! STATE/boot-id            the boot to which all of this belongs
//! STATE/lock               held for the moment in which a name is taken or a dead replica is swept
//! STATE/replicas/NAME/     see [`crate::shim::Paths`]
//! STATE/runc/              runc's own
//! ```
//!
//! A replica's `lock` file is locked by the command that makes it and then, through the same open file, by its shim. What
//! is not locked and has no `exit.json` belongs to a shim that crashed. Open-file-description locks are used because they
//! can be looked at without being taken; looking must never make a concurrent [`State::create`] fail.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::cgroup::Cgroup;
use crate::error::{Context, Error};
use crate::record::{Cause, Exit, ExitStatus, Record, Status, read_json, write_json};
use crate::removal::remove_tree;
use crate::shim::Paths;
use crate::spec::Name;

/// How long a name may stay locked after its exit was written: the shim's last steps.
const LAST_STEPS: Duration = Duration::from_secs(5);

/// The state directory.
#[derive(Debug, Clone)]
pub struct State {
    dir: PathBuf,
}

/// One replica of a state directory.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Its name.
    pub name: Name,
    /// What it does, with the lock and the exit taken into account.
    pub status: Status,
    /// What was written down; absent in the first moments.
    pub record: Option<Record>,
    /// How it ended, if it has.
    pub exit: Option<Exit>,
    /// Its shim is gone and has not said how it ended.
    is_orphaned: bool,
}

/// What [`State::sweep`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Swept {
    /// The replica whose shim had died.
    pub name: Name,
    /// Its directory is kept with logs and exit, because it had been ready once.
    pub kept: bool,
}

/// The identity of this boot of the machine.
///
/// # Errors
/// If `/proc` is not mounted.
pub fn boot_id() -> Result<String, Error> {
    let path = "/proc/sys/kernel/random/boot_id";
    Ok(std::fs::read_to_string(path).context("read", path)?.trim().into())
}

impl State {
    /// Where the state lies unless told otherwise.
    pub const DEFAULT_DIR: &str = "/run/rewarm";

    /// Opens the directory and makes it if needed. What belongs to another boot than `boot_id` is removed.
    ///
    /// # Errors
    /// If the directory cannot be made or written.
    pub fn open(dir: &Path, boot_id: &str) -> Result<Self, Error> {
        make_dir(dir)?;
        let dir = dir.canonicalize().context("open", dir.display())?;
        let state = Self { dir };
        let _lock = state.lock()?;
        let path = state.dir.join("boot-id");
        let seen = std::fs::read_to_string(&path).unwrap_or_default();
        if seen.trim() != boot_id {
            for old in ["replicas", "runc"] {
                remove_tree(&state.dir.join(old))?;
            }
            std::fs::write(&path, boot_id).context("write", path.display())?;
        }
        make_dir(&state.replicas())?;
        make_dir(&state.runc())?;
        Ok(state)
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory that runc keeps its own state in.
    #[must_use]
    pub fn runc(&self) -> PathBuf {
        self.dir.join("runc")
    }

    fn replicas(&self) -> PathBuf {
        self.dir.join("replicas")
    }

    /// The paths of a replica, whether it exists or not.
    #[must_use]
    pub fn paths(&self, name: &Name) -> Paths {
        Paths::new(self.replicas().join(name.as_str()))
    }

    /// All replicas, stopped ones included, by name.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn list(&self) -> Result<Vec<Entry>, Error> {
        let replicas = self.replicas();
        let mut entries = Vec::new();
        for item in std::fs::read_dir(&replicas).context("read", replicas.display())? {
            let item = item.context("read", replicas.display())?;
            let name = item.file_name().to_str().and_then(|name| name.parse::<Name>().ok());
            if let Some(name) = name {
                entries.extend(self.entry(&name)?);
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// One replica; `None` if there is none of this name.
    ///
    /// # Errors
    /// If its lock cannot be looked at.
    pub fn entry(&self, name: &Name) -> Result<Option<Entry>, Error> {
        let paths = self.paths(name);
        if !paths.dir().exists() {
            return Ok(None);
        }
        // The lock is looked at first: a shim writes the exit down before it lets go of it.
        let locked = is_locked(&paths)?;
        let exit: Option<Exit> = read_json(&paths.exit());
        let record: Option<Record> = read_json(&paths.record());
        let status = match (&exit, &record) {
            (Some(Exit { cause: Cause::Crashed | Cause::Resident(_), .. }), _) => Status::Crashed,
            (Some(_), _) => Status::Exited,
            (None, Some(record)) if locked => record.status,
            (None, None) if locked => Status::Starting,
            (None, _) => Status::Crashed,
        };
        let is_orphaned = !locked && exit.is_none();
        Ok(Some(Entry { name: name.clone(), status, record, exit, is_orphaned }))
    }

    /// Takes a name. The directory of a stopped or crashed replica of this name is removed first.
    ///
    /// # Errors
    /// `NameInUse` if a replica of this name lives.
    pub fn create(&self, name: &Name) -> Result<Claim, Error> {
        let _lock = self.lock()?;
        let paths = self.paths(name);
        if let Some(entry) = self.entry(name)? {
            if entry.exit.is_none() && is_locked(&paths)? {
                return Err(Error::NameInUse { name: name.clone(), status: entry.status });
            }
            self.bury(&entry)?;
            remove_tree(paths.dir())?;
        }
        make_dir(paths.dir())?;
        make_dir(&paths.logs())?;
        let lock = lock_file(&paths.lock())?;
        if !try_lock(&lock).context("lock", paths.lock().display())? {
            return Err(Error::NameInUse { name: name.clone(), status: Status::Starting });
        }
        Ok(Claim { name: name.clone(), state_dir: self.dir.clone(), paths, lock, handed_over: false })
    }

    /// Removes what is left of a stopped or crashed replica: logs, exit status, record.
    ///
    /// # Errors
    /// `UnknownName`; `Busy` if it lives.
    pub fn remove(&self, name: &Name) -> Result<(), Error> {
        let _lock = self.lock()?;
        let entry = self.entry(name)?.ok_or_else(|| Error::UnknownName { name: name.clone() })?;
        if entry.exit.is_none() && is_locked(&self.paths(name))? {
            return Err(Error::Busy { name: name.clone(), with: format!("it is {}", entry.status) });
        }
        self.bury(&entry)?;
        remove_tree(self.paths(name).dir())
    }

    /// How a stopped replica ended.
    ///
    /// # Errors
    /// `UnknownName`; `NotRunning` never: a replica that lives gives `None`.
    pub fn exit(&self, name: &Name) -> Result<Option<Exit>, Error> {
        let entry = self.entry(name)?.ok_or_else(|| Error::UnknownName { name: name.clone() })?;
        Ok(entry.exit)
    }

    /// Cleans up after shims that died: kills their servers, removes cgroups and files. A replica that had been ready is
    /// kept as crashed, with its logs, until it is removed or its name is used again; others vanish.
    ///
    /// # Errors
    /// If something cannot be removed.
    pub fn sweep(&self) -> Result<Vec<Swept>, Error> {
        if !self.list()?.iter().any(|entry| entry.is_orphaned) {
            return Ok(Vec::new());
        }
        let _lock = self.lock()?;
        let mut swept = Vec::new();
        // Looked at again under the lock: a name may just have been taken.
        for entry in self.list()?.into_iter().filter(|entry| entry.is_orphaned) {
            self.bury(&entry)?;
            let paths = self.paths(&entry.name);
            let kept = entry.record.as_ref().is_some_and(|record| record.status != Status::Starting);
            if kept {
                let exit =
                    Exit { status: ExitStatus::Unknown, cause: Cause::Crashed, ended: Timestamp::now() };
                write_json(&paths.exit(), &exit)?;
                strip(&paths)?;
            } else {
                remove_tree(paths.dir())?;
            }
            swept.push(Swept { name: entry.name, kept });
        }
        Ok(swept)
    }

    /// Kills what may still run of a replica whose shim is gone or about to go.
    fn bury(&self, entry: &Entry) -> Result<(), Error> {
        if entry.exit.is_some() {
            return wait_unlocked(&self.paths(&entry.name));
        }
        if let Some(record) = &entry.record {
            let cgroup = Cgroup::open(&record.cgroup)?;
            cgroup.kill(Duration::from_secs(10))?;
            cgroup.remove()?;
        }
        remove_tree(&self.runc().join(entry.name.as_str()))
    }

    fn lock(&self) -> Result<File, Error> {
        let path = self.dir.join("lock");
        let file = lock_file(&path)?;
        let whole = whole_file(libc::F_WRLCK);
        loop {
            match fcntl(&file, FcntlArg::F_OFD_SETLKW(&whole)) {
                Ok(_) => return Ok(file),
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("lock", path.display()),
            }
        }
    }
}

/// A name that was taken, and its locked directory. Dropping it gives the name back and removes the directory, unless a
/// shim has taken over.
#[derive(Debug)]
pub struct Claim {
    name: Name,
    state_dir: PathBuf,
    paths: Paths,
    lock: File,
    handed_over: bool,
}

impl Claim {
    /// The name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// The replica's paths.
    #[must_use]
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// The state directory.
    #[must_use]
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    pub(crate) fn lock_fd(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }

    /// The shim has the lock and the directory from here on.
    pub(crate) fn hand_over(mut self) {
        self.handed_over = true;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.handed_over {
            // Nobody is left to be told. An unlocked directory without a record is swept by the next command.
            let _ = remove_tree(self.paths.dir());
        }
    }
}

/// Removes all of a replica's directory but what tells how it went.
pub(crate) fn strip(paths: &Paths) -> Result<(), Error> {
    let keep = [paths.lock(), paths.record(), paths.exit(), paths.logs(), paths.shim_log()];
    for item in std::fs::read_dir(paths.dir()).context("read", paths.dir().display())? {
        let path = item.context("read", paths.dir().display())?.path();
        if !keep.contains(&path) {
            remove_tree(&path)?;
        }
    }
    Ok(())
}

pub(crate) fn make_dir(path: &Path) -> Result<(), Error> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).context("create", path.display())
}

fn lock_file(path: &Path) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.open(path).context("open", path.display())
}

fn whole_file(kind: libc::c_int) -> libc::flock {
    let narrow = |value: libc::c_int| libc::c_short::try_from(value).expect("lock constants are small");
    libc::flock { l_type: narrow(kind), l_whence: narrow(libc::SEEK_SET), l_start: 0, l_len: 0, l_pid: 0 }
}

fn try_lock(file: &File) -> io::Result<bool> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&whole_file(libc::F_WRLCK))) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn is_locked(paths: &Paths) -> Result<bool, Error> {
    let path = paths.lock();
    let file = match OpenOptions::new().read(true).write(true).open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).context("open", path.display()),
    };
    let mut lock = whole_file(libc::F_WRLCK);
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock)).context("look at the lock of", path.display())?;
    Ok(libc::c_int::from(lock.l_type) != libc::F_UNLCK)
}

fn wait_unlocked(paths: &Paths) -> Result<(), Error> {
    let deadline = Instant::now() + LAST_STEPS;
    while is_locked(paths)? {
        if Instant::now() > deadline {
            return Err(Error::Deadline { operation: "the end of the shim", seconds: LAST_STEPS.as_secs() });
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        text.parse().expect("a good name")
    }

    #[test]
    fn a_name_is_taken_once_and_given_back_when_the_claim_is_dropped() {
        let dir = tempfile::tempdir().expect("tempdir");
        let state = State::open(dir.path(), "boot-1").expect("open");
        let claim = state.create(&name("a")).expect("free");
        assert!(matches!(state.create(&name("a")), Err(Error::NameInUse { .. })));
        assert!(matches!(state.remove(&name("a")), Err(Error::Busy { .. })));
        assert_eq!(state.list().expect("list").len(), 1);
        drop(claim);
        assert!(state.list().expect("list").is_empty());
        state.create(&name("a")).expect("free again");
    }

    #[test]
    fn what_a_dead_command_left_is_swept() {
        let dir = tempfile::tempdir().expect("tempdir");
        let state = State::open(dir.path(), "boot-1").expect("open");
        let claim = state.create(&name("a")).expect("free");
        claim.hand_over();
        assert_eq!(state.entry(&name("a")).expect("entry").expect("exists").status, Status::Crashed);
        let swept = state.sweep().expect("sweep");
        assert_eq!(swept, [Swept { name: name("a"), kept: false }]);
        assert!(state.list().expect("list").is_empty());
    }

    #[test]
    fn a_living_claim_is_not_swept() {
        let dir = tempfile::tempdir().expect("tempdir");
        let state = State::open(dir.path(), "boot-1").expect("open");
        let _claim = state.create(&name("a")).expect("free");
        assert!(state.sweep().expect("sweep").is_empty());
        assert_eq!(state.list().expect("list").len(), 1);
    }

    /// A shim that writes down how its replica ended is alive as long as it has the lock, whatever stands there by then.
    #[test]
    fn a_shim_in_its_last_steps_is_not_swept() {
        let dir = tempfile::tempdir().expect("tempdir");
        let state = State::open(dir.path(), "boot-1").expect("open");
        let claim = state.create(&name("a")).expect("free");
        let record = Record {
            name: name("a"),
            uuid: uuid::Uuid::nil(),
            generation: 0,
            created: Timestamp::now(),
            origin: crate::record::Origin::Cold,
            spec: crate::spec::Spec::default(),
            status: Status::Crashed,
            shim_pid: 1,
            pid: None,
            cgroup: "rewarm-no-such".into(),
            published: Vec::new(),
            device: None,
            memory: None,
            drained: None,
        };
        write_json(&claim.paths().record(), &record).expect("written");
        assert_eq!(state.sweep().expect("sweep"), []);
        assert!(!claim.paths().exit().exists(), "the shim writes it");
        let (paths, exit) = (
            claim.paths().clone(),
            Exit { status: ExitStatus::Code(3), cause: Cause::Ended, ended: Timestamp::now() },
        );
        write_json(&paths.exit(), &exit).expect("written");
        claim.hand_over();
        assert_eq!(state.sweep().expect("sweep"), []);
        assert_eq!(state.exit(&name("a")).expect("looked at"), Some(exit));
    }

    #[test]
    fn another_boot_starts_empty() {
        let dir = tempfile::tempdir().expect("tempdir");
        let state = State::open(dir.path(), "boot-1").expect("open");
        state.create(&name("a")).expect("free").hand_over();
        let state = State::open(dir.path(), "boot-2").expect("open");
        assert!(state.list().expect("list").is_empty());
    }

    #[test]
    fn of_many_who_want_a_name_one_gets_it() {
        let dir = tempfile::tempdir().expect("tempdir");
        let state = State::open(dir.path(), "boot-1").expect("open");
        let winners: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| state.create(&name("a")).ok())).collect();
            threads.into_iter().filter_map(|thread| thread.join().expect("no panic")).collect()
        });
        assert_eq!(winners.len(), 1);
    }
}
