//! `rewarm`: starts a replica when held requests would otherwise wait too long, and not before; lets one go as soon as it
//! is idle, if another can be started in time.
//!
//! The rules, each of which can be switched off to see what it is worth:
//!
//! - *rescue*: every held request has a last moment at which a start still helps it: the target wait, less what a start takes.
//!   Those whose last moment is now are compared with the slots that become free in time: by answers that are expected, by
//!   replicas on their way, by every faster tier. Only what is missing is started. A backlog that drains by itself
//!   starts nothing.
//! - *ahead*: where no warm replica is left and restores are late, they are begun as soon as there are more requests than slots:
//!   too late for those who wait, but load that has come tends to stay.
//! - *spill*: replicas beyond those that the requests in flight would fill get only requests that have waited for a
//!   while; all others wait for a slot in the full ones. What is there only for the overflow becomes idle, and goes.
//! - *floor*, *burst*, *keep*: where every start is slower than the target wait, only replicas that are there already
//!   help: what the last minute's arrivals amount to and what its bursts needed is kept, and an idle replica is let go
//!   only after a few times what a new start would take (ski rental). Where a start is in time, an idle replica goes at once.

mod past;

use std::time::Duration;

use self::past::Past;
use super::{Decision, Event, Policy, Reason, Spare, View};
use crate::moment::Moment;
use crate::pool::State;

/// How often it looks while nothing happens but time.
const TICK: Duration = Duration::from_millis(250);

/// Its settings.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Rule *rescue*. Without it every held request starts what it needs at once.
    pub rescue: bool,
    /// Share of the target wait that may be used to wait for slots in place of starting.
    pub patience: f64,
    /// Time before a request's last moment at which that counts as come: no start takes exactly as long as expected.
    pub margin: Duration,
    /// Standard deviations by which fewer answers are expected than on average.
    pub caution: f64,
    /// Share of the arrivals during a start that counts as held already, where starts are late.
    pub foresight: f64,
    /// Rule *ahead*.
    pub ahead: bool,
    /// Standard deviations of the requests in flight that are added to them.
    pub ahead_z: f64,
    /// Rule *spill*: share of the target wait after which a request goes to any replica; 0: at once.
    pub spill: f64,
    /// Share of one replica's slots by which requests must exceed the full ones before one more counts among them.
    pub spill_slack: f64,
    /// Rule *floor*.
    pub floor: bool,
    /// Standard deviations above the average load.
    pub floor_z: f64,
    /// Rule *burst*.
    pub burst: bool,
    /// How far it remembers.
    pub burst_window: Duration,
    /// Which of the remembered ten-second peaks counts.
    pub burst_quantile: f64,
    /// Rule *keep*: an idle replica is kept for so many times what its start takes.
    pub keep: f64,
    /// The same for the last one.
    pub keep_last: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            rescue: true,
            patience: 1.0,
            margin: Duration::from_millis(100),
            caution: 0.5,
            foresight: 1.0,
            ahead: true,
            ahead_z: 0.0,
            spill: 0.5,
            spill_slack: 0.4,
            floor: true,
            floor_z: 0.0,
            burst: true,
            burst_window: Duration::from_secs(300),
            burst_quantile: 0.9,
            keep: 3.0,
            keep_last: 5.0,
        }
    }
}

/// The policy.
#[derive(Debug)]
pub struct Rewarm {
    settings: Settings,
    past: Past,
}

/// Held requests that nothing which is there or coming will take in time.
struct Shortfall {
    /// Requests whose last moment for such a start is now.
    due: u32,
    /// How many of them get a slot without it.
    served: f64,
    /// Within how many seconds.
    within_s: f64,
    /// Starts that are missing.
    starts: u32,
}

impl Rewarm {
    /// With these settings.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { settings, past: Past::new(settings.burst_window) }
    }

    /// What held requests need now.
    fn rescue(&self, view: &View<'_>) -> Option<Decision> {
        let held = view.held.len() as u32;
        if held == 0 {
            return None;
        }
        let (active, warm) = (view.pool.active(), view.pool.count(State::Warm));
        if active == 0 {
            // One at once: nothing is gained by waiting. More follow where requests grow old.
            let next = if warm > 0 { view.start.wake } else { view.start.restore };
            let more = self.shortfall(view, next, 1, 0);
            let wanted = 1 + more.map_or(0, |short| short.starts);
            return Some(Decision { wanted, reason: Reason::Wakeup { held } });
        }
        let decide = |short: Shortfall, faster: u32| {
            let Shortfall { due, served, within_s, starts } = short;
            let added = faster + starts;
            Decision { wanted: active + added, reason: Reason::Rescue { due, served, within_s, added } }
        };
        // The slower tier first: only for what all warm replicas together could not do in time.
        let restores = self.shortfall(view, view.start.restore, 0, warm);
        if let Some(short) = restores {
            return Some(decide(short, warm));
        }
        let wakes = if warm > 0 { self.shortfall(view, view.start.wake, 0, 0) } else { None };
        wakes.map(|short| decide(short, 0))
    }

    /// What is missing for the held requests whose last moment for a start of `seconds` is now, if `started` replicas more
    /// serve by then and `woken` warm ones are woken now.
    fn shortfall(&self, view: &View<'_>, seconds: f64, started: u32, woken: u32) -> Option<Shortfall> {
        let target = view.limits.target_wait.as_secs_f64() * self.settings.patience;
        let concurrency = f64::from(view.limits.concurrency);
        let last_call = target - seconds - self.settings.margin.as_secs_f64();
        let last_call_age = Duration::from_secs_f64(last_call.max(0.0));
        let old = |came: &Moment| *came + last_call_age <= view.now;
        let all = last_call <= 0.0 || !self.settings.rescue;
        let due = if all { view.held.len() } else { view.held.partition_point(old) };
        if due == 0 {
            return None;
        }
        let within_s = (target - view.now.seconds_since(view.held[due - 1])).max(seconds);
        let mut demand = due as f64;
        if self.starts_are_late(view) {
            // Too slow for those who wait; it is for those who will come meanwhile.
            demand += self.settings.foresight * self.past.arrivals_fast(view.now) * seconds;
        }
        let rate = self.past.answers_per_slot();
        let busy = f64::from(view.pool.in_flight() - view.pool.in_flight_draining());
        let mut slots = f64::from(view.pool.free_slots()) + f64::from(started) * concurrency;
        let mut answers = busy * rate * within_s;
        let coming = view.pool.expected().map(|expected| expected.seconds_since(view.now));
        let woken = std::iter::repeat_n(view.start.wake, woken as usize);
        for left_s in coming.chain(woken).map(|ready_s| within_s - ready_s).filter(|left_s| *left_s >= 0.0) {
            slots += concurrency;
            answers += concurrency * rate * left_s;
        }
        let served = slots + (answers - self.settings.caution * answers.sqrt()).max(0.0);
        let starts = ((demand - served) / concurrency).ceil();
        (starts > 0.0).then_some(Shortfall { due: due as u32, served, within_s, starts: starts as u32 })
    }

    /// Restores that the requests there are call for, where nothing is left that would be in time.
    fn ahead(&self, view: &View<'_>) -> Option<Decision> {
        let in_time = view.start.restore <= view.limits.target_wait.as_secs_f64();
        if !self.settings.ahead || in_time || view.held.is_empty() || view.pool.count(State::Warm) > 0 {
            return None;
        }
        let requests = f64::from(view.requests());
        let spread = self.settings.ahead_z * f64::from(view.pool.in_flight()).sqrt();
        let wanted = ((requests + spread) / f64::from(view.limits.concurrency)).ceil() as u32;
        let reason = Reason::Ahead { requests: view.requests(), replicas: wanted };
        (wanted > view.pool.active()).then_some(Decision { wanted, reason })
    }

    /// Whether no start is in time for a request that waits.
    fn starts_are_late(&self, view: &View<'_>) -> bool {
        next_start(view) > view.limits.target_wait.as_secs_f64()
    }

    /// Replicas that are kept whatever is asked now, and why.
    fn base(&self, view: &View<'_>) -> (u32, Reason) {
        let mut base = (view.limits.min, Reason::Configured);
        if !self.starts_are_late(view) {
            return base;
        }
        let concurrency = f64::from(view.limits.concurrency);
        if self.settings.floor {
            let load = self.past.arrivals_slow(view.now) * self.past.service_s();
            if load >= concurrency / 2.0 {
                let replicas = ((load + self.settings.floor_z * load.sqrt()) / concurrency).ceil() as u32;
                if replicas > base.0 {
                    base = (replicas, Reason::Floor { load, replicas });
                }
            }
        }
        if self.settings.burst {
            let peak = self.past.peak(self.settings.burst_quantile);
            let replicas = (f64::from(peak) / concurrency).ceil() as u32;
            if replicas > base.0 {
                base = (replicas, Reason::Burst { replicas });
            }
        }
        base
    }

    /// How long requests wait for a slot in the full replicas. Not at all where starts are late: there the replicas that
    /// are here are all the help there is.
    fn spill_age(&self, view: &View<'_>) -> Duration {
        if self.starts_are_late(view) {
            return Duration::ZERO;
        }
        view.limits.target_wait.mul_f64(self.settings.spill)
    }

    /// Whether an idle replica can go.
    fn release(&self, view: &View<'_>, base: u32) -> Option<Reason> {
        let pool = view.pool;
        let serving = pool.serving();
        if pool.count(State::Ready) == 0 || serving <= base || pool.starting() > 0 || !view.held.is_empty() {
            return None;
        }
        let idle = pool.replicas().filter(|replica| replica.state() == State::Ready);
        let since = idle.map(|replica| replica.since()).min()?;
        let again = next_start(view);
        let times = if serving == 1 { self.settings.keep_last } else { self.settings.keep };
        let keep_s = if self.starts_are_late(view) { times * again } else { 0.0 };
        let idle_s = view.now.seconds_since(since);
        (idle_s >= keep_s).then_some(Reason::Idle { idle_s, keep_s })
    }
}

/// Seconds that the start after an idle replica has gone will take: it goes back to the warm ones, or those are all there.
fn next_start(view: &View<'_>) -> f64 {
    if view.pool.shape().warm > 0 { view.start.wake } else { view.start.restore }
}

/// When the next held request will have waited for so long.
fn next_to_reach(view: &View<'_>, age: Duration) -> Option<Moment> {
    let reached = view.held.partition_point(|came| *came + age <= view.now);
    view.held.get(reached).map(|came| *came + age)
}

impl Policy for Rewarm {
    fn note(&mut self, now: Moment, event: Event, requests: u32) {
        self.past.note(now, event, requests);
    }

    fn decide(&mut self, view: &View<'_>, _event: Event) -> Option<Decision> {
        let active = view.pool.active();
        let (base, because) = self.base(view);
        let help = [self.rescue(view), self.ahead(view)].into_iter().flatten().max_by_key(|help| help.wanted);
        if let Some(help) = help
            && help.wanted >= base
        {
            return Some(help);
        }
        if base > active {
            return Some(Decision { wanted: base, reason: because });
        }
        if let Some(reason) = self.release(view, base) {
            return Some(Decision { wanted: active - 1, reason });
        }
        Some(Decision { wanted: active, reason: Reason::Steady })
    }

    fn timer(&self, view: &View<'_>) -> Option<Moment> {
        if view.held.is_empty() && view.pool.active() == 0 {
            return None;
        }
        // Between the looks: the moments at which a held request may go to any replica, or is to be helped by a start.
        let target_s = view.limits.target_wait.as_secs_f64() * self.settings.patience;
        let last_call_s = target_s - next_start(view) - self.settings.margin.as_secs_f64();
        let last_call = Duration::from_secs_f64(last_call_s.max(0.0));
        let moments = [self.spill_age(view), last_call].map(|age| next_to_reach(view, age));
        Some(moments.into_iter().flatten().fold(view.now.next_multiple_of(TICK), Moment::min))
    }

    fn undrains(&self) -> bool {
        true
    }

    fn spare(&self, view: &View<'_>) -> Spare {
        let age = self.spill_age(view);
        if age.is_zero() {
            return Spare::default();
        }
        let in_flight = f64::from(view.pool.in_flight() - view.pool.in_flight_draining());
        let full = (in_flight / f64::from(view.limits.concurrency) - self.settings.spill_slack).ceil();
        Spare { replicas: view.pool.serving().saturating_sub((full as u32).max(1)), age }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::{Ledger, Memory};
    use crate::policy::{Limits, StartSeconds};
    use crate::pool::{Pool, Shape, Tier};
    use std::collections::VecDeque;

    const LIMITS: Limits = Limits { concurrency: 4, min: 0, max: 9, target_wait: Duration::from_secs(1) };

    fn at(seconds: f64) -> Moment {
        Moment::from_seconds(seconds)
    }

    /// A pool with so many warm replicas, and serving ones with so many requests in flight.
    fn pool(warm: u32, in_flight: &[u32]) -> Pool {
        let shape =
            Shape { concurrency: 4, max: 9, warm, serving: Memory::default(), paused: Memory::default() };
        let mut pool = Pool::new(shape, Ledger::new(Memory::UNLIMITED));
        for count in in_flight {
            let id = pool.start(Tier::Restore, at(0.0)).expect("memory");
            pool.started(id, at(0.0));
            for _ in 0..*count {
                assert_eq!(pool.assign(at(0.0), 0), Some(id), "fill the busiest first in this test");
            }
        }
        for _ in 0..warm {
            pool.park(at(0.0)).expect("memory");
        }
        pool
    }

    /// A policy that has seen answers of one second.
    fn policy() -> Rewarm {
        let mut policy = Rewarm::new(Settings { caution: 0.0, keep: 1.0, ..Settings::default() });
        policy.note(at(0.0), Event::Finished { service: 1.0, early: false }, 0);
        policy
    }

    fn decide(policy: &mut Rewarm, pool: &Pool, held: &[f64], now: f64, start: StartSeconds) -> Decision {
        let held: VecDeque<Moment> = held.iter().map(|came| at(*came)).collect();
        let view = View { now: at(now), pool, held: &held, limits: &LIMITS, start };
        policy.decide(&view, Event::Timer).expect("it always decides")
    }

    const FAST: StartSeconds = StartSeconds { wake: 0.5, restore: 5.0 };

    #[test]
    fn a_backlog_that_drains_in_time_starts_nothing() {
        // Four answers a second come: the two that have waited 0.3 s will have slots long before their second is over.
        let decision = decide(&mut policy(), &pool(2, &[4]), &[1.0, 1.0], 1.3, FAST);
        assert_eq!((decision.wanted, decision.reason), (1, Reason::Steady));
    }

    #[test]
    fn a_request_is_helped_at_its_last_moment_and_not_before() {
        let held: Vec<f64> = (0..6).map(|_| 1.0).collect();
        // A wake takes 0.5 s, and 0.1 s is left for surprises: the last moment is 0.4 s after the arrival.
        assert_eq!(decide(&mut policy(), &pool(2, &[4]), &held, 1.39, FAST).wanted, 1);
        let decision = decide(&mut policy(), &pool(2, &[4]), &held, 1.4, FAST);
        assert_eq!(decision.wanted, 2);
        assert_eq!(
            decision.reason.to_string(),
            "6 held requests would wait too long: 2.4 of them get a slot within 0.60 s, 1 more replicas are started"
        );
    }

    #[test]
    fn it_looks_when_the_next_request_is_to_be_helped() {
        let (policy, pool) = (policy(), pool(2, &[4]));
        let held: VecDeque<Moment> = [1.0, 1.2].map(at).into();
        let timer = |now: f64| {
            policy.timer(&View { now: at(now), pool: &pool, held: &held, limits: &LIMITS, start: FAST })
        };
        // Multiples of 0.25 s, 0.4 s after each arrival, and 0.5 s after it.
        let looks: Vec<f64> =
            [1.3, 1.4, 1.5, 1.6, 1.65, 1.7].iter().map(|now| timer(*now).expect("one").seconds()).collect();
        assert_eq!(looks, [1.4, 1.5, 1.6, 1.7, 1.7, 1.75]);
    }

    #[test]
    fn replicas_on_their_way_count() {
        let mut pool = pool(2, &[4]);
        let warm = pool.replicas().find(|replica| replica.state() == State::Warm).expect("one").id();
        pool.wake(warm, at(1.5)).expect("memory");
        let held: Vec<f64> = (0..6).map(|_| 1.0).collect();
        let decision = decide(&mut policy(), &pool, &held, 1.4, FAST);
        assert_eq!((decision.wanted, decision.reason), (2, Reason::Steady));
    }

    #[test]
    fn the_first_request_after_zero_starts_one_at_once() {
        let decision = decide(&mut policy(), &pool(2, &[]), &[1.0], 1.0, FAST);
        assert_eq!((decision.wanted, decision.reason), (1, Reason::Wakeup { held: 1 }));
    }

    #[test]
    fn restores_are_begun_when_no_warm_one_is_left() {
        let decision = decide(&mut policy(), &pool(0, &[4]), &[1.0], 1.0, FAST);
        assert_eq!((decision.wanted, decision.reason), (2, Reason::Ahead { requests: 5, replicas: 2 }));
    }

    #[test]
    fn restores_that_are_in_time_are_not_begun_ahead() {
        let quick = StartSeconds { wake: 0.5, restore: 0.5 };
        assert_eq!(decide(&mut policy(), &pool(0, &[4]), &[1.0], 1.0, quick).wanted, 1);
    }

    #[test]
    fn an_idle_replica_goes_at_once_where_a_wake_is_in_time() {
        let decision = decide(&mut policy(), &pool(1, &[4, 0]), &[], 1.0, FAST);
        assert_eq!(decision.wanted, 1);
    }

    #[test]
    fn an_idle_replica_is_kept_for_as_long_as_a_late_start_takes() {
        let pool = pool(0, &[4, 0]);
        assert_eq!(decide(&mut policy(), &pool, &[], 4.9, FAST).wanted, 2);
        let decision = decide(&mut policy(), &pool, &[], 5.0, FAST);
        assert_eq!((decision.wanted, decision.reason), (1, Reason::Idle { idle_s: 5.0, keep_s: 5.0 }));
    }

    #[test]
    fn load_and_bursts_are_remembered_where_starts_are_late() {
        let mut policy = policy();
        for tenth in 0..600 {
            policy.note(at(f64::from(tenth) / 10.0), Event::Arrival, 14);
        }
        let slow = StartSeconds { wake: 2.0, restore: 5.0 };
        let decision = decide(&mut policy, &pool(2, &[4]), &[], 60.0, slow);
        assert_eq!((decision.wanted, decision.reason), (4, Reason::Burst { replicas: 4 }));
        policy.settings.burst = false;
        let decision = decide(&mut policy, &pool(2, &[4]), &[], 60.0, slow);
        assert!(matches!(decision.reason, Reason::Floor { replicas: 2, .. }), "{:?}", decision.reason);
    }

    #[test]
    fn replicas_for_the_overflow_are_spared() {
        let policy = policy();
        let held = VecDeque::new();
        let spared = |in_flight: &[u32]| {
            let pool = pool(0, in_flight);
            policy
                .spare(&View { now: at(1.0), pool: &pool, held: &held, limits: &LIMITS, start: FAST })
                .replicas
        };
        // Late starts: what is here is all the help there is.
        assert_eq!(spared(&[4, 1]), 0);
        let pool = pool(1, &[4, 4, 1]);
        let view = View { now: at(1.0), pool: &pool, held: &held, limits: &LIMITS, start: FAST };
        assert_eq!(policy.spare(&view), Spare { replicas: 1, age: Duration::from_millis(500) });
    }
}
