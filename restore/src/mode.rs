//! When a replica's memory is filled, and what `auto` makes of what is known.

use crate::lazy::When;

/// When a replica's memory is filled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// By what is known of size, density and rate. Lazily, the replica is ready at once, unless the rest arrives within a
    /// moment.
    #[default]
    Auto,
    /// While the server runs already, also after the replica is ready; what is touched comes first.
    Lazy,
    /// Before the server runs.
    Eager,
}

/// What is known of a snapshot before its first process is made. In bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Known {
    /// Its content.
    pub(crate) content: u64,
    /// Of that, what lies decoded in memory.
    pub(crate) arrived: u64,
    /// What earlier restores touched before their first answers.
    pub(crate) working_set: Option<u64>,
    /// Content that came from this store in a second, the last time.
    pub(crate) rate: Option<u64>,
    /// The store is a folder of this machine.
    pub(crate) is_folder: bool,
}

/// Below this the two differ by less than a person notices, and only one of them stops the server in between.
const SMALL: u64 = 64 << 20;
/// Where all is here, filling a stopped tree takes half of the time that a running one takes (docs/memory.md): from this
/// part on it is sooner to fill all of it than to fill what is touched.
const DENSE: f64 = 0.5;
/// Where it has to be waited for, filling goes on beside it and costs nothing on top: nearly all must be wanted.
const NEARLY_ALL: f64 = 0.95;
/// At more than this the processors set the pace and not the network: checking, decoding and filling get into each
/// other's way, and filling a running server is sooner (measured; docs/memory.md).
const PROCESSORS_BOUND: u64 = 500_000_000;

/// Content up to this length is all there within few seconds at a fast rate: in which order matters little.
const SOON_THERE: u64 = 4 << 30;

impl Mode {
    /// When the pager fills what nobody has asked for. To learn what is touched, all else is held back for a while. Where
    /// content comes as fast as it is put into place, that is not worth it where it is known already, or where all of it is
    /// there soon.
    #[must_use]
    pub(crate) fn when(self, known: Known) -> When {
        let comes_fast = known.rate.map_or(known.is_folder, |rate| rate > PROCESSORS_BOUND);
        let not_to_learn = known.working_set.is_some() || (self == Self::Auto && known.content <= SOON_THERE);
        match self.choose(known) {
            Self::Eager => When::Stopped,
            Self::Auto | Self::Lazy if comes_fast && not_to_learn => When::AtOnce,
            Self::Auto | Self::Lazy => When::Recorded,
        }
    }

    /// What `auto` means, by size, density of the working set and bandwidth. What is not known speaks for lazily: that is
    /// how it becomes known.
    #[must_use]
    fn choose(self, known: Known) -> Self {
        let Known { content, arrived, working_set: Some(wanted), rate, .. } = known else { return self };
        if self != Self::Auto || content < SMALL {
            return self;
        }
        let density = wanted as f64 / content as f64;
        let eager = if arrived >= content {
            density >= DENSE
        } else {
            density >= NEARLY_ALL && rate.is_some_and(|rate| rate <= PROCESSORS_BOUND)
        };
        if eager { Self::Eager } else { self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const KNOWN: Known = Known {
        content: GIB,
        arrived: GIB,
        working_set: Some(GIB),
        rate: Some(100_000_000),
        is_folder: false,
    };

    fn auto(known: Known) -> Mode {
        Mode::Auto.choose(known)
    }

    #[test]
    fn what_the_user_says_goes() {
        for known in [KNOWN, Known::default()] {
            assert_eq!(Mode::Lazy.choose(known), Mode::Lazy);
            assert_eq!(Mode::Eager.choose(known), Mode::Eager);
        }
    }

    #[test]
    fn what_is_here_is_filled_before_the_server_runs_if_half_of_it_is_wanted() {
        assert_eq!(auto(KNOWN), Mode::Eager);
        assert_eq!(auto(Known { working_set: Some(GIB / 2), rate: None, ..KNOWN }), Mode::Eager);
        assert_eq!(auto(Known { working_set: Some(GIB / 2 - 1), ..KNOWN }), Mode::Auto);
    }

    #[test]
    fn what_has_to_be_waited_for_is_filled_while_the_server_runs_unless_the_network_is_slow_and_all_is_wanted()
     {
        let missing = Known { arrived: GIB / 4, ..KNOWN };
        assert_eq!(auto(missing), Mode::Eager);
        assert_eq!(auto(Known { working_set: Some(GIB / 10 * 9), ..missing }), Mode::Auto);
        assert_eq!(auto(Known { rate: Some(4_000_000_000), ..missing }), Mode::Auto);
        assert_eq!(auto(Known { rate: None, ..missing }), Mode::Auto);
    }

    #[test]
    fn what_comes_fast_is_not_held_back() {
        let first = Known { arrived: 0, working_set: None, rate: None, ..KNOWN };
        assert_eq!(Mode::Auto.when(first), When::Recorded);
        assert_eq!(Mode::Auto.when(Known { is_folder: true, ..first }), When::AtOnce);
        assert_eq!(Mode::Auto.when(Known { rate: Some(1_000_000_000), ..first }), When::AtOnce);
        assert_eq!(Mode::Lazy.when(Known { is_folder: true, ..first }), When::Recorded);
        assert_eq!(Mode::Auto.when(Known { is_folder: true, rate: Some(100), ..first }), When::Recorded);
        assert_eq!(Mode::Auto.when(KNOWN), When::Stopped);
        let large = Known { content: 5 * GIB, is_folder: true, ..first };
        assert_eq!(Mode::Auto.when(large), When::Recorded);
        assert_eq!(Mode::Auto.when(Known { working_set: Some(1 << 20), ..large }), When::AtOnce);
    }

    #[test]
    fn what_is_small_or_not_known_is_filled_while_the_server_runs() {
        assert_eq!(auto(Known { content: SMALL - 1, ..KNOWN }), Mode::Auto);
        assert_eq!(auto(Known { content: SMALL, arrived: SMALL, ..KNOWN }), Mode::Eager);
        assert_eq!(auto(Known { working_set: None, ..KNOWN }), Mode::Auto);
    }
}
