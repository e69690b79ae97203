//! Codec 3: elements of two bytes split into two planes, each stored on its own.
//!
//! A weight in bf16 or fp16 is sign, exponent and mantissa. Mantissas are noise; exponents of one matrix lie close
//! together, but every second byte of noise hides that from a codec that looks for repetitions. Split, the plane of the
//! high bytes shrinks to two fifths and that of the low bytes stays as it is, for which no time is lost on the way back.
//!
//! ```text
//! | stored length of the low plane, u32 LE | low plane | high plane |
//! ```
//!
//! A plane whose stored length is half of the content is stored as it is; a shorter one is a zstd frame.

use std::cell::RefCell;
use std::io;

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{CParameter, Strategy};

/// Bytes of the length in front.
const LENGTH_BYTES: usize = 4;
/// A plane is compressed if a sixteenth of it is saved.
const SAVING_MIN_SHIFT: u32 = 4;

thread_local! {
    static ENCODER: RefCell<Option<Compressor<'static>>> = const { RefCell::new(None) };
    static DECODER: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
    /// The two planes on their way in and out.
    static PLANES: RefCell<[Vec<u8>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// Encodes content of an even length. `None` if zstd fails.
pub(super) fn encode(raw: &[u8]) -> Option<Vec<u8>> {
    let half = raw.len() / 2;
    PLANES.with_borrow_mut(|[low, high]| {
        low.resize(half, 0);
        high.resize(half, 0);
        split(raw, low, high);
        let mut out = vec![0; LENGTH_BYTES];
        append(&mut out, low)?;
        let stored = u32::try_from(out.len() - LENGTH_BYTES).expect("a chunk is shorter than 4 GiB");
        out[..LENGTH_BYTES].copy_from_slice(&stored.to_le_bytes());
        append(&mut out, high)?;
        Some(out)
    })
}

/// Appends a plane, compressed if that saves enough.
fn append(out: &mut Vec<u8>, plane: &[u8]) -> Option<()> {
    let packed = ENCODER.with_borrow_mut(|slot| {
        let encoder = match slot {
            Some(encoder) => encoder,
            None => slot.insert(encoder()?),
        };
        encoder.compress(plane).ok()
    })?;
    let pays = packed.len() + (plane.len() >> SAVING_MIN_SHIFT) <= plane.len();
    out.extend_from_slice(if pays { &packed } else { plane });
    Some(())
}

/// Finds next to no repetitions: those of exponents are chance, and each costs more time on the way back than the entropy
/// code that stands for the bytes instead.
fn encoder() -> Option<Compressor<'static>> {
    let mut encoder = Compressor::new(1).ok()?;
    encoder.set_parameter(CParameter::Strategy(Strategy::ZSTD_fast)).ok()?;
    encoder.set_parameter(CParameter::MinMatch(7)).ok()?;
    encoder.set_parameter(CParameter::HashLog(HASH_LOG)).ok()?;
    Some(encoder)
}

/// A table of so few places that what is found in it is hardly ever a match.
const HASH_LOG: u32 = 6;

/// Decodes into exactly `raw`; `Err(None)` if `stored` holds another length.
pub(super) fn decode(stored: &[u8], raw: &mut [u8]) -> Result<(), Option<io::Error>> {
    let half = raw.len() / 2;
    let (length, planes) = stored.split_first_chunk::<LENGTH_BYTES>().ok_or(None)?;
    let (low, high) = planes.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or(None)?;
    if !raw.len().is_multiple_of(2) {
        return Err(None);
    }
    PLANES.with_borrow_mut(|[low_plane, high_plane]| {
        let low = plane(low, half, low_plane)?;
        let high = plane(high, half, high_plane)?;
        join(low, high, raw);
        Ok(())
    })
}

/// The content of a plane: itself, or what it decodes to in `scratch`.
fn plane<'a>(stored: &'a [u8], half: usize, scratch: &'a mut Vec<u8>) -> Result<&'a [u8], Option<io::Error>> {
    if stored.len() == half {
        return Ok(stored);
    }
    if stored.len() > half {
        return Err(None);
    }
    scratch.resize(half, 0);
    let length = DECODER.with_borrow_mut(|slot| {
        let decoder = match slot {
            Some(decoder) => decoder,
            None => slot.insert(Decompressor::new()?),
        };
        decoder.decompress_to_buffer(stored, &mut scratch[..])
    })?;
    if length == half { Ok(scratch) } else { Err(None) }
}

// Both loops are plain, so that the compiler makes shuffles of them.

fn split(raw: &[u8], low: &mut [u8], high: &mut [u8]) {
    for ((pair, low), high) in raw.chunks_exact(2).zip(low).zip(high) {
        *low = pair[0];
        *high = pair[1];
    }
}

fn join(low: &[u8], high: &[u8], raw: &mut [u8]) {
    for ((pair, low), high) in raw.chunks_exact_mut(2).zip(low).zip(high) {
        pair[0] = *low;
        pair[1] = *high;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Exponents that lie close together over noise.
    fn weights(elements: usize) -> Vec<u8> {
        let mut noise = vec![0; elements * 2];
        blake3::Hasher::new().update(b"weights").finalize_xof().fill(&mut noise);
        for pair in noise.chunks_exact_mut(2) {
            pair[1] = 0x3a + (pair[1] & 0x81).count_ones() as u8 + pair[1] % 3;
        }
        noise
    }

    #[test]
    fn what_is_encoded_is_decoded_and_is_shorter() {
        for elements in [2048, 2048 * 64, 2048 * 512] {
            let raw = weights(elements);
            let stored = encode(&raw).unwrap();
            assert!(stored.len() * 4 < raw.len() * 3, "{} of {}", stored.len(), raw.len());
            let mut back = vec![0; raw.len()];
            decode(&stored, &mut back).unwrap();
            assert!(back == raw);
        }
    }

    #[test]
    fn noise_and_zeros_are_carried_too() {
        let mut noise = vec![0; 8192];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        for raw in [noise, vec![0; 8192], vec![]] {
            let stored = encode(&raw).unwrap();
            let mut back = vec![1; raw.len()];
            decode(&stored, &mut back).unwrap();
            assert!(back == raw);
        }
    }

    #[test]
    fn truncated_planes_and_lengths_that_lie_are_refused() {
        let raw = weights(4096);
        let stored = encode(&raw).unwrap();
        let mut back = vec![0; raw.len()];
        for cut in [0, 3, 4, 100, stored.len() / 2, stored.len() - 1] {
            assert!(decode(&stored[..cut], &mut back).is_err(), "cut at {cut}");
        }
        for length in [0u32, 1, 4095, 4097, u32::MAX] {
            let mut lying = stored.clone();
            lying[..4].copy_from_slice(&length.to_le_bytes());
            assert!(decode(&lying, &mut back).is_err(), "a low plane of {length}");
        }
        assert!(decode(&stored, &mut vec![0; raw.len() - 2]).is_err());
        assert!(decode(&stored, &mut vec![0; raw.len() + 2]).is_err());
        assert!(decode(&stored, &mut vec![0; raw.len() - 1]).is_err());
    }

    #[test]
    fn a_plane_that_is_a_bomb_is_stopped_at_its_length() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 19).unwrap();
        let low = vec![0u8; 8192];
        let stored = [&8192u32.to_le_bytes()[..], &low, &bomb].concat();
        assert!(decode(&stored, &mut vec![0; 16384]).is_err());
        let both = [&(bomb.len() as u32).to_le_bytes()[..], &bomb, &bomb].concat();
        assert!(decode(&both, &mut vec![0; 4 << 20]).is_err());
    }
}
