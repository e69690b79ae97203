//! What a bundle grants, read from its OCI configuration.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::{Value, json};

use super::{Allowed, AllowedMount, Capabilities, Identity, Namespace, Violation, check};
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

/// System calls that a bundle may deny, with their numbers on x86-64 (`asm/unistd_64.h`).
const SYSCALLS: [(&str, u32); 10] = [
    ("add_key", 248),
    ("request_key", 249),
    ("keyctl", 250),
    ("perf_event_open", 298),
    ("fanotify_init", 300),
    ("bpf", 321),
    ("userfaultfd", 323),
    ("io_uring_setup", 425),
    ("io_uring_enter", 426),
    ("io_uring_register", 427),
];

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
/// [`Error::Io`] if the configuration cannot be read, is no JSON, or denies a system call whose number is not known here;
/// otherwise as [`check`].
pub fn check_bundle(images: &Path, config: &Path) -> crate::Result<Vec<Violation>> {
    let text = fs::read(config).map_err(Error::io("read", config))?;
    let value: Value =
        serde_json::from_slice(&text).map_err(io::Error::from).map_err(Error::io("read", config))?;
    check(images, &allowed(&value).map_err(Error::io("understand", config))?)
}

/// What a bundle grants.
fn allowed(config: &Value) -> io::Result<Allowed> {
    let capabilities = capabilities(&config["process"]);
    let namespace = |kind: &str| list(&config["linux"]["namespaces"]).any(|entry| entry["type"] == kind);
    let kinds = [
        ("pid", Namespace::Pid),
        ("network", Namespace::Net),
        ("ipc", Namespace::Ipc),
        ("uts", Namespace::Uts),
        ("mount", Namespace::Mount),
        ("cgroup", Namespace::Cgroup),
    ];
    Ok(Allowed {
        identity: identity(&config["process"], &capabilities),
        capabilities,
        no_new_privs: config["process"]["noNewPrivileges"] == true,
        seccomp: if config["linux"]["seccomp"].is_object() {
            SeccompMode::Filter
        } else {
            SeccompMode::Disabled
        },
        denied_syscalls: denied(&config["linux"]["seccomp"])?,
        mounts: mounts(config),
        own_namespaces: kinds.into_iter().filter(|(kind, _)| namespace(kind)).map(|(_, own)| own).collect(),
        oom_score_adj_min: config["process"]["oomScoreAdj"]
            .as_i64()
            .and_then(|v| i32::try_from(v).ok())
            .unwrap_or(0),
        devices: DEVICES.map(str::to_owned).to_vec(),
    })
}

/// What the server has once it runs. Executing it takes from all users but root what files do not give, and where new privileges
/// are given up, no file gives any.
fn capabilities(process: &Value) -> Capabilities {
    let of = |set: &str| mask(&process["capabilities"][set]);
    let keeps = process["user"]["uid"] == 0 || process["noNewPrivileges"] != true;
    let after = |set: &str| if keeps { of(set) } else { of(set) & of("ambient") };
    Capabilities {
        inheritable: of("inheritable"),
        permitted: after("permitted"),
        effective: after("effective"),
        bounding: of("bounding"),
        ambient: of("ambient"),
    }
}

/// Without the capability to become another, and with new privileges given up, a server stays who it is.
fn identity(process: &Value, capabilities: &Capabilities) -> Identity {
    let may = |name: &str| capabilities.permitted & mask(&json!([name])) != 0;
    let stays = |name: &str| process["noNewPrivileges"] == true && !may(name);
    let number = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let user = &process["user"];
    let groups = || [&user["gid"]].into_iter().chain(list(&user["additionalGids"])).filter_map(number);
    Identity {
        user: if stays("CAP_SETUID") { number(&user["uid"]).or(Some(0)) } else { None },
        groups: stays("CAP_SETGID").then(|| groups().collect()),
    }
}

/// The calls that a seccomp profile lets through for no arguments.
fn denied(profile: &Value) -> io::Result<Vec<u32>> {
    let refused = |rule: &&Value| rule["action"] != "SCMP_ACT_ALLOW" && list(&rule["args"]).next().is_none();
    let names = list(&profile["syscalls"]).filter(refused).flat_map(|rule| list(&rule["names"]));
    let number = |name: &Value| {
        let known = SYSCALLS.iter().find(|(known, _)| name == known).map(|(_, number)| *number);
        known.ok_or_else(|| {
            io::Error::other(format!("its seccomp profile denies {name}, of which no number is known"))
        })
    };
    names.map(number).collect()
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
        }))
        .expect("understood");
        assert_eq!(allowed.capabilities.bounding, 0b10_0001);
        assert_eq!(allowed.capabilities.effective, 0);
        assert!(allowed.no_new_privs);
        assert_eq!(allowed.own_namespaces, [Namespace::Pid, Namespace::Net]);
        let points: Vec<&str> = allowed.mounts.iter().map(|mount| mount.mountpoint.as_str()).collect();
        assert_eq!(points, ["/proc", "/proc/kcore", "/proc/kcore", "/proc/sys"]);
    }
    fn granted(user: &Value, capabilities: &[&str], no_new_privs: bool) -> Allowed {
        let sets = json!({"bounding": capabilities, "permitted": capabilities, "effective": capabilities});
        let process = json!({"user": user, "capabilities": sets, "noNewPrivileges": no_new_privs});
        allowed(&json!({ "process": process })).expect("understood")
    }

    #[test]
    fn a_user_without_rights_stays_who_he_is_and_gets_none() {
        let user = json!({"uid": 1000, "gid": 100, "additionalGids": [4, 24]});
        let stays = granted(&user, &["CAP_SETUID", "CAP_SETGID"], true);
        let identity = Identity { user: Some(1000), groups: Some(vec![100, 4, 24]) };
        assert_eq!(stays.identity, identity);
        assert_eq!((stays.capabilities.permitted, stays.capabilities.effective), (0, 0));
        // A program with the set-user-id bit makes another of him.
        let may = granted(&user, &["CAP_SETUID"], false);
        assert_eq!((may.identity, may.capabilities.permitted), (Identity::default(), 1 << 7));
        let root = json!({"uid": 0, "gid": 0});
        assert_eq!(granted(&root, &["CAP_SETUID", "CAP_SETGID"], true).identity, Identity::default());
        let bound = Identity { user: None, groups: Some(vec![0]) };
        assert_eq!(granted(&root, &["CAP_SETUID"], true).identity, bound);
    }

    #[test]
    fn what_a_profile_denies_for_all_arguments_must_be_denied() {
        let rule = |names: &[&str], action: &str| json!({"names": names, "action": action});
        let mut for_some = rule(&["arch_prctl"], "SCMP_ACT_ERRNO");
        for_some["args"] = json!([{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]);
        let of = |rules: &[Value]| denied(&json!({ "syscalls": rules }));
        let errno = rule(&["bpf", "userfaultfd"], "SCMP_ACT_ERRNO");
        let found = of(&[errno, for_some, rule(&["keyctl"], "SCMP_ACT_ALLOW")]).expect("known");
        assert_eq!(found, [321, 323]);
        let unknown = of(&[rule(&["frobnicate"], "SCMP_ACT_KILL_PROCESS")]).expect_err("no number");
        assert!(unknown.to_string().contains("frobnicate"), "{unknown}");
    }
}
