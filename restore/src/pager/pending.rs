//! What a task still lacks: which place in its content stream belongs to which address, until it is there.
//!
//! A page is given **once**. As soon as it is in place, or the task gave its content up, it leaves this map, and a
//! later fault on it gets a zero page: after `MADV_DONTNEED`, or after the kernel took a `MADV_FREE`d page back, the
//! old content must never appear again.
//!
//! Two maps hold the same pieces, one by address (faults, events) and one by place in the stream (fill). In one
//! address space each place of the stream is wanted at one address at most; mremap moves it.

use std::collections::BTreeMap;
use std::ops::Range;

/// A run of pages that is contiguous in memory and in the stream, inside one mapping. All in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Address in the task.
    pub vaddr: u64,
    /// Place in the task's content stream.
    pub offset: u64,
    /// Length.
    pub length: u64,
}

impl Piece {
    /// Addresses of the piece.
    #[must_use]
    pub fn addresses(&self) -> Range<u64> {
        self.vaddr..self.vaddr + self.length
    }

    /// Place of the piece in the stream.
    #[must_use]
    pub fn stream(&self) -> Range<u64> {
        self.offset..self.offset + self.length
    }

    fn cut_to_addresses(self, range: &Range<u64>) -> Option<Piece> {
        let start = self.vaddr.max(range.start);
        let end = (self.vaddr + self.length).min(range.end);
        (start < end).then(|| Piece {
            vaddr: start,
            offset: self.offset + (start - self.vaddr),
            length: end - start,
        })
    }

    fn cut_to_stream(self, range: &Range<u64>) -> Option<Piece> {
        let start = self.offset.max(range.start);
        let end = (self.offset + self.length).min(range.end);
        (start < end).then(|| Piece {
            vaddr: self.vaddr + (start - self.offset),
            offset: start,
            length: end - start,
        })
    }
}

/// The pieces that are not in place.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Pending {
    by_address: BTreeMap<u64, Piece>,
    /// Place in the stream to address.
    by_stream: BTreeMap<u64, u64>,
    bytes: u64,
}

impl Pending {
    /// Pending are exactly these pieces, which overlap neither in memory nor in the stream.
    #[must_use]
    pub(super) fn new(pieces: impl IntoIterator<Item = Piece>) -> Pending {
        let mut pending = Pending::default();
        for piece in pieces {
            pending.insert(piece);
        }
        pending
    }

    /// Bytes that are pending.
    #[must_use]
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether everything is in place.
    #[must_use]
    pub(super) fn is_empty(&self) -> bool {
        self.by_address.is_empty()
    }

    /// The pending piece that holds the address.
    #[must_use]
    pub(super) fn at(&self, address: u64) -> Option<Piece> {
        let (_, &piece) = self.by_address.range(..=address).next_back()?;
        piece.addresses().contains(&address).then_some(piece)
    }

    /// The first pending address in the range.
    #[must_use]
    pub(super) fn first_in(&self, range: &Range<u64>) -> Option<u64> {
        if self.at(range.start).is_some() {
            return Some(range.start);
        }
        self.by_address.range(range.clone()).next().map(|(&start, _)| start)
    }

    /// The first pending place in the stream at or after `offset`.
    #[must_use]
    pub(super) fn next_in_stream(&self, offset: u64) -> Option<u64> {
        if let Some((_, address)) = self.by_stream.range(..=offset).next_back()
            && self.by_address[address].stream().contains(&offset)
        {
            return Some(offset);
        }
        self.by_stream.range(offset..).next().map(|(&start, _)| start)
    }

    /// The first of what is pending of this part of the stream.
    #[must_use]
    pub(super) fn first_in_stream(&self, range: &Range<u64>) -> Option<Piece> {
        if let Some((_, address)) = self.by_stream.range(..=range.start).next_back()
            && let Some(piece) = self.by_address[address].cut_to_stream(range)
        {
            return Some(piece);
        }
        let (_, address) = self.by_stream.range(range.clone()).next()?;
        self.by_address[address].cut_to_stream(range)
    }

    /// What is pending of this part of the stream, in its order.
    #[must_use]
    pub(super) fn in_stream(&self, range: &Range<u64>) -> Vec<Piece> {
        let before = self.by_stream.range(..range.start).next_back();
        before
            .into_iter()
            .chain(self.by_stream.range(range.clone()))
            .filter_map(|(_, address)| self.by_address[address].cut_to_stream(range))
            .collect()
    }

    /// What is pending at these addresses, lowest first.
    #[must_use]
    pub(super) fn within(&self, range: &Range<u64>) -> Vec<Piece> {
        let before = self.by_address.range(..range.start).next_back();
        before
            .into_iter()
            .chain(self.by_address.range(range.clone()))
            .filter_map(|(_, piece)| piece.cut_to_addresses(range))
            .collect()
    }

    /// Takes what is pending at these addresses out: it is in place, or nobody wants it any more.
    pub(super) fn take(&mut self, range: &Range<u64>) -> Vec<Piece> {
        let before = self.by_address.range(..range.start).next_back();
        let touched: Vec<Piece> = before
            .into_iter()
            .chain(self.by_address.range(range.clone()))
            .map(|(_, &piece)| piece)
            .filter(|piece| piece.cut_to_addresses(range).is_some())
            .collect();
        let mut taken = Vec::with_capacity(touched.len());
        for piece in touched {
            self.drop_whole(piece);
            taken.extend(piece.cut_to_addresses(range));
            if let Some(left) = piece.cut_to_addresses(&(0..range.start)) {
                self.insert(left);
            }
            if let Some(right) = piece.cut_to_addresses(&(range.end..u64::MAX)) {
                self.insert(right);
            }
        }
        taken
    }

    /// What was pending at `from` is pending at `to`; what was pending there is not wanted any more.
    pub(super) fn relocate(&mut self, from: u64, to: u64, length: u64) {
        let moved = self.take(&(from..from + length));
        self.take(&(to..to + length));
        for piece in moved {
            self.insert(Piece { vaddr: to + (piece.vaddr - from), ..piece });
        }
    }

    fn insert(&mut self, piece: Piece) {
        self.by_address.insert(piece.vaddr, piece);
        self.by_stream.insert(piece.offset, piece.vaddr);
        self.bytes += piece.length;
    }

    fn drop_whole(&mut self, piece: Piece) {
        self.by_address.remove(&piece.vaddr);
        self.by_stream.remove(&piece.offset);
        self.bytes -= piece.length;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Address to place in the stream, one entry for each unit.
    type Model = BTreeMap<u64, u64>;

    fn flat(pending: &Pending) -> Model {
        let mut model = Model::new();
        for piece in pending.by_address.values() {
            for step in 0..piece.length {
                assert_eq!(model.insert(piece.vaddr + step, piece.offset + step), None);
            }
        }
        model
    }

    fn check(pending: &Pending, model: &Model) {
        assert_eq!(&flat(pending), model);
        assert_eq!(pending.bytes(), model.len() as u64);
        assert_eq!(pending.by_stream.len(), pending.by_address.len());
        for probe in 0..130 {
            assert_eq!(
                pending.at(probe).map(|piece| piece.offset + (probe - piece.vaddr)),
                model.get(&probe).copied()
            );
            let next = model.values().copied().filter(|&offset| offset >= probe).min();
            assert_eq!(pending.next_in_stream(probe), next);
        }
        let mut wanted: Vec<(u64, u64)> =
            model.iter().map(|(&a, &o)| (o, a)).filter(|(o, _)| (20..50).contains(o)).collect();
        wanted.sort_unstable();
        let got: Vec<(u64, u64)> = pending
            .in_stream(&(20..50))
            .into_iter()
            .flat_map(|piece| (0..piece.length).map(move |step| (piece.offset + step, piece.vaddr + step)))
            .collect();
        assert_eq!(got, wanted);
        let first = pending.first_in_stream(&(20..50)).map(|piece| (piece.offset, piece.vaddr));
        assert_eq!(first, wanted.first().copied());
    }

    proptest! {
        #[test]
        fn like_a_map_of_pages(
            changes in prop::collection::vec((any::<bool>(), 0_u64..100, 0_u64..100, 0_u64..30), 0..25)
        ) {
            let start = [
                Piece { vaddr: 5, offset: 0, length: 20 },
                Piece { vaddr: 25, offset: 20, length: 10 },
                Piece { vaddr: 60, offset: 30, length: 25 },
            ];
            let mut pending = Pending::new(start);
            let mut model = flat(&pending);
            for (relocate, from, to, length) in changes {
                if relocate {
                    pending.relocate(from, to, length);
                    let moved: Vec<(u64, u64)> = model
                        .range(from..from + length)
                        .map(|(&address, &offset)| (address, offset))
                        .collect();
                    model.retain(|address, _| !(from..from + length).contains(address));
                    model.retain(|address, _| !(to..to + length).contains(address));
                    model.extend(moved.into_iter().map(|(address, offset)| (address - from + to, offset)));
                } else {
                    let taken = pending.take(&(from..from + length));
                    let units: u64 = taken.iter().map(|piece| piece.length).sum();
                    let before = model.len();
                    model.retain(|address, _| !(from..from + length).contains(address));
                    prop_assert_eq!(units, (before - model.len()) as u64);
                }
                check(&pending, &model);
            }
        }
    }
}
