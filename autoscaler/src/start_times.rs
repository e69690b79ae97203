//! How long starts take: what was configured until enough was measured, then what nine of ten keep to.

use std::collections::VecDeque;

use crate::policy::StartSeconds;
use crate::pool::Tier;

/// Starts that are remembered of each tier: machines and stores change.
const REMEMBERED: usize = 32;
/// Fewer starts than this say nothing about nine of ten.
const ENOUGH: usize = 5;

/// Measured starts of each tier.
#[derive(Debug, Clone)]
pub struct StartTimes {
    expected: StartSeconds,
    wakes: Measured,
    restores: Measured,
}

#[derive(Debug, Clone, Default)]
struct Measured {
    seconds: VecDeque<f64>,
    /// The ninth of ten, kept because it is asked for at every event.
    high: Option<f64>,
}

impl StartTimes {
    /// Nothing measured yet.
    #[must_use]
    pub fn new(expected: StartSeconds) -> Self {
        Self { expected, wakes: Measured::default(), restores: Measured::default() }
    }

    /// A start took so long. Restores and cold starts are one tier here: at any time only one of them is to be had.
    pub fn record(&mut self, tier: Tier, seconds: f64) {
        match tier {
            Tier::Wake => self.wakes.record(seconds),
            Tier::Restore | Tier::Cold => self.restores.record(seconds),
        }
    }

    /// What a start will take.
    #[must_use]
    pub fn expected(&self) -> StartSeconds {
        StartSeconds {
            wake: self.wakes.high.unwrap_or(self.expected.wake),
            restore: self.restores.high.unwrap_or(self.expected.restore),
        }
    }
}

impl Measured {
    fn record(&mut self, seconds: f64) {
        if self.seconds.len() == REMEMBERED {
            self.seconds.pop_front();
        }
        self.seconds.push_back(seconds);
        if self.seconds.len() >= ENOUGH {
            let mut sorted: Vec<f64> = self.seconds.iter().copied().collect();
            sorted.sort_unstable_by(f64::total_cmp);
            self.high = Some(sorted[(sorted.len() * 9).div_ceil(10) - 1]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configured_time_counts_until_enough_was_measured() {
        let mut times = StartTimes::new(StartSeconds { wake: 0.5, restore: 5.0 });
        for seconds in [1.0, 2.0, 3.0, 4.0] {
            times.record(Tier::Restore, seconds);
        }
        assert_eq!(times.expected().restore, 5.0);
        times.record(Tier::Restore, 2.0);
        assert_eq!(times.expected(), StartSeconds { wake: 0.5, restore: 4.0 });
        for _ in 0..40 {
            times.record(Tier::Restore, 1.0);
        }
        assert_eq!(times.expected().restore, 1.0);
    }
}
