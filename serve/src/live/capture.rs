//! A tag that heals itself: where no variant of the snapshot fits this machine, one is made here.
//!
//! What is held and what is asked meanwhile is answered by cold replicas. The one that is captured never serves anybody, and
//! is begun only when nobody waits: its start would take the machine from those who do. It is not in the book, because no
//! policy should count on it; the memory that it takes is.

use std::time::Duration;

use rewarm_autoscaler::ledger::Hold;
use rewarm_autoscaler::moment::Moment;

use super::inner::Inner;
use super::members::random;
use crate::link::ToParent;

/// How long after a failure it is tried again, the first time and at most.
const REST: Duration = Duration::from_secs(60);
const REST_MAX: Duration = Duration::from_secs(3600);

/// What is known of captures.
#[derive(Debug, Default)]
pub(super) struct Capture {
    running: Option<(String, Hold)>,
    failures: u32,
    not_before: Option<Moment>,
}

impl Capture {
    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    fn failed(&mut self, now: Moment) {
        let rest = REST.saturating_mul(1 << self.failures.min(16)).min(REST_MAX);
        self.failures += 1;
        self.not_before = Some(now + rest);
    }
}

impl Inner {
    /// Whether this is what is captured.
    pub(super) fn captures(&self, name: &str) -> bool {
        self.capture.running.as_ref().is_some_and(|(running, _)| running == name)
    }

    /// Whether the snapshot needs a variant that fits, and nothing is done about that.
    fn capture_missing(&self) -> bool {
        self.config.capture
            && self.known.as_ref().is_some_and(|known| !known.fits)
            && !(self.capture.is_running() || self.finishing || self.paused)
    }

    /// When it is tried again.
    pub(super) fn capture_again(&self) -> Option<Moment> {
        self.capture.not_before.filter(|moment| *moment > self.now && self.capture_missing())
    }

    /// Begins a capture where one is needed and nothing is more urgent.
    pub(super) fn capture(&mut self) {
        let urgent = !self.queue.is_empty() || self.pool.starting() > 0 || self.shared.room.is_short();
        if !self.capture_missing() || urgent || self.capture_again().is_some() {
            return;
        }
        // Where memory is short, replicas that serve are worth more.
        let Ok(hold) = self.shared.ledger.take(self.memory().0) else { return };
        let name = format!("{}-{:06x}", self.config.name, random());
        let snapshot = &self.config.snapshot;
        tracing::info!(
            pool = self.config.name,
            replica = name,
            snapshot,
            "no variant fits this machine: one is made"
        );
        self.capture.running = Some((name.clone(), hold));
        self.order(&ToParent::Capture { pool: self.config.name.clone(), name });
    }

    /// A capture is over.
    pub(super) fn captured(&mut self, name: &str, problem: Option<String>) {
        if self.captures(name) {
            self.capture.running = None;
        }
        match problem {
            None => {
                self.capture = Capture::default();
                self.replaced();
                tracing::info!(pool = self.config.name, "the snapshot has a variant that fits this machine");
            }
            Some(problem) => {
                self.capture.failed(self.now);
                tracing::warn!(pool = self.config.name, problem, "no variant was made");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capture_that_fails_rests_for_longer_and_longer() {
        let (mut capture, now) = (Capture::default(), Moment::from_seconds(1.0));
        for rest in [60.0, 120.0, 240.0] {
            capture.failed(now);
            assert_eq!(capture.not_before, Some(Moment::from_seconds(1.0 + rest)));
        }
        (0..40).for_each(|_| capture.failed(now));
        assert_eq!(capture.not_before, Some(Moment::from_seconds(3601.0)));
    }
}
