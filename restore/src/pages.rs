//! Where the bytes of a content stream go in the pages image that CRIU reads.
//!
//! CRIU reads `pages-N.img` front to back, in the order of the pagemap's entries that are present. The content stream has
//! the same order but lacks zero pages. Zero pages of anonymous memory are left out of the pagemap: memory that was never
//! touched is zero. Zero pages elsewhere (a private page of a file that was overwritten with zeros) must be present, or
//! the file's own content would show through: they become a hole in the image.

use rewarm_criu::layout::{Layout, PAGE_BYTES, Run};

/// Which pages CRIU reads itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reads {
    /// All of them.
    All,
    /// Only those that must be there before the task runs; the pager fills the rest.
    NotLazy,
    /// None: the pager fills all of them.
    Nothing,
}

/// A run of the pagemap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// First address or offset.
    pub(crate) vaddr: u64,
    /// Pages of 4096 bytes.
    pub(crate) pages: u64,
    /// May be filled later.
    pub(crate) lazy: bool,
    /// Its bytes lie in the pages image.
    pub(crate) present: bool,
}

/// A part of the content stream that lies in one piece in the pages image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    stream: u64,
    file: u64,
    bytes: u64,
}

/// The pagemap of an object and the way from its content stream into its pages image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PagesImage {
    entries: Vec<Entry>,
    pieces: Vec<Piece>,
    file_bytes: u64,
}

impl PagesImage {
    /// Plans the image of an object.
    pub(crate) fn plan(layout: &Layout, reads: Reads) -> Self {
        let mut image = Self::default();
        for (stream, run) in layout.placed() {
            image.add(stream, run, reads);
        }
        image
    }

    fn add(&mut self, stream: u64, run: Run, reads: Reads) {
        if reads == Reads::Nothing || (run.zero && run.lazy) {
            return;
        }
        let present = reads == Reads::All || !run.lazy;
        self.push_entry(Entry { vaddr: run.vaddr, pages: run.pages, lazy: run.lazy, present });
        if !present {
            return;
        }
        let bytes = run.pages * PAGE_BYTES;
        if !run.zero {
            match self.pieces.last_mut() {
                Some(last)
                    if last.stream + last.bytes == stream && last.file + last.bytes == self.file_bytes =>
                {
                    last.bytes += bytes;
                }
                _ => self.pieces.push(Piece { stream, file: self.file_bytes, bytes }),
            }
        }
        self.file_bytes += bytes;
    }

    fn push_entry(&mut self, entry: Entry) {
        match self.entries.last_mut() {
            Some(last)
                if last.vaddr + last.pages * PAGE_BYTES == entry.vaddr
                    && (last.lazy, last.present) == (entry.lazy, entry.present) =>
            {
                last.pages += entry.pages;
            }
            _ => self.entries.push(entry),
        }
    }

    /// The pagemap's runs by address.
    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Length of the pages image, holes included.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// The parts of the content stream that go into the image, in order.
    pub(crate) fn wanted(&self) -> impl Iterator<Item = std::ops::Range<u64>> + '_ {
        self.pieces.iter().map(|piece| piece.stream..piece.stream + piece.bytes)
    }

    /// Says where a part of the content stream goes: `write` gets the offset in the image and the bytes, for each piece.
    /// What the image does not take is passed over.
    ///
    /// # Errors
    /// What `write` returns.
    pub(crate) fn place<E>(
        &self,
        stream: u64,
        bytes: &[u8],
        mut write: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let end = stream + bytes.len() as u64;
        let first = self.pieces.partition_point(|piece| piece.stream + piece.bytes <= stream);
        for piece in self.pieces[first..].iter().take_while(|piece| piece.stream < end) {
            let from = piece.stream.max(stream);
            let to = (piece.stream + piece.bytes).min(end);
            let slice = &bytes[(from - stream) as usize..(to - stream) as usize];
            write(piece.file + (from - piece.stream), slice)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        let mut layout = Layout::new();
        let mut push =
            |page: u64, pages, zero, lazy| layout.push(Run { vaddr: page * PAGE_BYTES, pages, zero, lazy });
        push(0, 2, false, true);
        push(2, 3, true, true);
        push(5, 1, false, true);
        push(10, 1, false, false);
        push(11, 2, true, false);
        push(13, 1, false, false);
        layout
    }

    fn fill(image: &PagesImage, stream: &[u8], step: usize) -> Vec<u8> {
        let mut file = vec![0; image.file_bytes() as usize];
        for (index, part) in stream.chunks(step).enumerate() {
            image
                .place((index * step) as u64, part, |offset, bytes| {
                    file[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
                    Ok::<(), ()>(())
                })
                .expect("copied");
        }
        file
    }

    #[test]
    fn an_image_that_criu_reads_whole_has_holes_only_where_zeros_must_be_present() {
        let image = PagesImage::plan(&layout(), Reads::All);
        let pages: Vec<(u64, u64)> =
            image.entries().iter().map(|e| (e.vaddr / PAGE_BYTES, e.pages)).collect();
        assert_eq!(pages, [(0, 2), (5, 1), (10, 4)]);
        assert_eq!(image.file_bytes(), 7 * PAGE_BYTES);
        let stream: Vec<u8> = (1..=5u8).flat_map(|page| [page; PAGE_BYTES as usize]).collect();
        for step in [4096, 5000, 100_000] {
            let file = fill(&image, &stream, step);
            let firsts: Vec<u8> = file.chunks(PAGE_BYTES as usize).map(|page| page[0]).collect();
            assert_eq!(firsts, [1, 2, 3, 4, 0, 0, 5], "step {step}");
        }
    }

    #[test]
    fn an_image_for_a_lazy_restore_holds_only_what_criu_insists_on() {
        let image = PagesImage::plan(&layout(), Reads::NotLazy);
        assert_eq!(
            image.entries().iter().map(|e| (e.lazy, e.present)).collect::<Vec<_>>(),
            [(true, false), (true, false), (false, true)]
        );
        let wanted: Vec<_> =
            image.wanted().map(|part| part.start / PAGE_BYTES..part.end / PAGE_BYTES).collect();
        assert_eq!(wanted, [3..4, 4..5]);
        let stream: Vec<u8> = (1..=5u8).flat_map(|page| [page; PAGE_BYTES as usize]).collect();
        let firsts: Vec<u8> =
            fill(&image, &stream, 4096).chunks(PAGE_BYTES as usize).map(|page| page[0]).collect();
        assert_eq!(firsts, [4, 0, 0, 5]);
    }
}
