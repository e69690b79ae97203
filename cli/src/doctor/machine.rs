//! Privileges, control groups, folders, disk and memory.

use std::fs;
use std::path::Path;

use nix::sys::statfs::{OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, statfs};

use super::Need;
use crate::render::bytes;

/// Capabilities without which nothing works, by their number in the kernel.
const NEEDED: [(u32, &str); 14] = [
    (0, "CAP_CHOWN"),
    (1, "CAP_DAC_OVERRIDE"),
    (3, "CAP_FOWNER"),
    (5, "CAP_KILL"),
    (6, "CAP_SETGID"),
    (7, "CAP_SETUID"),
    (8, "CAP_SETPCAP"),
    (12, "CAP_NET_ADMIN"),
    (18, "CAP_SYS_CHROOT"),
    (19, "CAP_SYS_PTRACE"),
    (21, "CAP_SYS_ADMIN"),
    (27, "CAP_MKNOD"),
    (31, "CAP_SETFCAP"),
    (40, "CAP_CHECKPOINT_RESTORE"),
];
const SYS_RESOURCE: u32 = 24;

/// Below this a snapshot of even a small server may not find room for its images.
const DISK_BYTES_MIN: u64 = 1 << 30;
/// Below this the pages of a dump do not fit beside the server.
const MEMORY_BYTES_MIN: u64 = 1 << 30;

pub(super) fn privileges() -> [Need; 3] {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = field(&status, "CapEff:").and_then(|hex| u64::from_str_radix(hex, 16).ok()).unwrap_or(0);
    let user = field(&status, "Uid:").and_then(|ids| ids.split_whitespace().nth(1)).unwrap_or("?");
    let root = if user == "0" {
        Need::ok("root", "user 0")
    } else {
        Need::missing(
            "root",
            format!("user {user}"),
            "containers cannot be made",
            "run as root, for example by sudo",
        )
    };
    let has = |number: u32| effective & (1 << number) != 0;
    let lacking: Vec<&str> =
        NEEDED.iter().filter(|(number, _)| !has(*number)).map(|(_, name)| *name).collect();
    let capabilities = if lacking.is_empty() {
        Need::ok("capabilities", format!("all {} that are needed", NEEDED.len()))
    } else {
        Need::missing(
            "capabilities",
            format!("without {}", lacking.join(", ")),
            "processes cannot be dumped and restored",
            "grant them to this shell or container (for example --privileged)",
        )
    };
    let resource = if has(SYS_RESOURCE) {
        Need::ok("CAP_SYS_RESOURCE", "granted")
    } else {
        Need::degraded(
            "CAP_SYS_RESOURCE",
            "absent",
            "a server whose processes belong to several users cannot be snapshotted, and one with higher limits (RLIMIT_*) than this shell's cannot be restored",
            "grant CAP_SYS_RESOURCE; or run each server as one user, and raise this shell's limits to those of the server",
        )
    };
    [root, capabilities, resource]
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

pub(super) fn cgroups() -> Need {
    const NAME: &str = "cgroups";
    const FREEZER_FIX: &str =
        "mount the freezer controller at /sys/fs/cgroup/freezer, or boot with cgroup v2";
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let groups = Hierarchies::of(&mounts);
    let found = groups.describe();
    if groups.v2 && groups.v1.is_empty() {
        return memory_of_v2(found);
    }
    if groups.v1.is_empty() {
        return Need::missing(
            NAME,
            "none mounted",
            "replicas cannot be limited, frozen or ended as a whole",
            "mount -t cgroup2 none /sys/fs/cgroup",
        );
    }
    // On a hybrid machine runc uses the v1 controllers.
    if !groups.has("freezer") {
        return Need::missing(NAME, found, "servers cannot be frozen as a whole for a dump", FREEZER_FIX);
    }
    if !groups.has("memory") {
        return Need::degraded(
            NAME,
            found,
            "--memory is not enforced",
            "mount the memory controller at /sys/fs/cgroup/memory",
        );
    }
    Need::ok(NAME, found)
}

fn memory_of_v2(found: String) -> Need {
    const NAME: &str = "cgroups";
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if controllers.split_whitespace().any(|name| name == "memory") {
        return Need::ok(NAME, found);
    }
    Need::degraded(
        NAME,
        format!("{found}, controllers: {}", controllers.trim()),
        "--memory is not enforced",
        "enable the memory controller in the parent's cgroup.subtree_control",
    )
}

/// Mounted cgroup hierarchies.
#[derive(Debug, Default, PartialEq)]
struct Hierarchies {
    v2: bool,
    /// Options of each v1 mount, controllers among them.
    v1: Vec<String>,
}

impl Hierarchies {
    fn of(mounts: &str) -> Self {
        let mut all = Self::default();
        for line in mounts.lines() {
            let fields: Vec<&str> = line.split_whitespace().collect();
            match fields.as_slice() {
                [_, _, "cgroup2", ..] => all.v2 = true,
                [_, _, "cgroup", options, ..] => all.v1.push((*options).to_owned()),
                _ => {}
            }
        }
        all
    }

    fn has(&self, controller: &str) -> bool {
        self.v1.iter().any(|options| options.split(',').any(|option| option == controller))
    }

    fn describe(&self) -> String {
        match (self.v2, self.v1.is_empty()) {
            (true, true) => "v2".to_owned(),
            (true, false) => "hybrid, v1 controllers are used".to_owned(),
            (false, _) => "v1".to_owned(),
        }
    }
}

pub(super) fn state_folder(state: &Path) -> Need {
    const NAME: &str = "state folder";
    let base = existing(state);
    let found = |kind: &str| format!("{} on {kind}", state.display());
    let unusable = "replicas cannot keep their folder there";
    match statfs(base) {
        Err(error) => {
            Need::missing(NAME, format!("{}: {error}", base.display()), unusable, "choose another by --state")
        }
        Ok(system) if system.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY) => {
            Need::missing(NAME, found("a read-only file system"), unusable, "choose another by --state")
        }
        Ok(system) if system.filesystem_type() == OVERLAYFS_SUPER_MAGIC => Need::degraded(
            NAME,
            found("overlayfs"),
            "what replicas write to their root takes memory, because an overlay's layer cannot lie on another overlay",
            "choose a folder on ext4, xfs or tmpfs by --state",
        ),
        Ok(system) if system.filesystem_type() == TMPFS_MAGIC => Need::ok(NAME, found("tmpfs")),
        Ok(_) => Need::ok(NAME, found("disk")),
    }
}

pub(super) fn disk(state: &Path) -> Need {
    const NAME: &str = "disk";
    let Ok(system) = statfs(existing(state)) else {
        return Need::degraded(
            NAME,
            "unknown",
            "nobody can say how much may be written",
            "choose another by --state",
        );
    };
    let block = u64::try_from(system.block_size()).unwrap_or(0);
    let free = system.blocks_available().saturating_mul(block);
    let found = format!("{} free for {}", bytes(free), state.display());
    if free >= DISK_BYTES_MIN {
        return Need::ok(NAME, found);
    }
    Need::degraded(
        NAME,
        found,
        "what replicas write to their root, and their logs, may not find room",
        "free some space or choose another folder by --state",
    )
}

pub(super) fn memory() -> Need {
    const NAME: &str = "memory";
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |name: &str| {
        let text = field(&info, name)?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    };
    let (total, available) = (kib("MemTotal:").unwrap_or(0) << 10, kib("MemAvailable:").unwrap_or(0) << 10);
    let found = format!("{} available of {}", bytes(available), bytes(total));
    if available >= MEMORY_BYTES_MIN {
        return Need::ok(NAME, found);
    }
    Need::degraded(
        NAME,
        found,
        "the pages of a dump do not fit into memory, so the server stays frozen while they are uploaded",
        "free some memory before a snapshot",
    )
}

/// The folder, or the nearest one above it that exists.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_told_apart() {
        let v1 = "cgroup /sys/fs/cgroup/freezer cgroup rw,relatime,freezer 0 0\n";
        let v2 = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert!(Hierarchies::of(v1).has("freezer"));
        assert!(!Hierarchies::of(v1).has("memory"));
        assert_eq!(Hierarchies::of(v1).describe(), "v1");
        assert_eq!(Hierarchies::of(v2).describe(), "v2");
        assert_eq!(Hierarchies::of(&format!("{v1}{v2}")).describe(), "hybrid, v1 controllers are used");
        assert_eq!(Hierarchies::of("proc /proc proc rw 0 0\n"), Hierarchies::default());
    }

    #[test]
    fn a_folder_that_does_not_exist_yet_is_judged_by_the_one_above() {
        assert_eq!(existing(Path::new("/proc/self/no/such")), Path::new("/proc/self"));
    }
}
