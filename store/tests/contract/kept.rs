//! A sink that keeps what it is given.

use std::io;
use std::sync::Mutex;

use rewarm_store::Sink;

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
