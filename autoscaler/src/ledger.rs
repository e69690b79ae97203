//! Host and device memory that replicas hold, so that no start overdraws it.

use std::sync::{Arc, Mutex, PoisonError};

/// An amount of both kinds of memory, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// Of the host: restored and paused replicas, caches.
    pub host: u64,
    /// Of the devices.
    pub device: u64,
}

impl Memory {
    /// The more of each kind.
    #[must_use]
    pub fn max(self, other: Memory) -> Memory {
        Memory { host: self.host.max(other.host), device: self.device.max(other.device) }
    }

    /// More than any machine has.
    pub const UNLIMITED: Memory = Memory { host: u64::MAX, device: u64::MAX };
}

/// The kind of memory that replicas which wait have, too.
pub const HOST: &str = "host";

/// A claim that would overdraw the ledger; nothing was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{kind} memory: {wanted} bytes wanted, {free} of {total} free")]
pub struct Short {
    /// `host` or `device`.
    pub kind: &'static str,
    /// What was asked for.
    pub wanted: u64,
    /// What is left.
    pub free: u64,
    /// What there is.
    pub total: u64,
}

/// The book of one machine. Clones are the same book.
#[derive(Debug, Clone)]
pub struct Ledger(Arc<Book>);

#[derive(Debug)]
struct Book {
    total: Memory,
    used: Mutex<Memory>,
}

/// Memory that is taken, given back when this is dropped.
#[derive(Debug)]
pub struct Hold {
    ledger: Ledger,
    memory: Memory,
}

impl Ledger {
    /// A book over so much memory.
    #[must_use]
    pub fn new(total: Memory) -> Self {
        Self(Arc::new(Book { total, used: Mutex::default() }))
    }

    /// What is taken now.
    #[must_use]
    pub fn used(&self) -> Memory {
        *self.lock()
    }

    /// Takes memory.
    ///
    /// # Errors
    /// Where one kind is short; then nothing is taken.
    pub fn take(&self, memory: Memory) -> Result<Hold, Short> {
        self.exchange(Memory::default(), memory)?;
        Ok(Hold { ledger: self.clone(), memory })
    }

    fn exchange(&self, old: Memory, new: Memory) -> Result<(), Short> {
        let total = self.0.total;
        let mut used = self.lock();
        let left = |kind, used: u64, old: u64, new: u64, total: u64| {
            // Nothing is free where more runs than there is room for; to take less is possible all the same.
            let free = total.saturating_sub(used - old);
            let fits = new <= free.max(old);
            if fits { Ok(used - old + new) } else { Err(Short { kind, wanted: new, free, total }) }
        };
        let host = left(HOST, used.host, old.host, new.host, total.host)?;
        let device = left("device", used.device, old.device, new.device, total.device)?;
        *used = Memory { host, device };
        Ok(())
    }

    /// Counts what is there, whether it fits or not, and gives what was counted: sums end where the numbers do.
    fn count(&self, old: Memory, new: Memory) -> Memory {
        let mut used = self.lock();
        let others = Memory { host: used.host - old.host, device: used.device - old.device };
        let counted = Memory {
            host: new.host.min(u64::MAX - others.host),
            device: new.device.min(u64::MAX - others.device),
        };
        *used = Memory { host: others.host + counted.host, device: others.device + counted.device };
        counted
    }

    /// Two numbers are never half written: a panic elsewhere leaves the book true.
    fn lock(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.0.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hold {
    /// Changes what is held, as a replica that wakes does: the new amount, or the old one and an error.
    ///
    /// # Errors
    /// Where one kind is short; then the old amount is still held.
    pub fn change(&mut self, memory: Memory) -> Result<(), Short> {
        self.ledger.exchange(self.memory, memory)?;
        self.memory = memory;
        Ok(())
    }

    /// Says what is held in truth, even where that is more than there is: what runs takes its memory, whatever the book
    /// says. Nothing more is given out until there is room again.
    pub fn correct(&mut self, memory: Memory) {
        self.memory = self.ledger.count(self.memory, memory);
    }

    /// What is held.
    #[must_use]
    pub fn memory(&self) -> Memory {
        self.memory
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let nothing = self.ledger.exchange(self.memory, Memory::default());
        debug_assert!(nothing.is_ok(), "giving back cannot overdraw");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TOTAL: Memory = Memory { host: 100, device: 10 };

    #[test]
    fn a_claim_that_does_not_fit_takes_nothing() {
        let ledger = Ledger::new(TOTAL);
        let _first = ledger.take(Memory { host: 90, device: 1 }).expect("fits");
        let short = ledger.take(Memory { host: 20, device: 1 }).expect_err("too much");
        assert_eq!(short.to_string(), "host memory: 20 bytes wanted, 10 of 100 free");
        let short = ledger.take(Memory { host: 1, device: 10 }).expect_err("too much");
        assert_eq!(short.to_string(), "device memory: 10 bytes wanted, 9 of 10 free");
        assert_eq!(ledger.used(), Memory { host: 90, device: 1 });
    }

    #[test]
    fn an_unlimited_book_does_not_overflow() {
        let ledger = Ledger::new(Memory::UNLIMITED);
        let _all = ledger.take(Memory::UNLIMITED).expect("fits");
        assert!(ledger.take(Memory { host: 1, device: 0 }).is_err());
    }

    #[test]
    fn what_is_there_is_counted_beyond_the_total_and_nothing_more_is_given_out() {
        let ledger = Ledger::new(TOTAL);
        let mut hold = ledger.take(Memory::default()).expect("nothing");
        hold.correct(Memory { host: 150, device: 1 });
        assert_eq!(ledger.used(), Memory { host: 150, device: 1 });
        let short = ledger.take(Memory { host: 1, device: 0 }).expect_err("nothing is left");
        assert_eq!(short.to_string(), "host memory: 1 bytes wanted, 0 of 100 free");
        assert!(hold.change(Memory { host: 151, device: 1 }).is_err());
        hold.change(Memory { host: 120, device: 2 }).expect("less of the one, and of the other what is free");
        let mut other = ledger.take(Memory::default()).expect("nothing");
        other.correct(Memory::UNLIMITED);
        assert_eq!(ledger.used(), Memory::UNLIMITED);
        drop(other);
        assert_eq!(ledger.used(), Memory { host: 120, device: 2 });
        drop(hold);
        assert_eq!(ledger.used(), Memory::default());
    }

    proptest! {
        /// Any order of taking, changing and dropping: the sum of what is held is what the book says, within its limits.
        #[test]
        fn the_book_is_never_overdrawn(steps in proptest::collection::vec((0..3_u8, 0..60_u64, 0..6_u64), 1..80)) {
            let ledger = Ledger::new(TOTAL);
            let mut holds: Vec<Hold> = Vec::new();
            for (kind, host, device) in steps {
                let memory = Memory { host, device };
                match (kind, holds.last_mut()) {
                    (0, _) | (_, None) => holds.extend(ledger.take(memory)),
                    (1, Some(hold)) => { let _ = hold.change(memory); }
                    (_, Some(_)) => { holds.swap_remove(0); }
                }
                let used = ledger.used();
                prop_assert!(used.host <= TOTAL.host && used.device <= TOTAL.device);
                prop_assert_eq!(used.host, holds.iter().map(|hold| hold.memory().host).sum::<u64>());
                prop_assert_eq!(used.device, holds.iter().map(|hold| hold.memory().device).sum::<u64>());
            }
            drop(holds);
            prop_assert_eq!(ledger.used(), Memory::default());
        }
    }
}
