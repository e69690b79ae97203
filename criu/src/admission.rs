//! Refuses images that ask for more than a replica may have, and lists what they need from the machine.
//!
//! CRIU runs as root and gives tasks what the images say: credentials, capabilities, namespaces, mounts, filters of
//! system calls. Who can write into a store must not become root on every machine that restores from it. So before
//! CRIU runs, [`check`] compares the images with what the bundle of the new replica grants. Everything that the images
//! want beyond it is listed at once. A snapshot asks the same of its own images before it publishes them.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use crate::Error;
use crate::image::core::{self, Credentials, Ids, SeccompMode, Thread};
use crate::image::files::{self, FileKind, OpenFile, RegularFile};
use crate::image::mounts::Mount;
use crate::image::seccomp::{self, Filter};
use crate::image::{self, inventory, mm, namespaces, pstree};

mod bpf;
mod bundle;
mod connections;
mod host_files;
mod mounts;
mod violation;

pub use bundle::check_bundle;
pub use connections::{Connection, Listener, Peer, connections, listeners};
pub use host_files::{HostFile, host_files};
pub use violation::Violation;

/// The most threads of a dump whose files are read.
const THREADS_MAX: usize = 1 << 20;

/// Sets of capabilities as bit masks by capability number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Inheritable.
    pub inheritable: u64,
    /// Permitted.
    pub permitted: u64,
    /// Effective.
    pub effective: u64,
    /// Bounding.
    pub bounding: u64,
    /// Ambient.
    pub ambient: u64,
}

/// Whose rights a thread has, where it cannot take others' by itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// The only user; `None` where the replica may become any.
    pub user: Option<u32>,
    /// The only groups, the first of them as its own group and any as supplementary ones; `None` where it may take any.
    pub groups: Option<Vec<u32>>,
}

/// A mount that the bundle asks for, or that the runtime makes by itself: a masked path is given twice, as a `bind` (of
/// `/dev/null`, over a file) and as a read-only `tmpfs` (over a folder), a read-only path as a read-only `bind`. Those
/// below `/proc` and `/sys` must be in the images if the path exists on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedMount {
    /// Where, absolute.
    pub mountpoint: String,
    /// Type of file system, such as `tmpfs`; `bind` for a bind mount of anything; `cgroup` for the cgroups of either
    /// version.
    pub kind: String,
    /// It must come back read-only.
    pub read_only: bool,
}

/// What the bundle of the new replica grants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    /// Users and groups.
    pub identity: Identity,
    /// Capabilities.
    pub capabilities: Capabilities,
    /// Each thread must have `no_new_privs`.
    pub no_new_privs: bool,
    /// How strictly system calls must at least be filtered.
    pub seccomp: SeccompMode,
    /// System calls (x86-64 numbers) that the filters must not let through, for any arguments: the filter programs in
    /// the images are run on each of them with all arguments zero.
    pub denied_syscalls: Vec<u32>,
    /// Mounts besides the root.
    pub mounts: Vec<AllowedMount>,
    /// Kinds of namespaces that must be the replica's own.
    pub own_namespaces: Vec<Namespace>,
    /// The lowest adjustment of the out-of-memory killer.
    pub oom_score_adj_min: i32,
    /// Device nodes that may be open, by path.
    pub devices: Vec<String>,
}

/// Kinds of namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Namespace {
    /// Process ids.
    Pid,
    /// Network.
    Net,
    /// System V objects and message queues.
    Ipc,
    /// Host name.
    Uts,
    /// Mounts.
    Mount,
    /// Cgroups.
    Cgroup,
}

impl Namespace {
    fn name(self) -> &'static str {
        match self {
            Self::Pid => "pid",
            Self::Net => "network",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Mount => "mount",
            Self::Cgroup => "cgroup",
        }
    }

    fn of(self, ids: &Ids) -> u32 {
        match self {
            Self::Pid => ids.pid,
            Self::Net => ids.net,
            Self::Ipc => ids.ipc,
            Self::Uts => ids.uts,
            Self::Mount => ids.mount,
            Self::Cgroup => ids.cgroup,
        }
    }
}

/// Compares an image directory with what is granted. Empty means that the images may be restored.
///
/// # Errors
/// [`Error::Io`] or [`Error::Image`] if an image that decides cannot be read: it must not be restored then.
pub fn check(directory: &Path, allowed: &Allowed) -> crate::Result<Vec<Violation>> {
    let mut found = Vec::new();
    names(directory, &mut found)?;
    let filters = seccomp::read(directory)?;
    let host = inventory::read(directory)?.host;
    let mut threads = 0;
    for task in pstree::read(directory)? {
        if let Some(ids) = core::ids(directory, task.pid)? {
            spaces(task.pid, &ids, &host, allowed, &mut found);
        }
        threads += task.threads.len();
        if threads > THREADS_MAX {
            let path = directory.join("pstree.img");
            let (seen, limit) = (threads as u64, THREADS_MAX as u64);
            return Err(Error::image(path)(crate::Fault::Limit { what: "number of threads", seen, limit }));
        }
        let leader = core::read(directory, task.pid)?;
        thread(task.pid, &leader, &filters, allowed, &mut found);
        if leader.is_ended() {
            continue;
        }
        for tid in task.threads.iter().filter(|tid| **tid != task.pid) {
            let mut other = core::read(directory, *tid)?;
            inherit_filter(&mut other, &leader, &filters);
            thread(*tid, &other, &filters, allowed, &mut found);
        }
    }
    if !namespaces::users(directory)?.is_empty() {
        found.push(Violation::UserNamespace { pid: None });
    }
    let mounted = image::mounts::read(directory)?;
    mounts::check(&mounted, &allowed.mounts, Path::exists, &mut found);
    check_files(directory, &mounted, allowed, &mut found)?;
    found.dedup();
    Ok(found)
}

/// Names that a dump of a replica by CRIU 4 has, without number and `.img`. Others would reach readers that nothing here
/// looks at: those for images of CRIU's first versions, and those that give firewall rules and routes to programs of the
/// host. A replica's network namespace comes from outside, so its dump has none of them.
const NAMES: &[&str] = &[
    "cgroup",
    "core-",
    "cpuinfo",
    "fdinfo-",
    "fifo-data",
    "filelocks",
    "files",
    "fs-",
    "ghost-file-",
    "ids-",
    "inventory",
    "ipcns-msg-",
    "ipcns-sem-",
    "ipcns-shm-",
    "ipcns-var-",
    "memfd",
    "mm-",
    "mountpoints-",
    "netns-",
    "pagemap-",
    "pagemap-shmem-",
    "pages-",
    "pidns-",
    "pipes-data",
    "pstree",
    "remap-fpath",
    "seccomp",
    "sk-queues",
    "tcp-stream-",
    "timens-",
    "tmpfs-",
    "tmpfs-dev-",
    "tty-data",
    "tty-info",
    "utsns-",
];

fn names(directory: &Path, found: &mut Vec<Violation>) -> crate::Result<()> {
    let mut unknown = Vec::new();
    for entry in fs::read_dir(directory).map_err(Error::io("list", directory))? {
        let entry = entry.map_err(Error::io("list", directory))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_file = entry.file_type().map_err(Error::io("look at", entry.path()))?.is_file();
        if !is_file || !is_known(&name) {
            unknown.push(Violation::UnknownImage { name });
        }
    }
    unknown.sort_by_key(ToString::to_string);
    found.append(&mut unknown);
    Ok(())
}

fn is_known(name: &str) -> bool {
    // runc's own file beside the images, and CRIU's statistics and logs where the work directory is the same.
    if matches!(name, "descriptors.json" | "stats-dump" | "stats-restore" | "dump.log" | "restore.log") {
        return true;
    }
    let Some(stem) = name.strip_suffix(".img") else { return false };
    let stem = stem.strip_suffix(".tar.gz").unwrap_or(stem);
    let number = stem.rfind(|c: char| !c.is_ascii_hexdigit()).map_or(0, |at| at + 1);
    NAMES.contains(&stem) || (number < stem.len() && NAMES.contains(&&stem[..number]))
}

fn spaces(pid: u32, ids: &Ids, host: &Ids, allowed: &Allowed, found: &mut Vec<Violation>) {
    for kind in &allowed.own_namespaces {
        if kind.of(ids) == kind.of(host) {
            found.push(Violation::HostNamespace { pid, kind: kind.name() });
        }
    }
    if ids.user != host.user {
        found.push(Violation::UserNamespace { pid: Some(pid) });
    }
}

fn thread(tid: u32, thread: &Thread, filters: &[Filter], allowed: &Allowed, found: &mut Vec<Violation>) {
    if let Some(credentials) = &thread.credentials {
        check_credentials(tid, credentials, allowed, found);
        check_seccomp(tid, thread, filters, allowed, found);
    }
    // Round robin, FIFO and deadline threads can take a processor for themselves.
    if matches!(thread.policy, 1 | 2 | 6) {
        found.push(Violation::Realtime { tid, policy: thread.policy });
    }
    let adjustment = thread.task.as_ref().and_then(|task| task.oom_score_adj).unwrap_or(0);
    if adjustment < allowed.oom_score_adj_min {
        found.push(Violation::OomScore { tid, seen: adjustment, lowest: allowed.oom_score_adj_min });
    }
}

fn check_credentials(tid: u32, seen: &Credentials, allowed: &Allowed, found: &mut Vec<Violation>) {
    let granted = &allowed.capabilities;
    for (set, seen, granted) in [
        ("inheritable", seen.inheritable, granted.inheritable),
        ("permitted", seen.permitted, granted.permitted),
        ("effective", seen.effective, granted.effective),
        ("bounding", seen.bounding, granted.bounding),
        ("ambient", seen.ambient, granted.ambient),
    ] {
        if seen & !granted != 0 {
            found.push(Violation::Capabilities { tid, set, extra: seen & !granted });
        }
    }
    if allowed.no_new_privs && !seen.no_new_privs {
        found.push(Violation::NewPrivileges { tid });
    }
    let Identity { user, groups } = &allowed.identity;
    if let Some(granted) = user
        && let Some(user) = seen.users.into_iter().find(|user| user != granted)
    {
        found.push(Violation::User { tid, seen: user, granted: *granted });
    }
    let own = groups.as_ref().and_then(|groups| groups.first());
    let other = own.and_then(|own| seen.groups.into_iter().find(|group| group != own));
    let more = groups.as_ref().and_then(|all| seen.supplementary.iter().find(|group| !all.contains(group)));
    if let Some(group) = other.or(more.copied()) {
        found.push(Violation::Group { tid, seen: group, granted: groups.clone().unwrap_or_default() });
    }
}

fn check_seccomp(
    tid: u32,
    thread: &Thread,
    filters: &[Filter],
    allowed: &Allowed,
    found: &mut Vec<Violation>,
) {
    if thread.seccomp < allowed.seccomp && thread.seccomp != SeccompMode::Strict {
        found.push(Violation::Seccomp { tid });
        return;
    }
    if thread.seccomp != SeccompMode::Filter {
        return;
    }
    let chain = chain(filters, thread.seccomp_filter);
    for &syscall in &allowed.denied_syscalls {
        if chain.iter().all(|filter| bpf::allows(&filter.program, syscall)) {
            found.push(Violation::Syscall { tid, syscall });
        }
    }
}

/// Where all threads of a task have the same filters, CRIU writes them down for the first thread only, with the flag by
/// which the kernel gives them to all threads (seen with 4.2.1: a server with threads has no mode in theirs).
fn inherit_filter(thread: &mut Thread, leader: &Thread, filters: &[Filter]) {
    const FOR_ALL_THREADS: u32 = 1;
    let innermost = leader.seccomp_filter.and_then(|index| filters.get(index as usize));
    if thread.seccomp == SeccompMode::Disabled
        && leader.seccomp == SeccompMode::Filter
        && innermost.is_some_and(|filter| filter.flags & FOR_ALL_THREADS != 0)
    {
        thread.seccomp = leader.seccomp;
        thread.seccomp_filter = leader.seccomp_filter;
    }
}

/// The filters that decide together for a thread, the innermost first.
fn chain(filters: &[Filter], innermost: Option<u32>) -> Vec<&Filter> {
    let mut chain = Vec::new();
    // An outer filter has a smaller index, which reading has checked, so this ends.
    let mut next = innermost;
    while let Some(filter) = next.and_then(|index| filters.get(index as usize)) {
        chain.push(filter);
        next = filter.outer;
    }
    chain
}

fn check_files(
    directory: &Path,
    mounted: &[Mount],
    allowed: &Allowed,
    found: &mut Vec<Violation>,
) -> crate::Result<()> {
    let known: HashSet<i32> = mounted.iter().filter_map(|mount| i32::try_from(mount.id).ok()).collect();
    for OpenFile { id, kind } in files::read(directory)? {
        match kind {
            FileKind::Regular(file) => check_file(&file, &known, allowed, found),
            FileKind::External => found.push(Violation::KernelObject { id, kind: "external file" }),
            FileKind::Packet => found.push(Violation::KernelObject { id, kind: "packet socket" }),
            FileKind::Tun => found.push(Violation::KernelObject { id, kind: "virtual network interface" }),
            FileKind::BpfMap => found.push(Violation::KernelObject { id, kind: "BPF map" }),
            _ => {}
        }
    }
    Ok(())
}

fn check_file(file: &RegularFile, mounts: &HashSet<i32>, allowed: &Allowed, found: &mut Vec<Violation>) {
    let path = || file.path.clone();
    if file.path.split('/').any(|part| part == "..") {
        found.push(Violation::Path { path: path() });
    }
    if file.is_device() && !allowed.devices.contains(&file.path) {
        found.push(Violation::Device { path: path() });
    }
    if file.external || (file.mount >= 0 && !mounts.is_empty() && !mounts.contains(&file.mount)) {
        found.push(Violation::OutsideFile { path: path() });
    }
}

/// Ids of files that some task maps or runs.
fn mapped(directory: &Path) -> crate::Result<HashSet<u32>> {
    let mut ids = HashSet::new();
    for task in pstree::read(directory)? {
        match mm::read(directory, task.pid) {
            Ok(space) => {
                ids.insert(space.exe);
                ids.extend(space.vmas.iter().filter_map(mm::Vma::file));
            }
            // A zombie has no memory.
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(ids)
}
