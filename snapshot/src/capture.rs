//! Copies a directory while the server is frozen: the root file system's delta and `/dev/shm`.

use std::io::{self, Read};
use std::path::Path;

use bytes::Bytes;
use rewarm_container::tree::{self, Tree};

/// Content is read in pieces of this size; each goes back to the system when it is uploaded.
const PIECE_BYTES: u64 = 4 << 20;

/// A directory as it was at the freeze.
#[derive(Debug)]
pub(crate) struct Captured {
    pub(crate) tree: Tree,
    pub(crate) content: Vec<Bytes>,
}

/// Reads all of a directory. `budget` is the memory that may be taken, and is reduced by what was.
pub(crate) fn capture(directory: &Path, budget: &mut u64) -> io::Result<Captured> {
    let tree = tree::scan(directory).map_err(io::Error::other)?;
    let bytes = tree.stream_bytes();
    *budget = budget.checked_sub(bytes).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::OutOfMemory,
            format!(
                "{} holds {bytes} bytes, more than the {budget} bytes that are free",
                directory.display()
            ),
        )
    })?;
    let mut reader = tree.read(directory);
    let mut content = Vec::new();
    let mut left = bytes;
    while left > 0 {
        let mut piece = vec![0; left.min(PIECE_BYTES) as usize];
        reader.read_exact(&mut piece)?;
        left -= piece.len() as u64;
        content.push(Bytes::from(piece));
    }
    drop(reader);
    Ok(Captured { tree, content })
}
