//! Bytes that no writer of ours made: every decoder gives an error or a value within its limits, and never panics.

use bytes::Bytes;
use proptest::prelude::*;
use uuid::Uuid;

use crate::codec::{self, Codec, Compression};
use crate::digest::ChunkId;
use crate::error::{Damage, Error};
use crate::format::boot::{self, Leaf, LeafPlace, Root, RootRegion};
use crate::format::frame::{self, Magic};
use crate::format::index::{ChunkRef, decode_leaf, encode_leaf};
use crate::format::manifest::{self, RegionKind};
use crate::format::{pack, tag};
use crate::limits::{
    BOOT_BYTES_LIMIT, CHUNK_BYTES_LIMIT, LEAF_CHUNKS_LIMIT, PACK_BYTES_LIMIT, REGIONS_LIMIT,
};

fn boot_with(raw: &[u8]) -> Vec<u8> {
    [&frame::header(Magic::Boot, Codec::None)[..], raw].concat()
}

fn decode_boot(raw: &[u8]) -> Result<Root, Error> {
    boot::decode(&boot_with(raw), raw.len() as u64, "store", "boot")
}

fn damage<T>(result: &Result<T, Error>) -> Option<&Damage> {
    match result {
        Err(Error::Damaged { source, .. }) => Some(source),
        _ => None,
    }
}

fn any_chunk() -> impl Strategy<Value = ChunkRef> {
    (any::<[u8; 32]>(), 0..3u32, 0..1_000_000u64, 1..1_000_000u32, 1..=1024u32, 0..4u8).prop_map(
        |(id, pack, offset, stored, pages, codec)| ChunkRef {
            id: ChunkId(id),
            pack,
            offset,
            stored,
            raw: pages * 4096,
            codec: Codec::from_id(codec).expect("0 to 3"),
        },
    )
}

fn any_root() -> impl Strategy<Value = Root> {
    let kind = prop_oneof![
        any::<u32>().prop_map(|pid| RegionKind::Task { pid }),
        any::<u64>().prop_map(|id| RegionKind::Shmem { id }),
        "[a-z]{0,8}".prop_map(|name| RegionKind::Tree { name }),
        "[a-z]{0,8}".prop_map(|name| RegionKind::File { name }),
        any::<(u32, Option<u8>, bool)>().prop_map(|(pid, gpu, direct)| {
            RegionKind::Device { pid, gpu: gpu.map(|gpu| format!("GPU-{gpu}")), direct }
        }),
    ];
    let leaf = (0..=LEAF_CHUNKS_LIMIT, 0..1000u64, any::<bool>(), any::<[u8; 32]>()).prop_map(
        |(chunks, pages, inline, digest)| Leaf {
            chunks,
            bytes: pages * 4096,
            place: match inline {
                true => LeafPlace::Inline(Bytes::copy_from_slice(&digest)),
                false => LeafPlace::Indexed {
                    offset: pages,
                    length: 77,
                    digest: crate::digest::Digest::from_bytes(digest),
                },
            },
        },
    );
    let region =
        (kind, any::<[u8; 8]>(), prop::collection::vec(leaf, 0..4)).prop_map(|(kind, meta, leaves)| {
            let bytes = leaves.iter().map(|leaf| leaf.bytes).sum();
            RootRegion { kind, meta: Bytes::copy_from_slice(&meta), bytes, leaves }
        });
    let packs = prop::collection::vec((any::<u128>().prop_map(Uuid::from_u128), 0..PACK_BYTES_LIMIT), 0..4);
    let files = prop::collection::btree_map("[a-z]{1,8}", prop::collection::vec(any::<u8>(), 0..50), 0..4);
    (packs, prop::collection::vec(region, 0..4), files, any::<[u8; 32]>()).prop_map(
        |(packs, regions, files, index)| Root {
            packs,
            regions,
            skeleton: files.into_iter().map(|(name, bytes)| (name, Bytes::from(bytes))).collect(),
            index: Some((crate::digest::Digest::from_bytes(index), 1 << 20)),
            session: Uuid::from_slice(&index[..16]).ok(),
        },
    )
}

proptest! {
    #[test]
    fn leaves_read_back(chunks in prop::collection::vec(any_chunk(), 0..40)) {
        let bytes = encode_leaf(&chunks);
        let lengths = [PACK_BYTES_LIMIT; 3];
        prop_assert_eq!(decode_leaf(&bytes, chunks.len() as u64, &lengths).unwrap(), chunks);
    }

    #[test]
    fn roots_read_back(root in any_root()) {
        let (bytes, raw_bytes) = boot::encode(&root).unwrap();
        prop_assert_eq!(boot::decode(&bytes, raw_bytes, "store", "boot").unwrap(), root);
    }

    #[test]
    fn arbitrary_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..300), count in 0..9u64) {
        let _ = decode_boot(&bytes);
        let _ = boot::decode(&bytes, count, "store", "boot");
        let _ = decode_leaf(&bytes, count, &[1 << 20]);
        let _ = pack::read_trailer(&bytes, 1 << 20);
        let _ = pack::read_footer(Uuid::nil(), &bytes, *crate::digest::Digest::of(&bytes).as_bytes(), 1 << 20);
        let _ = manifest::decode(&bytes, "store", "manifest");
        let _ = tag::decode(&bytes, "store", "tag");
        for codec in [Codec::Lz4, Codec::Zstd] {
            let mut raw = [0; 4096];
            let _ = codec::decode(codec, &bytes, &mut raw);
        }
    }

    #[test]
    fn roots_with_one_byte_changed_are_refused_or_within_limits(root in any_root(), at in any::<usize>(), to: u8) {
        let (bytes, raw_bytes) = boot::encode(&root).unwrap();
        let mut bytes = bytes.to_vec();
        let at = at % bytes.len();
        bytes[at] = to;
        if let Ok(root) = boot::decode(&bytes, raw_bytes, "store", "boot") {
            for region in &root.regions {
                prop_assert_eq!(region.leaves.iter().map(|leaf| leaf.bytes).sum::<u64>(), region.bytes);
                prop_assert!(region.leaves.iter().all(|leaf| leaf.chunks <= LEAF_CHUNKS_LIMIT));
            }
        }
    }

    #[test]
    fn leaves_with_one_byte_changed_stay_within_their_packs(
        chunks in prop::collection::vec(any_chunk(), 1..20), at in any::<usize>(), to: u8,
    ) {
        let mut bytes = encode_leaf(&chunks);
        let at = at % bytes.len();
        bytes[at] = to;
        let lengths = [1_500_000; 3];
        if let Ok(read) = decode_leaf(&bytes, chunks.len() as u64, &lengths) {
            for chunk in read {
                prop_assert!(chunk.offset + u64::from(chunk.stored) <= lengths[chunk.pack as usize]);
                prop_assert!(u64::from(chunk.raw) <= CHUNK_BYTES_LIMIT && chunk.raw > 0);
            }
        }
    }

    #[test]
    fn codecs_read_back(seed: u64, pages in 1..20usize, repeat in 1..64usize, level in 1..4i32) {
        let mut noise = vec![0; pages * 4096 / repeat + 1];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut noise);
        let content: Vec<u8> = noise.iter().flat_map(|byte| std::iter::repeat_n(*byte, repeat)).take(pages * 4096).collect();
        let parts = [Bytes::from(content.clone()).slice(..4096), Bytes::from(content.clone()).slice(4096..)];
        let auto = [codec::FOLDER_RATE, codec::BUCKET_RATE].map(|rate| (Compression::Auto, rate));
        let asked = [Compression::None, Compression::Planes, Compression::Zstd(level)].map(|asked| (asked, 1));
        for (compression, rate) in auto.into_iter().chain(asked) {
            let (codec, stored) = codec::encode(compression, rate, &parts);
            let stored = stored.unwrap_or_else(|| content.clone().into());
            prop_assert!(stored.len() <= content.len());
            let mut raw = vec![0; content.len()];
            codec::decode(codec, &stored, &mut raw).unwrap();
            prop_assert_eq!(&raw, &content);
            let mut short = vec![0; content.len() - 4096];
            prop_assert!(short.is_empty() || codec::decode(codec, &stored, &mut short).is_err());
            let mut long = vec![0; content.len() + 4096];
            prop_assert!(codec::decode(codec, &stored, &mut long).is_err());
        }
    }
}

/// The canary of this file: a decoder that let this through would let a bomb through.
#[test]
fn bombs_are_refused_before_they_take_memory() {
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 19).unwrap();
    assert!(bomb.len() < 10_000);
    let mut raw = vec![0; 4096];
    assert!(codec::decode(Codec::Zstd, &bomb, &mut raw).is_err());

    let huge = boot::decode(&boot_with(&[]), u64::MAX, "store", "boot");
    assert!(matches!(damage(&huge), Some(Damage::Bound { limit: BOOT_BYTES_LIMIT, .. })), "{huge:?}");

    // Two bytes each on the wire, a region each in memory.
    let many = [0x12, 0].repeat(REGIONS_LIMIT as usize + 1);
    let many = decode_boot(&many);
    assert!(matches!(damage(&many), Some(Damage::Bound { what: "regions", .. })), "{many:?}");
}
