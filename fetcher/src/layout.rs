//! Where the regions of a snapshot lie in its decoded stream. Both sides compute it from the lengths of the regions.

/// Unit in which content becomes readable, and what a pager copies at a time.
pub const BLOCK_BYTES: u64 = 512 << 10;

/// Longest stream, the limit of the store's format for one snapshot, with room for the gaps.
const STREAM_BYTES_LIMIT: u64 = 1 << 47;

/// The regions of a stream; each begins at a block.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    regions: Vec<(u64, u64)>,
    bytes: u64,
}

impl Layout {
    /// The layout of regions of these lengths, in bytes; `None` if they are longer than any snapshot can be.
    #[must_use]
    pub fn of(lengths: &[u64]) -> Option<Self> {
        let mut layout = Self::default();
        for &length in lengths {
            layout.regions.push((layout.bytes, length));
            let end = layout.bytes.checked_add(length).filter(|end| *end <= STREAM_BYTES_LIMIT)?;
            layout.bytes = end.next_multiple_of(BLOCK_BYTES);
        }
        Some(layout)
    }

    /// The numbers of the blocks in which something lies, in order.
    pub fn blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.regions()
            .iter()
            .flat_map(|(base, bytes)| base / BLOCK_BYTES..(base + bytes).div_ceil(BLOCK_BYTES))
    }

    /// Where each region begins and how many bytes it has.
    #[must_use]
    pub fn regions(&self) -> &[(u64, u64)] {
        &self.regions
    }

    /// Where a region begins.
    ///
    /// # Panics
    /// If there is no such region.
    #[must_use]
    pub fn base(&self, region: usize) -> u64 {
        self.regions[region].0
    }

    /// Length of the stream, gaps included.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of content, without the gaps.
    #[must_use]
    pub fn content_bytes(&self) -> u64 {
        self.regions.iter().map(|(_, length)| length).sum()
    }

    /// The region that holds an offset of the stream, with the offset in it; `None` in a gap or beyond the end.
    #[must_use]
    pub fn locate(&self, offset: u64) -> Option<(usize, u64)> {
        // Of regions that begin at the same place all but the last are empty.
        let region = self.regions.partition_point(|(base, _)| *base <= offset).checked_sub(1)?;
        let (base, length) = self.regions[region];
        (offset - base < length).then_some((region, offset - base))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_region_begins_at_a_block() {
        let layout = Layout::of(&[1, 0, BLOCK_BYTES, BLOCK_BYTES + 1, 5]).expect("short");
        let bases: Vec<u64> = layout.regions().iter().map(|(base, _)| base / BLOCK_BYTES).collect();
        assert_eq!(bases, [0, 1, 1, 2, 4]);
        assert_eq!((layout.bytes(), layout.content_bytes()), (5 * BLOCK_BYTES, 2 * BLOCK_BYTES + 7));
        assert_eq!(layout.locate(0), Some((0, 0)));
        assert_eq!(layout.locate(1), None);
        assert_eq!(layout.locate(BLOCK_BYTES), Some((2, 0)));
        assert_eq!(layout.locate(4 * BLOCK_BYTES + 4), Some((4, 4)));
        assert_eq!(layout.locate(5 * BLOCK_BYTES), None);
    }

    #[test]
    fn lengths_beyond_reason_are_refused() {
        assert_eq!(Layout::of(&[u64::MAX, 1]), None);
        assert_eq!(Layout::of(&[1 << 46, 1 << 46, 1]), None);
    }
}
