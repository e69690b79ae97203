//! The memory that takes a server's pages while it is frozen.
//!
//! Page allocation is what limits a receiver (on the development machine 1.0 GiB/s into fresh memory against 4 GiB/s into memory that was
//! touched before), so the expected amount is touched, in huge pages, before the freeze begins. Segments are separate
//! mappings so that each goes back to the system as soon as its last byte is uploaded.

use std::io;

use bytes::Bytes;
use memmap2::{Advice, Mmap, MmapMut};

/// Bytes of a segment: large enough that mapping it costs nothing, small enough that memory is given back early.
const SEGMENT_BYTES: usize = 64 << 20;

/// A place in the arena; never crosses a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Which segment.
    pub(crate) segment: usize,
    /// First byte in it.
    pub(crate) start: usize,
    /// Bytes.
    pub(crate) bytes: usize,
}

/// Memory that is being filled, in order.
pub(crate) struct Arena {
    segments: Vec<MmapMut>,
    /// The segment that is being filled, and how far.
    current: usize,
    used: usize,
    bytes_max: u64,
}

/// Memory that will not change any more.
pub(crate) struct Filled {
    segments: Vec<Bytes>,
}

impl Arena {
    /// Makes an arena, touches `expected` bytes of it, and lets it grow to `bytes_max` bytes.
    pub(crate) fn touched(expected: u64, bytes_max: u64) -> io::Result<Self> {
        let wanted = expected.min(bytes_max).div_ceil(SEGMENT_BYTES as u64);
        let mut arena = Self { segments: Vec::new(), current: 0, used: 0, bytes_max };
        for _ in 0..wanted {
            let mut segment = arena.map()?;
            // One byte a page is enough: the first of each huge page brings in the whole of it.
            segment.iter_mut().step_by(4096).for_each(|byte| *byte = 0);
            arena.segments.push(segment);
        }
        Ok(arena)
    }

    fn map(&self) -> io::Result<MmapMut> {
        let segment = MmapMut::map_anon(SEGMENT_BYTES)?;
        // Refused where the kernel has no transparent huge pages; the arena is only slower then.
        let _ = segment.advise(Advice::HugePage);
        Ok(segment)
    }

    /// Gives room for up to `bytes` bytes behind the last, at least one page, all in one segment.
    pub(crate) fn room(&mut self, bytes: u64) -> io::Result<(Extent, &mut [u8])> {
        if self.current < self.segments.len() && self.used == SEGMENT_BYTES {
            self.current += 1;
            self.used = 0;
        }
        if self.current == self.segments.len() {
            let taken = (self.segments.len() * SEGMENT_BYTES) as u64;
            if taken >= self.bytes_max {
                return Err(io::Error::new(
                    io::ErrorKind::OutOfMemory,
                    format!("the server has more pages than the {} bytes set aside for them", self.bytes_max),
                ));
            }
            let segment = self.map()?;
            self.segments.push(segment);
        }
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX).min(SEGMENT_BYTES - self.used);
        let extent = Extent { segment: self.current, start: self.used, bytes };
        self.used += bytes;
        Ok((extent, &mut self.segments[extent.segment][extent.start..extent.start + bytes]))
    }

    /// Ends filling: the memory can be shared from here on.
    pub(crate) fn finish(self) -> io::Result<Filled> {
        let segments = self.segments.into_iter().map(|segment| {
            let shared: Mmap = segment.make_read_only()?;
            Ok(Bytes::from_owner(shared))
        });
        Ok(Filled { segments: segments.collect::<io::Result<_>>()? })
    }
}

impl Filled {
    /// The bytes of an extent; keeps its segment alive.
    pub(crate) fn slice(&self, extent: Extent) -> Bytes {
        self.segments[extent.segment].slice(extent.start..extent.start + extent.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_never_crosses_a_segment_and_the_bytes_come_back() {
        let mut arena = Arena::touched(0, 2 * SEGMENT_BYTES as u64).expect("memory");
        let (first, bytes) = arena.room(SEGMENT_BYTES as u64 - 4096).expect("room");
        bytes[0] = 7;
        let (second, bytes) = arena.room(8192).expect("room");
        assert_eq!((second.segment, second.bytes), (0, 4096));
        bytes.fill(9);
        let (third, _) = arena.room(4096).expect("room");
        assert_eq!((third.segment, third.start), (1, 0));
        let filled = arena.finish().expect("read only");
        assert_eq!(filled.slice(first)[0], 7);
        assert!(filled.slice(second).iter().all(|byte| *byte == 9));
    }

    #[test]
    fn an_arena_does_not_grow_beyond_its_limit() {
        let mut arena = Arena::touched(SEGMENT_BYTES as u64, SEGMENT_BYTES as u64).expect("memory");
        arena.room(SEGMENT_BYTES as u64).expect("room");
        let error = arena.room(4096).expect_err("no more room");
        assert_eq!(error.kind(), io::ErrorKind::OutOfMemory);
    }
}
