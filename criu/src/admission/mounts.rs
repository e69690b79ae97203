//! Compares the mounts of the images with those that the bundle asks for.
//!
//! CRIU makes the mounts that the images list, with the flags that they list: what the new bundle says about masked and
//! read-only paths counts for nothing at a restore. So a mount that is missing can be as bad as one too many: without
//! the masks a process with user id 0 reaches `/proc/sysrq-trigger`, capabilities or not.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use crate::image::mounts::Mount;

use super::{AllowedMount, Violation};

/// File systems that hold no data of the host's disks and that CRIU may make itself. Those of cgroups are not among
/// them: mounted anew they would show the whole hierarchy of the host.
const MADE_BY_CRIU: &[&str] = &["proc", "sysfs", "tmpfs", "devpts", "mqueue"];
/// What runc binds over a file that is masked.
const MASK: &str = "/dev/null";

/// `exists` says whether a path below `/proc` or `/sys` exists on this machine.
pub(super) fn check(
    mounts: &[Mount],
    allowed: &[AllowedMount],
    exists: impl Fn(&Path) -> bool,
    found: &mut Vec<Violation>,
) {
    let mut roots = HashSet::new();
    let mut seen: BTreeMap<u32, HashSet<&str>> = BTreeMap::new();
    for mount in mounts {
        seen.entry(mount.namespace).or_default().insert(&mount.mountpoint);
        if mount.by_plugin {
            found.push(Violation::PluginMount { id: mount.id });
        }
        // The root is what the runtime has mounted there; CRIU takes it from its command line.
        if mount.mountpoint == "/" && roots.insert(mount.namespace) {
            continue;
        }
        found.extend(refuse(mount, allowed));
    }
    for points in seen.values() {
        for mask in allowed.iter().filter(|mask| covers(mask) && !points.contains(mask.mountpoint.as_str())) {
            let has_file_system = points.contains(parent(&mask.mountpoint));
            if has_file_system && exists(Path::new(&mask.mountpoint)) {
                let mountpoint = mask.mountpoint.clone();
                found.push(Violation::MissingMount { mountpoint });
            }
        }
    }
}

/// Why a mount is not among those that are allowed. Several entries can be for one place: a masked path is either a
/// file or a folder, and the bundle does not say which.
fn refuse(mount: &Mount, allowed: &[AllowedMount]) -> Option<Violation> {
    let mut refusal = Violation::Mount {
        mountpoint: mount.mountpoint.clone(),
        kind: mount.kind.clone(),
        source: mount.source.clone(),
    };
    for entry in allowed.iter().filter(|entry| fits(mount, entry)) {
        if !entry.read_only || mount.is_read_only() || is_cgroup_folder(mount, entry) {
            return None;
        }
        refusal = Violation::WritableMount { mountpoint: mount.mountpoint.clone() };
    }
    Some(refusal)
}

fn fits(mount: &Mount, entry: &AllowedMount) -> bool {
    let is_here = mount.mountpoint == entry.mountpoint;
    match &mount.external {
        // The key decides what the runtime binds; with another mount's key a read-only folder could come back writable.
        Some(key) if *key == mount.mountpoint => {
            let below = mount.mountpoint.strip_prefix(entry.mountpoint.as_str());
            let is_hierarchy = entry.kind == "cgroup" && below.is_some_and(|below| below.starts_with('/'));
            matches!(entry.kind.as_str(), "bind" | "cgroup") && (is_here || is_hierarchy)
        }
        Some(key) => is_here && key == MASK && covers(entry),
        None if !is_here || !MADE_BY_CRIU.contains(&mount.kind.as_str()) => false,
        // A read-only path is a part of the same file system, bound over itself.
        None => {
            entry.kind == mount.kind
                || (entry.kind == "bind" && entry.read_only)
                || is_cgroup_folder(mount, entry)
        }
    }
}

/// The tmpfs in which the hierarchies of cgroup v1 are mounted. runc leaves it writable.
fn is_cgroup_folder(mount: &Mount, entry: &AllowedMount) -> bool {
    entry.kind == "cgroup" && mount.kind == "tmpfs" && mount.external.is_none() && mount.root == "/"
}

/// The entry hides a part of the kernel's interfaces or keeps it from being written.
fn covers(entry: &AllowedMount) -> bool {
    let is_cover = entry.kind == "bind" || (entry.kind == "tmpfs" && entry.read_only);
    is_cover && !parent(&entry.mountpoint).is_empty()
}

/// The file system of the kernel that a path is in.
fn parent(path: &str) -> &'static str {
    ["/proc", "/sys"]
        .into_iter()
        .find(|parent| path.strip_prefix(parent).is_some_and(|rest| rest.starts_with('/')))
        .unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ_ONLY: u32 = 1;

    fn mount(mountpoint: &str, kind: &str, flags: u32, external: Option<&str>) -> Mount {
        Mount {
            namespace: 13,
            id: 1,
            parent: 2,
            kind: kind.to_owned(),
            flags: 0x20_0000 | flags,
            sb_flags: 0,
            root: "/".to_owned(),
            mountpoint: mountpoint.to_owned(),
            source: kind.to_owned(),
            options: String::new(),
            external: external.map(str::to_owned),
            by_plugin: false,
        }
    }

    fn entry(mountpoint: &str, kind: &str, read_only: bool) -> AllowedMount {
        AllowedMount { mountpoint: mountpoint.to_owned(), kind: kind.to_owned(), read_only }
    }

    /// The default configuration of runc with a read-only volume and a writable one.
    fn bundle() -> Vec<AllowedMount> {
        vec![
            entry("/proc", "proc", false),
            entry("/dev", "tmpfs", false),
            entry("/dev/pts", "devpts", false),
            entry("/dev/mqueue", "mqueue", false),
            entry("/sys", "sysfs", true),
            entry("/sys/fs/cgroup", "cgroup", true),
            entry("/data", "bind", false),
            entry("/models", "bind", true),
            entry("/proc/keys", "bind", false),
            entry("/proc/keys", "tmpfs", true),
            entry("/proc/acpi", "bind", false),
            entry("/proc/acpi", "tmpfs", true),
            entry("/proc/scsi", "bind", false),
            entry("/proc/scsi", "tmpfs", true),
            entry("/proc/sys", "bind", true),
        ]
    }

    /// What CRIU 4.2 writes for a container that runc 1.1 made of it, on cgroup v1.
    fn dumped() -> Vec<Mount> {
        vec![
            mount("/proc/acpi", "tmpfs", READ_ONLY, None),
            mount("/proc/keys", "tmpfs", 0, Some("/dev/null")),
            Mount { root: "/sys".to_owned(), ..mount("/proc/sys", "proc", READ_ONLY, None) },
            mount("/models", "unsupported", READ_ONLY, Some("/models")),
            mount("/data", "unsupported", 0, Some("/data")),
            Mount {
                root: "/rc0".to_owned(),
                ..mount("/sys/fs/cgroup/pids", "cgroup", READ_ONLY, Some("/sys/fs/cgroup/pids"))
            },
            mount("/sys/fs/cgroup", "tmpfs", 0, None),
            mount("/sys", "sysfs", READ_ONLY, None),
            mount("/dev/mqueue", "mqueue", 0, None),
            mount("/dev/pts", "devpts", 0, None),
            mount("/dev", "tmpfs", 0, None),
            mount("/proc", "proc", 0, None),
            mount("/", "overlay", 0, None),
        ]
    }

    /// The violations of a container on a machine that has every path but `/proc/scsi`.
    fn violations(mounts: &[Mount]) -> Vec<String> {
        let mut found = Vec::new();
        check(mounts, &bundle(), |path| path != Path::new("/proc/scsi"), &mut found);
        found.dedup();
        found.iter().map(ToString::to_string).collect()
    }

    fn with(change: impl FnOnce(&mut Vec<Mount>)) -> Vec<String> {
        let mut mounts = dumped();
        change(&mut mounts);
        violations(&mounts)
    }

    fn at<'a>(mounts: &'a mut [Mount], mountpoint: &str) -> &'a mut Mount {
        mounts.iter_mut().find(|mount| mount.mountpoint == mountpoint).expect("a mount")
    }

    #[test]
    fn what_runc_made_is_admitted() {
        assert_eq!(violations(&dumped()), [""; 0]);
    }

    #[test]
    fn a_disk_is_not_mounted() {
        let disk = mount("/mnt", "ext4", 0, None);
        assert_eq!(
            with(|mounts| mounts.push(disk)),
            ["mount of ext4 (ext4) at /mnt is not in the replica's configuration"]
        );
        for kind in ["ext4", "overlay", "cgroup"] {
            let found = with(|mounts| *at(mounts, "/data") = mount("/data", kind, 0, None));
            assert_eq!(
                found,
                [format!("mount of {kind} ({kind}) at /data is not in the replica's configuration")]
            );
        }
        let second_root = mount("/", "ext4", 0, None);
        assert_eq!(
            with(|mounts| mounts.push(second_root)),
            ["mount of ext4 (ext4) at / is not in the replica's configuration"]
        );
    }

    #[test]
    fn what_is_read_only_stays_so() {
        for mountpoint in ["/models", "/sys", "/proc/sys", "/sys/fs/cgroup/pids"] {
            let found = with(|mounts| at(mounts, mountpoint).flags = 0);
            assert_eq!(found, [format!("mount at {mountpoint} is writable, expected read-only")]);
        }
    }

    #[test]
    fn a_volume_does_not_come_back_under_another_one_s_key() {
        let found = with(|mounts| at(mounts, "/data").external = Some("/models".to_owned()));
        assert_eq!(
            found,
            ["mount of unsupported (unsupported) at /data is not in the replica's configuration"]
        );
    }

    #[test]
    fn masks_cannot_be_left_out_or_replaced() {
        for mountpoint in ["/proc/acpi", "/proc/keys", "/proc/sys"] {
            let found = with(|mounts| mounts.retain(|mount| mount.mountpoint != mountpoint));
            assert_eq!(
                found[0],
                format!(
                    "mount at {mountpoint} is missing, which the replica's configuration hides or protects"
                )
            );
        }
        let unmasked = Mount { root: "/keys".to_owned(), ..mount("/proc/keys", "proc", 0, None) };
        let found = with(|mounts| *at(mounts, "/proc/keys") = unmasked);
        assert_eq!(found, ["mount of proc (proc) at /proc/keys is not in the replica's configuration"]);
        let writable = mount("/proc/acpi", "tmpfs", 0, None);
        let found = with(|mounts| *at(mounts, "/proc/acpi") = writable);
        assert_eq!(found, ["mount at /proc/acpi is writable, expected read-only"]);
    }

    #[test]
    fn a_second_namespace_is_looked_at_as_well() {
        let found = with(|mounts| {
            mounts.push(Mount { namespace: 14, ..mount("/", "overlay", 0, None) });
            mounts.push(Mount { namespace: 14, ..mount("/proc", "proc", 0, None) });
        });
        assert_eq!(found.len(), 3, "{found:#?}");
    }
}
