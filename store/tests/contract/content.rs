//! Content for tests: without structure, or compressible, the same for the same seed.

use bytes::Bytes;

/// `bytes` bytes without structure.
pub(crate) fn random(bytes: usize, seed: u64) -> Bytes {
    let mut out = vec![0; bytes];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out.into()
}

/// `bytes` bytes that shrink to about a third.
pub(crate) fn compressible(bytes: usize, seed: u64) -> Bytes {
    let noise = random(bytes / 4 + 1, seed);
    let mut out = Vec::with_capacity(bytes + 32);
    for (n, byte) in noise.iter().enumerate() {
        out.extend_from_slice(&[*byte, 0, (n % 7) as u8, 0]);
    }
    out.truncate(bytes);
    out.into()
}
