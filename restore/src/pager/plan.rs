//! What has to be put where, before anything moves: a task's mappings and its content stream joined and checked.
//!
//! The content stream of a task is the concatenation of its stored pages in order of address; zero pages are not in
//! it. CRIU's runs may span neighbouring mappings, one UFFDIO_COPY may not (`ENOENT`), so runs are cut at the borders
//! of mappings here.

use std::ops::Range;

use super::pending::Piece;

/// Size of a page, which is all that userfaultfd deals in.
pub const PAGE: u64 = 4096;

/// Mappings and runs of one task together. A server with 65,000 mappings and a heap with holes at every 16th page
/// stays well below; a forged image that names 10^9 is refused before memory is taken for it.
pub const ENTRIES_MAX: usize = 8 << 20;

/// What fork does to a mapping (MADV_WIPEONFORK, MADV_DONTFORK).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AtFork {
    /// The child gets the content.
    #[default]
    Copied,
    /// The child gets zeros.
    Wiped,
    /// The child does not have the mapping.
    Absent,
}

/// One mapping that CRIU registers for missing pages: private, anonymous, not locked, not huge-page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// First byte.
    pub start: u64,
    /// First byte after it.
    pub end: u64,
    /// Whether the task may write it; `process_vm_writev` reaches only such.
    pub writable: bool,
    /// What fork does to it.
    pub at_fork: AtFork,
}

/// Stored pages that are contiguous in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First address.
    pub vaddr: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Place in the content stream, in bytes.
    pub offset: u64,
}

/// Why mappings and runs do not make a plan. Addresses and offsets are in bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Defect {
    /// The numbers are out of all proportion.
    #[error("{entries} mappings and runs, at most {ENTRIES_MAX} expected")]
    TooMany {
        /// Seen.
        entries: usize,
    },
    /// A mapping is empty, not aligned or below the end of the one before.
    #[error("mapping {start:#x}-{end:#x} is empty, not page-aligned or out of order")]
    Mapping {
        /// First byte.
        start: u64,
        /// First byte after it.
        end: u64,
    },
    /// A run is empty, not aligned, out of order or beyond the stream.
    #[error(
        "run of {bytes} bytes at {vaddr:#x}, stream offset {offset}, is empty, not page-aligned, out of order or beyond the stream's {stream} bytes"
    )]
    Run {
        /// First address.
        vaddr: u64,
        /// Length.
        bytes: u64,
        /// Place in the stream.
        offset: u64,
        /// Length of the stream.
        stream: u64,
    },
    /// A run reaches where nothing is mapped or where CRIU registers nothing.
    #[error("run reaches {vaddr:#x}, which lies in no mapping that can be filled")]
    Outside {
        /// The first such address.
        vaddr: u64,
    },
}

/// The plan of one task.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    mappings: Vec<Mapping>,
    pieces: Vec<Piece>,
}

impl Plan {
    /// Joins mappings (in order of address) and runs (in order of address) of a task whose content stream has `stream` bytes.
    ///
    /// # Errors
    /// The first thing that does not fit.
    pub fn new(mappings: Vec<Mapping>, runs: &[Run], stream: u64) -> Result<Plan, Defect> {
        let entries = mappings.len().saturating_add(runs.len());
        if entries > ENTRIES_MAX {
            return Err(Defect::TooMany { entries });
        }
        let mut floor = 0;
        for &Mapping { start, end, .. } in &mappings {
            if start < floor || start >= end || !start.is_multiple_of(PAGE) || !end.is_multiple_of(PAGE) {
                return Err(Defect::Mapping { start, end });
            }
            floor = end;
        }
        let mut plan = Plan { mappings, pieces: Vec::with_capacity(runs.len()) };
        let (mut floor, mut place) = (0, 0);
        for run in runs {
            check(run, floor, place, stream)?;
            floor = run.vaddr + run.bytes;
            place = run.offset + run.bytes;
            plan.cut(run)?;
        }
        Ok(plan)
    }

    /// Bytes that have to be filled.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.length).sum()
    }

    /// The mappings, lowest first.
    #[must_use]
    pub fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// What to fill, lowest address first, each piece inside one mapping.
    #[must_use]
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The pieces cut into steps that cross no multiple of `step` bytes of address space, lowest first.
    ///
    /// # Panics
    /// If `step` is not a multiple of the page size.
    pub fn steps(&self, step: u64) -> impl Iterator<Item = Piece> + '_ {
        assert!(step > 0 && step.is_multiple_of(PAGE), "step of {step} bytes, multiple of {PAGE} expected");
        self.pieces.iter().flat_map(move |&piece| Steps { rest: piece, step })
    }

    /// The mappings that are worth the huge-page mark (`madv |= 1 << 14` in CRIU's mm image) before an eager fill: writable, at least 2 MiB, nine tenths stored.
    ///
    /// A sparse mapping is left alone: each of its huge pages would take 2 MiB for a few pages of content.
    #[must_use]
    pub fn huge(&self) -> Vec<Range<u64>> {
        const HUGE: u64 = 2 << 20;
        let mut pieces = self.pieces.iter().peekable();
        let mut ranges = Vec::new();
        for mapping in &self.mappings {
            let mut stored = 0;
            while let Some(piece) = pieces.next_if(|piece| piece.vaddr < mapping.end) {
                stored += piece.length;
            }
            let length = mapping.end - mapping.start;
            if mapping.writable && length >= HUGE && stored / 9 >= length / 10 {
                ranges.push(mapping.start..mapping.end);
            }
        }
        ranges
    }

    fn cut(&mut self, run: &Run) -> Result<(), Defect> {
        let mut rest = Piece { vaddr: run.vaddr, offset: run.offset, length: run.bytes };
        let mut index = self.mappings.partition_point(|mapping| mapping.end <= rest.vaddr);
        while rest.length > 0 {
            let inside = self.mappings.get(index).filter(|mapping| mapping.start <= rest.vaddr);
            let Some(mapping) = inside else {
                return Err(Defect::Outside { vaddr: rest.vaddr });
            };
            let length = rest.length.min(mapping.end - rest.vaddr);
            self.pieces.push(Piece { length, ..rest });
            rest = Piece {
                vaddr: rest.vaddr + length,
                offset: rest.offset + length,
                length: rest.length - length,
            };
            index += 1;
        }
        Ok(())
    }
}

fn check(run: &Run, floor: u64, place: u64, stream: u64) -> Result<(), Defect> {
    let aligned = [run.vaddr, run.bytes, run.offset].iter().all(|value| value.is_multiple_of(PAGE));
    let in_stream = run.offset.checked_add(run.bytes).is_some_and(|end| end <= stream);
    let in_memory = run.vaddr.checked_add(run.bytes).is_some();
    if aligned && in_stream && in_memory && run.bytes > 0 && run.vaddr >= floor && run.offset >= place {
        return Ok(());
    }
    Err(Defect::Run { vaddr: run.vaddr, bytes: run.bytes, offset: run.offset, stream })
}

struct Steps {
    rest: Piece,
    step: u64,
}

impl Iterator for Steps {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        if self.rest.length == 0 {
            return None;
        }
        let length = self.rest.length.min(self.step - self.rest.vaddr % self.step);
        let piece = Piece { length, ..self.rest };
        self.rest.vaddr += length;
        self.rest.offset += length;
        self.rest.length -= length;
        Some(piece)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mapping(start: u64, end: u64) -> Mapping {
        Mapping { start: start * PAGE, end: end * PAGE, writable: true, at_fork: AtFork::Copied }
    }

    fn run(vaddr: u64, pages: u64, offset: u64) -> Run {
        Run { vaddr: vaddr * PAGE, bytes: pages * PAGE, offset: offset * PAGE }
    }

    #[test]
    fn a_run_across_two_mappings_is_cut() {
        let plan = Plan::new(vec![mapping(10, 20), mapping(20, 30)], &[run(18, 4, 0)], 4 * PAGE);
        let plan = plan.expect("a plan");
        let cut: Vec<(u64, u64)> =
            plan.pieces().iter().map(|piece| (piece.vaddr / PAGE, piece.offset / PAGE)).collect();
        assert_eq!(cut, [(18, 0), (20, 2)]);
        assert_eq!(plan.bytes(), 4 * PAGE);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mappings = || vec![mapping(10, 20), mapping(25, 30)];
        let all = 100 * PAGE;
        let hole = Plan::new(mappings(), &[run(18, 4, 0)], all);
        assert_eq!(hole, Err(Defect::Outside { vaddr: 20 * PAGE }));
        assert_eq!(Plan::new(mappings(), &[run(40, 1, 0)], all), Err(Defect::Outside { vaddr: 40 * PAGE }));
        for runs in [
            vec![run(10, 2, 0), run(11, 1, 2)],
            vec![run(10, 2, 0), run(12, 1, 1)],
            vec![run(10, 0, 0)],
            vec![run(10, 2, 99)],
            vec![Run { vaddr: u64::MAX - PAGE + 1, bytes: PAGE, offset: 0 }],
            vec![Run { vaddr: 10 * PAGE + 1, bytes: PAGE, offset: 0 }],
        ] {
            assert!(matches!(Plan::new(mappings(), &runs, all), Err(Defect::Run { .. })), "{runs:?}");
        }
        let crossed = Plan::new(vec![mapping(10, 20), mapping(19, 30)], &[], 0);
        assert!(matches!(crossed, Err(Defect::Mapping { .. })));
    }

    #[test]
    fn dense_writable_mappings_are_worth_huge_pages() {
        let mut locked = mapping(2048, 3072);
        locked.writable = false;
        let mappings = vec![mapping(0, 1024), mapping(1024, 2048), locked];
        let runs = [run(0, 1000, 0), run(1024, 500, 1000), run(2048, 1024, 1500)];
        let plan = Plan::new(mappings, &runs, 3000 * PAGE).expect("a plan");
        assert_eq!(plan.huge().first(), Some(&(0..1024 * PAGE)));
        assert_eq!(plan.huge().len(), 1);
    }

    proptest! {
        #[test]
        fn steps_cover_every_stored_page_once(
            lengths in prop::collection::vec((1_u64..40, 0_u64..5), 1..8),
            stored in prop::collection::vec((0_u64..9, 1_u64..50), 0..30),
            step in 1_u64..20,
        ) {
            let (mut at, mut mappings) = (1, Vec::new());
            for (length, gap) in lengths {
                mappings.push(mapping(at, at + length));
                at += length + gap;
            }
            // Runs over pages that are mapped, cut wherever a page is not.
            let mut pages: Vec<u64> = Vec::new();
            let mut cursor = 1;
            for (skip, length) in stored {
                pages.extend(cursor + skip..cursor + skip + length);
                cursor += skip + length;
            }
            pages.retain(|page| mappings.iter().any(|m| (m.start / PAGE..m.end / PAGE).contains(page)));
            let mut runs: Vec<Run> = Vec::new();
            for (index, &page) in pages.iter().enumerate() {
                match runs.last_mut() {
                    Some(last) if last.vaddr + last.bytes == page * PAGE => last.bytes += PAGE,
                    _ => runs.push(run(page, 1, index as u64)),
                }
            }
            let plan = Plan::new(mappings.clone(), &runs, pages.len() as u64 * PAGE).expect("a plan");
            let mut seen = Vec::new();
            for piece in plan.steps(step * PAGE) {
                prop_assert!(piece.length <= step * PAGE);
                prop_assert!(mappings.iter().any(|m| m.start <= piece.vaddr && piece.addresses().end <= m.end));
                for page in 0..piece.length / PAGE {
                    prop_assert_eq!(piece.offset / PAGE + page, seen.len() as u64);
                    seen.push(piece.vaddr / PAGE + page);
                }
            }
            prop_assert_eq!(seen, pages);
        }
    }
}
