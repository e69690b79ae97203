//! Cutting a content stream into chunks at page boundaries, by content.
//!
//! Each page gets a 64-bit hash; the hashes of the last four pages roll through one word, and a chunk ends where that
//! word falls below a threshold. The same content at another offset therefore gives the same chunks after at most a
//! chunk's length, and a changed page moves no border that is more than four pages away. Where chunks end is no part of
//! the format: a reader takes them as they are. But all writers of a store should agree, or they share nothing.
//!
//! Chunks are shorter where pages look like a heap, which changes a little everywhere: see `limits.rs`.

use crate::limits::{
    CHUNK_BYTES_MAX, CHUNK_BYTES_MEAN, CHUNK_BYTES_MIN, HEAP_CHUNK_BYTES_MAX, HEAP_CHUNK_BYTES_MEAN,
    HEAP_CHUNK_BYTES_MIN, PAGE_BYTES,
};

/// How long chunks get.
struct Lengths {
    pages_min: u64,
    pages_max: u64,
    threshold: u64,
}

impl Lengths {
    const fn of(bytes_min: u64, bytes_mean: u64, bytes_max: u64) -> Self {
        let (pages_min, pages_max) = (bytes_min / PAGE_BYTES, bytes_max / PAGE_BYTES);
        // Behind the minimum, one page in so many ends a chunk, so that the mean comes out.
        let threshold = u64::MAX / (bytes_mean / PAGE_BYTES - pages_min);
        Self { pages_min, pages_max, threshold }
    }
}

const USUAL: Lengths = Lengths::of(CHUNK_BYTES_MIN, CHUNK_BYTES_MEAN, CHUNK_BYTES_MAX);
const HEAP: Lengths = Lengths::of(HEAP_CHUNK_BYTES_MIN, HEAP_CHUNK_BYTES_MEAN, HEAP_CHUNK_BYTES_MAX);

/// Finds the ends of chunks in one content stream.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cutter {
    /// The hashes of the last four pages, 16 bits of each above the one before.
    rolling: u64,
    /// Pages since the last cut.
    pages: u64,
}

impl Cutter {
    /// Takes the next page; true if a chunk ends with it.
    pub(crate) fn ends_with(&mut self, page: &[u8]) -> bool {
        self.rolling = (self.rolling << 16).wrapping_add(page_hash(page));
        self.pages += 1;
        // The product spreads the four pages over the high bits, which the threshold looks at.
        let mixed = mix(self.rolling, 0x9fb2_1c65_1e98_df25);
        let lengths = if looks_like_a_heap(page) { &HEAP } else { &USUAL };
        let cut =
            self.pages >= lengths.pages_max || (self.pages >= lengths.pages_min && mixed < lengths.threshold);
        if cut {
            self.pages = 0;
        }
        cut
    }
}

/// Whether a page looks as if small objects lay in it: pointers, lengths and padding make a quarter of its bytes zero and
/// more, weights nearly none (seen with the embedding server: 90 MiB of 254 below a sixteenth, 1 MiB from there to an
/// eighth, all others above). Looked at is a block of 64 bytes in 512.
fn looks_like_a_heap(page: &[u8]) -> bool {
    let blocks = page.chunks_exact(512);
    let zeros: usize = blocks.map(|block| block[..64].iter().filter(|byte| **byte == 0).count()).sum();
    zeros > page.len() / 8 / 16
}

/// Folds the 128-bit product of two words into one.
fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product as u64) ^ ((product >> 64) as u64)
}

/// A fast hash of one page. Not for ids: whoever makes the content may find collisions, which only moves borders.
fn page_hash(page: &[u8]) -> u64 {
    const KEYS: [u64; 8] = [
        0xa076_1d64_78bd_642f,
        0xe703_7ed1_a0b4_28db,
        0x8ebc_6af0_9c88_c6e3,
        0x5899_65cc_7537_4cc3,
        0x1d8e_4e27_c47d_124f,
        0xeb44_acca_b455_d165,
        0x9e37_79b9_7f4a_7c15,
        0xc2b2_ae3d_27d4_eb4f,
    ];
    // Eight independent lanes keep the multiplier busy; one lane would wait for its latency.
    let mut lanes = KEYS;
    let blocks = page.chunks_exact(64);
    debug_assert!(blocks.remainder().is_empty(), "a page is a multiple of 64 bytes");
    for block in blocks {
        for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(8)) {
            let word = u64::from_le_bytes(word.try_into().expect("chunks_exact gives 8 bytes"));
            *lane = (*lane ^ word).wrapping_mul(0x9fb2_1c65_1e98_df25).rotate_left(29);
        }
    }
    lanes.iter().zip(KEYS).fold(0, |sum, (&lane, key)| mix(sum ^ lane, key ^ 0x5bd1_e995_5bd1_e995))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Content without structure, the same for the same seed.
    pub(crate) fn random(bytes: usize, seed: u64) -> Vec<u8> {
        let mut out = vec![0; bytes];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
        out
    }

    fn cuts(content: &[u8]) -> Vec<usize> {
        let mut cutter = Cutter::default();
        let page = PAGE_BYTES as usize;
        (1..=content.len() / page).filter(|n| cutter.ends_with(&content[(n - 1) * page..n * page])).collect()
    }

    #[test]
    fn random_content_is_cut_at_the_mean_within_the_bounds() {
        let ends = cuts(&random(64 << 20, 1));
        let lengths: Vec<usize> =
            ends.iter().scan(0, |last, &end| Some(end - std::mem::replace(last, end))).collect();
        assert!(lengths.iter().all(|pages| (16..=256).contains(pages)), "{lengths:?}");
        let mean = ends.last().unwrap() / ends.len();
        assert!((52..=76).contains(&mean), "mean is {mean} pages");
    }

    /// Pages of words of which each begins with bytes that are not zero and ends with zeros.
    fn heap(bytes: usize, seed: u64) -> Vec<u8> {
        let mut content = random(bytes, seed);
        content.chunks_exact_mut(8).for_each(|word| word[6..].fill(0));
        content
    }

    #[test]
    fn what_looks_like_a_heap_is_cut_finer_and_what_does_not_as_before() {
        let ends = cuts(&heap(16 << 20, 1));
        let mean = ends.last().unwrap() / ends.len();
        assert!((6..=10).contains(&mean), "mean is {mean} pages");
        // Half of each: every part has its own mean.
        let mixed = cuts(&[random(16 << 20, 2), heap(16 << 20, 3)].concat());
        let half = mixed.iter().filter(|end| **end <= 4096).count();
        assert!((4096 / 76..=4096 / 52).contains(&half), "{half} of {} lie in the first half", mixed.len());
        assert!((4096 / 10..=4096 / 6).contains(&(mixed.len() - half)));
    }

    #[test]
    fn a_page_that_changes_in_a_heap_brings_little() {
        let before = heap(16 << 20, 4);
        let mut after = before.clone();
        let chunks = |content: &[u8]| {
            let ends = cuts(content);
            let begins = std::iter::once(0).chain(ends.iter().copied());
            let parts = begins.zip(&ends).map(|(begin, end)| content[begin * 4096..end * 4096].to_vec());
            parts.collect::<std::collections::HashSet<_>>()
        };
        // One page in a hundred.
        (0..40).for_each(|n| after[n * 100 * 4096 + n * 64] ^= 1);
        let known = chunks(&before);
        let new: usize = chunks(&after).difference(&known).map(Vec::len).sum();
        assert!(new < (16 << 20) / 6, "{new} bytes are new for 40 pages");
    }

    #[test]
    fn borders_are_these_for_ever() {
        let ends = cuts(&random(4 << 20, 7));
        assert_eq!(ends, GOLDEN_ENDS, "writers of one store would share nothing");
        let ends = cuts(&heap(512 << 10, 7));
        assert_eq!(ends, GOLDEN_HEAP_ENDS, "writers of one store would share nothing");
    }

    #[test]
    fn content_at_another_offset_is_cut_alike() {
        let content = random(16 << 20, 2);
        let mut shifted = random(5 * 4096, 3);
        shifted.extend_from_slice(&content);
        let plain: std::collections::BTreeSet<usize> = cuts(&content).into_iter().collect();
        let same = cuts(&shifted).iter().filter(|end| **end > 5 && plain.contains(&(**end - 5))).count();
        assert!(same + 8 >= plain.len(), "{same} of {}", plain.len());
    }

    #[test]
    fn equal_pages_are_cut_at_the_maximum_but_for_the_few_that_look_like_a_cut() {
        let ends: Vec<Vec<usize>> = (0..=255).map(|byte| cuts(&vec![byte; 1 << 20])).collect();
        let long = ends.iter().filter(|ends| **ends == [256]).count();
        assert!(long > 230, "{long} of 256");
    }

    const GOLDEN_HEAP_ENDS: &[usize] = &[3, 9, 17, 23, 26, 32, 37, 62, 74, 83, 97, 105];
    const GOLDEN_ENDS: &[usize] = &[90, 146, 378, 400, 557, 586, 652, 694, 738, 805, 920, 937];
}
