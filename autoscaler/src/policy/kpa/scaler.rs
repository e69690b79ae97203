//! Knative's decision itself: averages in, wanted replicas out. Equal to the real one in every decision of `tests/kpa/`.

use std::collections::VecDeque;
use std::time::Duration;

use super::windows::{Aggregation, Window};
use crate::moment::Moment;

/// Seconds that one slot of the scale-down delay covers; Knative's tick.
const SLOT_SECONDS: u64 = 2;

/// What Knative's configuration and annotations amount to for one revision.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Requests in flight that one replica is meant to have: at least 0.01.
    pub target: f64,
    /// Requests in flight that one replica can have.
    pub total: f64,
    /// Length of the stable window in seconds.
    pub stable_window_s: u32,
    /// Length of the panic window in whole seconds, at least 1.
    pub panic_window_s: u32,
    /// How many times the ready replicas must be wanted for a panic.
    pub panic_threshold: f64,
    /// At most so many times the ready replicas in one decision.
    pub max_scale_up_rate: f64,
    /// At least the ready replicas divided by this in one decision.
    pub max_scale_down_rate: f64,
    /// For how long the highest decision holds.
    pub scale_down_delay: Duration,
    /// At least so many replicas where any are wanted; 0 and 1 mean nothing.
    pub activation_scale: u32,
    /// Burst that a revision should take without the activator; -1: always by the activator.
    pub target_burst_capacity: f64,
    /// Whether a route leads to the revision.
    pub reachable: bool,
    /// Fewest replicas.
    pub min_scale: u32,
    /// Most replicas; 0: no limit.
    pub max_scale: u32,
    /// How the windows weigh their seconds.
    pub aggregation: Aggregation,
}

impl Settings {
    /// Without scraping (burst capacity -1) no data means a load of zero, and no decision is ever invalid.
    fn scraped(&self) -> bool {
        self.target_burst_capacity != -1.0
    }
}

/// A valid decision.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Wanted {
    /// Average over the stable window.
    pub stable: f64,
    /// Average over the panic window.
    pub panic: f64,
    /// Replicas, before the limits.
    pub desired: u32,
    /// Replicas, within the limits.
    pub bounded: u32,
    /// Excess burst capacity; below zero the activator stays in the path.
    pub excess_burst_capacity: i32,
}

/// The autoscaler of one revision.
#[derive(Debug, Clone)]
pub struct Scaler {
    settings: Settings,
    stable: Window,
    panic: Window,
    /// When the panic was entered or last extended.
    panic_since: Option<Moment>,
    panic_replicas_max: u32,
    /// Decisions by slot of the scale-down delay, newest last.
    delayed: VecDeque<(u64, u32)>,
}

impl Scaler {
    /// An autoscaler that is started while so many replicas are ready. One that finds several begins in a panic.
    #[must_use]
    pub fn new(settings: Settings, ready: u32) -> Self {
        Self {
            stable: Window::new(settings.stable_window_s, settings.aggregation),
            panic: Window::new(settings.panic_window_s, settings.aggregation),
            panic_since: (ready > 1).then_some(Moment::START),
            panic_replicas_max: ready,
            delayed: VecDeque::new(),
            settings,
        }
    }

    /// Takes in the average concurrency that was reported at this moment. Several reports of one second add up.
    pub fn record(&mut self, at: Moment, concurrency: f64) {
        self.stable.record(at, concurrency);
        self.panic.record(at, concurrency);
    }

    /// Whether it is panicking.
    #[must_use]
    pub fn panicking(&self) -> bool {
        self.panic_since.is_some()
    }

    /// The most replicas wanted in this panic.
    #[must_use]
    pub fn panic_replicas_max(&self) -> u32 {
        self.panic_replicas_max
    }

    /// Decides; nothing where there are no data, and then nothing changes either.
    pub fn decide(&mut self, now: Moment, ready: u32) -> Option<Wanted> {
        let settings = &self.settings;
        if settings.scraped() && self.stable.is_empty(now) {
            return None;
        }
        let (stable, panic) = (self.stable.average(now), self.panic.average(now));
        let base = f64::from(ready.max(1));
        let up = (settings.max_scale_up_rate * base).ceil();
        let down = if settings.reachable { (base / settings.max_scale_down_rate).floor() } else { 0.0 };
        let (by_stable, by_panic) = ((stable / settings.target).ceil(), (panic / settings.target).ceil());
        let stable_replicas = raised(by_stable.max(down).min(up), by_stable, settings.activation_scale);
        let panic_replicas = raised(by_panic.max(down).min(up), by_panic, settings.activation_scale);

        let over = by_panic / base >= settings.panic_threshold;
        let window = Duration::from_secs(u64::from(settings.stable_window_s));
        if over {
            self.panic_since = Some(now);
        } else if self.panic_since.is_some_and(|since| since + window < now) {
            self.panic_since = None;
            self.panic_replicas_max = 0;
        }
        let mut desired = stable_replicas as u32;
        if self.panic_since.is_some() {
            self.panic_replicas_max = self.panic_replicas_max.max(desired).max(panic_replicas as u32);
            desired = self.panic_replicas_max;
        }
        if settings.reachable && !settings.scale_down_delay.is_zero() {
            desired = self.delay(now, desired);
        }
        let settings = &self.settings;
        Some(Wanted {
            stable,
            panic,
            desired,
            bounded: bounded(desired, settings.min_scale, settings.max_scale),
            excess_burst_capacity: excess_burst_capacity(settings, ready, panic),
        })
    }

    /// The highest decision of the delay's slots, this one included.
    fn delay(&mut self, now: Moment, desired: u32) -> u32 {
        let slots = self.settings.scale_down_delay.as_secs_f64() / SLOT_SECONDS as f64;
        let slots = slots.ceil() as u64;
        let slot = now.whole_seconds() / SLOT_SECONDS;
        match self.delayed.back_mut() {
            Some((last, highest)) if *last == slot => *highest = (*highest).max(desired),
            _ => self.delayed.push_back((slot, desired)),
        }
        while self.delayed.front().is_some_and(|(first, _)| first + slots <= slot) {
            self.delayed.pop_front();
        }
        self.delayed.iter().map(|(_, desired)| *desired).max().unwrap_or(desired)
    }
}

/// The activation scale counts where anything is wanted before the clamp, and may exceed the clamp.
fn raised(clamped: f64, unclamped: f64, activation_scale: u32) -> f64 {
    if activation_scale > 1 && unclamped > 0.0 { clamped.max(f64::from(activation_scale)) } else { clamped }
}

fn bounded(desired: u32, min: u32, max: u32) -> u32 {
    if desired < min {
        min
    } else if max > 0 && desired > max {
        max
    } else {
        desired
    }
}

/// Uses the ready replicas as they are, which may be none.
fn excess_burst_capacity(settings: &Settings, ready: u32, panic: f64) -> i32 {
    let wanted = settings.target_burst_capacity;
    if wanted == 0.0 {
        0
    } else if wanted == -1.0 {
        -1
    } else {
        (f64::from(ready) * settings.total - wanted - panic).floor() as i32
    }
}
