//! The processes behind the tasks: which they are, and how none of them survives.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rewarm_sys::hold::Hold;
use rewarm_sys::process::innermost_id;

/// How long killed tasks may take to be gone before the pager lets go of their memory all the same: exiting needs the
/// processor only, but a large memory takes its time.
const GONE_WITHIN: Duration = Duration::from_secs(20);

/// How long threads of stopped tasks may take to stand for a tracer: none of them runs.
const HELD_WITHIN: Duration = Duration::from_secs(10);

/// Where the processes of the replica are found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tasks {
    /// In this cgroup and those below it, in any hierarchy: a folder with `cgroup.procs`.
    Cgroup(PathBuf),
    /// Under their own numbers and those of their descendants: they have no pid namespace of their own.
    Numbers(Vec<i32>),
}

impl Tasks {
    /// The process that has this pid inside its own pid namespace.
    #[must_use]
    pub fn host_pid(&self, task: u32) -> Option<i32> {
        self.all().into_iter().find(|&pid| innermost_id(pid) == Some(task))
    }

    /// Lets every stopped process go on, so that none of them sees a signal. `unblock`: threads, by their ids in the innermost pid
    /// namespace, in which SIGCHLD was blocked for that. If this process dies in the middle, they die with it: the shim would kill them anyway.
    ///
    /// # Errors
    /// The kernel's, or a thread that does not stand in time; some of them may be stopped still.
    pub fn resume(&self, unblock: &[u32]) -> io::Result<()> {
        let processes: Vec<i32> = self.all().into_iter().collect();
        Hold::new(true).continue_unseen(&processes, unblock, HELD_WITHIN)
    }

    /// Kills every process and waits until all are gone. Returns those that are not.
    ///
    /// They are stopped before the first is killed, so that none forks in between or sees another one die.
    pub fn kill(&self) -> BTreeSet<i32> {
        let deadline = Instant::now() + GONE_WITHIN;
        let mut stopped = BTreeSet::new();
        // Each pass finds what was forked before its parent was stopped.
        loop {
            let found: Vec<i32> = self.all().into_iter().filter(|pid| !stopped.contains(pid)).collect();
            if found.is_empty() {
                break;
            }
            for pid in found {
                let _ = kill(Pid::from_raw(pid), Signal::SIGSTOP);
                stopped.insert(pid);
            }
        }
        loop {
            for &pid in &stopped {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            self.thaw();
            stopped.retain(|&pid| lives(pid));
            if stopped.is_empty() || Instant::now() > deadline {
                return stopped;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// A frozen task of cgroup v1 dies only when it is thawed. The signal is delivered before its next instruction.
    fn thaw(&self) {
        if let Tasks::Cgroup(folder) = self {
            let state = folder.join("freezer.state");
            if state.exists() {
                let _ = fs::write(state, "THAWED");
            }
        }
    }

    fn all(&self) -> BTreeSet<i32> {
        let mut pids = BTreeSet::new();
        match self {
            Tasks::Cgroup(folder) => members(folder, &mut pids),
            Tasks::Numbers(numbers) => {
                for &pid in numbers {
                    descendants(pid, &mut pids);
                }
            }
        }
        pids.retain(|&pid| pid > 0 && lives(pid));
        pids
    }
}

fn numbers(path: &Path) -> Vec<i32> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

fn members(folder: &Path, pids: &mut BTreeSet<i32>) {
    pids.extend(numbers(&folder.join("cgroup.procs")));
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        members(&entry.path(), pids);
    }
}

fn descendants(pid: i32, pids: &mut BTreeSet<i32>) {
    if !pids.insert(pid) {
        return;
    }
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    for thread in threads {
        for child in numbers(&thread.path().join("children")) {
            descendants(child, pids);
        }
    }
}

/// Whether the process still has memory: a zombie has none.
fn lives(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold anything, the state follows the last one.
    let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start().as_bytes());
    state.is_some_and(|state| !matches!(state.first(), None | Some(b'Z' | b'X')))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn no_descendant_survives() {
        let mut shell = Command::new("sh")
            .args(["-c", "sleep 100 & (sleep 100 & sleep 100; true) & wait"])
            .spawn()
            .expect("a shell");
        let pid = i32::try_from(shell.id()).expect("pids are int");
        let tasks = Tasks::Numbers(vec![pid]);
        let deadline = Instant::now() + Duration::from_secs(5);
        while tasks.all().len() < 5 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        let family = tasks.all();
        assert_eq!(family.len(), 5);
        assert_eq!(tasks.host_pid(shell.id()), Some(pid));
        assert_eq!(tasks.kill(), BTreeSet::new());
        shell.wait().expect("reaped");
        assert!(family.into_iter().all(|pid| !lives(pid)));
    }
}
