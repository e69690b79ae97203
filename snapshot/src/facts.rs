//! What a restore must know before it moves data: the machine, the server, the files of the host it depends on.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use rewarm_container::Record;
use rewarm_container::tree::Tree;
use rewarm_criu::admission;
use rewarm_probe::Recorded;
use rewarm_store::{Cpu, Facts, Hooks, HostFile};
use serde_json::Value;

use crate::dump::Dumped;
use crate::error::Cause;
use crate::pipeline::{Context, Replica, Request};

/// Gathers the facts; the sizes of memory are added by the upload.
pub(crate) async fn gather(
    replica: &Replica,
    dumped: &Dumped,
    request: &Request,
    context: &Context,
    recorded: Option<&Recorded>,
) -> Result<Facts, Cause> {
    let machine = Cause::io("look at this machine");
    let (kernel, architecture, cpu) = machine_facts().map_err(machine)?;
    let record = &replica.record;
    let mut spec = serde_json::to_value(&record.spec).expect("a spec has only string keys");
    spec["generation"] = Value::from(record.generation);
    let images = replica.client.inside().dump_images();
    // The server runs or is frozen: either way its files are seen as it sees them.
    let root = PathBuf::from(format!("/proc/{}/root", record.pid.unwrap_or_default()));
    let carried = carried(&dumped.upper);
    let host_files = tokio::task::spawn_blocking(move || host_files(&images, &root, &carried));
    Ok(Facts {
        kernel,
        architecture,
        cpu: Cpu { vendor: cpu.vendor, model: cpu.model, features: cpu.features.into_iter().collect() },
        criu: context.criu_version.to_string(),
        runc: context.runc_version.clone(),
        command: record.spec.command.clone(),
        spec,
        host_files: host_files.await.expect("looking at files does not panic")?,
        memory: Default::default(),
        ports: record.spec.ports.clone(),
        probe: recorded.map(Recorded::to_json),
        hooks: Hooks {
            pre: request.pre.as_ref().map(ToString::to_string),
            post: request.post.as_ref().map(ToString::to_string),
            engine: request
                .engine
                .as_ref()
                .map(|engine| serde_json::to_value(engine).expect("string keys only")),
        },
        device: device(dumped, record),
        labels: record.spec.labels.clone(),
        dumped_ms: Some(dumped.dumped_ms),
        limits: dumped.limits.clone(),
    })
}

/// What the snapshot carries of devices, and what waking the source cost, where that is known.
fn device(dumped: &Dumped, record: &Record) -> Option<Value> {
    let mut device = serde_json::to_value(dumped.device.as_ref()?).expect("string keys only");
    if let Some(wake) = record.device.and_then(|device| device.wake) {
        device["wake"] = serde_json::to_value(wake).expect("string keys only");
    }
    Some(device)
}

fn machine_facts() -> io::Result<(String, String, rewarm_sys::machine::Cpu)> {
    use rewarm_sys::machine;
    Ok((machine::kernel_release()?, machine::architecture()?, machine::cpu()?))
}

/// Paths that the snapshot brings along, as the server sees them.
fn carried(upper: &Tree) -> BTreeSet<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    let path =
        |entry: &rewarm_container::tree::Entry| Path::new("/").join(std::ffi::OsStr::from_bytes(&entry.path));
    upper.entries.iter().map(path).collect()
}

/// Files that CRIU will insist on and that come from the host.
fn host_files(images: &Path, root: &Path, carried: &BTreeSet<PathBuf>) -> Result<Vec<HostFile>, Cause> {
    /// Folders of Rewarm's own or of the kernel: made anew in each replica, or part of the snapshot.
    const OWN: [&str; 5] = ["/dev", "/proc", "/sys", "/run/rewarm", "/dev/shm"];
    let mut files = Vec::new();
    for file in admission::host_files(images)? {
        let path = Path::new(&file.path);
        if carried.contains(path) || OWN.iter().any(|own| path.starts_with(own)) {
            continue;
        }
        let seen = root.join(path.strip_prefix("/").unwrap_or(path));
        let doing = || format!("look at {}, which the server has open or mapped", file.path);
        let metadata = match std::fs::metadata(&seen) {
            Ok(metadata) => metadata,
            // Deleted since the freeze, or deleted and carried by CRIU: a restore on this machine would tell.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Cause::io(doing())(error)),
        };
        if file.folder && metadata.is_dir() {
            files.push(HostFile { path: file.path, folder: true, ..HostFile::default() });
            continue;
        }
        if !metadata.is_file() {
            continue;
        }
        // What has a build id is named by it. Other content that is mapped is part of the server's memory.
        let digest = match &file.build_id {
            None if file.mapped => Some(digest(&seen).map_err(Cause::io(doing()))?),
            _ => None,
        };
        let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        files.push(HostFile {
            bytes: file.bytes,
            build_id: file.build_id,
            digest,
            mtime_ns: modified.and_then(|time| i64::try_from(time.as_nanos()).ok()).unwrap_or(0),
            mapped: file.mapped,
            folder: false,
            path: file.path,
        });
    }
    Ok(files)
}

fn digest(path: &Path) -> io::Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(std::fs::File::open(path)?)?;
    Ok(hasher.finalize().to_hex().to_string())
}
