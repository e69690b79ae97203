//! How fast a folder store writes and fetches, and the two floors below it: hashing and the codecs.
//!
//! `cargo run --release -p rewarm-store --example throughput -- [MIB] [FOLDER] [FILE]`; with FILE its content and nothing else.

use std::hint::black_box;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use rewarm_store::{
    Compression, Facts, Name, Reference, RegionKind, SessionOptions, Sink, Store, StoreUrl, Target, parsers,
};

type Failure = Box<dyn std::error::Error>;

/// Content by name and how to make a MiB of it.
type Kind = (&'static str, fn(u64) -> Vec<u8>);

const MIB: usize = 1 << 20;
/// Id of the codec of planes.
const PLANES: u8 = 3;
const COMPRESSIONS: [Compression; 4] =
    [Compression::None, Compression::Auto, Compression::Planes, Compression::Zstd(1)];
const KINDS: [Kind; 3] = [("random", random), ("bf16 weights", weights), ("python heap", heap)];

struct Null;

impl Sink for Null {
    fn put(&self, _offset: u64, bytes: &[u8]) -> io::Result<()> {
        black_box(bytes);
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let mib: usize = arguments.next().map_or(Ok(1024), |text| text.parse())?;
    let folder = match arguments.next() {
        Some(folder) => folder.into(),
        None => std::env::temp_dir().join(format!("rewarm-throughput-{}", std::process::id())),
    };
    if let Some(file) = arguments.next() {
        let content = std::fs::read(file)?;
        let whole = content.len() / 4096 * 4096;
        floors("file", &content[..MIB.min(whole)]);
        let parts = Bytes::from(content).slice(..whole);
        let parts: Vec<Bytes> =
            (0..whole).step_by(MIB).map(|at| parts.slice(at..whole.min(at + MIB))).collect();
        for compression in COMPRESSIONS {
            round(&folder, compression, &parts).await?;
            std::fs::remove_dir_all(&folder)?;
        }
        return Ok(());
    }
    for (name, make) in KINDS {
        floors(name, &make(1));
        let content: Vec<Bytes> = (0..mib as u64).map(|n| make(n).into()).collect();
        for compression in COMPRESSIONS {
            round(&folder, compression, &content).await?;
            std::fs::remove_dir_all(&folder)?;
        }
    }
    Ok(())
}

/// One core, 256 KiB at a time, as the workers do it.
fn floors(name: &str, mib: &[u8]) {
    let chunks: Vec<&[u8]> = mib.chunks(256 << 10).collect();
    let rounds = 200;
    let key = [7; 32];
    let rate = |bytes: usize, begun: Instant| bytes as f64 / 1e9 / begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    for chunk in std::iter::repeat_n(&chunks, rounds).flatten() {
        black_box(blake3::keyed_hash(&key, chunk));
    }
    let hash = rate(rounds * mib.len(), begun);
    let mut raw = vec![0; 256 << 10];
    let mut line = format!("{name}: one core: keyed hash {hash:.2} GB/s");
    let mut zstd = zstd::bulk::Compressor::new(1).expect("level 1 exists");
    let mut unzstd = zstd::bulk::Decompressor::new().expect("memory");
    for codec in ["lz4", "zstd-1", "planes"] {
        let mut encode_one = |chunk: &[u8]| match codec {
            "lz4" => lz4_flex::block::compress(chunk),
            "zstd-1" => zstd.compress(chunk).expect("memory"),
            _ => parsers::encoded(PLANES, chunk).unwrap_or_else(|| chunk.to_vec()),
        };
        let begun = Instant::now();
        for chunk in std::iter::repeat_n(&chunks, 20).flatten() {
            black_box(encode_one(chunk));
        }
        let encode = rate(20 * mib.len(), begun);
        let stored: Vec<Vec<u8>> = chunks.iter().map(|chunk| encode_one(chunk)).collect();
        let small: usize = stored.iter().map(Vec::len).sum();
        let begun = Instant::now();
        for stored in std::iter::repeat_n(&stored, 100).flatten() {
            match codec {
                "lz4" => {
                    lz4_flex::block::decompress_into(stored, &mut raw).expect("valid");
                }
                "zstd-1" => {
                    unzstd.decompress_to_buffer(stored, &mut raw).expect("valid");
                }
                _ if stored.len() == raw.len() => raw.copy_from_slice(stored),
                _ => assert!(parsers::decodes(PLANES, stored, &mut raw)),
            }
        }
        let decode = rate(100 * mib.len(), begun);
        let ratio = mib.len() as f64 / small as f64;
        line += &format!("; {codec} {ratio:.2}x, encode {encode:.2}, decode {decode:.2} GB/s");
    }
    show(&line);
}

async fn round(folder: &std::path::Path, compression: Compression, content: &[Bytes]) -> Result<(), Failure> {
    let store_url: StoreUrl = folder.to_str().ok_or("a folder with a name in UTF-8")?.parse()?;
    let store = Store::open(&store_url).await?;
    let bench: Name = "bench".parse()?;
    let logical = content.iter().map(Bytes::len).sum::<usize>() as f64;
    let begun = Instant::now();
    let session = store.begin(SessionOptions { compression, ..SessionOptions::default() }).await?;
    let mut region = session.region(RegionKind::Task { pid: 1 }).await?;
    for part in content {
        region.push(part.clone()).await?;
    }
    region.finish(Vec::new()).await?;
    let published = session.publish(&bench, "v1", Facts::default()).await?;
    let written = begun.elapsed().as_secs_f64();
    let reference = Reference { store: store_url, name: bench, target: Target::Digest(published.digest) };
    let mut best = f64::MAX;
    for _ in 0..3 {
        let begun = Instant::now();
        let boot = store.resolve(&reference).await?.boot().await?;
        boot.fetch(0, Arc::new(Null), 8).await?;
        best = best.min(begun.elapsed().as_secs_f64());
    }
    show(&format!(
        "  {compression:>6}: write {:.0} MB/s, fetch {:.0} MB/s, stored {:.1} %",
        logical / 1e6 / written,
        logical / 1e6 / best,
        published.totals.stored_bytes as f64 * 100.0 / logical
    ));
    Ok(())
}

#[expect(clippy::print_stdout, reason = "an example talks to its user")]
fn show(line: &str) {
    println!("{line}");
}

fn random(seed: u64) -> Vec<u8> {
    let mut out = vec![0; MIB];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

/// Weights as a model has them: normal, 0.02, bfloat16.
fn weights(seed: u64) -> Vec<u8> {
    let noise = random(seed);
    let uniform = |bytes: &[u8]| f64::from(u16::from_le_bytes([bytes[0], bytes[1]])) / 65536.0 + 1e-6;
    let normal = |pair: &[u8]| {
        let (a, b) = (uniform(&pair[..2]), uniform(&pair[2..]));
        (-2.0 * a.min(1.0).ln()).sqrt() * (std::f64::consts::TAU * b).cos() * 0.02
    };
    let halves = noise
        .chunks_exact(4)
        .flat_map(|pair| ((normal(pair) as f32).to_bits() >> 16).to_le_bytes()[..2].to_vec());
    let mut out: Vec<u8> = halves.collect();
    let other: Vec<u8> = random(seed ^ 1 << 40)
        .chunks_exact(4)
        .flat_map(|pair| ((normal(pair) as f32).to_bits() >> 16).to_le_bytes()[..2].to_vec())
        .collect();
    out.extend(other);
    out
}

/// Something like an interpreter's heap: headers, reference counts, pointers into a narrow range, short strings.
fn heap(seed: u64) -> Vec<u8> {
    let noise = random(seed);
    let mut out = Vec::with_capacity(MIB + 64);
    for word in noise.chunks_exact(4) {
        let value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        out.extend_from_slice(&u64::from(value % 5 + 1).to_le_bytes());
        out.extend_from_slice(&(0x7f32_1000_0000u64 + u64::from(value % 97) * 408).to_le_bytes());
        out.extend_from_slice(&(0x7f32_2000_0000u64 + u64::from(value % (1 << 20)) * 16).to_le_bytes());
        out.extend_from_slice(if value % 3 == 0 { b"__init__" } else { b"\0\0\0\0\0\0\0\0" });
        if out.len() >= MIB {
            break;
        }
    }
    out.truncate(MIB);
    out
}
