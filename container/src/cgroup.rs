//! The cgroup of a replica: freeze, thaw, kill, limits, removal. runc makes it.
//!
//! On cgroup v1 (also in the hybrid layout) a cgroup is a directory of the same name below each hierarchy; on v2 it is one
//! directory. The name is unique on the machine and lies directly below the root: a common parent would have to be removed
//! by somebody, just when another replica makes its own below it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{Context, Error, Refusal};

/// How long the kernel may take to freeze all tasks. A task in an uninterruptible wait (a slow disk) delays it.
const FREEZE_DEADLINE: Duration = Duration::from_secs(10);
const STEP: Duration = Duration::from_millis(1);

/// The cgroup of one replica.
#[derive(Debug, Clone)]
pub struct Cgroup {
    layout: Layout,
}

#[derive(Debug, Clone)]
enum Layout {
    /// Directory of each hierarchy, with the controllers that it has.
    V1(Vec<(Vec<String>, PathBuf)>),
    V2(PathBuf),
}

impl Cgroup {
    /// Names the cgroup `name` of this machine's layout; it need not exist yet.
    ///
    /// # Errors
    /// `Refused` if no cgroup file system is mounted that could freeze a replica.
    pub fn open(name: &str) -> Result<Self, Error> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").context("read", "/proc/self/mounts")?;
        Self::of_mounts(&mounts, name).ok_or_else(|| {
            Refusal::Unsupported {
                what: "a replica",
                feature: "a mounted cgroup file system with a freezer".into(),
            }
            .into()
        })
    }

    fn of_mounts(mounts: &str, name: &str) -> Option<Self> {
        let name = name.trim_start_matches('/');
        let mut v1: Vec<(Vec<String>, PathBuf)> = Vec::new();
        let mut v2 = None;
        for line in mounts.lines() {
            let mut fields = line.split(' ').skip(1);
            let (Some(target), Some(kind), Some(options)) = (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            let dir = Path::new(target).join(name);
            match kind {
                "cgroup" => v1.push((options.split(',').map(Into::into).collect(), dir)),
                "cgroup2" if v2.is_none() => v2 = Some(dir),
                _ => {}
            }
        }
        let freezer = v1.iter().any(|(controllers, _)| controllers.iter().any(|c| c == "freezer"));
        if freezer {
            // The empty v2 hierarchy of a hybrid machine: runc puts processes there as well.
            v1.extend(v2.map(|dir| (Vec::new(), dir)));
            Some(Self { layout: Layout::V1(v1) })
        } else {
            v2.map(|dir| Self { layout: Layout::V2(dir) })
        }
    }

    fn dirs(&self) -> Vec<&Path> {
        match &self.layout {
            Layout::V1(dirs) => dirs.iter().map(|(_, dir)| dir.as_path()).collect(),
            Layout::V2(dir) => vec![dir],
        }
    }

    /// The directory that has this controller.
    fn controller(&self, name: &str) -> Option<&Path> {
        match &self.layout {
            Layout::V1(dirs) => dirs
                .iter()
                .find(|(controllers, _)| controllers.iter().any(|controller| controller == name))
                .map(|(_, dir)| dir.as_path()),
            Layout::V2(dir) => {
                let available = std::fs::read_to_string(dir.parent()?.join("cgroup.controllers")).ok()?;
                available.split_whitespace().any(|controller| controller == name).then_some(dir)
            }
        }
    }

    /// Refuses a limit whose controller this machine does not have.
    ///
    /// # Errors
    /// [`Refusal::Unsupported`].
    pub fn require(&self, controller: &str, what: &'static str) -> Result<(), Refusal> {
        match self.controller(controller) {
            Some(_) => Ok(()),
            None => {
                let feature = format!("the cgroup controller {controller}");
                Err(Refusal::Unsupported { what, feature })
            }
        }
    }

    /// Whether it exists.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.dirs().iter().any(|dir| dir.exists())
    }

    /// A directory whose `cgroup.procs` lists its members, as the host sees them.
    #[must_use]
    pub fn processes_dir(&self) -> &Path {
        match &self.layout {
            Layout::V1(_) => self.controller("freezer").expect("this layout was chosen because it has one"),
            Layout::V2(dir) => dir,
        }
    }

    /// Process numbers of its members, as the host sees them.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        let mut pids: Vec<u32> = self
            .dirs()
            .iter()
            .filter_map(|dir| std::fs::read_to_string(dir.join("cgroup.procs")).ok())
            .flat_map(|text| members(&text))
            .collect();
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    fn freezer(&self) -> Result<PathBuf, Error> {
        let dir = match &self.layout {
            Layout::V1(_) => self.controller("freezer").map(|dir| dir.join("freezer.state")),
            Layout::V2(dir) => Some(dir.join("cgroup.freeze")),
        };
        Ok(dir.expect("a layout without a freezer is refused when it is opened"))
    }

    /// Freezes all its tasks and waits until they stand still.
    ///
    /// # Errors
    /// `Deadline` if a task does not stand still; they go on in that case.
    pub fn freeze(&self) -> Result<(), Error> {
        let deadline = Instant::now() + FREEZE_DEADLINE;
        loop {
            // v1 leaves a task out that was being forked, until it is asked again.
            self.write_freezer(true)?;
            if self.is_frozen()? {
                return Ok(());
            }
            if Instant::now() > deadline {
                self.thaw()?;
                return Err(Error::Deadline { operation: "freeze", seconds: FREEZE_DEADLINE.as_secs() });
            }
            std::thread::sleep(STEP);
        }
    }

    /// Lets its tasks go on.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn thaw(&self) -> Result<(), Error> {
        self.write_freezer(false)
    }

    fn write_freezer(&self, freeze: bool) -> Result<(), Error> {
        let path = self.freezer()?;
        let value = match (&self.layout, freeze) {
            (Layout::V1(_), true) => "FROZEN",
            (Layout::V1(_), false) => "THAWED",
            (Layout::V2(_), true) => "1",
            (Layout::V2(_), false) => "0",
        };
        std::fs::write(&path, value).context("write", path.display())
    }

    /// Whether all its tasks stand still.
    ///
    /// # Errors
    /// If it does not exist.
    pub fn is_frozen(&self) -> Result<bool, Error> {
        let path = match &self.layout {
            Layout::V1(_) => self.freezer()?,
            Layout::V2(dir) => dir.join("cgroup.events"),
        };
        let text = std::fs::read_to_string(&path).context("read", path.display())?;
        Ok(match &self.layout {
            Layout::V1(_) => text.trim() == "FROZEN",
            Layout::V2(_) => text.lines().any(|line| line == "frozen 1"),
        })
    }

    /// Kills all its processes, frozen or not, and waits until none is left.
    ///
    /// # Errors
    /// `Deadline` if some do not end within `limit`.
    pub fn kill(&self, limit: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + limit;
        while self.exists() {
            let pids = self.pids();
            if pids.is_empty() {
                return Ok(());
            }
            for pid in pids {
                let pid = Pid::from_raw(i32::try_from(pid).expect("process numbers end at 4194304"));
                // Ended between reading and killing: what was wanted.
                let _ = kill(pid, Signal::SIGKILL);
            }
            // A frozen task of v1 takes its signal only when it is thawed.
            match self.thaw() {
                Err(Error::System { source, .. }) if gone(&source) => {}
                other => other?,
            }
            if Instant::now() > deadline {
                return Err(Error::Deadline {
                    operation: "the end of all processes",
                    seconds: limit.as_secs(),
                });
            }
            std::thread::sleep(STEP);
        }
        Ok(())
    }

    /// Removes it from each hierarchy. It must have no members left.
    ///
    /// # Errors
    /// If the kernel keeps it busy for more than some seconds.
    pub fn remove(&self) -> Result<(), Error> {
        // The last member may still be on its way out when it no longer shows.
        let deadline = Instant::now() + Duration::from_secs(5);
        for dir in self.dirs() {
            loop {
                match remove_below(dir) {
                    Ok(()) => break,
                    Err(error) if gone(&error) => break,
                    Err(error) if Instant::now() > deadline => {
                        return Err(error).context("remove", dir.display());
                    }
                    Err(_) => std::thread::sleep(STEP),
                }
            }
        }
        Ok(())
    }

    /// Memory charged to it, in bytes.
    #[must_use]
    pub fn memory_bytes(&self) -> Option<u64> {
        self.number("memory.usage_in_bytes", "memory.current")
    }

    /// Its memory limit in bytes, if it has one.
    #[must_use]
    pub fn memory_limit(&self) -> Option<u64> {
        // v1 writes "no limit" as the largest page-aligned number.
        self.number("memory.limit_in_bytes", "memory.max").filter(|limit| *limit < 1 << 62)
    }

    /// Bytes that its memory limit leaves, if it has one; files that are only cached count as free.
    #[must_use]
    pub fn memory_left(&self) -> Option<u64> {
        let (limit, used) = (self.memory_limit()?, self.memory_bytes()?);
        let stat =
            std::fs::read_to_string(self.controller("memory")?.join("memory.stat")).unwrap_or_default();
        let field =
            if matches!(self.layout, Layout::V1(_)) { "total_inactive_file " } else { "inactive_file " };
        let cached = stat.lines().find_map(|line| line.strip_prefix(field)?.trim().parse().ok()).unwrap_or(0);
        Some(limit.saturating_sub(used.saturating_sub(cached)))
    }

    fn number(&self, v1: &str, v2: &str) -> Option<u64> {
        let file = if matches!(self.layout, Layout::V1(_)) { v1 } else { v2 };
        std::fs::read_to_string(self.controller("memory")?.join(file)).ok()?.trim().parse().ok()
    }

    /// How many of its processes the kernel killed because the memory limit was reached.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        let file = if matches!(self.layout, Layout::V1(_)) { "memory.oom_control" } else { "memory.events" };
        let read = || {
            let text = std::fs::read_to_string(self.controller("memory")?.join(file)).ok()?;
            text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.parse().ok()
        };
        read().unwrap_or(0)
    }
}

fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(nix::libc::ENODEV)
}

fn remove_below(dir: &Path) -> io::Result<()> {
    for item in std::fs::read_dir(dir)? {
        let item = item?;
        if item.file_type()?.is_dir() {
            remove_below(&item.path())?;
        }
    }
    std::fs::remove_dir(dir)
}

/// The processes that `cgroup.procs` names. One that is not in the reader's pid namespace (any more) shows as 0 there, and a signal to
/// process 0 goes to the sender's own group.
fn members(list: &str) -> Vec<u32> {
    list.lines().filter_map(|line| line.parse().ok()).filter(|&pid| pid > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
        cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0\n\
        cgroup /sys/fs/cgroup/freezer cgroup rw,relatime,freezer 0 0\n\
        cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0\n";

    #[test]
    fn the_layout_is_told_from_the_mounts() {
        let hybrid = Cgroup::of_mounts(HYBRID, "/x").expect("hybrid");
        assert_eq!(hybrid.freezer().expect("freezer"), Path::new("/sys/fs/cgroup/freezer/x/freezer.state"));
        assert_eq!(hybrid.dirs().len(), 3);
        assert!(hybrid.require("cpu", "--cpus").is_err());
        let v2 = Cgroup::of_mounts("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", "/x").expect("v2");
        assert_eq!(v2.freezer().expect("freezer"), Path::new("/sys/fs/cgroup/x/cgroup.freeze"));
        assert!(Cgroup::of_mounts("proc /proc proc rw 0 0\n", "/x").is_none());
    }

    #[test]
    fn a_member_that_is_being_reaped_is_none() {
        assert_eq!(members("17\n0\n4194303\n"), [17, 4_194_303]);
    }
}
