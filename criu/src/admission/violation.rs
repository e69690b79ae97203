//! What images want beyond what is granted, in words.

use std::fmt;

/// One thing too many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Violation {
    /// Capabilities.
    Capabilities {
        /// Thread.
        tid: u32,
        /// Which set.
        set: &'static str,
        /// Those that are not granted, as a mask.
        extra: u64,
    },
    /// A thread could gain privileges by executing a program.
    NewPrivileges {
        /// Thread.
        tid: u32,
    },
    /// A user that the replica is not, and cannot become.
    User {
        /// Thread.
        tid: u32,
        /// The user in the images.
        seen: u32,
        /// The replica's.
        granted: u32,
    },
    /// A group that the replica is not in, and cannot join.
    Group {
        /// Thread.
        tid: u32,
        /// The group in the images.
        seen: u32,
        /// The replica's.
        granted: Vec<u32>,
    },
    /// System calls are not filtered.
    Seccomp {
        /// Thread.
        tid: u32,
    },
    /// The filters let a system call through that must be denied.
    Syscall {
        /// Thread.
        tid: u32,
        /// Its x86-64 number.
        syscall: u32,
    },
    /// A user namespace would be made.
    UserNamespace {
        /// The task in it, where one is known.
        pid: Option<u32>,
    },
    /// A task would run in the host's namespace.
    HostNamespace {
        /// Task.
        pid: u32,
        /// Kind of namespace.
        kind: &'static str,
    },
    /// A mount that the bundle does not ask for.
    Mount {
        /// Where.
        mountpoint: String,
        /// Type of file system.
        kind: String,
        /// Source.
        source: String,
    },
    /// A mount could be written that must not be.
    WritableMount {
        /// Where.
        mountpoint: String,
    },
    /// A mask or a read-only part of the kernel's interfaces is missing.
    MissingMount {
        /// Where.
        mountpoint: String,
    },
    /// A mount that a plugin of CRIU would make.
    PluginMount {
        /// Number of the mount.
        id: u32,
    },
    /// An open file whose path climbs.
    Path {
        /// The path.
        path: String,
    },
    /// A device that the bundle does not grant.
    Device {
        /// Path of its node.
        path: String,
    },
    /// An open file that lies on no mount of the replica.
    OutsideFile {
        /// Its path.
        path: String,
    },
    /// An open kernel object that no server needs and that needs privileges to make.
    KernelObject {
        /// Id of the open file.
        id: u32,
        /// What it is.
        kind: &'static str,
    },
    /// A thread with a real-time scheduling policy.
    Realtime {
        /// Thread.
        tid: u32,
        /// The kernel's number of the policy.
        policy: u32,
    },
    /// A task that the out-of-memory killer would spare.
    OomScore {
        /// Thread.
        tid: u32,
        /// Adjustment in the images.
        seen: i32,
        /// The lowest that is granted.
        lowest: i32,
    },
    /// A file in the image directory that no dump of a replica has.
    UnknownImage {
        /// Its name.
        name: String,
    },
}

/// Names of capabilities by number, from 0.
const CAPABILITIES: &[&str] = &[
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The names of the capabilities in a mask.
pub(super) fn names_of(mask: u64) -> String {
    let names = (0..64).filter(|bit| mask >> bit & 1 == 1).map(|bit| match CAPABILITIES.get(bit) {
        Some(name) => format!("CAP_{name}"),
        None => format!("capability {bit}"),
    });
    names.collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Capabilities { tid, set, extra } => {
                write!(
                    f,
                    "thread {tid} has {} in its {set} set, which the replica is not granted",
                    names_of(*extra)
                )
            }
            Self::NewPrivileges { tid } => {
                write!(f, "thread {tid} has not given up new privileges (no_new_privs)")
            }
            Self::User { tid, seen, granted } => {
                write!(
                    f,
                    "thread {tid} is user {seen}, the replica is user {granted} and cannot become another"
                )
            }
            Self::Group { tid, seen, granted } => {
                let granted = granted.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
                write!(
                    f,
                    "thread {tid} is in group {seen}, the replica is in {granted} and cannot join another"
                )
            }
            Self::Seccomp { tid } => write!(f, "thread {tid} has no filter of system calls"),
            Self::Syscall { tid, syscall } => {
                write!(f, "thread {tid} has filters that allow system call {syscall}, which must be denied")
            }
            Self::UserNamespace { pid: Some(pid) } => {
                write!(f, "task {pid} is in a user namespace of its own")
            }
            Self::UserNamespace { pid: None } => f.write_str("the images make a user namespace"),
            Self::HostNamespace { pid, kind } => write!(f, "task {pid} is in the host's {kind} namespace"),
            Self::Mount { mountpoint, kind, source } => {
                write!(f, "mount of {kind} ({source}) at {mountpoint} is not in the replica's configuration")
            }
            Self::WritableMount { mountpoint } => {
                write!(f, "mount at {mountpoint} is writable, expected read-only")
            }
            Self::MissingMount { mountpoint } => write!(
                f,
                "mount at {mountpoint} is missing, which the replica's configuration hides or protects"
            ),
            Self::PluginMount { id } => write!(f, "mount {id} is made by a plugin of criu"),
            Self::Path { path } => write!(f, "open file {path} has .. in its path"),
            Self::Device { path } => write!(f, "device {path} is open, which the replica is not granted"),
            Self::OutsideFile { path } => write!(f, "open file {path} lies on no mount of the replica"),
            Self::KernelObject { id, kind } => write!(f, "open file {id} is a {kind}"),
            Self::Realtime { tid, policy } => {
                write!(f, "thread {tid} has real-time scheduling policy {policy}")
            }
            Self::OomScore { tid, seen, lowest } => {
                write!(f, "thread {tid} has oom_score_adj {seen}, at least {lowest} is granted")
            }
            Self::UnknownImage { name } => {
                write!(f, "image directory has {name}, which no dump of a replica has")
            }
        }
    }
}
