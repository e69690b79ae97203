//! The book of one pool, the policy's look at it, and the steps that follow.

use std::collections::{HashMap, VecDeque};
use std::sync::Weak;
use std::time::Duration;

use rewarm_autoscaler::ledger::{Hold, Memory};
use rewarm_autoscaler::moment::Moment;
use rewarm_autoscaler::policy::{Event, Limits, Policy, StartSeconds, View};
use rewarm_autoscaler::pool::{Pool, ReplicaId, State, Tier};
use rewarm_autoscaler::queue::Queue;
use rewarm_autoscaler::start_times::StartTimes;
use rewarm_autoscaler::steer::{Step, Victim, next_step};

use super::capture::Capture;
use super::circuit::Tiers;
use super::members::Member;
use super::requests::{Granted, Waiter};
use super::room::{Lack, Obstacle};
use super::took::{self, Took};
use super::{Live, Shared, queue_limits, shape};
use crate::config::{Cold, PoolConfig};
use crate::replicas::Known;
use crate::status::{Command, DECISIONS_MAX, DecisionStatus, Notice, Refused, StartStatus, Totals};

/// A pool, under its lock.
pub(super) struct Inner {
    pub(super) me: Weak<Live>,
    pub(super) config: PoolConfig,
    pub(super) shared: Shared,
    pub(super) pool: Pool,
    pub(super) queue: Queue<Waiter>,
    pub(super) policy: Box<dyn Policy>,
    pub(super) victim: Victim,
    pub(super) times: StartTimes,
    pub(super) tiers: Tiers,
    pub(super) limits: Limits,
    pub(super) members: HashMap<ReplicaId, Member>,
    pub(super) names: HashMap<String, ReplicaId>,
    /// Replicas that are gone from the book and not yet from the machine, with their memory.
    pub(super) stopping: HashMap<String, Option<Hold>>,
    pub(super) known: Option<Known>,
    /// A number that was set by hand.
    pub(super) fixed: Option<u32>,
    pub(super) paused: bool,
    pub(super) finishing: bool,
    /// It is not in the file any more.
    pub(super) removed: bool,
    /// On its way to take the place of a replica of an older snapshot.
    pub(super) rolling: Option<ReplicaId>,
    pub(super) capture: Capture,
    /// Wanted by the last decision, within the limits.
    pub(super) desired: u32,
    /// Why no more is done for that.
    pub(super) obstacle: Option<Obstacle>,
    pub(super) lack: Option<Lack>,
    /// When [`Live::run`] looks next.
    pub(super) armed: Moment,
    pub(super) decisions: VecDeque<DecisionStatus>,
    pub(super) starts: VecDeque<StartStatus>,
    /// When the last start failed or was given up; nothing once another one has succeeded. By this process's own time: the
    /// machine's clock may be set.
    pub(super) start_failed: Option<Moment>,
    /// Seconds that starts took, the last ones of each tier.
    pub(super) took: Took,
    pub(super) totals: Totals,
    /// Slots that nobody took; dropped outside of the lock.
    pub(super) refused: Vec<Granted>,
    pub(super) now: Moment,
}

/// What the policy knows of a pool's limits.
pub(super) fn limits(config: &PoolConfig) -> Limits {
    Limits {
        concurrency: config.target_concurrency,
        min: config.min_replicas,
        max: config.max_replicas,
        target_wait: config.target_wait,
    }
}

impl Inner {
    pub(super) fn view(&self) -> View<'_> {
        View {
            now: self.now,
            pool: &self.pool,
            held: self.queue.arrivals(),
            limits: &self.limits,
            start: self.expected(),
        }
    }

    pub(super) fn note(&mut self, event: Event) {
        let requests = self.pool.in_flight() + self.queue.len() as u32;
        self.policy.note(self.now, event, requests);
    }

    /// Lets the policy look, and carries out what it wants.
    pub(super) fn decide(&mut self, event: Event) {
        if self.finishing {
            return;
        }
        let view = View {
            now: self.now,
            pool: &self.pool,
            held: self.queue.arrivals(),
            limits: &self.limits,
            start: self.expected(),
        };
        let decision = self.policy.decide(&view, event);
        let wanted = decision.map_or(self.desired, |decision| decision.wanted);
        let bounded = wanted.clamp(self.config.min_replicas, self.config.max_replicas);
        let by_hand = self.fixed.map(|fixed| fixed.min(self.config.max_replicas));
        let nobody = self.paused || self.is_left();
        self.desired = if nobody { 0 } else { by_hand.unwrap_or(bounded) };
        if self.rolling.is_some_and(|id| self.pool.find(id).is_some_and(|replica| replica.is_starting())) {
            // It is one too many until it serves, and nobody is to go before.
            self.desired = self.desired.max(self.pool.active());
        }
        let before = (self.pool.active(), self.pool.count(State::Warm), self.pool.in_flight());
        let mut steps = Vec::new();
        let mut obstacle = None;
        while let Some(step) = next_step(&self.pool, self.desired, self.victim, self.policy.undrains()) {
            match self.take(step) {
                Ok(done) => steps.push(done),
                Err(met) => {
                    // Said once, and not at every event for as long as it lasts.
                    if !steps.is_empty() || self.obstacle.is_none() {
                        steps.push(met.to_string());
                    }
                    obstacle = Some(met);
                    break;
                }
            }
        }
        self.meets(obstacle);
        if self.is_left() {
            self.dismiss_warm();
        }
        if steps.is_empty() {
            return;
        }
        let reason = match (self.paused, self.fixed, decision) {
            (true, ..) => "the pool is paused".to_owned(),
            _ if self.is_left() => "the pool was removed".to_owned(),
            (_, Some(fixed), _) => format!("{fixed} replicas were asked for by hand"),
            (.., Some(decision)) => decision.reason.to_string(),
            (.., None) => "the last decision still holds".to_owned(),
        };
        let (active, warm, in_flight) = before;
        let oldest_held_ms = self.oldest_held_ms();
        let decision = DecisionStatus {
            at: crate::status::now(),
            wanted,
            desired: self.desired,
            active,
            warm,
            in_flight,
            held: self.queue.len() as u32,
            oldest_held_ms,
            start_seconds: self.start_seconds(),
            reason,
            steps,
        };
        self.totals.decisions += 1;
        let _ = self
            .shared
            .notices
            .send(Notice::Decision { pool: self.config.name.clone(), decision: decision.clone() });
        if self.decisions.len() == DECISIONS_MAX {
            self.decisions.pop_front();
        }
        self.decisions.push_back(decision);
    }

    /// Carries out a step and says so, or says what stands in its way.
    fn take(&mut self, step: Step) -> Result<String, Obstacle> {
        match step {
            Step::Undrain(id) => {
                self.pool.undrain(id, self.now);
                if let Some(member) = self.members.get_mut(&id) {
                    member.deadline = None;
                }
                Ok(format!("{} gets requests again", self.told(id)))
            }
            Step::Wake(id) if self.tiers.wakes(self.now) => self.wake(id),
            // Where nothing else can be started, a wake that may fail is better than nothing.
            Step::Wake(id) => self.start(false).map(|(_, done)| done).or_else(|_| self.wake(id)),
            Step::Claim(id) => {
                self.pool.claim(id);
                self.claimed(id);
                Ok(format!("{} is to serve and not to wait", self.name(id)))
            }
            Step::Restore => self.start(false).map(|(_, done)| done),
            Step::Drain(id) => {
                let name = self.name(id);
                self.drain(id);
                Ok(format!("{name} is let go"))
            }
            Step::Cancel(id) => {
                let name = self.name(id);
                self.retire(id);
                Ok(format!("the start of {name} is given up"))
            }
        }
    }

    /// Gives a replica no further requests; it goes when it has answered those it has.
    pub(super) fn drain(&mut self, id: ReplicaId) {
        let over = self.pool.drain(id, self.now);
        let limit = self.config.drain.map(|limit| self.now + limit);
        if let Some(member) = self.members.get_mut(&id) {
            member.deadline = limit;
        }
        self.told(id);
        if over {
            self.retire(id);
        }
    }

    /// A request has left a replica.
    pub(super) fn ended(&mut self, id: ReplicaId, began: Moment, early: bool) {
        // One that died has given back all its slots at once.
        if self.pool.find(id).is_none() {
            return;
        }
        let service = self.now.seconds_since(began);
        self.totals.service_seconds.record(service);
        if self.pool.finish(id, self.now) {
            self.retire(id);
        }
        self.serve(Event::Finished { service, early });
    }

    /// Lets time pass: deadlines, the policy's timer, warm replicas, a new snapshot.
    pub(super) fn pass(&mut self) {
        self.expire();
        self.time_out();
        self.serve(Event::Timer);
        self.fill_warm();
        self.roll();
        self.capture();
    }

    /// When something has to be looked at, if nothing happens before.
    pub(super) fn next_moment(&self) -> Moment {
        let deadlines = self.members.values().filter_map(|member| member.deadline);
        let circuit = self.tiers.open(self.now).map(|open| open.until);
        let policy = self.policy.timer(&self.view());
        let room = self.lacks_room().then_some(self.now);
        let known = [
            self.queue.next_expiry(),
            circuit,
            policy,
            self.warm_again(),
            self.capture_again(),
            room,
            self.second_best(),
        ];
        deadlines.chain(known.into_iter().flatten()).min().unwrap_or(Moment::NEVER)
    }

    /// How long a start of this tier may take.
    pub(super) fn start_timeout(&self, tier: Tier) -> Duration {
        self.took.limit(tier, self.config.start_timeout)
    }

    /// What the next starts will take. Where wakes are left alone, warm replicas help nobody sooner than others.
    pub(super) fn expected(&self) -> StartSeconds {
        let expected = self.times.expected(self.tiers.usual());
        match self.tiers.wakes(self.now) {
            true => expected,
            false => StartSeconds { wake: expected.restore, ..expected },
        }
    }

    /// What one replica takes, as far as is known.
    pub(super) fn memory(&self) -> (Memory, Memory) {
        let known = self.known.as_ref();
        let host = self.config.replica_memory.or(known.map(|known| known.host_bytes)).unwrap_or(0);
        let device = known.map_or(0, |known| known.device_bytes);
        (Memory { host, device }, Memory { host: host.saturating_add(device), device: 0 })
    }

    /// The snapshot was looked at: what a replica takes, and which ones are of an older one.
    pub(super) fn learn(&mut self, known: Known) {
        self.times.guess(took::first_guess(&known));
        if self.known.as_ref().is_some_and(|before| before.source != known.source) {
            self.replaced();
        }
        let first = self.known.replace(known).is_none();
        let (serving, paused) = self.memory();
        self.pool.reshape(shape(&self.config, serving, paused));
        if first {
            // What was there before anything was known counted as nothing.
            self.pool.recount();
        }
        self.roll();
        self.capture();
    }

    /// Restores are of another snapshot from now on: what the one before did has no say about it.
    pub(super) fn replaced(&mut self) {
        self.tiers.replaced();
        self.times.replaced();
        self.took.replaced();
    }

    /// Changes what holds from now on.
    pub(super) fn change(&mut self, config: PoolConfig) {
        if config.policy != self.config.policy || limits(&config).concurrency != self.limits.concurrency {
            self.policy = config.policy.spec.build(&limits(&config));
            self.victim = self.policy.victim();
        }
        self.limits = limits(&config);
        self.queue.limit(queue_limits(&config));
        self.tiers.allow_cold(config.cold != Cold::Never);
        self.config = config;
        let (serving, paused) = self.memory();
        self.pool.reshape(shape(&self.config, serving, paused));
        self.serve(Event::Timer);
        self.dismiss_surplus();
    }

    /// Does what a person asks for.
    pub(super) fn command(&mut self, command: &Command) -> Result<String, Refused> {
        let pool = self.config.name.clone();
        match command {
            Command::Scale { replicas: Some(replicas), .. } => {
                if *replicas > self.config.max_replicas {
                    let problem = format!(
                        "{replicas} replicas are asked for, expected at most max_replicas of pool {pool}, which is {}",
                        self.config.max_replicas
                    );
                    return Err(Refused::Impossible { problem });
                }
                self.fixed = Some(*replicas);
                self.serve(Event::Timer);
                Ok(format!("pool {pool} goes to {replicas} replicas"))
            }
            Command::Scale { replicas: None, .. } => {
                self.fixed = None;
                self.serve(Event::Timer);
                Ok(format!("pool {pool} follows its policy"))
            }
            Command::Drain { replica, .. } => {
                let unknown = || Refused::UnknownReplica { pool: pool.clone(), replica: replica.clone() };
                let id = *self.names.get(replica).ok_or_else(unknown)?;
                self.dismiss(id);
                self.serve(Event::Timer);
                Ok(format!("{replica} finishes what it has, and goes"))
            }
            Command::Pause { .. } => {
                self.paused = true;
                self.refuse_held(&format!("pool {pool} is paused"));
                self.serve(Event::Timer);
                Ok(format!("pool {pool} is paused"))
            }
            Command::Resume { .. } => {
                self.paused = false;
                self.serve(Event::Timer);
                Ok(format!("pool {pool} serves again"))
            }
        }
    }
}
