//! Which streams stay in memory: those that somebody holds, and of the others the most recently used up to a limit of bytes and a number.

use std::sync::Arc;

/// So many that nobody holds may stay, whatever their size: each has descriptors, of which many machines give a process 1024.
const UNHELD_MAX: usize = 64;

/// What is decided about.
pub(crate) trait Entry {
    /// Bytes of memory that it takes.
    fn bytes(&self) -> u64;
    /// Whether it must stay.
    fn is_held(&self) -> bool;
    /// Rises with each use.
    fn used(&self) -> u64;
}

/// Whether `more` further bytes fit below `limit`.
pub(crate) fn fits<E: Entry>(entries: &[Arc<E>], limit: u64, more: u64) -> bool {
    let total: u64 = entries.iter().map(|entry| entry.bytes()).sum();
    total.saturating_add(more) <= limit
}

/// Takes those out that have to go so that `more` further bytes fit below `limit` and not too many stay, the least recently used first.
/// What is held stays, even above the limit.
pub(crate) fn make_room<E: Entry>(entries: &mut Vec<Arc<E>>, limit: u64, more: u64) -> Vec<Arc<E>> {
    let mut gone = Vec::new();
    loop {
        let unheld = entries.iter().filter(|entry| !entry.is_held()).count();
        if unheld <= UNHELD_MAX && fits(entries, limit, more) {
            return gone;
        }
        let oldest = (0..entries.len())
            .filter(|&index| !entries[index].is_held())
            .min_by_key(|&index| entries[index].used());
        match oldest {
            Some(index) => gone.push(entries.remove(index)),
            None => return gone,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone, PartialEq)]
    struct Fake {
        bytes: u64,
        held: bool,
        used: u64,
    }

    impl Entry for Fake {
        fn bytes(&self) -> u64 {
            self.bytes
        }
        fn is_held(&self) -> bool {
            self.held
        }
        fn used(&self) -> u64 {
            self.used
        }
    }

    #[test]
    fn the_latest_of_many_small_ones_stay_and_all_that_are_held() {
        let entry = |used| Arc::new(Fake { bytes: 1, held: used < 10, used });
        let mut entries: Vec<Arc<Fake>> = (0..200).map(entry).collect();
        let gone = make_room(&mut entries, u64::MAX, 0);
        let first_left = 200 - UNHELD_MAX as u64;
        assert_eq!(
            gone.iter().map(|entry| entry.used).collect::<Vec<_>>(),
            (10..first_left).collect::<Vec<_>>()
        );
        assert_eq!(entries.len(), 10 + UNHELD_MAX);
        assert!(make_room(&mut entries, u64::MAX, 0).is_empty());
    }

    proptest! {
        #[test]
        fn the_limit_is_kept_unless_all_that_is_left_is_held(
            made in prop::collection::vec((0_u64..100, any::<bool>()), 0..12),
            limit in 0_u64..400,
            more in 0_u64..100,
        ) {
            let mut entries: Vec<Arc<Fake>> = made
                .iter()
                .enumerate()
                .map(|(index, &(bytes, held))| Arc::new(Fake { bytes, held, used: (index as u64 * 7) % 12 }))
                .collect();
            let gone = make_room(&mut entries, limit, more);
            let total: u64 = entries.iter().map(|entry| entry.bytes).sum();
            prop_assert!(total + more <= limit || entries.iter().all(|entry| entry.held));
            prop_assert!(gone.iter().all(|entry| !entry.held));
            let oldest_left = entries.iter().filter(|entry| !entry.held).map(|entry| entry.used).min();
            let youngest_gone = gone.iter().map(|entry| entry.used).max();
            prop_assert!(oldest_left.zip(youngest_gone).is_none_or(|(left, gone)| gone <= left));
        }
    }
}
