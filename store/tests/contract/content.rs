//! Content for tests: without structure, or compressible, the same for the same seed.

use std::io;
use std::sync::Mutex;

use bytes::Bytes;
use rewarm_store::Sink;

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

/// Keeps what it is given, and insists that each byte comes once.
pub(crate) struct Kept {
    content: Mutex<(Vec<u8>, Vec<bool>)>,
}

impl Kept {
    pub(crate) fn new(bytes: u64) -> Self {
        Self { content: Mutex::new((vec![0; bytes as usize], vec![false; bytes as usize / 4096])) }
    }

    pub(crate) fn into_bytes(self: std::sync::Arc<Self>) -> Vec<u8> {
        let mut content = self.content.lock().unwrap();
        assert!(content.1.iter().all(|page| *page), "a page was never put");
        std::mem::take(&mut content.0)
    }
}

impl Sink for Kept {
    fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let offset = offset as usize;
        let mut content = self.content.lock().unwrap();
        content.0[offset..offset + bytes.len()].copy_from_slice(bytes);
        for page in &mut content.1[offset / 4096..(offset + bytes.len()) / 4096] {
            assert!(!*page, "a page was put twice");
            *page = true;
        }
        Ok(())
    }
}
