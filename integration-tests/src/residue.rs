//! Everything on the machine that belongs to one world, read from the kernel.
//!
//! What a world starts carries its id in an environment variable, in names or in paths, so that worlds do not see each
//! other and tests can run side by side. The same list is what [`crate::checks::no_residue`] compares and what a world
//! that is dropped takes away.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The environment variable by which everything that a world starts can be told from the rest of the machine.
pub const MARK: &str = "REWARM_TEST_WORLD";

/// Folders below the state folder whose content is the server's own and changes while it serves.
const LIVE: &[&str] = &["upper", "work", "shm", "logs"];
/// Empty folders of a living replica: where the first dump mounts its images, and where runc would put its own.
const MOUNT_POINTS: &[&str] = &["dump", "checkpoint"];
/// Control groups nest no deeper in any layout that Rewarm makes.
const CGROUP_DEPTH_MAX: usize = 8;

/// One thing that exists.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trace {
    /// A process, with its command line.
    Process {
        /// Its id in the first process namespace.
        pid: i32,
        /// Its command line.
        command: String,
    },
    /// A mount, in the mount namespace of the tests.
    Mount(PathBuf),
    /// A mount in a mount namespace of the world's own: that of a shim, or of a server.
    InnerMount {
        /// A process in it.
        pid: i32,
        /// Where.
        path: PathBuf,
    },
    /// A network namespace in which a process is or of which one holds a descriptor, by the number of its inode.
    Network(String),
    /// A control group.
    Cgroup(PathBuf),
    /// A name in the table of Unix sockets, abstract ones with their `@`.
    Socket(String),
    /// A file or folder in the world's state folder or its folder for temporary files; runc's state is among them.
    File(PathBuf),
}

impl std::fmt::Display for Trace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Trace::Process { pid, command } => write!(f, "process {pid}: {command}"),
            Trace::Mount(path) => write!(f, "mount {}", path.display()),
            Trace::InnerMount { pid, path } => {
                write!(f, "mount {} in the namespace of process {pid}", path.display())
            }
            Trace::Network(name) => write!(f, "network namespace {name}"),
            Trace::Cgroup(path) => write!(f, "cgroup {}", path.display()),
            Trace::Socket(name) => write!(f, "socket {name}"),
            Trace::File(path) => write!(f, "file {}", path.display()),
        }
    }
}

/// Everything that belongs to the world `id`, whose files lie below `folder`.
#[must_use]
pub fn of(id: &str, folder: &Path) -> BTreeSet<Trace> {
    let mut traces = BTreeSet::new();
    let processes = processes(id);
    namespaces(&processes, id, &mut traces);
    traces.extend(processes.into_iter().map(|(pid, command)| Trace::Process { pid, command }));
    traces.extend(mounts("self", id).into_iter().map(Trace::Mount));
    traces.extend(cgroups(id).into_iter().map(Trace::Cgroup));
    traces.extend(sockets(id).into_iter().map(Trace::Socket));
    for part in ["state", "tmp"] {
        files(&folder.join(part), &mut traces);
    }
    traces
}

/// Processes of a world: those with its mark in the environment, its id in the command line or in their cgroup. A server
/// may change its environment, `criu` has its own command line, and a container's init has a cgroup of its own. The
/// fetcher is not among them: see [`services`].
#[must_use]
pub fn processes(id: &str) -> Vec<(i32, String)> {
    all(id).into_iter().filter(|(_, command)| !is_service(command)).collect()
}

/// The fetcher of a world: it belongs to no operation, is started by the first restore and ends when nobody has needed
/// it for a while. Its workers end with it.
#[must_use]
pub fn services(id: &str) -> Vec<(i32, String)> {
    all(id).into_iter().filter(|(_, command)| is_service(command)).collect()
}

fn is_service(command: &str) -> bool {
    command.contains(" fetcher --limit ")
}

fn all(id: &str) -> Vec<(i32, String)> {
    let own = i32::try_from(std::process::id()).expect("process ids are positive and fit");
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if pid == own {
            continue;
        }
        let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        let command = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ").trim().to_owned();
        let marked = contains(&read("environ"), format!("{MARK}={id}").as_bytes())
            || command.contains(id)
            || contains(&read("cgroup"), id.as_bytes());
        if marked {
            found.push((pid, command.lines().next().unwrap_or_default().to_owned()));
        }
    }
    found
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

/// What the world's processes have in namespaces of their own.
fn namespaces(processes: &[(i32, String)], id: &str, traces: &mut BTreeSet<Trace>) {
    let link = |pid: &str, name: &str| fs::read_link(format!("/proc/{pid}/{name}")).ok();
    let mut seen = BTreeSet::from([link("self", "ns/mnt")]);
    let own = link("self", "ns/net");
    for pid in processes.iter().map(|(pid, _)| *pid) {
        let name = pid.to_string();
        if seen.insert(link(&name, "ns/mnt")) {
            traces.extend(mounts(&name, id).into_iter().map(|path| Trace::InnerMount { pid, path }));
        }
        let held = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let held = held.filter_map(|entry| fs::read_link(entry.path()).ok());
        let networks = held.chain(link(&name, "ns/net")).filter(|target| Some(target) != own.as_ref());
        let names = networks.map(|target| target.to_string_lossy().into_owned());
        traces.extend(names.filter(|name| name.starts_with("net:[")).map(Trace::Network));
    }
}

/// Mounts that name the world, as the process `pid` sees them.
fn mounts(pid: &str, id: &str) -> Vec<PathBuf> {
    let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    let lines = table.lines().filter(|line| line.contains(id));
    lines.filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from).collect()
}

/// Control groups with the id in their name, in every hierarchy.
#[must_use]
pub fn cgroups(id: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![(PathBuf::from("/sys/fs/cgroup"), 0)];
    while let Some((folder, depth)) = waiting.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            if entry.path().to_string_lossy().contains(id) {
                found.push(entry.path());
            }
            if depth < CGROUP_DEPTH_MAX {
                waiting.push((entry.path(), depth + 1));
            }
        }
    }
    // Children first, the order in which they can be removed.
    found.sort_by_key(|path| std::cmp::Reverse(path.as_os_str().as_bytes().len()));
    found
}

fn sockets(id: &str) -> Vec<String> {
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let names = table.lines().skip(1).filter_map(|line| line.split_whitespace().nth(7));
    names.filter(|name| name.contains(id)).map(str::to_owned).collect()
}

fn files(folder: &Path, traces: &mut BTreeSet<Trace>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let is_mount_point = MOUNT_POINTS.iter().any(|name| entry.file_name() == *name);
        if !is_mount_point || fs::read_dir(entry.path()).is_ok_and(|mut inside| inside.next().is_some()) {
            traces.insert(Trace::File(entry.path()));
        }
        let live = LIVE.iter().any(|name| entry.file_name() == *name);
        if !live && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(&entry.path(), traces);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marked_process_and_a_file_are_found_and_strangers_are_not() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("state/replicas/upper/inner")).unwrap();
        let id = "w0123456789";
        let mut child = std::process::Command::new("sleep").arg("30").env(MARK, id).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        // The environment of a child becomes visible when it has called exec.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while processes(id).is_empty() && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        let traces = of(id, folder.path());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(traces.contains(&Trace::Process { pid, command: "sleep 30".to_owned() }), "{traces:?}");
        assert!(traces.contains(&Trace::File(folder.path().join("state/replicas/upper"))));
        assert!(!traces.contains(&Trace::File(folder.path().join("state/replicas/upper/inner"))));
        assert_eq!(
            of("w9876543210", folder.path()).iter().filter(|t| !matches!(t, Trace::File(_))).count(),
            0
        );
    }
}
