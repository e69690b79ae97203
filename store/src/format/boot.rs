//! The boot object: root of the index and the skeleton, everything that a restore needs before it asks for memory.

use std::collections::BTreeMap;

use bytes::Bytes;
use prost::Message;
use uuid::Uuid;

use crate::codec::{self, Compression};
use crate::digest::Digest;
use crate::error::{Damage, Error, Result};
use crate::format::frame::{self, Magic};
use crate::format::manifest::RegionKind;
use crate::format::wire::{self, Allowed};
use crate::limits::{
    BOOT_BYTES_LIMIT, CONTENT_BYTES_LIMIT, LEAF_BYTES_LIMIT, LEAF_CHUNKS_LIMIT, LEAVES_LIMIT,
    PACK_BYTES_LIMIT, PACKS_LIMIT, PAGE_BYTES, REGIONS_LIMIT, SKELETON_FILES_LIMIT,
};

/// Root of the index and skeleton, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Root {
    /// The packs that leaves refer to by position, with their lengths.
    pub(crate) packs: Vec<(Uuid, u64)>,
    pub(crate) regions: Vec<RootRegion>,
    pub(crate) skeleton: BTreeMap<String, Bytes>,
    /// The object that holds the leaves that are not inline, with its length.
    pub(crate) index: Option<(Digest, u64)>,
    /// The session that wrote it. With it no two sessions write an object of the same name, of which one might be removed
    /// while the other refers to it.
    pub(crate) session: Option<Uuid>,
}

/// A region and where its leaves are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RootRegion {
    pub(crate) kind: RegionKind,
    pub(crate) meta: Bytes,
    pub(crate) bytes: u64,
    pub(crate) leaves: Vec<Leaf>,
}

/// A leaf: what it covers and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Leaf {
    /// How many chunks it lists.
    pub(crate) chunks: u64,
    /// Bytes of the stream that they make up.
    pub(crate) bytes: u64,
    pub(crate) place: LeafPlace,
}

/// Where the bytes of a leaf are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LeafPlace {
    Inline(Bytes),
    Indexed { offset: u64, length: u64, digest: Digest },
}

#[derive(Clone, PartialEq, Eq, Message)]
struct BootMessage {
    #[prost(message, repeated, tag = "1")]
    packs: Vec<PackMessage>,
    #[prost(message, repeated, tag = "2")]
    regions: Vec<RegionMessage>,
    #[prost(message, repeated, tag = "3")]
    files: Vec<FileMessage>,
    #[prost(message, optional, tag = "4")]
    index: Option<IndexMessage>,
    #[prost(bytes = "bytes", optional, tag = "5")]
    session: Option<Bytes>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct PackMessage {
    #[prost(bytes = "bytes", tag = "1")]
    id: Bytes,
    #[prost(uint64, tag = "2")]
    bytes: u64,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct RegionMessage {
    #[prost(oneof = "KindMessage", tags = "1, 2, 3, 4, 5")]
    kind: Option<KindMessage>,
    #[prost(bytes = "bytes", tag = "8")]
    meta: Bytes,
    #[prost(uint64, tag = "9")]
    bytes: u64,
    #[prost(message, repeated, tag = "10")]
    leaves: Vec<LeafMessage>,
}

#[derive(Clone, PartialEq, Eq, prost::Oneof)]
enum KindMessage {
    #[prost(uint32, tag = "1")]
    Task(u32),
    #[prost(uint64, tag = "2")]
    Shmem(u64),
    #[prost(string, tag = "3")]
    Tree(String),
    #[prost(string, tag = "4")]
    File(String),
    #[prost(message, tag = "5")]
    Device(DeviceMessage),
}

#[derive(Clone, PartialEq, Eq, Message)]
struct DeviceMessage {
    #[prost(uint32, tag = "1")]
    pid: u32,
    #[prost(string, optional, tag = "2")]
    gpu: Option<String>,
    #[prost(bool, tag = "3")]
    direct: bool,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct LeafMessage {
    #[prost(uint64, tag = "1")]
    chunks: u64,
    #[prost(uint64, tag = "2")]
    bytes: u64,
    #[prost(bytes = "bytes", optional, tag = "3")]
    inline: Option<Bytes>,
    #[prost(uint64, tag = "4")]
    offset: u64,
    #[prost(uint64, tag = "5")]
    length: u64,
    #[prost(bytes = "bytes", tag = "6")]
    digest: Bytes,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct FileMessage {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(bytes = "bytes", tag = "2")]
    bytes: Bytes,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct IndexMessage {
    #[prost(bytes = "bytes", tag = "1")]
    digest: Bytes,
    #[prost(uint64, tag = "2")]
    bytes: u64,
}

/// Encodes a boot object; also the length of its content before compression.
pub(crate) fn encode(root: &Root) -> Result<(Bytes, u64)> {
    let message = BootMessage {
        packs: root.packs.iter().map(|(id, bytes)| pack_message(*id, *bytes)).collect(),
        regions: root.regions.iter().map(region_message).collect(),
        files: root.skeleton.iter().map(file_message).collect(),
        index: root.index.as_ref().map(|(digest, bytes)| IndexMessage {
            digest: Bytes::copy_from_slice(digest.as_bytes()),
            bytes: *bytes,
        }),
        session: root.session.map(|id| Bytes::copy_from_slice(id.as_bytes())),
    };
    let raw = Bytes::from(message.encode_to_vec());
    let raw_bytes = raw.len() as u64;
    if raw_bytes > BOOT_BYTES_LIMIT {
        return Err(Error::Limit {
            what: "bytes of a boot object",
            value: raw_bytes,
            limit: BOOT_BYTES_LIMIT,
        });
    }
    let (codec, stored) = codec::encode(Compression::Zstd(3), codec::FOLDER_RATE, std::slice::from_ref(&raw));
    let mut out = frame::header(Magic::Boot, codec).to_vec();
    out.extend_from_slice(stored.as_ref().unwrap_or(&raw));
    Ok((Bytes::from(out), raw_bytes))
}

fn pack_message(id: Uuid, bytes: u64) -> PackMessage {
    PackMessage { id: Bytes::copy_from_slice(id.as_bytes()), bytes }
}

fn file_message((name, bytes): (&String, &Bytes)) -> FileMessage {
    FileMessage { name: name.clone(), bytes: bytes.clone() }
}

fn region_message(region: &RootRegion) -> RegionMessage {
    RegionMessage {
        kind: Some(match &region.kind {
            RegionKind::Task { pid } => KindMessage::Task(*pid),
            RegionKind::Shmem { id } => KindMessage::Shmem(*id),
            RegionKind::Tree { name } => KindMessage::Tree(name.clone()),
            RegionKind::File { name } => KindMessage::File(name.clone()),
            RegionKind::Device { pid, gpu, direct } => {
                KindMessage::Device(DeviceMessage { pid: *pid, gpu: gpu.clone(), direct: *direct })
            }
        }),
        meta: region.meta.clone(),
        bytes: region.bytes,
        leaves: region.leaves.iter().map(leaf_message).collect(),
    }
}

fn leaf_message(leaf: &Leaf) -> LeafMessage {
    let mut message = LeafMessage { chunks: leaf.chunks, bytes: leaf.bytes, ..LeafMessage::default() };
    match &leaf.place {
        LeafPlace::Inline(bytes) => message.inline = Some(bytes.clone()),
        LeafPlace::Indexed { offset, length, digest } => {
            message.offset = *offset;
            message.length = *length;
            message.digest = Bytes::copy_from_slice(digest.as_bytes());
        }
    }
    message
}

/// Decodes and checks a boot object whose content has `raw_bytes`. `store` and `object` are for the error.
pub(crate) fn decode(bytes: &[u8], raw_bytes: u64, store: &str, object: &str) -> Result<Root> {
    let damaged = |damage: Damage| Error::damaged(store, object, damage);
    let (codec, content) = frame::open(Magic::Boot, bytes, store, object)?;
    bound("bytes of a boot object", raw_bytes, BOOT_BYTES_LIMIT).map_err(damaged)?;
    let mut raw = vec![0; raw_bytes as usize];
    codec::decode(codec, content, &mut raw).map_err(|source| {
        damaged(Damage::Codec { offset: frame::HEADER_BYTES as u64, expected: raw_bytes, source })
    })?;
    read_message(Bytes::from(raw)).map_err(damaged)
}

/// What is counted before the message is decoded.
const LEAVES: Allowed = Allowed { tag: 10, what: "leaves", limit: LEAVES_LIMIT, inner: None };
const ALLOWED: &[Allowed] = &[
    Allowed { tag: 1, what: "packs", limit: PACKS_LIMIT, inner: None },
    Allowed { tag: 2, what: "regions", limit: REGIONS_LIMIT, inner: Some(&LEAVES) },
    Allowed { tag: 3, what: "skeleton files", limit: SKELETON_FILES_LIMIT, inner: None },
];

fn read_message(raw: Bytes) -> Result<Root, Damage> {
    wire::check(&raw, ALLOWED)?;
    let message = BootMessage::decode(raw)?;
    let index = match message.index {
        Some(index) => Some((digest_of(&index.digest)?, index.bytes)),
        None => None,
    };
    let session = message.session.as_deref().map(uuid_of).transpose()?;
    let mut packs = Vec::with_capacity(message.packs.len());
    for pack in &message.packs {
        bound("bytes of a pack", pack.bytes, PACK_BYTES_LIMIT)?;
        packs.push((uuid_of(&pack.id)?, pack.bytes));
    }
    let index_bytes = index.as_ref().map_or(0, |(_, bytes)| *bytes);
    let regions: Vec<RootRegion> = message
        .regions
        .into_iter()
        .map(|region| read_region(region, index_bytes))
        .collect::<Result<_, _>>()?;
    let total = regions.iter().fold(0u64, |sum, region| sum.saturating_add(region.bytes));
    bound("bytes of content", total, CONTENT_BYTES_LIMIT)?;
    let skeleton = message.files.into_iter().map(|file| (file.name, file.bytes)).collect();
    Ok(Root { packs, regions, skeleton, index, session })
}

fn read_region(region: RegionMessage, index_bytes: u64) -> Result<RootRegion, Damage> {
    let kind = match region.kind {
        Some(KindMessage::Task(pid)) => RegionKind::Task { pid },
        Some(KindMessage::Shmem(id)) => RegionKind::Shmem { id },
        Some(KindMessage::Tree(name)) => RegionKind::Tree { name },
        Some(KindMessage::File(name)) => RegionKind::File { name },
        Some(KindMessage::Device(DeviceMessage { pid, gpu, direct })) => {
            RegionKind::Device { pid, gpu, direct }
        }
        None => {
            let (found, expected) = ("unknown".to_owned(), "task, shmem, tree, file or device".to_owned());
            return Err(Damage::Frame { what: "kind of a region", found, expected });
        }
    };
    let mut leaves = Vec::with_capacity(region.leaves.len());
    let mut sum = 0u64;
    for leaf in region.leaves {
        bound("chunks of a leaf", leaf.chunks, LEAF_CHUNKS_LIMIT)?;
        sum = sum.saturating_add(leaf.bytes);
        let place = match leaf.inline {
            Some(bytes) => {
                bound("bytes of a leaf", bytes.len() as u64, LEAF_BYTES_LIMIT)?;
                LeafPlace::Inline(bytes)
            }
            None => {
                bound("bytes of a leaf", leaf.length, LEAF_BYTES_LIMIT)?;
                bound("end of a leaf in its object", leaf.offset.saturating_add(leaf.length), index_bytes)?;
                let digest = digest_of(&leaf.digest)?;
                LeafPlace::Indexed { offset: leaf.offset, length: leaf.length, digest }
            }
        };
        leaves.push(Leaf { chunks: leaf.chunks, bytes: leaf.bytes, place });
    }
    if sum != region.bytes || !sum.is_multiple_of(PAGE_BYTES) {
        return Err(Damage::Length { found: sum, expected: region.bytes });
    }
    Ok(RootRegion { kind, meta: region.meta, bytes: region.bytes, leaves })
}

fn uuid_of(bytes: &[u8]) -> Result<Uuid, Damage> {
    Uuid::from_slice(bytes).map_err(|_| Damage::Length { found: bytes.len() as u64, expected: 16 })
}

fn digest_of(bytes: &[u8]) -> Result<Digest, Damage> {
    let bytes = bytes.try_into().map_err(|_| Damage::Length { found: bytes.len() as u64, expected: 32 })?;
    Ok(Digest::from_bytes(bytes))
}

fn bound(what: &'static str, found: u64, limit: u64) -> Result<(), Damage> {
    if found > limit { Err(Damage::Bound { what, found, limit }) } else { Ok(()) }
}
