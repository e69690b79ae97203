//! Cases made from seeds: a failure names its seed, and the seed makes the same case again.
//!
//! `REWARM_FUZZ_SECONDS` is how long each search goes on (2 by default), `REWARM_FUZZ_SEED` the only case to look at.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long a search goes on where nobody says otherwise.
const SECONDS: u64 = 2;
/// A canary that is not caught within so many cases will not be.
const CANARY_CASES: u64 = 20_000;

/// Numbers that follow from a seed (SplitMix64).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The numbers of this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator might end, and its numbers would be options"
    )]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// True once in so many times.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// One of these.
    pub fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// So many bytes.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }

    /// Spoils a few bytes, or cuts the end off; most of the time it does nothing.
    pub fn spoil(&mut self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() || !self.once_in(4) {
            return;
        }
        if self.once_in(3) {
            bytes.truncate(self.below(bytes.len() as u64) as usize);
            return;
        }
        for _ in 0..=self.below(3) {
            let at = self.below(bytes.len() as u64) as usize;
            bytes[at] = self.one(&[0, 1, 0x7f, 0x80, 0xff, self.0 as u8]);
        }
    }
}

/// Looks at case after case; `case` says what is wrong with one.
///
/// # Panics
///
/// With the seed of the first case that is wrong.
#[expect(clippy::print_stdout, reason = "a search that found nothing says where it looked")]
pub fn holds(name: &str, mut case: impl FnMut(&mut Random) -> Result<(), String>) {
    if let Some(seed) = number("REWARM_FUZZ_SEED") {
        case(&mut Random::new(seed)).unwrap_or_else(|wrong| panic!("{name}: seed {seed}: {wrong}"));
        return;
    }
    let until = Instant::now() + Duration::from_secs(number("REWARM_FUZZ_SECONDS").unwrap_or(SECONDS));
    let first = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
    let mut seed = first;
    while Instant::now() < until {
        case(&mut Random::new(seed))
            .unwrap_or_else(|wrong| panic!("{name}: REWARM_FUZZ_SEED={seed} shows it again: {wrong}"));
        seed = seed.wrapping_add(1);
    }
    println!("{name}: {} cases from seed {first}", seed.wrapping_sub(first));
}

/// Shows that the cases reach what they are meant to reach: with a parser that is weakened on purpose, one must be wrong.
///
/// # Panics
///
/// When none is.
pub fn catches(what: &str, mut case: impl FnMut(&mut Random) -> Result<(), String>) {
    let caught = (0..CANARY_CASES).any(|seed| case(&mut Random::new(seed)).is_err());
    assert!(caught, "{CANARY_CASES} cases and none shows the weakness: {what}");
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{variable}={text}: no number")))
}
