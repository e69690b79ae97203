//! `tracker`: requests held and in flight, divided by a target, at every event and without delay. The strongest simple rival.
//!
//! Two settings let it come down more slowly: an average over the last seconds in place of the number itself (for going
//! down only: up is never late), and the highest decision of the last seconds.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Decision, Event, Policy, Reason, View};
use crate::moment::Moment;

/// How often it looks while nothing happens but time.
const TICK: Duration = Duration::from_millis(250);

/// Its settings.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Share of a replica's slots that it aims at.
    pub utilization: f64,
    /// Seconds over which requests are averaged; 0: the number itself.
    pub look_back: Duration,
    /// For how long the highest decision holds.
    pub down_delay: Duration,
    /// Whether a draining replica is taken back. Kubernetes and Ray, whose trackers this stands for, cannot.
    pub undrain: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { utilization: 0.8, look_back: Duration::ZERO, down_delay: Duration::ZERO, undrain: false }
    }
}

/// The policy.
#[derive(Debug)]
pub struct Tracker {
    settings: Settings,
    average: Average,
    /// Decisions that none after them reached, oldest and highest first.
    highest: VecDeque<(Moment, u32)>,
}

impl Tracker {
    /// With these settings.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { settings, average: Average::new(settings.look_back), highest: VecDeque::new() }
    }
}

impl Policy for Tracker {
    fn note(&mut self, now: Moment, _event: Event, requests: u32) {
        self.average.note(now, requests);
    }

    fn decide(&mut self, view: &View<'_>, _event: Event) -> Option<Decision> {
        let target = self.settings.utilization * f64::from(view.limits.concurrency);
        let requests = f64::from(view.requests()).max(self.average.over_window(view.now));
        let now = (requests / target).ceil() as u32;
        while self.highest.back().is_some_and(|(_, wanted)| *wanted <= now) {
            self.highest.pop_back();
        }
        self.highest.push_back((view.now, now));
        while self.highest.front().is_some_and(|(at, _)| *at + self.settings.down_delay < view.now) {
            self.highest.pop_front();
        }
        let highest = self.highest.front().map_or(now, |(_, wanted)| *wanted).max(now);
        let reason = if highest > now {
            Reason::Delayed { now, highest }
        } else {
            Reason::Target { requests, target }
        };
        Some(Decision { wanted: highest, reason })
    }

    fn timer(&self, view: &View<'_>) -> Option<Moment> {
        (view.pool.active() > 0 || view.requests() > 0).then(|| view.now.next_multiple_of(TICK))
    }

    fn undrains(&self) -> bool {
        self.settings.undrain
    }
}

/// The average of a step function over a window that moves along.
#[derive(Debug)]
struct Average {
    window: Duration,
    /// Value from each moment on, oldest first; the first may have begun before the window.
    steps: VecDeque<(Moment, u32)>,
    /// Integral from the first step to the last, in requests times seconds.
    area: f64,
}

impl Average {
    fn new(window: Duration) -> Self {
        Self { window, steps: VecDeque::from([(Moment::START, 0)]), area: 0.0 }
    }

    fn note(&mut self, now: Moment, value: u32) {
        if self.window.is_zero() {
            return;
        }
        let (at, last) = *self.steps.back().expect("one step is always kept");
        self.area += f64::from(last) * now.seconds_since(at);
        self.steps.push_back((now, value));
        self.forget(now);
    }

    /// Drops steps that ended before the window.
    fn forget(&mut self, now: Moment) {
        while self.steps.len() > 1 && self.steps[1].0 + self.window <= now {
            let (from, value) = self.steps.pop_front().expect("two steps");
            self.area -= f64::from(value) * self.steps[0].0.seconds_since(from);
        }
    }

    fn over_window(&mut self, now: Moment) -> f64 {
        if self.window.is_zero() {
            return 0.0;
        }
        self.forget(now);
        let (first, oldest) = self.steps[0];
        let (at, last) = *self.steps.back().expect("one step is always kept");
        let window_s = self.window.as_secs_f64();
        let outside = f64::from(oldest) * (now.seconds_since(first) - window_s).max(0.0);
        ((self.area + f64::from(last) * now.seconds_since(at) - outside) / window_s).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64) -> Moment {
        Moment::from_seconds(seconds)
    }

    #[test]
    fn the_average_is_that_of_the_window() {
        let mut average = Average::new(Duration::from_secs(4));
        average.note(at(1.0), 8);
        assert_eq!(average.over_window(at(1.0)), 0.0);
        assert_eq!(average.over_window(at(3.0)), 4.0);
        average.note(at(3.0), 0);
        assert_eq!(average.over_window(at(5.0)), 4.0);
        assert_eq!(average.over_window(at(6.0)), 2.0);
        average.note(at(6.0), 4);
        assert_eq!(average.over_window(at(6.0)), 2.0);
        assert_eq!(average.over_window(at(7.0)), 1.0);
        assert_eq!(average.over_window(at(20.0)), 4.0);
    }
}
