//! `kpa`: the Knative Pod Autoscaler, with its own signal path.
//!
//! The decision itself is [`scaler`], equal to the real one in every recorded case. Around it stands what Knative does with
//! requests and decisions: the average concurrency of each second is reported once a second, decisions fall every two
//! seconds, the first request after zero is pushed and decided at once, and the last replica is held before zero.

pub mod scaler;
pub mod windows;

use std::time::Duration;

use self::scaler::{Scaler, Settings as ScalerSettings, Wanted};
use self::windows::Aggregation;
use super::{Decision, Event, Policy, Reason, View};
use crate::moment::Moment;
use crate::steer::Victim;

const REPORT: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_secs(2);
/// Decisions come right after the reports of their second: the best phase that an autoscaler can have by chance.
const TICK_PHASE: Duration = Duration::from_millis(50);

/// Its settings; the defaults are Knative's.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Share of a replica's slots that it aims at.
    pub utilization: f64,
    /// Length of the stable window, in whole seconds.
    pub stable_window: Duration,
    /// Length of the panic window, in percent of the stable one.
    pub panic_window_percentage: f64,
    /// When it panics, in percent of the ready replicas.
    pub panic_threshold_percentage: f64,
    /// At most so many times the ready replicas in one decision.
    pub max_scale_up_rate: f64,
    /// At least the ready replicas divided by this in one decision.
    pub max_scale_down_rate: f64,
    /// For how long the highest decision holds.
    pub scale_down_delay: Duration,
    /// At least so many replicas where any are wanted.
    pub activation_scale: u32,
    /// Burst that should be taken without the activator.
    pub target_burst_capacity: f64,
    /// How long the last replica is held once it is inactive, unless the activator was in the path that long.
    pub grace: Duration,
    /// How the windows weigh their seconds.
    pub aggregation: Aggregation,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            utilization: 0.7,
            stable_window: Duration::from_secs(60),
            panic_window_percentage: 10.0,
            panic_threshold_percentage: 200.0,
            max_scale_up_rate: 1000.0,
            max_scale_down_rate: 2.0,
            scale_down_delay: Duration::ZERO,
            activation_scale: 0,
            target_burst_capacity: 211.0,
            grace: Duration::from_secs(30),
            aggregation: Aggregation::Linear,
        }
    }
}

/// The policy.
#[derive(Debug)]
pub struct Kpa {
    settings: Settings,
    scaler: Scaler,
    /// Requests now, since when, and their integral since the last report.
    requests: u32,
    changed: Moment,
    area: f64,
    /// Requests that the push of a first one has told already.
    pushed: f64,
    /// Whether a first request was pushed just now.
    poke: bool,
    /// Whether the activator knows the revision, that is, reports about it.
    known: bool,
    reported: Moment,
    next_report: Moment,
    next_tick: Moment,
    /// The last valid decision.
    last: u32,
    /// Since when more than zero replicas have been wanted.
    active_since: Option<Moment>,
    inactive_since: Option<Moment>,
    /// Since when the activator has been in the path.
    proxied_since: Option<Moment>,
}

impl Kpa {
    /// For a revision at zero whose pool has these limits.
    #[must_use]
    pub fn new(settings: Settings, concurrency: u32) -> Self {
        let total = f64::from(concurrency);
        let stable_window_s = settings.stable_window.as_secs_f64().round().max(1.0) as u32;
        let panic_window_s = f64::from(stable_window_s) * settings.panic_window_percentage / 100.0;
        let scaler = ScalerSettings {
            target: (total * settings.utilization).max(0.01),
            total,
            stable_window_s,
            panic_window_s: panic_window_s.round().max(1.0) as u32,
            panic_threshold: settings.panic_threshold_percentage / 100.0,
            max_scale_up_rate: settings.max_scale_up_rate,
            max_scale_down_rate: settings.max_scale_down_rate,
            scale_down_delay: settings.scale_down_delay,
            activation_scale: settings.activation_scale,
            target_burst_capacity: settings.target_burst_capacity,
            reachable: true,
            min_scale: 0,
            max_scale: 0,
            aggregation: settings.aggregation,
        };
        Self {
            settings,
            scaler: Scaler::new(scaler, 0),
            requests: 0,
            changed: Moment::START,
            area: 0.0,
            pushed: 0.0,
            poke: false,
            known: false,
            reported: Moment::START,
            next_report: Moment::START + REPORT,
            next_tick: Moment::START + TICK + TICK_PHASE,
            last: 0,
            active_since: None,
            inactive_since: None,
            proxied_since: Some(Moment::START),
        }
    }

    fn integrate(&mut self, now: Moment) {
        self.area += f64::from(self.requests) * now.seconds_since(self.changed);
        self.changed = now;
    }

    /// What activator and replicas report together each second. At zero replicas only the activator does, and it forgets a
    /// revision about which it had nothing to say.
    fn report(&mut self, now: Moment, ready: u32) {
        self.integrate(now);
        // Of a second, unless it was looked late.
        let time = now.seconds_since(self.reported).max(REPORT.as_secs_f64());
        self.reported = now;
        let average = std::mem::take(&mut self.area) / time;
        if self.known || ready > 0 {
            self.scaler.record(now, (average - std::mem::take(&mut self.pushed)).max(0.0));
        }
        self.known = self.requests > 0 || (self.known && average > 0.0);
    }

    fn tick(&mut self, view: &View<'_>) -> Option<Decision> {
        let wanted = self.scaler.decide(view.now, view.pool.serving())?;
        let proxied = wanted.excess_burst_capacity < 0 || wanted.desired == 0;
        self.proxied_since = if proxied { self.proxied_since.or(Some(view.now)) } else { None };
        self.last = wanted.desired;
        let reason = Reason::Windows {
            stable: wanted.stable,
            panic: wanted.panic,
            panicking: self.scaler.panicking(),
        };
        Some(self.towards_zero(view, wanted, reason))
    }

    /// Zero only after the revision was active for a stable window, and inactive or proxied for the grace period.
    fn towards_zero(&mut self, view: &View<'_>, wanted: Wanted, reason: Reason) -> Decision {
        let now = view.now;
        if wanted.bounded > 0 {
            self.inactive_since = None;
            self.active_since = self.active_since.or(Some(now));
            return Decision { wanted: wanted.bounded, reason };
        }
        let Some(active) = self.active_since else { return Decision { wanted: 0, reason } };
        let hold = Decision { wanted: 1, reason: Reason::HoldAtOne };
        if now.since(active) < self.settings.stable_window {
            return hold;
        }
        let inactive = *self.inactive_since.get_or_insert(now);
        let proxied = self.proxied_since.is_some_and(|since| now.since(since) >= self.settings.grace);
        if !proxied && now.since(inactive) < self.settings.grace {
            return hold;
        }
        self.active_since = None;
        self.inactive_since = None;
        Decision { wanted: 0, reason }
    }
}

impl Policy for Kpa {
    fn note(&mut self, now: Moment, event: Event, requests: u32) {
        self.integrate(now);
        self.requests = requests;
        if event == Event::Arrival && !self.known {
            self.known = true;
            self.pushed = 1.0;
            self.poke = true;
            self.scaler.record(now, 1.0);
        }
    }

    fn decide(&mut self, view: &View<'_>, event: Event) -> Option<Decision> {
        // The push of a first request is decided at once, but only if the last valid decision was zero.
        if std::mem::take(&mut self.poke) && self.last == 0 {
            return self.tick(view);
        }
        if event != Event::Timer {
            return None;
        }
        if view.now >= self.next_report {
            self.report(view.now, view.pool.serving());
            // Not one for each second that was missed: a pool may be given this policy long after its process began.
            self.next_report = view.now.next_multiple_of(REPORT);
        }
        if view.now >= self.next_tick {
            while self.next_tick <= view.now {
                self.next_tick = self.next_tick + TICK;
            }
            return self.tick(view);
        }
        None
    }

    fn timer(&self, _view: &View<'_>) -> Option<Moment> {
        Some(self.next_report.min(self.next_tick))
    }

    fn victim(&self) -> Victim {
        Victim::Newest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Ledger, Memory};
    use crate::policy::{Limits, StartSeconds};
    use crate::pool::{Pool, Shape, Tier};

    /// What is decided when, in the time of a pool with one replica that serves from the first second on. One request comes at
    /// 0.5 s and is answered at `answered`.
    fn timeline(settings: Settings, answered: f64) -> Vec<(f64, u32, bool)> {
        let (mut kpa, memory) = (Kpa::new(settings, 8), Memory::default());
        let shape = Shape { concurrency: 8, max: 16, warm: 0, serving: memory, paused: memory };
        let mut pool = Pool::new(shape, Ledger::new(Memory::UNLIMITED));
        let limits = Limits { concurrency: 8, min: 0, max: 16, target_wait: Duration::from_secs(1) };
        let mut held = std::collections::VecDeque::new();
        let (mut decisions, mut replica) = (Vec::new(), None);
        let mut look = |kpa: &mut Kpa, now: Moment, event, pool: &Pool, held: &_| {
            let start = StartSeconds { wake: 0.1, restore: 1.0 };
            let view = View { now, pool, held, limits: &limits, start };
            if let Some(decision) = kpa.decide(&view, event) {
                let held_at_one = matches!(decision.reason, Reason::HoldAtOne);
                decisions.push((now.seconds_since(Moment::START), decision.wanted, held_at_one));
            }
            kpa.timer(&view).expect("it always looks again")
        };
        let came = Moment::from_seconds(0.5);
        held.push_back(came);
        kpa.note(came, Event::Arrival, 1);
        let mut next = look(&mut kpa, came, Event::Arrival, &pool, &held);
        while next < Moment::from_seconds(200.0) {
            if replica.is_none() && next >= Moment::from_seconds(1.0) {
                let id = pool.start(Tier::Restore, next).expect("memory");
                pool.started(id, next);
                replica = Some(id);
            }
            if !held.is_empty() && next >= Moment::from_seconds(answered) {
                held.clear();
                kpa.note(Moment::from_seconds(answered), Event::Finished { service: 1.0, early: false }, 0);
            }
            next = look(&mut kpa, next, Event::Timer, &pool, &held);
        }
        decisions
    }

    /// When first held at one, and when zero was wanted first, after anything else.
    fn end(timeline: &[(f64, u32, bool)]) -> (Option<f64>, Option<f64>) {
        let first = |so: fn(&(f64, u32, bool)) -> bool| timeline.iter().find(|d| so(d)).map(|d| d.0);
        (first(|(_, _, held)| *held), first(|(_, wanted, _)| *wanted == 0))
    }

    #[test]
    fn a_first_request_is_decided_at_once_and_everything_else_each_two_seconds() {
        let decisions = timeline(Settings::default(), 3.0);
        let first: Vec<_> = decisions.iter().take(3).map(|(at, wanted, _)| (*at, *wanted)).collect();
        assert_eq!(first, [(0.5, 1), (2.05, 1), (4.05, 1)]);
    }

    #[test]
    fn with_the_activator_in_the_path_for_long_there_is_no_grace() {
        // Nothing is left of the request in a window of 60 s.
        assert_eq!(end(&timeline(Settings::default(), 3.0)), (None, Some(64.05)));
    }

    #[test]
    fn without_it_one_replica_is_held_for_the_grace_period() {
        let settings = Settings { target_burst_capacity: 0.0, ..Settings::default() };
        assert_eq!(end(&timeline(settings, 3.0)), (Some(64.05), Some(94.05)));
        let short = Settings { grace: Duration::from_secs(6), ..settings };
        assert_eq!(end(&timeline(short, 3.0)), (Some(64.05), Some(70.05)));
    }

    #[test]
    fn one_replica_is_held_until_the_revision_was_active_for_a_stable_window() {
        // Zero is wanted first when it has been active for 59.55 s.
        let settings = Settings { grace: Duration::ZERO, ..Settings::default() };
        assert_eq!(end(&timeline(settings, 0.6)), (Some(60.05), Some(62.05)));
    }
}
