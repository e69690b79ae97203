//! How long starts of this pool take: what is reckoned with before any is known, and from when on one takes too long.
//!
//! Each tier has its own limit. A cold start takes many times as long as a restore; by the limit of restores it would be ended
//! each time, just when nothing else is to be had, and by that of cold starts a restore that hangs would be waited for.

use std::collections::VecDeque;
use std::time::Duration;

use rewarm_autoscaler::policy::StartSeconds;
use rewarm_autoscaler::pool::Tier;

use crate::replicas::Known;

/// What starts are expected to take before anything is known, in seconds.
pub(super) const FIRST_GUESS: StartSeconds = StartSeconds { wake: 0.1, restore: 1.0 };
/// What a restore takes without bytes, in seconds: sandbox, runc and CRIU, comparing answers.
const RESTORE_S: f64 = 0.2;
/// Bytes that a restore moves in a second, as long as nothing was measured. Folders and the decoded cache give two to four times
/// as much, buckets a third (docs/benchmarks.md).
const RESTORE_BYTES_PER_S: f64 = (1_u64 << 30) as f64;
/// The same for what a wake moves onto devices: what drivers do without pinned memory, or half of it.
const WAKE_BYTES_PER_S: f64 = 5e9;

/// How many measured starts of each tier are remembered.
const TOOK_MAX: usize = 200;
/// Fewer measured starts than this say nothing about the slowest ones.
const STARTS_KNOWN: usize = 20;
/// A start that takes so many times as long as the slowest of a hundred is failed.
const START_PATIENCE: f64 = 3.0;
/// What a busy machine is allowed, however fast its starts were before.
const LIMIT_MIN: Duration = Duration::from_secs(1);

/// What starts from this snapshot are expected to take before any was measured. Never less than of an unknown one: too long a
/// guess costs a replica at most, too short a one lets requests wait.
pub(super) fn first_guess(known: &Known) -> StartSeconds {
    let (host, device) = (known.host_bytes as f64, known.device_bytes as f64);
    let restore = RESTORE_S + (host + device) / RESTORE_BYTES_PER_S;
    StartSeconds {
        wake: FIRST_GUESS.wake + device / WAKE_BYTES_PER_S,
        restore: restore.max(FIRST_GUESS.restore),
    }
}

/// What the last starts of each tier took.
#[derive(Debug, Default)]
pub(super) struct Took {
    wakes: Starts,
    restores: Starts,
    colds: Starts,
}

#[derive(Debug, Default)]
struct Starts {
    seconds: VecDeque<f64>,
    /// How many in a row have taken too long.
    late: u32,
}

impl Took {
    fn of(&mut self, tier: Tier) -> &mut Starts {
        match tier {
            Tier::Wake => &mut self.wakes,
            Tier::Restore => &mut self.restores,
            Tier::Cold => &mut self.colds,
        }
    }

    pub(super) fn record(&mut self, tier: Tier, seconds: f64) {
        let took = self.of(tier);
        took.late = 0;
        if took.seconds.len() == TOOK_MAX {
            took.seconds.pop_front();
        }
        took.seconds.push_back(seconds);
    }

    /// A start of this tier was ended because it took too long.
    pub(super) fn late(&mut self, tier: Tier) {
        self.of(tier).late += 1;
    }

    /// How long a start of this tier may take: so long as `unknown` while too few are known, else by what they took. Each one that
    /// takes too long gives the next twice the time, up to `unknown`: starts that have become slower for good (what was decoded is
    /// not any more, the store is far) would be ended for ever.
    pub(super) fn limit(&self, tier: Tier, unknown: Duration) -> Duration {
        let Starts { seconds, late } = match tier {
            Tier::Wake => &self.wakes,
            Tier::Restore => &self.restores,
            Tier::Cold => &self.colds,
        };
        if seconds.len() < STARTS_KNOWN {
            return unknown;
        }
        let mut sorted: Vec<f64> = seconds.iter().copied().collect();
        sorted.sort_unstable_by(f64::total_cmp);
        let slowest = sorted[(sorted.len() * 99).div_ceil(100) - 1];
        let limit = Duration::from_secs_f64(slowest * START_PATIENCE).max(LIMIT_MIN);
        limit.saturating_mul(1 << late.min(&16)).min(unknown.max(limit))
    }

    /// Another snapshot is restored from now on, which may be many times as large.
    pub(super) fn replaced(&mut self) {
        (self.wakes, self.restores) = Default::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(host_bytes: u64, device_bytes: u64) -> Known {
        Known { source: "s3://models/p@sha".to_owned(), host_bytes, device_bytes, port: None, fits: true }
    }

    const UNKNOWN: Duration = Duration::from_secs(7);

    fn after(tier: Tier, seconds: &[f64]) -> Took {
        let mut took = Took::default();
        seconds.iter().for_each(|seconds| took.record(tier, *seconds));
        took
    }

    #[test]
    fn the_first_guess_grows_with_the_bytes_that_are_moved() {
        let (mib, gib) = (1 << 20, 1 << 30);
        assert_eq!(first_guess(&known(10 * mib, 0)), FIRST_GUESS);
        let large = first_guess(&known(4 * gib, 0));
        assert!((large.restore - 4.2).abs() < 1e-9, "{large:?}");
        assert!((large.wake - FIRST_GUESS.wake).abs() < 1e-9, "a wake moves no host memory: {large:?}");
        let device = first_guess(&known(4 * gib, 10_000_000_000));
        assert!((device.wake - 2.1).abs() < 1e-9, "{device:?}");
        assert!(device.restore > large.restore + 9.0, "{device:?}");
    }

    #[test]
    fn once_enough_starts_of_a_tier_are_known_one_may_take_three_times_as_long_as_the_slowest_of_a_hundred() {
        let limit = |tier: Tier, seconds: &[f64]| {
            let took = after(tier, seconds);
            let others = [Tier::Wake, Tier::Restore, Tier::Cold].into_iter().filter(|other| *other != tier);
            assert!(
                others.map(|other| took.limit(other, UNKNOWN)).all(|limit| limit == UNKNOWN),
                "{tier:?} alone"
            );
            took.limit(tier, UNKNOWN).as_secs_f64()
        };
        let seconds = |count: u32| (1..=count).map(f64::from).collect::<Vec<_>>();
        for tier in [Tier::Wake, Tier::Restore, Tier::Cold] {
            assert_eq!(limit(tier, &seconds(19)), 7.0, "too few are known");
            assert_eq!(limit(tier, &seconds(20)), 60.0, "three times 20 s");
            assert_eq!(limit(tier, &seconds(200)), 594.0, "two of two hundred were slower");
            assert_eq!(limit(tier, &seconds(300)), 894.0, "the last two hundred are remembered");
            assert_eq!(limit(tier, &[0.01; 50]), 1.0, "a busy machine is allowed a second");
        }
    }

    #[test]
    fn starts_that_have_become_slower_are_let_come_in_the_end() {
        let mut took = after(Tier::Restore, &[0.1; 30]);
        let limits = [2.0, 4.0, 7.0, 7.0].map(|_| {
            took.late(Tier::Restore);
            took.limit(Tier::Restore, UNKNOWN).as_secs_f64()
        });
        assert_eq!(limits, [2.0, 4.0, 7.0, 7.0]);
        assert_eq!(
            took.limit(Tier::Restore, Duration::ZERO),
            LIMIT_MIN,
            "never less than by what was measured"
        );
        took.record(Tier::Restore, 5.0);
        assert_eq!(took.limit(Tier::Restore, UNKNOWN), Duration::from_secs(15));
    }
}
