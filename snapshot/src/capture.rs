//! Copies a directory while the server is frozen: the root file system's delta and `/dev/shm`.

use std::io;
use std::path::Path;

use rewarm_container::tree::{self, Tree};

use crate::receive::Intake;

/// Takes all of a directory. Gives what it consists of; its content has gone on.
pub(crate) fn capture(name: &'static str, directory: &Path, intake: &mut Intake) -> io::Result<Tree> {
    let tree = tree::scan(directory).map_err(io::Error::other)?;
    intake.tree(name, &tree, &mut tree.read(directory))?;
    Ok(tree)
}

/// Bytes of content that a directory has at the moment. One that cannot be read shows when it is captured.
pub(crate) fn bytes(directory: &Path) -> u64 {
    tree::scan(directory).map_or(0, |tree| tree.stream_bytes())
}
