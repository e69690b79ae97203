//! Points in time, counted from the beginning of a run. The live loop and the simulator share them; nothing here reads a clock.

use std::ops::Add;
use std::time::Duration;

/// Nanoseconds since the beginning of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(u64);

impl Moment {
    /// The beginning of the run.
    pub const START: Moment = Moment(0);
    /// Later than everything.
    pub const NEVER: Moment = Moment(u64::MAX);

    /// So many nanoseconds after the beginning.
    #[must_use]
    pub fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// So many seconds after the beginning; negative ones are the beginning.
    #[must_use]
    pub fn from_seconds(seconds: f64) -> Self {
        Self((seconds * 1e9).round() as u64)
    }

    /// Seconds after the beginning.
    #[must_use]
    pub fn seconds(self) -> f64 {
        self.0 as f64 / 1e9
    }

    /// Nanoseconds after the beginning.
    #[must_use]
    pub fn nanos(self) -> u64 {
        self.0
    }

    /// Whole seconds after the beginning.
    #[must_use]
    pub fn whole_seconds(self) -> u64 {
        self.0 / 1_000_000_000
    }

    /// The time that has passed since `earlier`; zero where that is later.
    #[must_use]
    pub fn since(self, earlier: Moment) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// As [`Moment::since`], in seconds.
    #[must_use]
    pub fn seconds_since(self, earlier: Moment) -> f64 {
        self.0.saturating_sub(earlier.0) as f64 / 1e9
    }

    /// The first multiple of `step` after this moment.
    #[must_use]
    pub fn next_multiple_of(self, step: Duration) -> Moment {
        let step = nanos(step).max(1);
        Moment((self.0 / step + 1).saturating_mul(step))
    }
}

impl Add<Duration> for Moment {
    type Output = Moment;

    fn add(self, time: Duration) -> Moment {
        Moment(self.0.saturating_add(nanos(time)))
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multiples_are_later() {
        let step = Duration::from_millis(250);
        assert_eq!(Moment::START.next_multiple_of(step), Moment::from_seconds(0.25));
        assert_eq!(Moment::from_seconds(0.25).next_multiple_of(step), Moment::from_seconds(0.5));
        assert_eq!(Moment::from_seconds(0.3).next_multiple_of(step), Moment::from_seconds(0.5));
    }

    #[test]
    fn nothing_overflows() {
        assert_eq!(Moment::NEVER + Duration::MAX, Moment::NEVER);
        assert_eq!(Moment::START.since(Moment::NEVER), Duration::ZERO);
        assert_eq!(Moment::from_seconds(-1.0), Moment::START);
    }
}
