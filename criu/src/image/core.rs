//! `core-TID.img`: who a thread is and what it may do.
//!
//! The file of a main thread also has what belongs to the whole task. `ids-PID.img` has the namespaces of a task.

use std::path::{Path, PathBuf};

use prost::Message;

use super::{Kind, read_one};
use crate::{Error, Fault};

/// CRIU's state of a task that it restores as a zombie.
const DEAD: u32 = 2;

/// How system calls are filtered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SeccompMode {
    /// Not at all.
    Disabled,
    /// Only read, write, exit and sigreturn.
    Strict,
    /// By filter programs.
    Filter,
}

/// Credentials of a thread. Sets of capabilities are bit masks by capability number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// Real, effective, saved and file system user.
    pub users: [u32; 4],
    /// Real, effective, saved and file system group.
    pub groups: [u32; 4],
    /// Supplementary groups.
    pub supplementary: Vec<u32>,
    /// Inheritable capabilities.
    pub inheritable: u64,
    /// Permitted capabilities.
    pub permitted: u64,
    /// Effective capabilities.
    pub effective: u64,
    /// Bounding set.
    pub bounding: u64,
    /// Ambient capabilities.
    pub ambient: u64,
    /// Secure bits of prctl.
    pub securebits: u32,
    /// `no_new_privs` is set.
    pub no_new_privs: bool,
    /// Profile of the security module, empty where there is none.
    pub lsm_profile: String,
}

/// What belongs to the whole task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskState {
    /// CRIU's state: 1 alive, 2 dead, 3 stopped, 6 zombie.
    pub state: u32,
    /// Adjustment of the out-of-memory killer, -1000 to 1000.
    pub oom_score_adj: Option<i32>,
    /// The task reaps the orphans below it.
    pub subreaper: bool,
    /// A handler of the task runs when a child of it is stopped by a signal or goes on. Held true where the image does not say.
    pub hears_of_stops: bool,
}

/// One thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thread {
    /// Name, at most 15 bytes.
    pub name: String,
    /// Only in the file of a main thread.
    pub task: Option<TaskState>,
    /// Credentials; `None` for zombies.
    pub credentials: Option<Credentials>,
    /// How system calls are filtered.
    pub seccomp: SeccompMode,
    /// Index of the innermost filter in `seccomp.img`.
    pub seccomp_filter: Option<u32>,
    /// Scheduling policy: 0 normal, 1 FIFO, 2 round robin, 3 batch, 5 idle, 6 deadline.
    pub policy: u32,
    /// Nice value, -20 to 19.
    pub nice: i32,
}

impl Thread {
    /// Whether it is the main thread of a task that had ended and that nobody had waited for: there is its exit status, and
    /// no memory, namespace or thread. CRIU writes any number for the threads of such a task and reads none of them.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.task.as_ref().is_some_and(|task| task.state == DEAD)
    }
}

/// Numbers of namespaces and of what a task may share with others, as CRIU counts them. 0 where there is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ids {
    /// Address space.
    pub vm: u32,
    /// Table of open files, the number in `fdinfo-ID.img`.
    pub files: u32,
    /// Pid namespace.
    pub pid: u32,
    /// Network namespace.
    pub net: u32,
    /// IPC namespace.
    pub ipc: u32,
    /// Host name namespace.
    pub uts: u32,
    /// Mount namespace, the number in `mountpoints-ID.img`.
    pub mount: u32,
    /// User namespace.
    pub user: u32,
    /// Cgroup namespace.
    pub cgroup: u32,
    /// Time namespace.
    pub time: u32,
}

/// Fields of a thread's entry that hold the signals it blocks: of the whole task, which counts for a main thread, and of the thread.
pub(crate) const TASK_FIELD: u32 = 3;
pub(crate) const THREAD_FIELD: u32 = 5;
pub(crate) const TASK_BLOCKED: u32 = 5;
pub(crate) const THREAD_BLOCKED: u32 = 6;

/// Place of SIGCHLD (17) among the actions: one for each signal from 1 on, but for SIGKILL (9).
const CHILD_ACTION: usize = 15;
const DEFAULT_OR_IGNORED: u64 = 1;
const NO_CHILD_STOP: u64 = 1;

#[derive(Clone, PartialEq, Message)]
struct CoreEntry {
    #[prost(message, optional, tag = "3")]
    task: Option<TaskCoreEntry>,
    #[prost(message, optional, tag = "5")]
    thread: Option<ThreadCoreEntry>,
}

#[derive(Clone, PartialEq, Message)]
struct TaskCoreEntry {
    #[prost(uint32, tag = "1")]
    state: u32,
    #[prost(string, tag = "6")]
    name: String,
    #[prost(uint32, optional, tag = "11")]
    old_seccomp_mode: Option<u32>,
    #[prost(uint32, optional, tag = "12")]
    old_seccomp_filter: Option<u32>,
    #[prost(int32, optional, tag = "14")]
    oom_score_adj: Option<i32>,
    #[prost(message, repeated, tag = "15")]
    actions: Vec<ActionEntry>,
    #[prost(bool, tag = "18")]
    subreaper: bool,
}

/// What a signal does.
#[derive(Clone, Copy, PartialEq, Message)]
struct ActionEntry {
    #[prost(uint64, tag = "1")]
    handler: u64,
    #[prost(uint64, tag = "2")]
    flags: u64,
}

#[derive(Clone, PartialEq, Message)]
struct ThreadCoreEntry {
    #[prost(sint32, tag = "3")]
    nice: i32,
    #[prost(uint32, tag = "4")]
    policy: u32,
    #[prost(message, optional, tag = "10")]
    credentials: Option<CredsEntry>,
    #[prost(uint32, optional, tag = "11")]
    seccomp_mode: Option<u32>,
    #[prost(uint32, optional, tag = "12")]
    seccomp_filter: Option<u32>,
    #[prost(string, tag = "13")]
    name: String,
}

#[derive(Clone, PartialEq, Message)]
struct CredsEntry {
    #[prost(uint32, tag = "1")]
    uid: u32,
    #[prost(uint32, tag = "2")]
    gid: u32,
    #[prost(uint32, tag = "3")]
    euid: u32,
    #[prost(uint32, tag = "4")]
    egid: u32,
    #[prost(uint32, tag = "5")]
    suid: u32,
    #[prost(uint32, tag = "6")]
    sgid: u32,
    #[prost(uint32, tag = "7")]
    fsuid: u32,
    #[prost(uint32, tag = "8")]
    fsgid: u32,
    #[prost(uint32, repeated, packed = "false", tag = "9")]
    inheritable: Vec<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "10")]
    permitted: Vec<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "11")]
    effective: Vec<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "12")]
    bounding: Vec<u32>,
    #[prost(uint32, tag = "13")]
    securebits: u32,
    #[prost(uint32, repeated, packed = "false", tag = "14")]
    supplementary: Vec<u32>,
    #[prost(string, tag = "15")]
    lsm_profile: String,
    #[prost(uint32, tag = "18")]
    no_new_privs: u32,
    #[prost(uint32, repeated, packed = "false", tag = "19")]
    ambient: Vec<u32>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct IdsEntry {
    #[prost(uint32, tag = "1")]
    vm: u32,
    #[prost(uint32, tag = "2")]
    files: u32,
    #[prost(uint32, tag = "5")]
    pid: u32,
    #[prost(uint32, tag = "6")]
    net: u32,
    #[prost(uint32, tag = "7")]
    ipc: u32,
    #[prost(uint32, tag = "8")]
    uts: u32,
    #[prost(uint32, tag = "9")]
    mount: u32,
    #[prost(uint32, tag = "10")]
    user: u32,
    #[prost(uint32, tag = "11")]
    cgroup: u32,
    #[prost(uint32, tag = "12")]
    time: u32,
}

impl From<IdsEntry> for Ids {
    fn from(entry: IdsEntry) -> Self {
        let IdsEntry { vm, files, pid, net, ipc, uts, mount, user, cgroup, time } = entry;
        Self { vm, files, pid, net, ipc, uts, mount, user, cgroup, time }
    }
}

/// Reads the file of a thread.
///
/// # Errors
/// [`crate::Error::Io`] if there is none, [`crate::Error::Image`] if it is not what CRIU writes.
pub fn read(directory: &Path, tid: u32) -> crate::Result<Thread> {
    let path = path(directory, tid);
    let entry: CoreEntry = read_one(&path, Kind::Core)?;
    thread(entry).map_err(Error::image(path))
}

pub(crate) fn path(directory: &Path, tid: u32) -> PathBuf {
    directory.join(format!("core-{tid}.img"))
}

/// Reads the namespaces of a task. A zombie has none.
///
/// # Errors
/// [`crate::Error::Image`] if the file is not what CRIU writes.
pub fn ids(directory: &Path, pid: u32) -> crate::Result<Option<Ids>> {
    let path: PathBuf = directory.join(format!("ids-{pid}.img"));
    match read_one::<IdsEntry>(&path, Kind::Ids) {
        Ok(entry) => Ok(Some(entry.into())),
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn thread(entry: CoreEntry) -> Result<Thread, Fault> {
    let task = entry.task.unwrap_or_default();
    let is_main = task.state != 0;
    let thread = entry.thread.unwrap_or_default();
    let mode = thread.seccomp_mode.or(task.old_seccomp_mode).unwrap_or(0);
    let seccomp = match mode {
        0 => SeccompMode::Disabled,
        1 => SeccompMode::Strict,
        2 => SeccompMode::Filter,
        seen => {
            let expected = "0, 1 or 2";
            return Err(Fault::Value { what: "seccomp mode", seen: u64::from(seen), expected });
        }
    };
    let hears =
        |action: &ActionEntry| action.handler > DEFAULT_OR_IGNORED && action.flags & NO_CHILD_STOP == 0;
    let state = TaskState {
        state: task.state,
        oom_score_adj: task.oom_score_adj,
        subreaper: task.subreaper,
        hears_of_stops: task.actions.get(CHILD_ACTION).is_none_or(hears),
    };
    Ok(Thread {
        name: if thread.name.is_empty() { task.name } else { thread.name },
        task: is_main.then_some(state),
        credentials: thread.credentials.map(credentials).transpose()?,
        seccomp,
        seccomp_filter: thread.seccomp_filter.or(task.old_seccomp_filter),
        policy: thread.policy,
        nice: thread.nice,
    })
}

fn credentials(entry: CredsEntry) -> Result<Credentials, Fault> {
    Ok(Credentials {
        users: [entry.uid, entry.euid, entry.suid, entry.fsuid],
        groups: [entry.gid, entry.egid, entry.sgid, entry.fsgid],
        inheritable: mask(&entry.inheritable)?,
        permitted: mask(&entry.permitted)?,
        effective: mask(&entry.effective)?,
        bounding: mask(&entry.bounding)?,
        ambient: mask(&entry.ambient)?,
        securebits: entry.securebits,
        supplementary: entry.supplementary,
        no_new_privs: entry.no_new_privs != 0,
        lsm_profile: entry.lsm_profile,
    })
}

/// A set of capabilities is stored as words of 32 bits, the low one first.
fn mask(words: &[u32]) -> Result<u64, Fault> {
    match *words {
        [] => Ok(0),
        [low] => Ok(u64::from(low)),
        [low, high] => Ok(u64::from(low) | u64::from(high) << 32),
        _ => {
            let expected = "at most 2";
            Err(Fault::Value { what: "number of capability words", seen: words.len() as u64, expected })
        }
    }
}
