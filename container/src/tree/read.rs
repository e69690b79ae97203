//! The content stream of a tree.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::tree::scan::{join, open_file};
use crate::tree::{Extent, Tree};

impl Tree {
    /// The content of the files below `dir` as one stream of [`Tree::stream_bytes`] bytes. `dir` is what was scanned, and
    /// nobody has written to it since.
    #[must_use]
    pub fn read<'a>(&'a self, dir: &Path) -> Reader<'a> {
        Reader { tree: self, dir: dir.into(), entry: 0, extent: 0, done: 0, file: None }
    }
}

/// Reads the content stream of a tree from its directory.
#[derive(Debug)]
pub struct Reader<'a> {
    tree: &'a Tree,
    dir: PathBuf,
    entry: usize,
    extent: usize,
    /// Bytes of the present extent that were given out, padding included.
    done: u64,
    file: Option<File>,
}

impl Reader<'_> {
    fn current(&mut self) -> Option<Extent> {
        while let Some(entry) = self.tree.entries.get(self.entry) {
            if let Some(extent) = entry.extents.get(self.extent) {
                if self.done < extent.stream_bytes() {
                    return Some(*extent);
                }
                self.extent += 1;
                self.done = 0;
            } else {
                self.entry += 1;
                self.extent = 0;
                self.file = None;
            }
        }
        None
    }

    fn file(&mut self) -> io::Result<&File> {
        if self.file.is_none() {
            let full = join(&self.dir, &self.tree.entries[self.entry].path);
            self.file = Some(open_file(&full).map_err(io::Error::other)?);
        }
        Ok(self.file.as_ref().expect("set above"))
    }
}

impl Read for Reader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some(extent) = self.current() else { return Ok(0) };
        let clip = |left: u64| usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        let count = if self.done < extent.bytes {
            let count = clip(extent.bytes - self.done);
            let at = extent.offset + self.done;
            match self.file()?.read_at(&mut buf[..count], at)? {
                0 if count > 0 => {
                    let path = String::from_utf8_lossy(&self.tree.entries[self.entry].path).into_owned();
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        format!("{path} ends at {at}, but was longer when it was listed"),
                    ));
                }
                count => count,
            }
        } else {
            let count = clip(extent.stream_bytes() - self.done);
            buf[..count].fill(0);
            count
        };
        self.done += count as u64;
        Ok(count)
    }
}
