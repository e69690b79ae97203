//! `mountpoints-ID.img`: the mounts of a mount namespace.

use std::path::Path;

use prost::Message;

use super::{Image, Kind, numbered};
use crate::{Error, Fault};

/// The most mounts of a namespace: the kernel's default limit.
const MOUNTS_MAX: u64 = 100_000;

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Number of the mount namespace.
    pub namespace: u32,
    /// Number of the mount.
    pub id: u32,
    /// Number of the mount that it lies on.
    pub parent: u32,
    /// Type of file system as CRIU restores it, such as `tmpfs`.
    pub kind: String,
    /// `MS_*` flags of the mount.
    pub flags: u32,
    /// `MS_*` flags of the file system.
    pub sb_flags: u32,
    /// Folder of the file system that is mounted, `/` for all of it.
    pub root: String,
    /// Where it is mounted, absolute.
    pub mountpoint: String,
    /// Source as in mount(8).
    pub source: String,
    /// Options of the file system.
    pub options: String,
    /// Key by which the restoring side says what to bind here; `None` if CRIU makes the mount itself.
    pub external: Option<String>,
    /// Restored by a plugin of CRIU.
    pub by_plugin: bool,
}

impl Mount {
    const MS_RDONLY: u32 = 1;

    /// Nothing can be written through it.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        (self.flags | self.sb_flags) & Self::MS_RDONLY != 0
    }
}

#[derive(Clone, PartialEq, Message)]
struct MntEntry {
    #[prost(uint32, tag = "1")]
    kind: u32,
    #[prost(uint32, tag = "2")]
    id: u32,
    #[prost(uint32, tag = "4")]
    parent: u32,
    #[prost(uint32, tag = "5")]
    flags: u32,
    #[prost(string, tag = "6")]
    root: String,
    #[prost(string, tag = "7")]
    mountpoint: String,
    #[prost(string, tag = "8")]
    source: String,
    #[prost(string, tag = "9")]
    options: String,
    #[prost(bool, tag = "12")]
    by_plugin: bool,
    #[prost(bool, tag = "13")]
    old_external: bool,
    #[prost(string, tag = "14")]
    name: String,
    #[prost(uint32, tag = "17")]
    sb_flags: u32,
    #[prost(string, optional, tag = "18")]
    external: Option<String>,
}

/// CRIU's numbers of file systems, from 0.
const KINDS: &[&str] = &[
    "unsupported",
    "proc",
    "sysfs",
    "devtmpfs",
    "binfmt_misc",
    "tmpfs",
    "devpts",
    "simfs",
    "pstore",
    "securityfs",
    "fusectl",
    "debugfs",
    "cgroup",
    "aufs",
    "mqueue",
    "fuse",
    "auto",
    "overlay",
    "autofs",
    "tracefs",
];
const AUTO: u32 = 16;
const CGROUP2: u32 = 23;

/// Reads the mounts of all mount namespaces.
///
/// # Errors
/// [`Error::Io`] or [`Error::Image`] if a file cannot be read or is not what CRIU writes.
pub fn read(directory: &Path) -> crate::Result<Vec<Mount>> {
    let mut mounts = Vec::new();
    for (namespace, path) in numbered(directory, "mountpoints-", 10)? {
        let what = "number of a mount namespace";
        let namespace = u32::try_from(namespace)
            .map_err(|_| Error::image(&path)(Fault::Value { what, seen: namespace, expected: "32 bits" }))?;
        Image::read(&path, Kind::Mounts)?.each(|entry: MntEntry| {
            let seen = mounts.len() as u64 + 1;
            if seen > MOUNTS_MAX {
                return Err(Fault::Limit { what: "number of mounts", seen, limit: MOUNTS_MAX });
            }
            mounts.push(mount(namespace, entry));
            Ok(())
        })?;
    }
    Ok(mounts)
}

fn mount(namespace: u32, entry: MntEntry) -> Mount {
    let kind = match entry.kind {
        AUTO => entry.name,
        CGROUP2 => "cgroup2".to_owned(),
        other => KINDS.get(other as usize).map_or_else(|| format!("type {other}"), |&name| name.to_owned()),
    };
    // Older images have a flag instead of a key; the key stands in the place of the root then.
    let external = entry.external.or_else(|| entry.old_external.then(|| entry.root.clone()));
    // CRIU leaves the slash out, and calls the root `/` or `./`.
    let mountpoint = format!("/{}", entry.mountpoint.trim_start_matches("./").trim_start_matches('/'));
    Mount {
        namespace,
        id: entry.id,
        parent: entry.parent,
        kind,
        flags: entry.flags,
        sb_flags: entry.sb_flags,
        root: entry.root,
        mountpoint,
        source: entry.source,
        options: entry.options,
        external,
        by_plugin: entry.by_plugin,
    }
}
