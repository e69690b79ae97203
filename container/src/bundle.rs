//! What runc reads: the OCI configuration of a replica.
//!
//! It is chosen so that CRIU can carry the replica: no terminal, no resource limits (CRIU would have to set them without
//! the right to), the network namespace by path, `/dev/shm` as a bind of our own directory (CRIU would push a tmpfs of the
//! container through `tar --gzip` while the server is frozen), and nothing masked by a tmpfs where a read-only bind does it
//! (each costs 4 to 8 ms in every restore).

mod seccomp;
pub(crate) mod user;

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::cgroup::Cgroup;
use crate::error::{Context, Error, Refusal};
use crate::shim::Paths;
use crate::spec::Spec;

/// The annotation by which runc tells CRIU its configuration file.
pub const CRIU_CONFIG_ANNOTATION: &str = "org.criu.config";

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Period of the CPU limit in microseconds, the kernel's own default.
const CPU_PERIOD_US: u64 = 100_000;

/// What a server may do as root of its container: what servers that start as root and give it up need. Without
/// `CAP_SYS_ADMIN`, `CAP_SYS_PTRACE`, `CAP_MKNOD` and all else that reaches beyond the container or cannot be carried.
const CAPABILITIES: &[&str] = &[
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Files of which nothing must be seen.
const MASKED: &[&str] =
    &["/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/sched_debug"];

/// What must not be written to: a server's root user could reach the whole machine through it.
const READ_ONLY: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/scsi",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// What [`config`] needs beside the specification.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The replica's directories.
    pub paths: &'a Paths,
    /// The network namespace; `None` for the host's own.
    pub network: Option<&'a Path>,
    /// Name of the cgroup.
    pub cgroup: &'a str,
    /// Host name inside.
    pub host_name: &'a str,
}

/// Checks that this machine can give what the specification asks for.
///
/// # Errors
/// A [`Refusal`] that names what is missing.
pub fn check(spec: &Spec, cgroup: &Cgroup) -> Result<(), Error> {
    if spec.command.is_empty() {
        return Err(Error::Malformed { what: "command", value: String::new(), expected: "a program" });
    }
    crate::rootfs::check_lower(&spec.rootfs)?;
    for mount in &spec.mounts {
        mount.source.metadata().map_err(|source| Refusal::Missing {
            what: "mount source",
            path: mount.source.clone(),
            source,
        })?;
    }
    for path in spec.gpu.iter().flat_map(|gpu| {
        gpu.provided.devices.iter().chain(gpu.provided.files.iter().map(|(source, _)| source))
    }) {
        path.metadata().map_err(|source| Refusal::Missing {
            what: "GPU file",
            path: path.clone(),
            source,
        })?;
    }
    if !spec.workdir.is_absolute() {
        let value = spec.workdir.display().to_string();
        return Err(Error::Malformed { what: "workdir", value, expected: "an absolute path" });
    }
    if let Some(bad) = spec.env.iter().find(|pair| pair.split_once('=').is_none_or(|(key, _)| key.is_empty()))
    {
        return Err(Error::Malformed { what: "env", value: bad.clone(), expected: "K=V" });
    }
    if let Some(wanted) = spec.memory_bytes {
        cgroup.require("memory", "a memory limit")?;
        let available = memory_total()?;
        if wanted > available {
            return Err(exceeds("memory", format!("{wanted} bytes"), format!("{available} bytes")));
        }
    }
    if let Some(wanted) = spec.cpus {
        cgroup.require("cpu", "a CPU limit")?;
        let available = std::thread::available_parallelism().context("count", "the CPUs")?.get();
        // Less than a hundredth of a CPU is below the kernel's smallest quota.
        if !(0.01..=available as f64).contains(&wanted) {
            return Err(exceeds("CPUs", wanted.to_string(), format!("0.01 to {available}")));
        }
    }
    Ok(())
}

fn exceeds(what: &'static str, wanted: String, available: String) -> Error {
    Refusal::Exceeds { what, wanted, available }.into()
}

/// Memory of this machine in bytes.
///
/// # Errors
/// If `/proc` is not mounted.
pub fn memory_total() -> Result<u64, Error> {
    let text = std::fs::read_to_string("/proc/meminfo").context("read", "/proc/meminfo")?;
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|rest| rest.trim().strip_suffix(" kB")).and_then(|kib| kib.parse::<u64>().ok());
    Ok(kib.unwrap_or(0) << 10)
}

/// What gives two starts of a server the same memory, where its addresses are the same. The C library otherwise moves its
/// threshold with what happens to be freed first: a tensor lies in a heap then, at an offset that another start does not have,
/// instead of pages of its own (two starts of an embedding server: 42 % new without, 10 % with it).
const DETERMINISTIC: [&str; 2] = ["PYTHONHASHSEED=0", "MALLOC_MMAP_THRESHOLD_=131072"];

/// The configuration of a replica.
///
/// # Errors
/// If the user is not known inside the root file system.
pub fn config(spec: &Spec, place: Place<'_>) -> Result<oci_spec::runtime::Spec, Error> {
    let user = user::resolve(spec.user.as_ref(), &spec.rootfs)?;
    let mut env = vec![PATH.to_owned(), format!("HOME={}", user.home)];
    if spec.deterministic {
        env.extend(DETERMINISTIC.map(String::from));
    }
    let provided = spec.gpu.as_ref().map(|gpu| &gpu.provided.env[..]).unwrap_or_default();
    for pair in provided.iter().chain(&spec.env) {
        let key = pair.split_once('=').map_or(pair.as_str(), |(key, _)| key);
        env.retain(|old| old.split_once('=').is_none_or(|(old, _)| old != key));
        env.push(pair.clone());
    }
    let value = json!({
        "ociVersion": "1.0.2",
        "hostname": place.host_name,
        "root": { "path": place.paths.rootfs(), "readonly": false },
        "process": {
            "terminal": false,
            "user": { "uid": user.uid, "gid": user.gid, "additionalGids": user.groups },
            "args": spec.command,
            "env": env,
            "cwd": spec.workdir,
            "noNewPrivileges": true,
            // The shim is protected from the kernel's memory killer, and its children would inherit that.
            "oomScoreAdj": 0,
            "capabilities": {
                "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES,
                "inheritable": [], "ambient": [],
            },
        },
        "mounts": mounts(spec, place.paths),
        "annotations": { CRIU_CONFIG_ANNOTATION: place.paths.criu_config() },
        "linux": {
            "cgroupsPath": format!("/{}", place.cgroup),
            "namespaces": namespaces(place.network),
            "resources": resources(spec),
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
            "seccomp": seccomp::profile(),
        },
    });
    Ok(serde_json::from_value(value).expect("the value above has the shape of an OCI configuration"))
}

fn namespaces(network: Option<&Path>) -> Value {
    let mut namespaces = vec![
        json!({ "type": "pid" }),
        json!({ "type": "mount" }),
        json!({ "type": "ipc" }),
        json!({ "type": "uts" }),
    ];
    namespaces.extend(network.map(|path| json!({ "type": "network", "path": path })));
    namespaces.into()
}

fn mounts(spec: &Spec, paths: &Paths) -> Vec<Value> {
    let mount = |target: &str, kind: &str, source: Value, options: &[&str]| json!({ "destination": target, "type": kind, "source": source, "options": options });
    let mut mounts = vec![
        mount("/proc", "proc", "proc".into(), &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", "tmpfs".into(), &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            "devpts".into(),
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("/dev/shm", "bind", json!(paths.shm()), &["bind", "nosuid", "nodev", "noexec"]),
        mount("/sys", "sysfs", "sysfs".into(), &["nosuid", "noexec", "nodev", "ro"]),
        mount("/run/rewarm", "bind", json!(paths.identity()), &["bind", "nosuid", "nodev", "noexec", "ro"]),
    ];
    for own in &spec.mounts {
        let access = if own.read_only { "ro" } else { "rw" };
        let target = own.target.to_string_lossy();
        // CRIU mounts the source as it is named, and cannot where that is a symbolic link.
        let source = own.source.canonicalize().unwrap_or_else(|_| own.source.clone());
        mounts.push(mount(&target, "bind", json!(source), &["rbind", "rprivate", access]));
    }
    let Some(gpu) = &spec.gpu else { return mounts };
    // Bound and not made: the kernel gives some of them another number on each machine.
    for device in &gpu.provided.devices {
        mounts.push(mount(&device.to_string_lossy(), "bind", json!(device), &["bind", "rprivate", "nosuid"]));
    }
    for (source, target) in &gpu.provided.files {
        let source = source.canonicalize().unwrap_or_else(|_| source.clone());
        let options = ["bind", "rprivate", "nosuid", "nodev", "ro"];
        mounts.push(mount(&target.to_string_lossy(), "bind", json!(source), &options));
    }
    mounts
}

/// The rules that let a replica use its devices.
fn device_rules(spec: &Spec) -> Vec<Value> {
    let devices = spec.gpu.as_ref().map(|gpu| &gpu.provided.devices[..]).unwrap_or_default();
    let rule = |path: &std::path::PathBuf| {
        let number = std::fs::metadata(path).ok()?.rdev();
        let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
        Some(json!({ "allow": true, "type": "c", "major": major, "minor": minor, "access": "rw" }))
    };
    devices.iter().filter_map(rule).collect()
}

fn resources(spec: &Spec) -> Value {
    let mut resources = json!({
        // runc adds null, zero, full, random, urandom, tty and the terminals of the replica itself.
        "devices": [{ "allow": false, "access": "rwm" }],
    });
    resources["devices"].as_array_mut().expect("made above").extend(device_rules(spec));
    if let Some(bytes) = spec.memory_bytes {
        resources["memory"] = json!({ "limit": bytes });
    }
    if let Some(cpus) = spec.cpus {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "checked to be between 0.01 and the number of CPUs"
        )]
        let quota = (cpus * CPU_PERIOD_US as f64).round() as i64;
        resources["cpu"] = json!({ "quota": quota, "period": CPU_PERIOD_US });
    }
    resources
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(spec: &Spec) -> Value {
        let paths = Paths::new("/state/replicas/a".into());
        let place =
            Place { paths: &paths, network: Some(Path::new("/proc/1/fd/9")), cgroup: "x", host_name: "a" };
        serde_json::to_value(config(spec, place).expect("config")).expect("json")
    }

    #[test]
    fn what_criu_cannot_carry_is_not_asked_for() {
        let spec = Spec { command: vec!["true".into()], ..Spec::default() };
        let value = made(&spec);
        assert_eq!(value["process"]["terminal"], false);
        assert!(value["process"].get("rlimits").is_none_or(Value::is_null));
        assert_eq!(value["linux"]["namespaces"][4]["path"], "/proc/1/fd/9");
        assert_eq!(value["annotations"][CRIU_CONFIG_ANNOTATION], "/state/replicas/a/criu.conf");
        let tmpfs = value["mounts"].as_array().expect("mounts").iter().filter(|m| m["type"] == "tmpfs");
        assert_eq!(tmpfs.count(), 1, "only /dev");
    }

    #[test]
    fn limits_mounts_and_environment_arrive() {
        let spec = Spec {
            command: vec!["true".into()],
            memory_bytes: Some(1 << 20),
            cpus: Some(1.5),
            mounts: vec!["/a:/b:ro".parse().expect("mount")],
            env: vec!["HOME=/x".into(), "K=V".into()],
            ..Spec::default()
        };
        let value = made(&spec);
        assert_eq!(value["linux"]["resources"]["memory"]["limit"], 1 << 20);
        assert_eq!(value["linux"]["resources"]["cpu"]["quota"], 150_000);
        let mounts = value["mounts"].as_array().expect("mounts");
        assert_eq!(mounts.last().expect("own")["options"], json!(["rbind", "rprivate", "ro"]));
        assert_eq!(value["process"]["env"], json!([PATH, "HOME=/x", "K=V"]));
    }

    #[test]
    fn devices_are_bound_and_allowed_by_their_number_and_files_cannot_be_written() {
        let provided = rewarm_gpu::provide::Provided {
            devices: vec!["/dev/null".into()],
            files: vec![("/etc/passwd".into(), "/usr/lib/libcuda.so.1".into())],
            env: vec!["A=B".into()],
        };
        let gpu = crate::spec::Gpu { wanted: rewarm_gpu::provide::Wanted::All, provided };
        let spec = Spec { command: vec!["true".into()], gpu: Some(gpu), ..Spec::default() };
        let value = made(&spec);
        let rules = &value["linux"]["resources"]["devices"];
        assert_eq!(rules[1], json!({"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rw"}));
        let mounts = value["mounts"].as_array().expect("mounts");
        let of = |target: &str| mounts.iter().find(|mount| mount["destination"] == target).expect("a mount");
        assert_eq!(of("/dev/null")["options"], json!(["bind", "rprivate", "nosuid"]));
        assert!(of("/usr/lib/libcuda.so.1")["options"].as_array().expect("a list").contains(&json!("ro")));
        assert!(value["process"]["env"].as_array().expect("a list").contains(&json!("A=B")));
    }

    #[test]
    fn more_than_the_machine_has_is_refused() {
        let cgroup = Cgroup::open("rewarm-test").expect("cgroups");
        let base = Spec { command: vec!["true".into()], ..Spec::default() };
        let refused = |spec: Spec| matches!(check(&spec, &cgroup), Err(Error::Refused(_)));
        assert!(refused(Spec { memory_bytes: Some(u64::MAX), ..base.clone() }));
        assert!(refused(Spec { cpus: Some(1e6), ..base.clone() }));
        assert!(refused(Spec { cpus: Some(f64::NAN), ..base.clone() }));
        assert!(refused(Spec { rootfs: "/no/such".into(), ..base.clone() }));
        assert!(refused(Spec { mounts: vec!["/no/such:/b".parse().expect("mount")], ..base.clone() }));
        check(&base, &cgroup).expect("the defaults");
    }
}
