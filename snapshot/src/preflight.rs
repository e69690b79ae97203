//! Looks for what cannot be dumped, before anything is touched.
//!
//! Reads `/proc` of every task of the replica and answers with every reason at once. What only CRIU can see is left to
//! CRIU: a dump that it refuses leaves the server running.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use procfs::net::TcpState;
use procfs::process::{FDTarget, Process};
use rewarm_criu::binary::Version;

use crate::own::{Own, Pairs, entries, plain};
use crate::peers::peers;

/// CRIU copies a deleted file that is still open into the image, up to this size (`ghost-limit`).
pub(crate) const GHOST_BYTES_MAX: u64 = 1 << 30;

/// How the paths of GPU devices begin.
const DEVICES: &str = "/dev/nvidia";

/// How `/proc/PID/stat` calls the state of a process that a signal has stopped.
const STOPPED: char = 'T';

/// How `/proc` ends the path of a file that has no name any more.
const DELETED: &str = " (deleted)";

/// One thing that cannot be dumped, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// An io_uring exists; CRIU cannot carry it.
    #[error(
        "process {pid} holds an io_uring (fd {fd}), which cannot be carried; start the server under `rewarm run`, which makes libraries fall back"
    )]
    IoUring {
        /// Which process.
        pid: i32,
        /// Which descriptor.
        fd: i32,
    },
    /// A userfaultfd exists: CRIU cannot carry it, nor the memory that is registered with it.
    #[error(
        "process {pid} holds a userfaultfd (fd {fd}), which cannot be carried; close it in a pre hook, or start the server under `rewarm run`, which makes libraries fall back"
    )]
    Userfaultfd {
        /// Which process.
        pid: i32,
        /// Which descriptor.
        fd: i32,
    },
    /// A process was stopped (SIGSTOP): CRIU would wait for it, with the whole server frozen.
    #[error(
        "process {pid} is stopped by a signal, and a dump would wait for it; let it go on first: kill -CONT {pid}"
    )]
    Stopped {
        /// Which process.
        pid: i32,
    },
    /// A GPU device is open in a process that the CUDA driver knows nothing of.
    #[error("process {pid} holds {path} but has no CUDA driver loaded that could let go of it")]
    Device {
        /// Which process.
        pid: i32,
        /// The device file.
        path: String,
    },
    /// Memory that the kernel may drop, which this CRIU restores as something else: clones would share what libraries keep there.
    #[error(
        "process {pid} keeps the state of a random generator in memory that the kernel may drop (glibc 2.41 and newer do), which CRIU {criu} does not know: clones would draw the same numbers; take CRIU 4.2 or newer"
    )]
    Droppable {
        /// Which process.
        pid: i32,
        /// Version of CRIU.
        criu: Version,
    },
    /// A deleted file that is open or mapped is larger than CRIU may copy.
    #[error(
        "process {pid} holds the deleted file {path} of {bytes} bytes; at most {GHOST_BYTES_MAX} bytes are carried"
    )]
    Ghost {
        /// Which process.
        pid: i32,
        /// Its former path.
        path: String,
        /// Its size.
        bytes: u64,
    },
    /// A file is open that lies in none of the replica's mounts.
    #[error(
        "process {pid} holds {path} (fd {fd}), which lies outside of the replica's mounts; bring it in with --mount"
    )]
    OutsideFile {
        /// Which process.
        pid: i32,
        /// Which descriptor.
        fd: i32,
        /// The path as the process sees it.
        path: String,
    },
    /// A connection leaves the replica.
    #[error(
        "process {pid} holds a connection from {local} to {remote} outside of the replica; close it in a pre hook, or let clones find it closed with --tcp-close"
    )]
    Outside {
        /// Which process.
        pid: i32,
        /// The replica's end.
        local: SocketAddr,
        /// The other end.
        remote: SocketAddr,
    },
    /// A Unix socket is connected to one that no process of the replica holds.
    #[error(
        "process {pid} holds a Unix connection from {local} to {remote} outside of the replica, which no clone could have; close it in a pre hook"
    )]
    OutsideUnix {
        /// Which process.
        pid: i32,
        /// The replica's end: its path, or the number of its inode.
        local: String,
        /// The other end.
        remote: String,
    },
    /// CRIU must not read the limits of a process that belongs to somebody else.
    #[error(
        "process {pid} runs as {owner} and process {other_pid} as {other}: without CAP_SYS_RESOURCE CRIU can read the limits of one user's processes only; grant that capability, or run all of the server as one user"
    )]
    Owners {
        /// The first process.
        pid: i32,
        /// Whose it is.
        owner: Owner,
        /// A process of somebody else.
        other_pid: i32,
        /// Whose that is.
        other: Owner,
    },
}

/// Whose a process is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Owner {
    /// User number, the same for its real, effective and saved user.
    pub uid: u32,
    /// Group number, likewise.
    pub gid: u32,
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "user {} of group {}", self.uid, self.gid)
    }
}

/// What the preflight learned of a replica that can be dumped.
#[derive(Debug, Clone, Default)]
pub(crate) struct Findings {
    /// As whom CRIU must run to read the limits of all processes; `None` where it may read those of all.
    pub(crate) owner: Option<Owner>,
    /// The highest limit of each resource that any process has, by the kernel's name of it.
    pub(crate) limits: BTreeMap<String, u64>,
    /// Bytes that CRIU will send, at most.
    pub(crate) memory_bytes: u64,
    /// The processes of Rewarm that may hold the other end of a connection; none where only they can.
    pub(crate) own: Option<Own>,
    /// Rewarm's own connections, as far as they were there.
    pub(crate) connections: Pairs,
    /// Things a person should read.
    pub(crate) warnings: Vec<String>,
}

/// What the caller allows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    /// Connections to the outside come back closed instead of being refused.
    pub(crate) tcp_close: bool,
    /// Every socket in the network namespace that is not the server's is Rewarm's own.
    pub(crate) private_net: bool,
    /// The CRIU that will dump.
    pub(crate) criu: Version,
}

/// Examines the task `init` and all its descendants.
pub(crate) fn examine(init: i32, shim: i32, rules: Rules) -> Result<Findings, Vec<Obstacle>> {
    let tasks = descendants(init);
    let mut obstacles = Vec::new();
    let mut findings = Findings::default();
    let mut sockets: BTreeMap<u64, i32> = BTreeMap::new();
    for task in &tasks {
        findings.memory_bytes += task_bytes(task);
        if task.stat().is_ok_and(|stat| stat.state == STOPPED) {
            obstacles.push(Obstacle::Stopped { pid: task.pid() });
        }
        descriptors(task, &mut sockets, &mut obstacles);
        mappings(task.pid(), &mut obstacles);
        if !rules.criu.knows_droppable() && has_droppable(task.pid()) {
            obstacles.push(Obstacle::Droppable { pid: task.pid(), criu: rules.criu });
        }
        for (name, limit) in rewarm_sys::process::hard_limits(task.pid()).unwrap_or_default() {
            let highest = findings.limits.entry(name).or_default();
            *highest = limit.max(*highest);
        }
    }
    if !rewarm_sys::process::may_change_limits() {
        match common_owner(&tasks) {
            Ok(owner) => findings.owner = owner,
            Err(obstacle) => obstacles.push(obstacle),
        }
    }
    findings.warnings.extend(secrets(&tasks));
    if !rules.private_net {
        let own = Own::find(shim);
        findings.connections = own.connections(init);
        findings.own = Some(own);
        obstacles.extend(outside(init, rules, &sockets, &findings.connections));
    }
    obstacles.extend(outside_by_path(init, &sockets));
    // The driver lets go of its devices before the dump; what is left then is refused then.
    obstacles.retain(|obstacle| {
        !matches!(obstacle, Obstacle::Device { pid, .. } if rewarm_gpu::ranges::loads_driver(*pid))
    });
    if obstacles.is_empty() { Ok(findings) } else { Err(obstacles) }
}

/// A task and all that descend from it, `init` first. Tasks that end meanwhile are left out.
pub(crate) fn descendants(init: i32) -> Vec<Process> {
    let mut found = Vec::new();
    let mut queue = vec![init];
    while let Some(pid) = queue.pop() {
        let Ok(process) = Process::new(pid) else { continue };
        for thread in process.tasks().into_iter().flatten().flatten() {
            queue.extend(
                thread.children().unwrap_or_default().into_iter().filter_map(|pid| i32::try_from(pid).ok()),
            );
        }
        found.push(process);
    }
    found
}

/// Whose all the tasks are; `None` if they are root's, which CRIU is anyway. The kernel lets a process without
/// CAP_SYS_RESOURCE read the limits of those whose three user and group numbers are its own real ones.
fn common_owner(tasks: &[Process]) -> Result<Option<Owner>, Obstacle> {
    let owner = |task: &Process| {
        let status = task.status().ok()?;
        Some((task.pid(), Owner { uid: status.euid, gid: status.egid }))
    };
    let mut owners = tasks.iter().filter_map(owner);
    let Some((pid, first)) = owners.next() else { return Ok(None) };
    match owners.find(|(_, other)| *other != first) {
        Some((other_pid, other)) => Err(Obstacle::Owners { pid, owner: first, other_pid, other }),
        None => Ok(Some(first).filter(|owner| *owner != Owner::default())),
    }
}

/// Bytes of a task that CRIU will send: its own pages, and shared memory that has no file.
fn task_bytes(task: &Process) -> u64 {
    let Ok(status) = task.status() else { return 0 };
    let kib = |value: Option<u64>| value.unwrap_or(0) * 1024;
    kib(status.rssanon) + kib(status.rssshmem)
}

fn descriptors(task: &Process, sockets: &mut BTreeMap<u64, i32>, obstacles: &mut Vec<Obstacle>) {
    let pid = task.pid();
    let mounts: BTreeSet<String> = task
        .mountinfo()
        .map(|list| list.into_iter().map(|mount| mount.mnt_id.to_string()).collect())
        .unwrap_or_default();
    for fd in task.fd().into_iter().flatten().flatten() {
        match &fd.target {
            FDTarget::Socket(inode) => {
                sockets.insert(*inode, pid);
            }
            FDTarget::AnonInode(kind) if kind.contains("io_uring") => {
                obstacles.push(Obstacle::IoUring { pid, fd: fd.fd });
            }
            FDTarget::AnonInode(kind) if kind.contains("userfaultfd") => {
                obstacles.push(Obstacle::Userfaultfd { pid, fd: fd.fd });
            }
            FDTarget::Path(path) => file(pid, fd.fd, &path.to_string_lossy(), &mounts, obstacles),
            _ => {}
        }
    }
}

/// What is mapped needs no descriptor any more: a driver may have closed its device, a program its file.
fn mappings(pid: i32, obstacles: &mut Vec<Obstacle>) {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    // START-END PERMISSIONS OFFSET DEVICE INODE PATH, the path behind blanks.
    let mapped = maps.lines().filter_map(|line| {
        let mut words = line.splitn(6, ' ');
        let range = words.next()?;
        Some((range, words.nth(3)?, words.next()?.trim_start()))
    });
    let mut seen = BTreeSet::new();
    for (range, _, path) in mapped.filter(|(_, inode, path)| seen.insert((*inode, *path))) {
        let obstacle = if path.starts_with(DEVICES) {
            Obstacle::Device { pid, path: path.to_owned() }
        } else if let Some(path) = path.strip_suffix(DELETED)
            && !is_memory(path)
        {
            match ghost(pid, path, &format!("map_files/{}", unpadded(range))) {
                Some(ghost) => ghost,
                None => continue,
            }
        } else {
            continue;
        };
        if !obstacles.contains(&obstacle) {
            obstacles.push(obstacle);
        }
    }
}

/// `maps` pads addresses to eight digits, `map_files` does not.
fn unpadded(range: &str) -> String {
    range.split('-').map(|address| address.trim_start_matches('0')).collect::<Vec<_>>().join("-")
}

/// Shared memory of several kinds is named like a deleted file and is carried as memory, whatever its size.
fn is_memory(path: &str) -> bool {
    path == "/dev/zero" || ["/memfd:", "/SYSV", "/anon_hugepage"].iter().any(|kind| path.starts_with(kind))
}

/// The obstacle that a deleted file is, if it is one; `link` leads to it from the folder of its process in `/proc`.
fn ghost(pid: i32, path: &str, link: &str) -> Option<Obstacle> {
    let bytes = std::fs::metadata(format!("/proc/{pid}/{link}")).map_or(0, |metadata| metadata.len());
    (bytes > GHOST_BYTES_MAX).then(|| Obstacle::Ghost { pid, path: path.to_owned(), bytes })
}

/// Whether a process has memory that is `MAP_DROPPABLE`. Reading this takes the kernel long where there is much memory.
fn has_droppable(pid: i32) -> bool {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let mut flags = smaps.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    flags.any(|flags| flags.split_whitespace().any(|flag| flag == "dp"))
}

fn file(pid: i32, fd: i32, path: &str, mounts: &BTreeSet<String>, obstacles: &mut Vec<Obstacle>) {
    if path.starts_with(DEVICES) {
        obstacles.push(Obstacle::Device { pid, path: path.to_owned() });
        return;
    }
    if let Some(path) = path.strip_suffix(DELETED) {
        if !is_memory(path) {
            obstacles.extend(ghost(pid, path, &format!("fd/{fd}")));
        }
        return;
    }
    // The kernel names the mount of every descriptor; one that the process's own namespace lacks was handed in.
    let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
    let mount = info.lines().find_map(|line| line.strip_prefix("mnt_id:")).map(str::trim);
    if let Some(mount) = mount
        && path.starts_with('/')
        && path != "/dev/null"
        && !mounts.is_empty()
        && !mounts.contains(mount)
    {
        obstacles.push(Obstacle::OutsideFile { pid, fd, path: path.to_owned() });
    }
}

/// The connections of the replica to the outside: neither inside, where they survive, nor Rewarm's own, which a clone finds
/// closed.
fn outside(init: i32, rules: Rules, sockets: &BTreeMap<u64, i32>, own: &Pairs) -> Vec<Obstacle> {
    if rules.tcp_close {
        return Vec::new();
    }
    let entries = entries(init);
    let inside: Pairs = entries
        .iter()
        .filter(|entry| sockets.contains_key(&entry.inode))
        .map(|entry| (plain(entry.local_address), plain(entry.remote_address)))
        .collect();
    let found = entries.iter().filter_map(|entry| {
        let pid = *sockets.get(&entry.inode)?;
        let (local, remote) = (plain(entry.local_address), plain(entry.remote_address));
        let carried = inside.contains(&(remote, local)) || own.contains(&(local, remote));
        (!carried && !is_harmless(&entry.state)).then_some(Obstacle::Outside { pid, local, remote })
    });
    found.collect()
}

/// Unix connections that leave the replica: a path leads out of its network too, where a mount brings one in.
fn outside_by_path(init: i32, sockets: &BTreeMap<u64, i32>) -> Vec<Obstacle> {
    // Where the kernel does not tell, CRIU cannot dump sockets at all, and says so.
    let peers = peers(init).unwrap_or_default();
    let leave = peers.iter().filter(|(_, remote)| !sockets.contains_key(*remote));
    let leave: Vec<_> =
        leave.filter_map(|(local, remote)| Some((*sockets.get(local)?, *local, *remote))).collect();
    if leave.is_empty() {
        return Vec::new();
    }
    let table = |pid: i32| Process::new(pid).and_then(|process| process.unix()).unwrap_or_default();
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    let paths: BTreeMap<u64, String> = [init, own]
        .into_iter()
        .flat_map(table)
        .filter_map(|entry| Some((entry.inode, entry.path?.to_string_lossy().into_owned())))
        .collect();
    let name = |inode: u64| paths.get(&inode).cloned().unwrap_or_else(|| format!("socket {inode}"));
    leave
        .into_iter()
        .map(|(pid, local, remote)| Obstacle::OutsideUnix { pid, local: name(local), remote: name(remote) })
        .collect()
}

/// No connection, or one that the other side has ended: nobody can notice that it does not come back.
fn is_harmless(state: &TcpState) -> bool {
    matches!(
        state,
        TcpState::Listen | TcpState::Close | TcpState::CloseWait | TcpState::LastAck | TcpState::Closing
    )
}

/// Warns of environment variables whose names look like secrets: a snapshot carries their values.
fn secrets(tasks: &[Process]) -> Vec<String> {
    const MARKS: [&str; 6] = ["TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "API_KEY"];
    let mut names = BTreeSet::new();
    for task in tasks {
        for name in task.environ().unwrap_or_default().into_keys() {
            let name = name.to_string_lossy().into_owned();
            let upper = name.to_uppercase();
            if MARKS.iter().any(|mark| upper.contains(mark)) || upper.ends_with("_KEY") {
                names.insert(name);
            }
        }
    }
    if names.is_empty() {
        return Vec::new();
    }
    let names: Vec<String> = names.into_iter().collect();
    vec![format!(
        "the environment looks as if it held secrets ({}): every clone gets them, and so does whoever can read the store",
        names.join(", ")
    )]
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, PoisonError};

    use super::*;

    const RULES: Rules =
        Rules { tcp_close: false, private_net: false, criu: Version { major: 4, minor: 2, patch: 0 } };

    /// Several tests look at the connections of the process in which they run.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

    #[test]
    fn this_process_can_be_examined_and_its_own_loopback_connection_is_inside() {
        let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback");
        let _client = std::net::TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        let _server = listener.accept().expect("accepted");
        let pid = i32::try_from(std::process::id()).expect("a pid");
        let findings = examine(pid, pid, RULES).expect("nothing in the way");
        assert!(findings.memory_bytes > 0);
    }

    #[test]
    fn a_deleted_file_is_carried_up_to_its_limit() {
        use std::os::fd::AsRawFd;
        let pid = i32::try_from(std::process::id()).expect("a pid");
        let path = std::env::temp_dir().join(format!("rewarm-ghost-{pid}"));
        let file = std::fs::File::create(&path).expect("a folder for it");
        std::fs::remove_file(&path).expect("just made");
        let found = |bytes| {
            // It has no content, and so takes no room on the disk.
            file.set_len(bytes).expect("sparse");
            ghost(pid, "/srv/gone", &format!("fd/{}", file.as_raw_fd()))
        };
        assert_eq!(found(GHOST_BYTES_MAX), None);
        let bytes = GHOST_BYTES_MAX + 1;
        assert_eq!(found(bytes), Some(Obstacle::Ghost { pid, path: "/srv/gone".to_owned(), bytes }));
    }

    #[test]
    fn a_stopped_process_is_refused_until_it_goes_on() {
        // The others look at all children of this process.
        let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().expect("a process");
        let pid = i32::try_from(child.id()).expect("a pid");
        let signal = |signal| nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).expect("sent");
        let state = || Process::new(pid).and_then(|process| process.stat()).expect("it lives").state;
        let found = || examine(pid, pid, RULES).err();
        signal(nix::sys::signal::Signal::SIGSTOP);
        while state() != STOPPED {
            std::thread::yield_now();
        }
        let stopped = found();
        signal(nix::sys::signal::Signal::SIGCONT);
        while state() == STOPPED {
            std::thread::yield_now();
        }
        let goes_on = found();
        child.kill().expect("its end");
        child.wait().expect("its end");
        assert_eq!((stopped, goes_on), (Some(vec![Obstacle::Stopped { pid }]), None));
    }

    #[test]
    fn a_connection_whose_other_end_is_elsewhere_is_refused_with_both_addresses() {
        let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback");
        let address = listener.local_addr().expect("bound");
        // The peer is another process that does not belong to the replica.
        let mut peer = std::process::Command::new("bash")
            .args(["-c", &format!("exec 3<>/dev/tcp/127.0.0.1/{}; read -t 20 <&3", address.port())])
            .spawn()
            .expect("bash");
        let (_server, remote) = listener.accept().expect("accepted");
        let pid = i32::try_from(std::process::id()).expect("a pid");
        let sockets = {
            let mut sockets = BTreeMap::new();
            descriptors(&Process::myself().expect("proc"), &mut sockets, &mut Vec::new());
            sockets
        };
        let obstacles = outside(pid, RULES, &sockets, &Pairs::new());
        let seen = obstacles.iter().any(
            |o| matches!(o, Obstacle::Outside { local, remote: r, .. } if *local == address && *r == remote),
        );
        let own = outside(pid, RULES, &sockets, &Pairs::from([(address, remote)]));
        let closed = outside(pid, Rules { tcp_close: true, ..RULES }, &sockets, &Pairs::new());
        peer.kill().expect("killed");
        peer.wait().expect("reaped");
        assert!(seen, "{obstacles:?}");
        assert_eq!((own, closed), (Vec::new(), Vec::new()));
    }

    /// Runs a program of Python that prints a word, and looks at its process once it has.
    fn of_python<T>(program: &str, look: impl FnOnce(i32, &str) -> T) -> T {
        use std::io::BufRead;
        let program =
            format!("import ctypes, mmap, os, sys\n{program}\nsys.stdout.flush(); sys.stdin.read()");
        let mut child = std::process::Command::new("python3")
            .args(["-c", &program])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("python3");
        let mut word = String::new();
        std::io::BufReader::new(child.stdout.take().expect("piped")).read_line(&mut word).expect("a word");
        let seen = look(i32::try_from(child.id()).expect("a pid"), word.trim());
        drop(child.stdin.take());
        child.wait().expect("its end");
        seen
    }

    #[expect(clippy::print_stdout, reason = "a test says why it is skipped")]
    #[test]
    fn memory_that_may_be_dropped_is_refused_where_criu_does_not_know_it() {
        let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        // MAP_DROPPABLE and MAP_ANONYMOUS, as glibc 2.41 asks for the state of the vDSO's generator.
        let program = "libc = ctypes.CDLL(None, use_errno=True); libc.mmap.restype = ctypes.c_void_p\n\
                       made = libc.mmap(None, 4096, 3, 0x28, -1, 0)\n\
                       print('none' if made == ctypes.c_void_p(-1).value else 'made')";
        of_python(program, |pid, word| {
            if word != "made" {
                println!("skipped: needs Linux 6.11");
                let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a release");
                let mut numbers = release
                    .split(|part: char| !part.is_ascii_digit())
                    .map_while(|number| number.parse::<u32>().ok());
                let version = (numbers.next().expect("a number"), numbers.next().expect("a number"));
                assert!(version < (6, 11), "Linux {release} knows MAP_DROPPABLE");
                return;
            }
            let old = Version { major: 4, minor: 1, patch: 1 };
            let found = |criu| examine(pid, pid, Rules { criu, ..RULES }).err();
            assert_eq!(found(old), Some(vec![Obstacle::Droppable { pid, criu: old }]));
            assert_eq!(found(RULES.criu), None);
        });
        of_python("print('other')", |pid, _| {
            let old = Rules { criu: Version { major: 4, minor: 1, patch: 1 }, ..RULES };
            assert_eq!(examine(pid, pid, old).err(), None, "without such memory CRIU 4.1 will do");
        });
    }

    #[test]
    fn a_deleted_file_that_is_only_mapped_counts_and_memory_without_a_file_does_not() {
        let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let path = std::env::temp_dir().join(format!("ghost with a blank {}", std::process::id()));
        let program = format!(
            "size = (1 << 30) + 4096\n\
             file = os.open({path:?}, os.O_RDWR | os.O_CREAT); os.unlink({path:?}); os.truncate(file, size)\n\
             one, two = mmap.mmap(file, 4096), mmap.mmap(file, 8192)\n\
             os.close(file); shared = mmap.mmap(-1, size)\n\
             memory = os.memfd_create('memory'); os.truncate(memory, size); third = mmap.mmap(memory, size)\n\
             print('mapped')"
        );
        let found = of_python(&program, |pid, word| {
            assert_eq!(word, "mapped");
            let mut found = Vec::new();
            mappings(pid, &mut found);
            found.iter().map(ToString::to_string).collect::<Vec<_>>()
        });
        // Python keeps a descriptor of what it maps, which is not what is looked at here.
        assert_eq!(found.len(), 1, "{found:?}");
        let words = format!("the deleted file {} of {} bytes", path.display(), (1 << 30) + 4096);
        assert!(found[0].contains(&words), "{found:?}");
    }

    #[test]
    fn a_missing_process_has_no_descendants() {
        assert!(descendants(i32::MAX).is_empty());
    }
}
