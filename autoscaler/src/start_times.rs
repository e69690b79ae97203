//! How long starts take: what was configured or guessed until enough was measured, then what nine of ten keep to.

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
    guess: StartSeconds,
    wakes: Measured,
    restores: Measured,
    colds: Measured,
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
    pub fn new(guess: StartSeconds) -> Self {
        Self { guess, wakes: Measured::default(), restores: Measured::default(), colds: Measured::default() }
    }

    /// More is known before anything is measured; what was measured counts more.
    pub fn guess(&mut self, guess: StartSeconds) {
        self.guess = guess;
    }

    /// Another snapshot is restored from now on. It is still the same server that is started cold.
    pub fn replaced(&mut self) {
        (self.wakes, self.restores) = Default::default();
    }

    /// A start took so long.
    pub fn record(&mut self, tier: Tier, seconds: f64) {
        match tier {
            Tier::Wake => self.wakes.record(seconds),
            Tier::Restore => self.restores.record(seconds),
            Tier::Cold => self.colds.record(seconds),
        }
    }

    /// What a start of this tier will take, in seconds.
    #[must_use]
    pub fn of(&self, tier: Tier) -> f64 {
        match tier {
            Tier::Wake => self.wakes.high.unwrap_or(self.guess.wake),
            Tier::Restore => self.restores.high.unwrap_or(self.guess.restore),
            Tier::Cold => self.colds.high.unwrap_or(self.guess.restore),
        }
    }

    /// What a policy is to reckon with while `tier` is what makes replicas from nothing: a cold start of a minute says nothing
    /// about the restores that are possible again.
    #[must_use]
    pub fn expected(&self, tier: Tier) -> StartSeconds {
        StartSeconds { wake: self.of(Tier::Wake), restore: self.of(tier) }
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
    fn the_guess_counts_until_enough_was_measured() {
        let mut times = StartTimes::new(StartSeconds { wake: 0.5, restore: 5.0 });
        for seconds in [1.0, 2.0, 3.0, 4.0] {
            times.record(Tier::Restore, seconds);
        }
        assert_eq!(times.of(Tier::Restore), 5.0);
        times.guess(StartSeconds { wake: 0.6, restore: 6.0 });
        assert_eq!(times.of(Tier::Restore), 6.0);
        times.record(Tier::Restore, 2.0);
        assert_eq!(times.expected(Tier::Restore), StartSeconds { wake: 0.6, restore: 4.0 });
        for _ in 0..40 {
            times.record(Tier::Restore, 1.0);
        }
        assert_eq!(times.of(Tier::Restore), 1.0);
    }

    #[test]
    fn cold_starts_say_nothing_about_restores() {
        let mut times = StartTimes::new(StartSeconds { wake: 0.5, restore: 5.0 });
        for (tier, seconds) in [(Tier::Restore, 0.4), (Tier::Cold, 60.0), (Tier::Wake, 0.01)] {
            (0..5).for_each(|_| times.record(tier, seconds));
        }
        assert_eq!(times.expected(Tier::Restore), StartSeconds { wake: 0.01, restore: 0.4 });
        assert_eq!(times.expected(Tier::Cold), StartSeconds { wake: 0.01, restore: 60.0 });
        times.replaced();
        assert_eq!(times.expected(Tier::Restore), StartSeconds { wake: 0.5, restore: 5.0 });
        assert_eq!(times.of(Tier::Cold), 60.0);
    }
}
