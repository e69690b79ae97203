//! How much memory a snapshot may take beside the server, and who gets it.

use crate::arena::ARENA_BYTES_MIN;

const MIB: u64 = 1 << 20;
/// The arena of a server that does not go on afterwards: with what the writer takes (256 MiB), and the program, its threads,
/// codecs and requests (90 MiB seen), no more than 512 MiB.
const STOPPED_BYTES: u64 = 128 * MIB;
/// From here on the chunks that wait for a full pack cannot fill an arena, whatever they hold of it: 32 MiB of the
/// shortest chunks (64 KiB), each in a segment (2 MiB) of its own, hold 1 GiB.
const AMPLE_BYTES: u64 = 2 << 30;

/// Memory of one snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Budget {
    /// Bytes that the server is expected to send.
    pub(crate) expected: u64,
    /// Bytes of the arena.
    pub(crate) arena: u64,
    /// Bytes of content that the store's writer may hold.
    pub(crate) writer: u64,
    /// The arena may fill up, so nothing may be held in it that can wait for the store.
    pub(crate) scarce: bool,
}

impl Budget {
    /// `wanted` is what the user allows for the arena; without it, it is half of what is `free`, and no more than needed
    /// for a server that is to be stopped: nobody waits for it.
    pub(crate) fn new(wanted: Option<u64>, stop: bool, free: u64, expected: u64) -> Self {
        let default = if stop { (free / 2).min(STOPPED_BYTES) } else { free / 2 };
        let arena = wanted.unwrap_or(default).max(ARENA_BYTES_MIN);
        let scarce = arena < AMPLE_BYTES || expected > arena / 2;
        Self { expected, arena, writer: free / 4, scarce }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn half_of_what_is_free_is_for_a_server_that_goes_on() {
        let budget = Budget::new(None, false, 20 * GIB, GIB);
        assert_eq!((budget.arena, budget.scarce), (10 * GIB, false));
        assert!(Budget::new(None, false, 20 * GIB, 6 * GIB).scarce, "it may not fit");
        assert_eq!(Budget::new(None, false, MIB, GIB).arena, ARENA_BYTES_MIN);
    }

    #[test]
    fn a_server_that_stops_waits_for_the_store() {
        let budget = Budget::new(None, true, 20 * GIB, GIB);
        assert_eq!((budget.arena, budget.scarce), (STOPPED_BYTES, true));
        assert_eq!(Budget::new(Some(64 * MIB), true, 20 * GIB, GIB).arena, 64 * MIB);
    }
}
