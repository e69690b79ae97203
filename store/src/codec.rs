//! How the content of a chunk is stored, and the choice of how.
//!
//! On the way back every byte is hashed (about 4.6 GB/s a core) and decoded, so a codec must save more time on the way
//! than it costs there: content that a sample finds barely compressible is stored raw. What it saves depends on how fast
//! the store answers, so weights are split into planes for buckets and stored raw in folders.

mod planes;

use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;
use std::io;
use std::str::FromStr;

use bytes::Bytes;

use crate::error::{Error, Syntax};

/// What the user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// A sample of each chunk decides between none, LZ4, zstd at level 1 and planes, for the rate of the store.
    #[default]
    Auto,
    /// Planes, for every chunk that becomes shorter by them.
    Planes,
    /// zstd at this level, 1 to 19, for every chunk that becomes shorter by it.
    Zstd(i32),
    /// Every chunk is stored raw.
    None,
}

impl FromStr for Compression {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let expected = || Error::Syntax {
            text: text.to_owned(),
            kind: "compression",
            source: Syntax::Form { expected: "auto, planes, zstd:N with N from 1 to 19, or none" },
        };
        match text.split_once(':') {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "planes" => Ok(Self::Planes),
            None if text == "none" => Ok(Self::None),
            Some(("zstd", level)) => match level.parse() {
                Ok(level @ 1..=19) => Ok(Self::Zstd(level)),
                _ => Err(expected()),
            },
            _ => Err(expected()),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Planes => f.write_str("planes"),
            Self::Zstd(level) => write!(f, "zstd:{level}"),
            Self::None => f.write_str("none"),
        }
    }
}

/// How a chunk is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codec {
    None = 0,
    Lz4 = 1,
    Zstd = 2,
    Planes = 3,
}

impl Codec {
    pub(crate) fn from_id(id: u8) -> Option<Self> {
        match id {
            0 => Some(Self::None),
            1 => Some(Self::Lz4),
            2 => Some(Self::Zstd),
            3 => Some(Self::Planes),
            _ => None,
        }
    }

    pub(crate) fn id(self) -> u8 {
        self as u8
    }
}

/// A compressed chunk must save at least a sixteenth, or it is stored raw: below that decoding costs more than it saves.
const SAVING_MIN_SHIFT: u32 = 4;
/// Bytes of each of the three samples.
const SAMPLE_BYTES: usize = 4096;
/// Percent of its length that an LZ4 sample must fall to before anything but raw is considered. Weights in bf16 do not
/// (100 %): zstd would take 22 % off them and fetch at a third of the speed.
const LZ4_WORTH_PERCENT: usize = 85;

thread_local! {
    /// Making a zstd context costs as much as compressing a small chunk.
    static ENCODER: RefCell<Option<(i32, zstd::bulk::Compressor<'static>)>> = const { RefCell::new(None) };
    static DECODER: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Content that is read at this rate, in bytes a second over all cores, where nobody says otherwise: from a folder as fast
/// as memory is, from a bucket as fast as 10 Gbit/s are.
pub(crate) const FOLDER_RATE: u64 = u64::MAX;
pub(crate) const BUCKET_RATE: u64 = 1_250_000_000;

/// Encodes the concatenation of `parts` for a store that is read at `rate` bytes a second. `None` means: store it raw.
pub(crate) fn encode(compression: Compression, rate: u64, parts: &[Bytes]) -> (Codec, Option<Bytes>) {
    let (codec, level) = match compression {
        Compression::None => (Codec::None, 0),
        Compression::Planes => (Codec::Planes, 0),
        Compression::Zstd(level) => (Codec::Zstd, level),
        Compression::Auto => (choose(parts, rate), 1),
    };
    if codec == Codec::None {
        return (Codec::None, None);
    }
    let raw = joined(parts);
    let stored = match codec {
        Codec::None => None,
        Codec::Lz4 => Some(lz4_flex::block::compress(&raw)),
        Codec::Zstd => compress_zstd(level, &raw),
        Codec::Planes => planes::encode(&raw),
    };
    match stored {
        Some(stored) if stored.len() + (raw.len() >> SAVING_MIN_SHIFT) <= raw.len() => {
            (codec, Some(Bytes::from(stored)))
        }
        _ => (Codec::None, None),
    }
}

fn joined(parts: &[Bytes]) -> Cow<'_, [u8]> {
    match parts {
        [one] => Cow::Borrowed(one),
        many => Cow::Owned(many.concat()),
    }
}

fn compress_zstd(level: i32, raw: &[u8]) -> Option<Vec<u8>> {
    ENCODER.with_borrow_mut(|slot| {
        if slot.as_ref().is_none_or(|(held, _)| *held != level) {
            *slot = Some((level, zstd::bulk::Compressor::new(level).ok()?));
        }
        slot.as_mut()?.1.compress(raw).ok()
    })
}

/// Bytes of content that one core decodes in a second (docs/snapshot-format.md says how it was measured).
const PLANES_DECODE_RATE: f64 = 4.0e9;
const ZSTD_DECODE_RATE: f64 = 1.4e9;
const LZ4_DECODE_RATE: f64 = 2.8e9;

/// More than half cannot be saved of what LZ4 finds nothing in: the low bytes are noise. So folders need no sample.
const PLANES_SAVE_MAX: f64 = 0.5;

/// Whether content of which `saved` (0 to 1) need not be fetched comes sooner, although a core decodes each of its bytes in
/// `seconds` more: what the network saves must be more than what the cores pay.
fn pays(saved: f64, rate: u64, seconds: f64) -> bool {
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    saved / rate as f64 > seconds / cores
}

fn planes_pay(saved: f64, rate: u64) -> bool {
    pays(saved, rate, 1.0 / PLANES_DECODE_RATE)
}

/// The same for zstd, in comparison with LZ4.
fn zstd_pays(saved: f64, rate: u64) -> bool {
    pays(saved, rate, 1.0 / ZSTD_DECODE_RATE - 1.0 / LZ4_DECODE_RATE)
}

/// Chooses by what three samples shrink to.
fn choose(parts: &[Bytes], rate: u64) -> Codec {
    let total: usize = parts.iter().map(Bytes::len).sum();
    let samples = [1, 2, 3].map(|quarter| page_at(parts, total / 4 * quarter)).concat();
    let lz4 = lz4_flex::block::compress(&samples).len();
    if lz4 * 100 > samples.len() * LZ4_WORTH_PERCENT {
        if !planes_pay(PLANES_SAVE_MAX, rate) {
            return Codec::None;
        }
        let split = planes::encode(&samples).map_or(samples.len(), |split| split.len());
        let saved = 1.0 - split as f64 / samples.len() as f64;
        return if planes_pay(saved, rate) { Codec::Planes } else { Codec::None };
    }
    let share = |bytes: usize| bytes as f64 / samples.len() as f64;
    // Even nothing at all would not be fetched soon enough to be worth a sample.
    if !zstd_pays(share(lz4), rate) {
        return Codec::Lz4;
    }
    match compress_zstd(1, &samples) {
        Some(zstd) if zstd_pays(share(lz4) - share(zstd.len()), rate) => Codec::Zstd,
        _ => Codec::Lz4,
    }
}

/// The page of `parts` that holds the byte at `offset`; parts are multiples of a page.
fn page_at(parts: &[Bytes], offset: usize) -> &[u8] {
    let mut offset = offset / SAMPLE_BYTES * SAMPLE_BYTES;
    for part in parts {
        if offset + SAMPLE_BYTES <= part.len() {
            return &part[offset..offset + SAMPLE_BYTES];
        }
        offset -= part.len();
    }
    &[]
}

/// Decodes `stored` into exactly `raw.len()` bytes. Never writes beyond them, whatever `stored` claims.
pub(crate) fn decode(codec: Codec, stored: &[u8], raw: &mut [u8]) -> Result<(), Option<io::Error>> {
    let length = match codec {
        Codec::None if stored.len() == raw.len() => {
            raw.copy_from_slice(stored);
            raw.len()
        }
        Codec::None => stored.len(),
        Codec::Lz4 => lz4_flex::block::decompress_into(stored, raw)
            .map_err(|error| Some(io::Error::new(io::ErrorKind::InvalidData, error)))?,
        Codec::Planes => {
            planes::decode(stored, raw)?;
            raw.len()
        }
        Codec::Zstd => DECODER.with_borrow_mut(|slot| {
            let decoder = match slot {
                Some(decoder) => decoder,
                None => slot.insert(zstd::bulk::Decompressor::new()?),
            };
            decoder.decompress_to_buffer(stored, raw)
        })?,
    };
    if length == raw.len() { Ok(()) } else { Err(None) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    fn noise(bytes: usize) -> Vec<u8> {
        let mut noise = vec![0; bytes];
        blake3::Hasher::new().update(b"noise").finalize_xof().fill(&mut noise);
        noise
    }

    /// Normally distributed weights in bf16, as of a layer: the high bytes lie close together over noise.
    fn weights(bytes: usize) -> Vec<u8> {
        let unit = |bytes: &[u8]| f32::from(u16::from_le_bytes([bytes[0], bytes[1]])) / 65_536.0 - 0.5;
        let of = |dice: &[u8]| dice.chunks_exact(2).map(unit).sum::<f32>() * 0.02;
        let weight = |dice: &[u8]| ((of(dice).to_bits() >> 16) as u16).to_le_bytes();
        noise(bytes * 12).chunks_exact(24).flat_map(weight).collect()
    }

    /// Objects of an interpreter: counts, pointers into one arena, short texts.
    fn heap(bytes: usize) -> Vec<u8> {
        let object = |dice: &[u8]| {
            let place = u64::from(u16::from_le_bytes([dice[0], dice[1]]));
            let (count, kind) =
                (u64::from(dice[2] % 4) + 1, 0x5581_2233_4400 + u64::from(dice[3] % 8) * 0x1a0);
            [count, kind, 0x7f12_3400_0000 + place * 16, u64::from(dice[2] >> 4)]
        };
        let objects = noise(bytes / 8);
        objects.chunks_exact(4).flat_map(|dice| object(dice).map(u64::to_le_bytes).concat()).collect()
    }

    fn chosen(content: Vec<u8>, rate: u64) -> Codec {
        let bytes = Bytes::from(content);
        let (codec, stored) = encode(Compression::Auto, rate, std::slice::from_ref(&bytes));
        assert_eq!(codec == Codec::None, stored.is_none(), "{codec:?}");
        codec
    }

    #[test]
    fn what_a_codec_saves_is_weighed_against_the_rate_of_the_store() {
        const SLOW: u64 = 100_000_000;
        for (rate, of_weights, of_heap) in [
            (FOLDER_RATE, Codec::None, Codec::Lz4),
            (BUCKET_RATE, Codec::Planes, Codec::Lz4),
            (SLOW, Codec::Planes, Codec::Zstd),
        ] {
            assert_eq!(chosen(weights(MIB), rate), of_weights, "weights at {rate}");
            assert_eq!(chosen(heap(MIB), rate), of_heap, "a heap at {rate}");
            assert_eq!(chosen(noise(MIB), rate), Codec::None, "noise at {rate}");
        }
    }

    #[test]
    fn what_was_asked_for_is_done_where_it_saves_anything() {
        for (asked, codec) in [
            (Compression::None, Codec::None),
            (Compression::Planes, Codec::Planes),
            (Compression::Zstd(3), Codec::Zstd),
        ] {
            let weights = Bytes::from(weights(MIB));
            assert_eq!(encode(asked, FOLDER_RATE, &[weights]).0, codec);
            assert_eq!(encode(asked, FOLDER_RATE, &[noise(MIB).into()]).0, Codec::None, "{asked}");
        }
    }
}
