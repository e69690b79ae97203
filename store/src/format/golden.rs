//! The exact bytes of every kind of object of format version 1, as they lie under `tests/golden/v1`, and of what version 2
//! adds.
//!
//! A difference means that older programs cannot read what this one writes. `REWARM_GOLDEN=write` writes the files
//! anew, which is right only together with a new version of the format.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bytes::Bytes;
use uuid::Uuid;

use crate::codec::Codec;
use crate::digest::{ChunkId, ChunkKey, Digest};
use crate::format::boot::{self, Leaf, LeafPlace, Root, RootRegion};
use crate::format::frame::{self, Magic};
use crate::format::index::{ChunkRef, Location, decode_leaf, encode_leaf};
use crate::format::manifest::{
    self, BootRef, Cpu, Facts, Hooks, HostFile, KeyInfo, Manifest, Memory, RegionKind, RegionTotals, Seal,
    SharedMemory, Signature, TaskMemory, Totals,
};
use crate::format::pack::{self, TRAILER_BYTES};
use crate::format::tag::{self, DecidingFacts, TagIndex, Variant};

fn check(name: &str, bytes: &[u8]) {
    check_of("v1", name, bytes);
}

fn check_of(version: &str, name: &str, bytes: &[u8]) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(version).join(name);
    if std::env::var_os("REWARM_GOLDEN").is_some_and(|value| value == "write") {
        std::fs::write(&path, bytes).unwrap();
    }
    let golden = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(golden == bytes, "{name} has other bytes than {version} of the format");
}

const PACK: Uuid = Uuid::from_u128(0x0192_0000_0000_7000_8000_0000_0000_0001);

/// One page that holds 0, 1, 2, ... 255, 0, 1, ...
fn page() -> Vec<u8> {
    (0..4096u32).map(|n| n as u8).collect()
}

fn chunks() -> Vec<(ChunkId, Location)> {
    let key = ChunkKey::public();
    let raw = page();
    let double = [raw.clone(), vec![0xa5; 4096]].concat();
    vec![
        (
            key.id([&raw[..]]),
            Location { pack: PACK, offset: 16, stored: 4096, raw: 4096, codec: Codec::None },
        ),
        (
            key.id([&double[..]]),
            Location { pack: PACK, offset: 4112, stored: 300, raw: 8192, codec: Codec::Zstd },
        ),
    ]
}

fn refs() -> Vec<ChunkRef> {
    chunks().iter().map(|(id, location)| location.with(*id, 0)).collect()
}

fn root() -> Root {
    let leaf = encode_leaf(&refs());
    let indexed = LeafPlace::Indexed { offset: 16, length: leaf.len() as u64, digest: Digest::of(&leaf) };
    let region = |kind, place| RootRegion {
        kind,
        meta: Bytes::from_static(b"meta"),
        bytes: 12288,
        leaves: vec![Leaf { chunks: 2, bytes: 12288, place }],
    };
    Root {
        packs: vec![(PACK, 5000)],
        regions: vec![
            region(RegionKind::Task { pid: 1 }, LeafPlace::Inline(leaf.into())),
            region(RegionKind::Shmem { id: 7 }, indexed.clone()),
            region(RegionKind::Tree { name: "upper".into() }, indexed.clone()),
            region(RegionKind::File { name: "ghost".into() }, indexed),
        ],
        skeleton: BTreeMap::from([("inventory.img".to_owned(), Bytes::from_static(b"\x58\x31\x31\x63"))]),
        index: Some((Digest::of(&index()), index().len() as u64)),
        session: None,
    }
}

fn index() -> Vec<u8> {
    let mut out = frame::header(Magic::Index, Codec::None).to_vec();
    out.extend_from_slice(&encode_leaf(&refs()));
    out
}

fn manifest() -> (Manifest, Seal) {
    let facts = Facts {
        kernel: "6.18.0".into(),
        architecture: "x86_64".into(),
        cpu: Cpu {
            vendor: "GenuineIntel".into(),
            model: "A".into(),
            features: vec!["avx2".into(), "fpu".into()],
        },
        criu: "4.2.1".into(),
        runc: "1.1.5".into(),
        command: vec!["python3".into(), "serve.py".into()],
        spec: serde_json::json!({"name": "web"}),
        host_files: vec![HostFile {
            path: "/lib/libc.so.6".into(),
            bytes: 1_926_256,
            build_id: Some("58fd23a6".into()),
            mapped: true,
            ..HostFile::default()
        }],
        ports: vec![8000],
        ..Facts::default()
    };
    let regions = vec![RegionTotals { kind: RegionKind::Task { pid: 1 }, bytes: 12288, chunks: 2 }];
    let manifest = Manifest {
        format: 1,
        program: "rewarm 0.1.0".into(),
        name: "web".into(),
        tag: "v1".into(),
        created: "2026-11-25T00:00:00Z".into(),
        facts,
        boot: BootRef { digest: Digest::of(b"boot"), bytes: 500, raw_bytes: 484 },
        regions,
        totals: Totals { content_bytes: 12288, stored_bytes: 4896, new_bytes: 5500, chunks: 2, packs: 1 },
        key: KeyInfo::public(),
    };
    let signature = Signature { algorithm: "ed25519".into(), key: "k1".into(), value: "00".repeat(64) };
    (manifest, Seal { signatures: vec![signature] })
}

/// What a second program would have to know: every field of the facts has its row in the description.
#[test]
fn every_fact_is_documented() {
    let document = include_str!("../../../docs/snapshot-format.md");
    let facts = Facts {
        host_files: vec![HostFile { folder: true, ..HostFile::default() }],
        memory: Memory {
            tasks: vec![TaskMemory::default()],
            shared: vec![SharedMemory::default()],
            ..Memory::default()
        },
        hooks: Hooks { engine: Some(serde_json::Value::Null), ..Hooks::default() },
        dumped_ms: Some(1),
        limits: BTreeMap::from([("Max open files".to_owned(), 1)]),
        ..manifest().0.facts
    };
    let mut facts = serde_json::to_value(facts).unwrap();
    // Their fields are the user's, and of other crates.
    for opaque in ["spec", "limits", "labels"] {
        facts[opaque].take();
    }
    let mut waiting = vec![facts];
    let mut seen = 0;
    while let Some(value) = waiting.pop() {
        match value {
            serde_json::Value::Object(fields) => {
                for (name, value) in fields {
                    assert!(document.contains(&format!("`{name}`")), "{name} is not documented");
                    seen += 1;
                    waiting.push(value);
                }
            }
            serde_json::Value::Array(values) => waiting.extend(values),
            _ => {}
        }
    }
    assert!(seen > 30, "{seen} fields were looked for");
}

#[test]
fn chunk_ids() {
    check("chunk-ids.txt", chunks().iter().map(|(id, _)| format!("{id}\n")).collect::<String>().as_bytes());
}

#[test]
fn leaf() {
    let bytes = encode_leaf(&refs());
    check("leaf.bin", &bytes);
    assert_eq!(decode_leaf(&bytes, 2, &[5000]).unwrap(), refs());
}

#[test]
fn pack_ending() {
    let ending = pack::ending(&chunks());
    check("pack-ending.bin", &ending);
    let (footer, trailer) = ending.split_at(ending.len() - TRAILER_BYTES);
    let (length, digest) = pack::read_trailer(trailer, 5000).unwrap();
    assert_eq!(length as usize, footer.len());
    assert_eq!(pack::read_footer(PACK, footer, digest, 5000).unwrap(), chunks());
}

#[test]
fn headers() {
    for (magic, name) in [(Magic::Pack, "pack"), (Magic::Index, "index"), (Magic::Boot, "boot")] {
        check(&format!("header-{name}.bin"), &frame::header(magic, Codec::None));
    }
}

#[test]
fn index_object() {
    check("index.bin", &index());
}

#[test]
fn boot_object() {
    let (bytes, raw_bytes) = boot::encode(&root()).unwrap();
    // What zstd makes of it may change with zstd; what it holds may not.
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1/boot.bin");
    if std::env::var_os("REWARM_GOLDEN").is_some_and(|value| value == "write") {
        std::fs::write(&golden, &bytes).unwrap();
    }
    let golden = std::fs::read(golden).unwrap();
    assert_eq!(boot::decode(&golden, raw_bytes, "store", "boot").unwrap(), root());
    let raw = |bytes: &[u8]| {
        let (codec, content) = frame::open(Magic::Boot, bytes, "store", "boot").unwrap();
        let mut raw = vec![0; raw_bytes as usize];
        crate::codec::decode(codec, content, &mut raw).unwrap();
        raw
    };
    check("boot-content.bin", &raw(&bytes));
    assert!(raw(&golden) == raw(&bytes));
}

#[test]
fn manifest_object() {
    let (manifest, seal) = manifest();
    let bytes = manifest::sealed(serde_json::to_vec(&manifest).unwrap(), &seal).unwrap();
    check("manifest.jsonl", &bytes);
    assert_eq!(manifest::decode(&bytes, "store", "manifest").unwrap(), (manifest, seal));
}

/// What version 2 adds: a region of device memory.
#[test]
fn regions_of_device_memory() {
    let kinds = [
        RegionKind::Device {
            pid: 1,
            gpu: Some("GPU-00000000-0000-0000-0000-0000000000d0".into()),
            direct: false,
        },
        RegionKind::Device { pid: 300, gpu: None, direct: false },
    ];
    let mut root = root();
    let first = root.regions[0].clone();
    root.regions.extend(kinds.iter().map(|kind| RootRegion { kind: kind.clone(), ..first.clone() }));
    let (bytes, raw_bytes) = boot::encode(&root).unwrap();
    assert_eq!(boot::decode(&bytes, raw_bytes, "store", "boot").unwrap(), root);
    let (codec, content) = frame::open(Magic::Boot, &bytes, "store", "boot").unwrap();
    let mut raw = vec![0; raw_bytes as usize];
    crate::codec::decode(codec, content, &mut raw).unwrap();
    check_of("v2", "boot-content.bin", &raw);

    let (mut manifest, seal) = manifest();
    assert_eq!(manifest::format_of(&manifest.regions), 1, "what the first version can say stays in it");
    manifest.regions.extend(kinds.map(|kind| RegionTotals { kind, bytes: 12288, chunks: 2 }));
    manifest.format = manifest::format_of(&manifest.regions);
    assert_eq!(manifest.format, 2);
    let bytes = manifest::sealed(serde_json::to_vec(&manifest).unwrap(), &seal).unwrap();
    check_of("v2", "manifest.jsonl", &bytes);
    assert_eq!(manifest::decode(&bytes, "store", "manifest").unwrap(), (manifest, seal));
}

#[test]
fn tag_index() {
    let (manifest, seal) = manifest();
    let bytes = manifest::sealed(serde_json::to_vec(&manifest).unwrap(), &seal).unwrap();
    let facts = DecidingFacts::of(&manifest.facts);
    let published = manifest.created.clone();
    let variant = Variant { manifest: Digest::of(&bytes), bytes: bytes.len() as u64, published, facts };
    let index = TagIndex {
        format: 1,
        name: "web".into(),
        tag: "v1".into(),
        number: 1,
        writer: "01920000-0000-7000-8000-000000000002".into(),
        published: "2026-11-25T00:00:00Z".into(),
        variants: vec![variant],
    };
    check("tag.json", &index.encode());
    assert_eq!(tag::decode(&index.encode(), "store", "tag").unwrap(), index);
}
