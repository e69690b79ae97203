//! Which tier a start uses where starts have failed, and when none is tried.
//!
//! A start that fails is replaced by one of the next tier at once. Three failures of a tier in a row open its circuit:
//! it is left alone for a while, which doubles with each further failure. A replica that is lost soon after it began to serve is
//! such a failure too: without that, a snapshot whose replicas answer once and then refuse would be restored for ever.
//!
//! Wakes have a circuit of their own: while it is open, warm replicas stay as they are and others are restored. Without that each
//! request to a pool whose wakes hang would wait for a wake to time out first.

use std::time::Duration;

use rewarm_autoscaler::moment::Moment;
use rewarm_autoscaler::pool::Tier;

/// So many failures in a row open a circuit.
const FAILURES: u32 = 3;
/// The first pause, and the longest.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// One tier's failures.
#[derive(Debug, Default)]
struct Circuit {
    in_a_row: u32,
    /// How many of those served first. Another start that succeeds says nothing against them.
    lost: u32,
    until: Option<Moment>,
    reason: String,
}

/// What has failed of each tier.
#[derive(Debug)]
pub(super) struct Tiers {
    wake: Circuit,
    restore: Circuit,
    cold: Circuit,
    cold_allowed: bool,
    /// Restores that failed and are to be replaced by cold starts.
    owed: u32,
}

impl Circuit {
    fn closed(&self, now: Moment) -> bool {
        self.until.is_none_or(|until| until <= now)
    }

    fn open(&self, now: Moment) -> Option<Open> {
        let until = self.until.filter(|until| *until > now)?;
        Some(Open { failures: self.in_a_row, until, reason: self.reason.clone() })
    }

    fn failed(&mut self, now: Moment, reason: &str) {
        self.in_a_row += 1;
        reason.clone_into(&mut self.reason);
        if let Some(beyond) = self.in_a_row.checked_sub(FAILURES) {
            let pause = PAUSE.saturating_mul(1 << beyond.min(16)).min(PAUSE_MAX);
            self.until = Some(now + pause);
        }
    }

    fn started(&mut self) {
        match self.lost {
            0 => self.worked(),
            lost => self.in_a_row = lost,
        }
    }

    fn lost(&mut self, now: Moment, reason: &str) {
        self.lost += 1;
        self.failed(now, reason);
    }

    fn worked(&mut self) {
        *self = Self::default();
    }
}

/// Why nothing is started.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Open {
    pub(super) failures: u32,
    pub(super) until: Moment,
    pub(super) reason: String,
}

impl Tiers {
    pub(super) fn new(cold_allowed: bool) -> Self {
        let (wake, restore, cold) = Default::default();
        Self { wake, restore, cold, cold_allowed, owed: 0 }
    }

    pub(super) fn allow_cold(&mut self, allowed: bool) {
        self.cold_allowed = allowed;
    }

    /// The tier for the next start; `None` while nothing is to be tried.
    pub(super) fn choose(&mut self, now: Moment) -> Option<Tier> {
        let cold = self.cold_allowed && self.cold.closed(now);
        if cold && (self.owed > 0 || !self.restore.closed(now)) {
            self.owed = self.owed.saturating_sub(1);
            return Some(Tier::Cold);
        }
        self.restore.closed(now).then_some(Tier::Restore)
    }

    /// The tier that makes replicas from nothing, as long as nothing changes. One restore that fails is replaced by a cold start,
    /// and the next may work; once the circuit was open, restores have to prove first that they do.
    pub(super) fn usual(&self) -> Tier {
        let cold = self.cold_allowed && self.restore.until.is_some() && self.cold.until.is_none();
        if cold { Tier::Cold } else { Tier::Restore }
    }

    /// Whether warm replicas can be woken, as far as is known.
    pub(super) fn wakes(&self, now: Moment) -> bool {
        self.wake.closed(now)
    }

    /// When a wake is tried again that is not now.
    pub(super) fn wakes_again(&self) -> Option<Moment> {
        self.wake.until
    }

    /// Whether the snapshot can be restored, as far as is known.
    pub(super) fn restores(&self, now: Moment) -> bool {
        self.restore.closed(now)
    }

    pub(super) fn failed(&mut self, tier: Tier, now: Moment, reason: &str) {
        match tier {
            Tier::Restore => {
                self.restore.failed(now, reason);
                self.owed += 1;
            }
            Tier::Cold => self.cold.failed(now, reason),
            Tier::Wake => self.wake.failed(now, reason),
        }
    }

    /// A replica that came from this tier was lost soon after it began to serve. Not every loss is the tier's fault, so the next
    /// start is of the same one.
    pub(super) fn lost(&mut self, tier: Tier, now: Moment, reason: &str) {
        match tier {
            Tier::Restore => self.restore.lost(now, reason),
            Tier::Cold => self.cold.lost(now, reason),
            Tier::Wake => self.wake.lost(now, reason),
        }
    }

    /// A replica of this tier begins to serve.
    pub(super) fn started(&mut self, tier: Tier) {
        match tier {
            Tier::Restore => {
                self.restore.started();
                self.owed = 0;
            }
            Tier::Cold => self.cold.started(),
            Tier::Wake => self.wake.started(),
        }
    }

    /// Restores are of another snapshot from now on.
    pub(super) fn replaced(&mut self) {
        self.restore.worked();
        self.wake.worked();
        self.owed = 0;
    }

    /// A replica of this tier has served for long enough.
    pub(super) fn worked(&mut self, tier: Tier) {
        match tier {
            Tier::Restore => self.restore.worked(),
            Tier::Cold => self.cold.worked(),
            Tier::Wake => self.wake.worked(),
        }
    }

    /// Why nothing can be started now, if nothing can.
    pub(super) fn open(&self, now: Moment) -> Option<Open> {
        let restore = self.restore.open(now)?;
        if self.cold_allowed { self.cold.open(now).map(|cold| cold.sooner(restore)) } else { Some(restore) }
    }

    /// A circuit that is open while another tier serves: of restores, or of wakes.
    pub(super) fn degraded(&self, now: Moment) -> Option<Open> {
        self.restore.open(now).or_else(|| self.wake.open(now))
    }
}

impl Open {
    fn sooner(self, other: Open) -> Open {
        if other.until < self.until { other } else { self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64) -> Moment {
        Moment::from_seconds(seconds)
    }

    #[test]
    fn a_failed_restore_is_replaced_by_a_cold_start_and_tried_again() {
        let mut tiers = Tiers::new(true);
        assert_eq!(tiers.choose(at(0.0)), Some(Tier::Restore));
        tiers.failed(Tier::Restore, at(1.0), "no such snapshot");
        assert_eq!(tiers.choose(at(1.0)), Some(Tier::Cold));
        assert_eq!(tiers.choose(at(1.0)), Some(Tier::Restore));
    }

    #[test]
    fn three_failures_in_a_row_leave_a_tier_alone_for_longer_and_longer() {
        let mut tiers = Tiers::new(false);
        for _ in 0..2 {
            tiers.failed(Tier::Restore, at(0.0), "store down");
            assert_eq!(tiers.choose(at(0.0)), Some(Tier::Restore));
        }
        for (now, until) in [(0.0, 1.0), (1.0, 3.0), (3.0, 7.0), (100.0, 108.0)] {
            tiers.failed(Tier::Restore, at(now), "store down");
            assert_eq!(tiers.choose(at(now)), None);
            let open = tiers.open(at(now)).expect("open");
            assert_eq!((open.until, open.reason.as_str()), (at(until), "store down"));
            assert_eq!(tiers.choose(at(until)), Some(Tier::Restore));
        }
        tiers.started(Tier::Restore);
        tiers.failed(Tier::Restore, at(200.0), "store down");
        assert_eq!((tiers.choose(at(200.0)), tiers.open(at(200.0))), (Some(Tier::Restore), None));
    }

    #[test]
    fn replicas_that_are_lost_soon_open_a_circuit_although_each_of_them_was_started() {
        let mut tiers = Tiers::new(true);
        for _ in 0..2 {
            tiers.started(Tier::Restore);
            tiers.lost(Tier::Restore, at(0.0), "it cannot be reached");
            assert_eq!(tiers.choose(at(0.0)), Some(Tier::Restore));
        }
        for (now, until) in [(0.0, 1.0), (1.0, 3.0), (3.0, 7.0)] {
            tiers.started(Tier::Restore);
            tiers.lost(Tier::Restore, at(now), "it cannot be reached");
            assert_eq!(tiers.choose(at(now)), Some(Tier::Cold));
            assert_eq!(tiers.choose(at(until)), Some(Tier::Restore));
        }
        tiers.started(Tier::Restore);
        tiers.worked(Tier::Restore);
        tiers.lost(Tier::Restore, at(7.0), "it cannot be reached");
        assert_eq!(tiers.choose(at(7.0)), Some(Tier::Restore));
    }

    #[test]
    fn cold_starts_serve_while_restores_are_left_alone() {
        let mut tiers = Tiers::new(true);
        (0..3).for_each(|_| tiers.failed(Tier::Restore, at(0.0), "damaged"));
        for _ in 0..5 {
            assert_eq!(tiers.choose(at(0.5)), Some(Tier::Cold));
        }
        assert_eq!((tiers.open(at(0.5)), tiers.degraded(at(0.5)).map(|open| open.failures)), (None, Some(3)));
    }

    #[test]
    fn cold_starts_are_the_usual_ones_from_the_opening_of_the_circuit_to_the_next_restore_that_serves() {
        let mut tiers = Tiers::new(true);
        (0..2).for_each(|_| tiers.failed(Tier::Restore, at(0.0), "store down"));
        assert_eq!(tiers.usual(), Tier::Restore, "each of them is replaced, and the next may work");
        tiers.failed(Tier::Restore, at(0.0), "store down");
        assert_eq!(tiers.usual(), Tier::Cold);
        (0..3).for_each(|_| assert_eq!(tiers.choose(at(2.0)), Some(Tier::Cold), "one for each that failed"));
        assert_eq!(tiers.choose(at(2.0)), Some(Tier::Restore), "it is tried");
        assert_eq!(tiers.usual(), Tier::Cold, "and has not served yet");
        tiers.started(Tier::Restore);
        assert_eq!(tiers.usual(), Tier::Restore);
        let mut alone = Tiers::new(false);
        (0..3).for_each(|_| alone.failed(Tier::Restore, at(0.0), "store down"));
        assert_eq!(alone.usual(), Tier::Restore, "there is no other");
    }

    #[test]
    fn wakes_that_fail_have_a_circuit_of_their_own() {
        let mut tiers = Tiers::new(true);
        for _ in 0..2 {
            tiers.failed(Tier::Wake, at(0.0), "its device is gone");
            assert!(tiers.wakes(at(0.0)));
        }
        for (now, until) in [(0.0, 1.0), (1.0, 3.0)] {
            tiers.failed(Tier::Wake, at(now), "its device is gone");
            assert_eq!((tiers.wakes(at(now)), tiers.wakes(at(until))), (false, true));
            assert_eq!((tiers.open(at(now)), tiers.choose(at(now))), (None, Some(Tier::Restore)));
            assert_eq!(
                tiers.degraded(at(now)).map(|open| open.reason),
                Some("its device is gone".to_owned())
            );
        }
        tiers.started(Tier::Wake);
        tiers.failed(Tier::Wake, at(9.0), "its device is gone");
        assert!(tiers.wakes(at(9.0)), "one worked in between");
    }
}
