//! What a bundle grants, read from its OCI configuration.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::Value;

use super::{Allowed, AllowedMount, Capabilities, Namespace, Violation, check};
use crate::Error;
use crate::image::core::SeccompMode;

/// Capabilities in the order of their numbers (`linux/capability.h`).
const CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// Number of `io_uring_setup` on x86-64, which the bundle's seccomp profile denies.
const IO_URING_SETUP: u32 = 425;

/// Device nodes that runc gives to every container.
const DEVICES: [&str; 8] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
    "/dev/ptmx",
    "/dev/pts/ptmx",
];

/// Compares an image directory with what the bundle grants whose `config.json` is given. Empty means that the images may be
/// restored into it.
///
/// # Errors
/// [`Error::Io`] if the configuration cannot be read or is no JSON; otherwise as [`check`].
pub fn check_bundle(images: &Path, config: &Path) -> crate::Result<Vec<Violation>> {
    let text = fs::read(config).map_err(Error::io("read", config))?;
    let value: Value =
        serde_json::from_slice(&text).map_err(io::Error::from).map_err(Error::io("read", config))?;
    check(images, &allowed(&value))
}

/// What a bundle grants.
fn allowed(config: &Value) -> Allowed {
    let capabilities = &config["process"]["capabilities"];
    let namespace = |kind: &str| list(&config["linux"]["namespaces"]).any(|entry| entry["type"] == kind);
    let kinds = [
        ("pid", Namespace::Pid),
        ("network", Namespace::Net),
        ("ipc", Namespace::Ipc),
        ("uts", Namespace::Uts),
        ("mount", Namespace::Mount),
        ("cgroup", Namespace::Cgroup),
    ];
    Allowed {
        capabilities: Capabilities {
            inheritable: mask(&capabilities["inheritable"]),
            permitted: mask(&capabilities["permitted"]),
            effective: mask(&capabilities["effective"]),
            bounding: mask(&capabilities["bounding"]),
            ambient: mask(&capabilities["ambient"]),
        },
        no_new_privs: config["process"]["noNewPrivileges"] == true,
        seccomp: if config["linux"]["seccomp"].is_object() {
            SeccompMode::Filter
        } else {
            SeccompMode::Disabled
        },
        denied_syscalls: vec![IO_URING_SETUP],
        mounts: mounts(config),
        own_namespaces: kinds.into_iter().filter(|(kind, _)| namespace(kind)).map(|(_, own)| own).collect(),
        oom_score_adj_min: config["process"]["oomScoreAdj"]
            .as_i64()
            .and_then(|v| i32::try_from(v).ok())
            .unwrap_or(0),
        devices: DEVICES.map(str::to_owned).to_vec(),
    }
}

fn mounts(config: &Value) -> Vec<AllowedMount> {
    let own = list(&config["mounts"]).map(|mount| AllowedMount {
        mountpoint: text(&mount["destination"]),
        kind: text(&mount["type"]),
        read_only: list(&mount["options"]).any(|option| option == "ro"),
    });
    // runc masks a file by a bind of /dev/null and a folder by an empty read-only tmpfs.
    let masked = list(&config["linux"]["maskedPaths"])
        .flat_map(|path| ["bind", "tmpfs"].map(|kind| (text(path), kind, kind == "tmpfs")));
    let read_only = list(&config["linux"]["readonlyPaths"]).map(|path| (text(path), "bind", true));
    let made = masked.chain(read_only).map(|(mountpoint, kind, read_only)| AllowedMount {
        mountpoint,
        kind: kind.to_owned(),
        read_only,
    });
    own.chain(made).collect()
}

fn mask(names: &Value) -> u64 {
    let bit = |name: &Value| CAPABILITIES.iter().position(|known| name == known).map(|bit| 1u64 << bit);
    list(names).filter_map(bit).fold(0, |mask, bit| mask | bit)
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_bundle_grants_what_it_names_and_nothing_else() {
        let allowed = allowed(&json!({
            "process": {"capabilities": {"bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_UNHEARD_OF"]}, "noNewPrivileges": true},
            "mounts": [{"destination": "/proc", "type": "proc", "options": ["nosuid"]}],
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "network", "path": "/x"}],
                "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"], "seccomp": {},
            },
        }));
        assert_eq!(allowed.capabilities.bounding, 0b10_0001);
        assert_eq!(allowed.capabilities.effective, 0);
        assert!(allowed.no_new_privs);
        assert_eq!(allowed.own_namespaces, [Namespace::Pid, Namespace::Net]);
        let points: Vec<&str> = allowed.mounts.iter().map(|mount| mount.mountpoint.as_str()).collect();
        assert_eq!(points, ["/proc", "/proc/kcore", "/proc/kcore", "/proc/sys"]);
    }
}
