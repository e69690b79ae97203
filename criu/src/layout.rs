//! The layout of a dumped object: which pages it has, and where each lies in the region's content stream.
//!
//! A region's content stream is the concatenation of the object's pages that are not all zero, in address order. The
//! layout says where each of them belongs, which pages are zero and so have no bytes, and which of them CRIU insists on
//! reading itself (those that its dump did not mark as lazy). Snapshot writes it, restore and pager read it; the store
//! carries it as the region's opaque `meta`. Encoded as protobuf with gaps instead of addresses, so that a heap with
//! many holes costs three bytes a run.

use prost::Message;

use crate::wire;

/// Bytes of a page; CRIU counts in pages of this size on x86-64.
pub const PAGE_BYTES: u64 = 4096;

/// The most runs that a layout may have: a process with the kernel's limit of 65,530 mappings whose every mapping has
/// sixteen holes. Checked before memory is taken for them.
const RUNS_MAX: usize = 1 << 20;

/// A run of pages that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Address of the first page (task) or offset in the segment (shared memory), in bytes.
    pub vaddr: u64,
    /// Number of pages, at least one.
    pub pages: u64,
    /// The pages are all zero and have no bytes in the stream.
    pub zero: bool,
    /// The pages may be filled after the task runs. The others CRIU reads itself, before.
    pub lazy: bool,
}

impl Run {
    /// First address behind the run.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.vaddr + self.pages * PAGE_BYTES
    }

    /// Bytes of the run in the content stream.
    #[must_use]
    pub fn stream_bytes(&self) -> u64 {
        if self.zero { 0 } else { self.pages * PAGE_BYTES }
    }
}

/// Why a layout cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// The bytes are no layout at all.
    #[error("layout is not decodable")]
    Decode(#[source] prost::DecodeError),
    /// The three lists of a layout differ in length.
    #[error("layout has {gaps} gaps, {pages} lengths and {kinds} kinds, which should be equal")]
    Uneven {
        /// Number of gaps.
        gaps: usize,
        /// Number of lengths.
        pages: usize,
        /// Number of kinds.
        kinds: usize,
    },
    /// A run is empty, unknown or does not fit into the address space.
    #[error("layout run {index} is invalid: {pages} pages at {vaddr:#x}, kind {kind}")]
    Run {
        /// Which run.
        index: usize,
        /// Its address.
        vaddr: u64,
        /// Its length.
        pages: u64,
        /// Its kind.
        kind: u8,
    },
    /// More runs than any process can have.
    #[error("layout has {runs} runs, more than the limit of {RUNS_MAX}")]
    TooMany {
        /// How many.
        runs: usize,
    },
}

/// The pages of one object, by address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Layout {
    runs: Vec<Run>,
}

/// Numbers of the lists' fields.
const GAPS: u32 = 1;
const PAGES: u32 = 2;
const KINDS: u32 = 3;

const KIND_ZERO: u8 = 1;
const KIND_LAZY: u8 = 2;

#[derive(Clone, PartialEq, Message)]
struct Encoded {
    /// Pages between the end of the run before and this one.
    #[prost(uint64, repeated, tag = "1")]
    gaps: Vec<u64>,
    #[prost(uint64, repeated, tag = "2")]
    pages: Vec<u64>,
    /// One byte a run: bit 0 zero, bit 1 lazy.
    #[prost(bytes = "vec", tag = "3")]
    kinds: Vec<u8>,
}

/// How many numbers a list has, as far as the message can be read: what breaks it is found by decoding.
fn count(message: &[u8], number: u32) -> usize {
    let fields = wire::Fields::new(message).map_while(Result::ok).filter(|field| field.number == number);
    let numbers = fields.map(|field| match field.value {
        // Bytes, one for each run.
        wire::Value::Bytes(bytes) if number == KINDS => bytes.len(),
        // Packed numbers, each of which ends with the only byte whose highest bit is clear.
        wire::Value::Bytes(bytes) => bytes.iter().filter(|byte| **byte < 0x80).count(),
        wire::Value::Varint(_) | wire::Value::Fixed => 1,
    });
    numbers.sum()
}

impl Layout {
    /// A layout without pages.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a run behind the others; one that continues the last run extends it.
    ///
    /// # Panics
    /// If the run is empty, unaligned, or begins before the end of the last one: CRIU's order is checked by the receiver.
    pub fn push(&mut self, run: Run) {
        assert!(run.pages > 0 && run.vaddr.is_multiple_of(PAGE_BYTES), "run {run:?} is empty or unaligned");
        if let Some(last) = self.runs.last_mut() {
            assert!(last.end() <= run.vaddr, "run {run:?} begins before the end of {last:?}");
            if last.end() == run.vaddr && last.zero == run.zero && last.lazy == run.lazy {
                last.pages += run.pages;
                return;
            }
        }
        self.runs.push(run);
    }

    /// The runs by address; neighbours that touch differ in kind.
    #[must_use]
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The runs, each with the offset of its first byte in the content stream.
    pub fn placed(&self) -> impl Iterator<Item = (u64, Run)> + '_ {
        self.runs.iter().scan(0, |offset, run| {
            let start = *offset;
            *offset += run.stream_bytes();
            Some((start, *run))
        })
    }

    /// Bytes of the content stream.
    #[must_use]
    pub fn stream_bytes(&self) -> u64 {
        self.runs.iter().map(Run::stream_bytes).sum()
    }

    /// Bytes of memory, zero pages included.
    #[must_use]
    pub fn logical_bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.pages * PAGE_BYTES).sum()
    }

    /// The form in which the store carries it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut encoded = Encoded::default();
        let mut end = 0;
        for run in &self.runs {
            encoded.gaps.push((run.vaddr - end) / PAGE_BYTES);
            encoded.pages.push(run.pages);
            let zero = if run.zero { KIND_ZERO } else { 0 };
            encoded.kinds.push(zero | if run.lazy { KIND_LAZY } else { 0 });
            end = run.end();
        }
        encoded.encode_to_vec()
    }

    /// Reads what [`Self::encode`] wrote, or refuses it.
    ///
    /// # Errors
    /// If the bytes are not a layout, or describe more than an address space can hold.
    pub fn decode(bytes: &[u8]) -> Result<Self, LayoutError> {
        // Counted before decoding: a byte of the message can become eight bytes of memory.
        for number in [GAPS, PAGES, KINDS] {
            let runs = count(bytes, number);
            if runs > RUNS_MAX {
                return Err(LayoutError::TooMany { runs });
            }
        }
        let encoded = Encoded::decode(bytes).map_err(LayoutError::Decode)?;
        let (gaps, pages, kinds) = (encoded.gaps.len(), encoded.pages.len(), encoded.kinds.len());
        if gaps != pages || pages != kinds {
            return Err(LayoutError::Uneven { gaps, pages, kinds });
        }
        let mut layout = Self { runs: Vec::with_capacity(gaps) };
        let mut end: u64 = 0;
        for (index, ((gap, pages), kind)) in
            encoded.gaps.iter().zip(&encoded.pages).zip(&encoded.kinds).enumerate()
        {
            let vaddr = gap.checked_mul(PAGE_BYTES).and_then(|bytes| end.checked_add(bytes));
            let next =
                vaddr.and_then(|v| pages.checked_mul(PAGE_BYTES).and_then(|bytes| v.checked_add(bytes)));
            let (Some(vaddr), Some(next)) = (vaddr, next) else {
                return Err(LayoutError::Run { index, vaddr: end, pages: *pages, kind: *kind });
            };
            if *pages == 0 || *kind > (KIND_ZERO | KIND_LAZY) {
                return Err(LayoutError::Run { index, vaddr, pages: *pages, kind: *kind });
            }
            layout.push(Run {
                vaddr,
                pages: *pages,
                zero: kind & KIND_ZERO != 0,
                lazy: kind & KIND_LAZY != 0,
            });
            end = next;
        }
        Ok(layout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limited;
    use proptest::prelude::*;

    fn run(page: u64, pages: u64, zero: bool, lazy: bool) -> Run {
        Run { vaddr: page * PAGE_BYTES, pages, zero, lazy }
    }

    #[test]
    fn runs_that_continue_each_other_become_one() {
        let mut layout = Layout::new();
        layout.push(run(1, 2, false, true));
        layout.push(run(3, 4, false, true));
        layout.push(run(7, 1, true, true));
        assert_eq!(layout.runs(), [run(1, 6, false, true), run(7, 1, true, true)]);
        assert_eq!(layout.stream_bytes(), 6 * PAGE_BYTES);
        assert_eq!(layout.logical_bytes(), 7 * PAGE_BYTES);
    }

    #[test]
    fn a_zero_run_takes_no_room_in_the_stream() {
        let mut layout = Layout::new();
        layout.push(run(0, 3, true, true));
        layout.push(run(3, 1, false, true));
        layout.push(run(9, 1, false, false));
        let offsets: Vec<u64> = layout.placed().map(|(offset, _)| offset).collect();
        assert_eq!(offsets, [0, 0, PAGE_BYTES]);
    }

    /// The bytes stand in snapshots, and in their description.
    #[test]
    fn the_encoding_is_the_documented_one() {
        const LINES: [&str; 3] = ["0a 04 80 08 00 02", "12 03 02 01 03", "1a 03 02 03 00"];
        let document = include_str!("../../docs/snapshot-format.md");
        let mut layout = Layout::new();
        layout.push(run(0x400, 2, false, true));
        layout.push(run(0x402, 1, true, true));
        layout.push(run(0x405, 3, false, false));
        let bytes: Vec<String> = layout.encode().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(bytes.join(" "), LINES.join(" "));
        for line in LINES {
            assert!(document.contains(&format!("\n{line} ")), "{line} is not documented");
        }
        assert_eq!((layout.logical_bytes(), layout.stream_bytes()), (24 << 10, 20 << 10));
    }

    #[test]
    fn an_empty_run_and_an_address_beyond_the_end_are_refused() {
        let empty = Encoded { gaps: vec![1], pages: vec![0], kinds: vec![0] }.encode_to_vec();
        assert!(matches!(Layout::decode(&empty), Err(LayoutError::Run { index: 0, .. })));
        let beyond = Encoded { gaps: vec![1 << 60], pages: vec![1], kinds: vec![0] }.encode_to_vec();
        assert!(matches!(Layout::decode(&beyond), Err(LayoutError::Run { index: 0, .. })));
        let uneven = Encoded { gaps: vec![1, 2], pages: vec![1], kinds: vec![0] }.encode_to_vec();
        assert!(matches!(Layout::decode(&uneven), Err(LayoutError::Uneven { .. })));
    }

    #[test]
    fn as_many_runs_as_a_process_can_have_are_read() {
        let runs =
            |count: usize| Encoded { gaps: vec![1; count], pages: vec![300; count], kinds: vec![0; count] };
        let decoded = Layout::decode(&runs(RUNS_MAX).encode_to_vec()).expect("as many as are allowed");
        assert_eq!(decoded.runs().len(), RUNS_MAX);
        let more = Layout::decode(&runs(RUNS_MAX + 1).encode_to_vec());
        assert!(matches!(more, Err(LayoutError::TooMany { runs }) if runs == RUNS_MAX + 1), "{more:?}");
    }

    /// Lists whose numbers take as little room as can be, packed and not.
    #[test]
    fn too_many_runs_are_refused_before_memory_is_taken() {
        limited::to(100 << 20, "layout::tests::too_many_runs_are_refused_before_memory_is_taken", || {
            for number in [GAPS, PAGES, KINDS] {
                let mut packed = Vec::new();
                wire::put_bytes(&mut packed, number, &vec![1; 24 << 20]);
                let refused = Layout::decode(&packed);
                assert!(
                    matches!(refused, Err(LayoutError::TooMany { runs }) if runs == 24 << 20),
                    "{refused:?}"
                );
            }
            let single = [(GAPS << 3) as u8, 1].repeat(12 << 20);
            let refused = Layout::decode(&single);
            assert!(matches!(refused, Err(LayoutError::TooMany { runs }) if runs == 12 << 20), "{refused:?}");
        });
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(steps in prop::collection::vec((0u64..9, 1u64..9, any::<bool>(), any::<bool>()), 0..64)) {
            let mut layout = Layout::new();
            let mut page = 0;
            for (gap, pages, zero, lazy) in steps {
                page += gap;
                layout.push(run(page, pages, zero, lazy));
                page += pages;
            }
            prop_assert_eq!(Layout::decode(&layout.encode()).expect("own bytes"), layout);
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            let _ = Layout::decode(&bytes);
        }
    }
}
