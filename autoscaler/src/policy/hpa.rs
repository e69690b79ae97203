//! `hpa`: Kubernetes' horizontal pod autoscaler on requests held and in flight, with KEDA in front of it for the step from
//! and to zero.
//!
//! HPA looks every 15 s, tolerates 10 % around its target, at most doubles (or adds four), and goes down to the highest
//! recommendation of five minutes. KEDA pushes 0 -> 1 at the first request and goes back to zero at a poll after its
//! cooldown.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Decision, Event, Policy, Reason, View};
use crate::moment::Moment;

/// Its settings; the defaults are those of Kubernetes and KEDA.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Share of a replica's slots that it aims at.
    pub utilization: f64,
    /// Time between two looks.
    pub sync: Duration,
    /// Deviation from the target that changes nothing.
    pub tolerance: f64,
    /// For how long the highest recommendation holds.
    pub down_stabilization: Duration,
    /// How long nothing must be asked before zero.
    pub cooldown: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            utilization: 0.7,
            sync: Duration::from_secs(15),
            tolerance: 0.1,
            down_stabilization: Duration::from_secs(300),
            cooldown: Duration::from_secs(300),
        }
    }
}

/// The policy.
#[derive(Debug)]
pub struct Hpa {
    settings: Settings,
    replicas: u32,
    recommended: VecDeque<(Moment, u32)>,
    /// When something was in flight last.
    asked: Moment,
    next_sync: Moment,
}

impl Hpa {
    /// With these settings.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let next_sync = Moment::START + settings.sync;
        Self { settings, replicas: 0, recommended: VecDeque::new(), asked: Moment::START, next_sync }
    }

    /// Replicas that it did not ask for (the minimum, or those of a policy before it) are looked at from now on.
    fn take_over(&mut self, view: &View<'_>) {
        self.replicas = view.pool.active();
        if self.replicas > 0 {
            self.asked = view.now;
            self.recommended.clear();
            self.next_sync = view.now.next_multiple_of(self.settings.sync);
        }
    }

    fn sync(&mut self, view: &View<'_>) -> Decision {
        let now = view.now;
        let requests = f64::from(view.requests());
        let target = self.settings.utilization * f64::from(view.limits.concurrency);
        let ratio = requests / (target * f64::from(self.replicas));
        let within = (ratio - 1.0).abs() <= self.settings.tolerance;
        let raw = if within { self.replicas } else { ((requests / target).ceil() as u32).max(1) };
        let raw = raw.min(view.limits.max);
        self.recommended.push_back((now, raw));
        let window = self.settings.down_stabilization;
        while self.recommended.front().is_some_and(|(at, _)| *at + window < now) {
            self.recommended.pop_front();
        }
        // Down only to what nothing in the window asked to exceed; up by doubling or four.
        let highest = self.recommended.iter().map(|(_, replicas)| *replicas).max().unwrap_or(raw);
        let stabilized = if raw < self.replicas { highest.min(self.replicas) } else { raw };
        let limit = (self.replicas * 2).max(self.replicas + 4);
        self.replicas = stabilized.min(limit);
        let reason = if self.replicas > raw {
            Reason::Delayed { now: raw, highest: self.replicas }
        } else {
            Reason::Target { requests, target }
        };
        Decision { wanted: self.replicas, reason }
    }
}

impl Policy for Hpa {
    fn note(&mut self, now: Moment, _event: Event, requests: u32) {
        if requests > 0 {
            self.asked = now;
        }
    }

    fn decide(&mut self, view: &View<'_>, event: Event) -> Option<Decision> {
        if self.replicas == 0 {
            let held = view.held.len() as u32;
            if held == 0 {
                self.take_over(view);
                return None;
            }
            self.replicas = 1;
            self.recommended.clear();
            self.next_sync = view.now.next_multiple_of(self.settings.sync);
            return Some(Decision { wanted: 1, reason: Reason::Wakeup { held } });
        }
        if event != Event::Timer || view.now < self.next_sync {
            return None;
        }
        self.next_sync = view.now.next_multiple_of(self.settings.sync);
        if view.requests() > 0 {
            self.asked = view.now;
        }
        let idle = view.now.since(self.asked);
        if idle >= self.settings.cooldown {
            self.replicas = 0;
            let (idle_s, keep_s) = (idle.as_secs_f64(), self.settings.cooldown.as_secs_f64());
            return Some(Decision { wanted: 0, reason: Reason::Idle { idle_s, keep_s } });
        }
        Some(self.sync(view))
    }

    fn timer(&self, _view: &View<'_>) -> Option<Moment> {
        (self.replicas > 0).then_some(self.next_sync)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Ledger, Memory};
    use crate::policy::{Limits, StartSeconds};
    use crate::pool::{Pool, Shape};

    /// Requests, all of them held, and what is wanted for them at a moment; nothing where nothing is decided.
    fn at(hpa: &mut Hpa, seconds: f64, event: Event, requests: usize) -> Option<u32> {
        let (now, memory) = (Moment::from_seconds(seconds), Memory::default());
        let shape = Shape { concurrency: 8, max: 16, warm: 0, serving: memory, paused: memory };
        let pool = Pool::new(shape, Ledger::new(Memory::UNLIMITED));
        let limits = Limits { concurrency: 8, min: 0, max: 16, target_wait: Duration::from_secs(1) };
        let held = std::iter::repeat_n(now, requests).collect();
        hpa.note(now, event, requests as u32);
        let start = StartSeconds { wake: 0.1, restore: 1.0 };
        let view = View { now, pool: &pool, held: &held, limits: &limits, start };
        hpa.decide(&view, event).map(|decision| decision.wanted)
    }

    #[test]
    fn a_timeline_of_kubernetes_and_keda() {
        let mut hpa = Hpa::new(Settings::default());
        assert_eq!(at(&mut hpa, 0.5, Event::Timer, 0), None);
        assert_eq!(at(&mut hpa, 1.0, Event::Arrival, 1), Some(1), "KEDA pushes the first one at once");
        assert_eq!(at(&mut hpa, 2.0, Event::Arrival, 50), None, "everything else waits for the next look");
        assert_eq!(at(&mut hpa, 14.9, Event::Timer, 50), None, "and that is each quarter of a minute");
        // 5.6 requests for each replica.
        let looks = [
            (15.0, 6, 1, "a tenth beside the target is tolerated"),
            (30.0, 7, 2, "a quarter is not"),
            (45.0, 100, 6, "four more"),
            (60.0, 100, 12, "twice as many"),
            (75.0, 100, 16, "the limit of the pool"),
            (90.0, 5, 16, "the highest of five minutes holds"),
            (375.0, 5, 16, "up to the last second of them"),
            (390.0, 5, 1, "and no longer"),
            (405.0, 0, 1, "one stays while it cools down"),
            (675.0, 0, 1, "so it does just before five minutes"),
            (690.0, 0, 0, "then KEDA goes back to zero"),
        ];
        for (seconds, requests, wanted, why) in looks {
            assert_eq!(at(&mut hpa, seconds, Event::Timer, requests), Some(wanted), "{seconds} s: {why}");
        }
        assert_eq!(at(&mut hpa, 691.0, Event::Arrival, 1), Some(1), "and pushes again");
    }
}
