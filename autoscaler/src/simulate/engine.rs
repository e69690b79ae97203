//! The loop over events: answers and starts that are due, arrivals, the policy's timer, deadlines.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::time::Duration;

use super::account::{Account, Outcome};
use super::{Scenario, StartSamples};
use crate::config::PolicySpec;
use crate::ledger::{Ledger, Memory};
use crate::moment::Moment;
use crate::policy::{Event, Policy, StartSeconds, View};
use crate::pool::{Pool, ReplicaId, Retired, Shape, State, Tier};
use crate::queue::Queue;
use crate::start_times::StartTimes;
use crate::steer::{Step, Victim, next_step};
use crate::trace::{Request, Trace};

/// How long a replay goes on after the last answer, for policies that let replicas go late. What is still there then is
/// there for good.
const TAIL: Duration = Duration::from_secs(900);

pub(super) struct Engine<'a> {
    requests: &'a [Request],
    scenario: &'a Scenario,
    name: &'a str,
    policy: Box<dyn Policy>,
    victim: Victim,
    pool: Pool,
    queue: Queue<&'a Request>,
    times: StartTimes,
    /// Answers and starts that are on their way. The number keeps equal moments in the order in which they were begun.
    due: BinaryHeap<Reverse<(Moment, u64, Due)>>,
    begun: u64,
    /// When the last of a replica's answers will have been sent, where the scenario is clairvoyant.
    ends: HashMap<ReplicaId, Moment>,
    random: fastrand::Rng,
    account: Account,
    now: Moment,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    Answer {
        replica: ReplicaId,
        service: Duration,
        early: bool,
    },
    /// `expected` is what the pool was told, and what tells this start from others of the same place.
    Start {
        replica: ReplicaId,
        tier: Tier,
        began: Moment,
        expected: Moment,
    },
}

impl<'a> Engine<'a> {
    pub(super) fn new(trace: &'a Trace, scenario: &'a Scenario, policy: &'a PolicySpec) -> Self {
        let limits = &scenario.limits;
        let paused = Memory { host: scenario.replica_memory, device: 0 };
        let shape = Shape {
            concurrency: limits.concurrency,
            max: limits.max,
            warm: scenario.warm,
            serving: Memory::default(),
            paused,
        };
        let mut pool = Pool::new(shape, Ledger::new(Memory::UNLIMITED));
        for _ in 0..scenario.warm {
            pool.park(Moment::START).expect("an unlimited ledger has room");
        }
        let wake = scenario.wake.high();
        let restore = scenario.restore.as_ref().unwrap_or(&scenario.cold).high();
        let policy_name = policy.name.as_str();
        let policy = policy.build(limits);
        Self {
            requests: &trace.requests,
            scenario,
            name: policy_name,
            victim: policy.victim(),
            policy,
            pool,
            queue: Queue::new(scenario.queue),
            times: StartTimes::new(StartSeconds { wake, restore }),
            due: BinaryHeap::new(),
            begun: 0,
            ends: HashMap::new(),
            random: fastrand::Rng::with_seed(scenario.seed),
            account: Account::new(limits.target_wait, trace.requests.len()),
            now: Moment::START,
        }
    }

    pub(super) fn run(mut self) -> Outcome {
        // Replicas that are wanted before anybody asks: a minimum, a fixed number.
        self.decide(Event::Timer);
        let mut arrivals = self.requests.iter().peekable();
        loop {
            let due = self.due.peek().map_or(Moment::NEVER, |Reverse((at, _, _))| *at);
            let arrival = arrivals.peek().map_or(Moment::NEVER, |request| request.arrival);
            let expiry = self.queue.next_expiry().unwrap_or(Moment::NEVER);
            let timer = self.policy.timer(&self.view()).unwrap_or(Moment::NEVER);
            let next = due.min(arrival).min(expiry).min(timer);
            if next == Moment::NEVER || self.is_over(next, due.min(arrival)) {
                break;
            }
            self.account.advance(next, &self.pool);
            self.now = next;
            if due == next {
                self.happen();
            } else if arrival == next {
                self.arrive(arrivals.next().expect("it was seen"));
            } else if expiry == next {
                self.expire();
            } else {
                self.tell(Event::Timer);
            }
        }
        self.account.drops += self.queue.len() as u64;
        self.account.close(self.name, &self.pool, self.scenario.replica_memory, self.scenario.seed)
    }

    /// Nothing more will come, and either nothing is left or what is left stays.
    fn is_over(&self, next: Moment, work: Moment) -> bool {
        let left = self.pool.charged() > 0 || !self.queue.is_empty();
        work == Moment::NEVER && (!left || next.since(self.account.last_answer()) > TAIL)
    }

    /// What makes replicas from nothing in this scenario.
    fn tier(&self) -> Tier {
        if self.scenario.restore.is_some() { Tier::Restore } else { Tier::Cold }
    }

    fn view(&self) -> View<'_> {
        View {
            now: self.now,
            pool: &self.pool,
            held: self.queue.arrivals(),
            limits: &self.scenario.limits,
            start: self.times.expected(self.tier()),
        }
    }

    /// The next answer is sent, or the next start is done.
    fn happen(&mut self) {
        let Some(Reverse((_, _, due))) = self.due.pop() else { return };
        match due {
            Due::Answer { replica, service, early } => {
                self.account.answered(self.now);
                if self.pool.finish(replica, self.now) {
                    self.retire(replica);
                }
                self.tell(Event::Finished { service: service.as_secs_f64(), early });
            }
            Due::Start { replica, tier, began, expected } => {
                // A start that was given up; its place may be another's by now, or it may have been begun again.
                if self
                    .pool
                    .find(replica)
                    .is_none_or(|found| !found.is_starting() || found.since() != expected)
                {
                    return;
                }
                self.pool.started(replica, self.now);
                self.times.record(tier, self.now.seconds_since(began));
                self.tell(Event::Started);
            }
        }
    }

    fn arrive(&mut self, request: &'a Request) {
        let direct = if self.queue.is_empty() { self.slot(self.now) } else { None };
        if let Some(replica) = direct {
            self.dispatch(request, self.now, replica);
        } else if self.queue.hold(self.now, request).is_err() {
            self.account.drops += 1;
        }
        self.tell(Event::Arrival);
        self.account.held_max = self.account.held_max.max(self.queue.len());
    }

    fn expire(&mut self) {
        while self.queue.expire(self.now).is_some() {
            self.account.drops += 1;
        }
        self.tell(Event::Left);
    }

    /// Tells the policy, does what it wants, and gives out free slots.
    fn tell(&mut self, event: Event) {
        self.release();
        let requests = self.pool.in_flight() + self.queue.len() as u32;
        self.policy.note(self.now, event, requests);
        self.decide(event);
    }

    fn decide(&mut self, event: Event) {
        let view = View {
            now: self.now,
            pool: &self.pool,
            held: self.queue.arrivals(),
            limits: &self.scenario.limits,
            start: self.times.expected(self.tier()),
        };
        let Some(decision) = self.policy.decide(&view, event) else { return };
        let limits = &self.scenario.limits;
        let wanted = decision.wanted.clamp(limits.min, limits.max);
        while let Some(step) = next_step(&self.pool, wanted, self.victim, self.policy.undrains()) {
            self.take(step);
        }
        self.release();
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Undrain(replica) => self.pool.undrain(replica, self.now),
            Step::Wake(replica) => {
                let expected = self.now + Duration::from_secs_f64(self.times.of(Tier::Wake));
                self.pool.wake(replica, expected).expect("an unlimited ledger has room");
                let took = self.scenario.wake.draw(&mut self.random);
                self.begin(took, replica, Tier::Wake, expected);
            }
            // Nothing is restored here in order to wait.
            Step::Claim(replica) => self.pool.claim(replica),
            Step::Restore => {
                let tier = self.tier();
                let samples = self.scenario.restore.as_ref().unwrap_or(&self.scenario.cold);
                // No more than a live pool knows: not what this start will take, but what starts have taken.
                let expected = self.now + Duration::from_secs_f64(self.times.of(tier));
                let replica = self.pool.start(tier, expected).expect("an unlimited ledger has room");
                let took = samples.draw(&mut self.random);
                self.begin(took, replica, tier, expected);
            }
            Step::Drain(replica) => {
                if self.pool.drain(replica, self.now) {
                    self.retire(replica);
                }
            }
            Step::Cancel(replica) => self.retire(replica),
        }
    }

    fn begin(&mut self, took: Duration, replica: ReplicaId, tier: Tier, expected: Moment) {
        self.account.started(tier);
        self.push(self.now + took, Due::Start { replica, tier, began: self.now, expected });
    }

    /// A drained replica goes back to the warm ones without cost, where there is room.
    fn retire(&mut self, replica: ReplicaId) {
        if matches!(self.pool.retire(replica, self.now), Retired::Pausing) {
            self.pool.paused(replica, self.now).expect("an unlimited ledger has room");
        }
    }

    /// Gives held requests to free slots.
    fn release(&mut self) {
        while let Some(oldest) = self.queue.arrivals().front().copied()
            && let Some(replica) = self.slot(oldest)
            && let Some((came, request)) = self.queue.release()
        {
            self.dispatch(request, came, replica);
        }
    }

    /// Takes a slot for a request that came then, where there is one for it.
    fn slot(&mut self, came: Moment) -> Option<ReplicaId> {
        if self.pool.free_slots() == 0 {
            return None;
        }
        let spare = self.policy.spare(&self.view());
        let spare = if self.now.since(came) >= spare.age { 0 } else { spare.replicas };
        if self.scenario.clairvoyant {
            let id = self.last_to_end(spare)?;
            return self.pool.assign_to(id, self.now).then_some(id);
        }
        self.pool.assign(self.now, spare)
    }

    /// Of the replicas with a free slot the one that will be busy the longest anyway; `spare` of those that serve will end before it.
    fn last_to_end(&self, spare: u32) -> Option<ReplicaId> {
        let serving = || {
            let serving = self.pool.replicas().filter(|r| matches!(r.state(), State::Ready | State::Busy));
            serving.map(|replica| {
                (self.ends.get(&replica.id()).copied(), Reverse(replica.id()), replica.in_flight())
            })
        };
        let free = serving().filter(|(_, _, in_flight)| *in_flight < self.scenario.limits.concurrency);
        let (end, Reverse(id), _) = free.max()?;
        let sooner = serving().filter(|(other, replica, _)| (*other, *replica) < (end, Reverse(id))).count();
        (sooner >= spare as usize).then_some(id)
    }

    fn dispatch(&mut self, request: &Request, came: Moment, replica: ReplicaId) {
        let found = self.pool.find(replica).expect("it was just assigned");
        let early =
            found.tier() != Tier::Wake && found.assigned() <= u64::from(self.scenario.limits.concurrency);
        self.account.waited(self.now.since(came));
        if self.scenario.clairvoyant {
            let end = self.ends.entry(replica).or_default();
            *end = (*end).max(self.now + request.service);
        }
        self.push(self.now + request.service, Due::Answer { replica, service: request.service, early });
    }

    fn push(&mut self, at: Moment, due: Due) {
        self.begun += 1;
        self.due.push(Reverse((at, self.begun, due)));
    }
}

impl StartSamples {
    fn draw(&self, random: &mut fastrand::Rng) -> Duration {
        match self {
            StartSamples::Fixed(time) => *time,
            StartSamples::Measured(times) => times[random.usize(..times.len())],
        }
    }

    /// What nine of ten keep to, in seconds.
    fn high(&self) -> f64 {
        match self {
            StartSamples::Fixed(time) => time.as_secs_f64(),
            StartSamples::Measured(times) => {
                let mut sorted = times.clone();
                sorted.sort_unstable();
                sorted[(sorted.len() * 9).div_ceil(10) - 1].as_secs_f64()
            }
        }
    }
}
