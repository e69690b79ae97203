//! A set of addresses as disjoint ranges: what is registered with a userfaultfd.

use std::collections::BTreeMap;
use std::ops::Range;

/// Disjoint ranges; neighbours are merged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Ranges {
    /// Start to end.
    map: BTreeMap<u64, u64>,
}

impl Ranges {
    /// Adds every address of the range.
    pub(super) fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let Range { mut start, mut end } = range;
        if let Some((&before, &before_end)) = self.map.range(..=start).next_back()
            && before_end >= start
        {
            start = before;
            end = end.max(before_end);
        }
        while let Some((&next, &next_end)) = self.map.range(start..=end).next() {
            end = end.max(next_end);
            self.map.remove(&next);
        }
        self.map.insert(start, end);
    }

    /// Takes every address of the range away.
    pub(super) fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        if let Some((&before, &before_end)) = self.map.range(..range.start).next_back()
            && before_end > range.start
        {
            self.map.insert(before, range.start);
            if before_end > range.end {
                self.map.insert(range.end, before_end);
            }
        }
        while let Some((&next, &next_end)) = self.map.range(range.clone()).next() {
            self.map.remove(&next);
            if next_end > range.end {
                self.map.insert(range.end, next_end);
            }
        }
    }

    /// Whether the address is in the set.
    #[must_use]
    pub(super) fn contains(&self, address: u64) -> bool {
        self.around(address).is_some()
    }

    /// The range that holds the address.
    #[must_use]
    pub(super) fn around(&self, address: u64) -> Option<Range<u64>> {
        let (&start, &end) = self.map.range(..=address).next_back()?;
        (address < end).then_some(start..end)
    }

    /// Whether any address of the range is in the set.
    #[must_use]
    pub(super) fn touches(&self, range: &Range<u64>) -> bool {
        !range.is_empty() && (self.contains(range.start) || self.map.range(range.clone()).next().is_some())
    }

    /// What of the range is in the set, lowest first.
    pub(super) fn within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let before = self.map.range(..range.start).next_back();
        let parts = before.into_iter().chain(self.map.range(range.clone()));
        parts
            .map(move |(&start, &end)| start.max(range.start)..end.min(range.end))
            .filter(|part| !part.is_empty())
    }

    /// The ranges, lowest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.map.iter().map(|(&start, &end)| start..end)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn like_a_set_of_addresses(changes in prop::collection::vec((any::<bool>(), 0_u64..60, 0_u64..20), 0..40)) {
            let mut ranges = Ranges::default();
            let mut model = BTreeSet::new();
            for (add, start, length) in changes {
                let range = start..start + length;
                prop_assert_eq!(ranges.touches(&range), range.clone().any(|address| model.contains(&address)));
                if add {
                    ranges.insert(range.clone());
                    model.extend(range);
                } else {
                    ranges.remove(range.clone());
                    model.retain(|address| !range.contains(address));
                }
                let flat: Vec<u64> = ranges.iter().flatten().collect();
                prop_assert_eq!(&flat, &model.iter().copied().collect::<Vec<_>>());
                let all: Vec<_> = ranges.iter().collect();
                prop_assert!(all.windows(2).all(|pair| pair[0].end < pair[1].start), "{:?} are not merged", all);
                prop_assert_eq!(ranges.contains(30), model.contains(&30));
                let within: Vec<u64> = ranges.within(10..40).flatten().collect();
                prop_assert_eq!(within, model.range(10..40).copied().collect::<Vec<_>>());
            }
        }
    }
}
