//! The manifest: one snapshot, what a restore must know before it moves data.
//!
//! A manifest object is two lines of JSON. The first is the [`Manifest`]; the second is the [`Seal`], which carries
//! signatures over the exact bytes of the first line without its line end. The object's name is the digest of both.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::digest::Digest;
use crate::error::{Damage, Error, Result};
use crate::format::{FORMAT, FORMAT_NEWEST};
use crate::limits::{MANIFEST_BYTES_LIMIT, REGIONS_LIMIT};
use crate::signature::SigningKey;

/// One snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Format version; read before anything else.
    pub format: u32,
    /// Program and version that wrote it, for people.
    pub program: String,
    /// Name under which it was published.
    pub name: String,
    /// Tag under which it was first published.
    pub tag: String,
    /// When it was published, RFC 3339 in UTC.
    pub created: String,
    /// What the snapshot pipeline found out about the server and its machine.
    pub facts: Facts,
    /// The boot object.
    pub boot: BootRef,
    /// The regions in the order of the boot object, without their chunks.
    pub regions: Vec<RegionTotals>,
    /// Sums over the snapshot.
    pub totals: Totals,
    /// Under which key chunk ids are made and, one day, chunks are encrypted.
    pub key: KeyInfo,
}

/// Refers to a boot object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootRef {
    /// Digest of the object as it is stored.
    pub digest: Digest,
    /// Bytes of the object as it is stored.
    pub bytes: u64,
    /// Bytes of its content before compression.
    pub raw_bytes: u64,
}

/// What a region holds.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum RegionKind {
    /// Private pages of a task.
    Task {
        /// Its process id inside the replica.
        pid: u32,
    },
    /// Pages of a shared memory segment.
    Shmem {
        /// CRIU's id of the segment.
        id: u64,
    },
    /// Contents of files of a tree: `upper`, `shm`, ...
    Tree {
        /// Which tree.
        name: String,
    },
    /// Content of one file that is too long for the skeleton.
    File {
        /// Its name.
        name: String,
    },
    /// Device memory of a task.
    Device {
        /// Process id of the task inside the replica.
        pid: u32,
        /// Identity of the device; absent where the task had several and the driver does not tell which part is whose.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        gpu: Option<String>,
        /// It went past the task's own memory, in which it lies otherwise; then its addresses are those on the device, counted
        /// from 0.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        direct: bool,
    },
}

/// The format version of a manifest with these regions: 1, and 2 where a kind is among them that the first version does not
/// have. What can be read by an older program stays readable by it.
pub(crate) fn format_of(regions: &[RegionTotals]) -> u32 {
    let new = regions.iter().any(|region| matches!(region.kind, RegionKind::Device { .. }));
    if new { FORMAT_NEWEST } else { FORMAT }
}

/// A region and its size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionTotals {
    /// What it holds.
    #[serde(flatten)]
    pub kind: RegionKind,
    /// Bytes of its stream.
    pub bytes: u64,
    /// Chunks of its stream.
    pub chunks: u64,
}

/// Sums over a snapshot, in bytes where nothing else is said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Content of all regions.
    pub content_bytes: u64,
    /// What all chunks, each counted once, the boot object, the index and the manifest take in the store.
    pub stored_bytes: u64,
    /// What was written for this snapshot; the rest was in the store already.
    pub new_bytes: u64,
    /// Number of different chunks.
    pub chunks: u64,
    /// Number of packs that are referred to.
    pub packs: u64,
}

/// The key of chunk ids and of encryption.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyInfo {
    /// `public`: the constant of the format. Others come with encryption.
    pub chunk_ids: String,
    /// The wrapped data key of an encrypted store; `null` where nothing is encrypted.
    pub wrapped: Option<Value>,
}

impl KeyInfo {
    pub(crate) fn public() -> Self {
        Self { chunk_ids: "public".to_owned(), wrapped: None }
    }
}

/// The second line of a manifest object.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    /// Signatures over the first line.
    pub signatures: Vec<Signature>,
}

/// A signature over the first line of a manifest object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// `ed25519`.
    pub algorithm: String,
    /// The public key that made it, 64 hexadecimal digits.
    pub key: String,
    /// The signature in hexadecimal digits.
    pub value: String,
}

/// What the snapshot pipeline found out. Every part has a default, so that a reader survives what a writer left out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// Release of the kernel, as `uname -r` says.
    pub kernel: String,
    /// Architecture, as `uname -m` says.
    pub architecture: String,
    /// The processor that the server may have looked at.
    pub cpu: Cpu,
    /// Version of CRIU.
    pub criu: String,
    /// Version of runc.
    pub runc: String,
    /// Command line of the server.
    pub command: Vec<String>,
    /// The replica's own description, opaque to the store.
    pub spec: Value,
    /// Files of the host that CRIU will insist on.
    pub host_files: Vec<HostFile>,
    /// Sizes of memory.
    pub memory: Memory,
    /// Ports that the server listens on.
    pub ports: Vec<u16>,
    /// Recorded questions and answers, opaque to the store.
    pub probe: Option<Value>,
    /// Hooks around the dump and the restore.
    pub hooks: Hooks,
    /// Device state; `null` for a server without a device.
    pub device: Option<Value>,
    /// Labels of the user.
    pub labels: BTreeMap<String, String>,
    /// When the server was dumped, milliseconds since 1970; absent where it is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dumped_ms: Option<u64>,
    /// The highest limit of each resource (`RLIMIT_*`) that any of the server's processes has, by the kernel's name of it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<String, u64>,
}

/// A processor.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cpu {
    /// `vendor_id` of `/proc/cpuinfo`.
    pub vendor: String,
    /// `model name` of `/proc/cpuinfo`.
    pub model: String,
    /// `flags` of `/proc/cpuinfo`.
    pub features: Vec<String>,
}

/// A file outside the snapshot that must be there on restore.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostFile {
    /// Its path inside the replica.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    /// ELF build id in hexadecimal digits.
    pub build_id: Option<String>,
    /// BLAKE3 of its content in hexadecimal digits.
    pub digest: Option<String>,
    /// Time of its last change, nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Whether it is mapped into memory.
    pub mapped: bool,
    /// It is a folder, of which nothing but its being there counts.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub folder: bool,
}

/// Sizes of the server's memory, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// Pages that CRIU dumped, zero pages included.
    pub logical_bytes: u64,
    /// Of these, pages that are zero and not stored.
    pub zero_bytes: u64,
    /// Private pages of each task.
    pub tasks: Vec<TaskMemory>,
    /// Shared memory.
    pub shared: Vec<SharedMemory>,
}

/// Private pages of one task.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskMemory {
    /// Its process id inside the replica.
    pub pid: u32,
    /// Bytes.
    pub bytes: u64,
}

/// One shared memory segment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedMemory {
    /// CRIU's id of the segment.
    pub id: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Hooks as the user gave them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hooks {
    /// Before the dump.
    pub pre: Option<String>,
    /// After the restore, and on the source after it goes on.
    pub post: Option<String>,
    /// Steps of the inference engine, opaque to the store.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine: Option<Value>,
}

#[derive(Deserialize)]
struct Version {
    format: u32,
}

/// The bytes of a manifest object, signed by `key` if there is one.
pub(crate) fn encode(manifest: &Manifest, key: Option<&SigningKey>) -> Result<Bytes> {
    let line = serde_json::to_vec(manifest).expect("a manifest has only string keys");
    let seal = Seal { signatures: key.map(|key| key.sign(&line)).into_iter().collect() };
    sealed(line, &seal)
}

/// The first line of a manifest object and its seal.
pub(crate) fn sealed(line: Vec<u8>, seal: &Seal) -> Result<Bytes> {
    let mut out = line;
    out.push(b'\n');
    serde_json::to_writer(&mut out, seal).expect("writing to memory");
    out.push(b'\n');
    let value = out.len() as u64;
    if value > MANIFEST_BYTES_LIMIT {
        return Err(Error::Limit { what: "bytes of a manifest", value, limit: MANIFEST_BYTES_LIMIT });
    }
    Ok(Bytes::from(out))
}

/// Reads a manifest object whose digest was checked. `store` and `object` are for the error.
pub(crate) fn decode(bytes: &[u8], store: &str, object: &str) -> Result<(Manifest, Seal)> {
    let damaged = |damage: Damage| Error::damaged(store, object, damage);
    let mut lines = bytes.splitn(2, |&b| b == b'\n');
    let (body, seal) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let Version { format } = serde_json::from_slice(body).map_err(|error| damaged(error.into()))?;
    if format > FORMAT_NEWEST {
        return Err(Error::Newer { object: object.to_owned(), found: format, supported: FORMAT_NEWEST });
    }
    let manifest: Manifest = serde_json::from_slice(body).map_err(|error| damaged(error.into()))?;
    let (found, limit) = (manifest.regions.len() as u64, REGIONS_LIMIT);
    if found > limit {
        return Err(damaged(Damage::Bound { what: "regions", found, limit }));
    }
    let seal = serde_json::from_slice(seal).map_err(|error| damaged(error.into()))?;
    Ok((manifest, seal))
}
