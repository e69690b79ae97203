//! Replicas: how they are begun, what becomes of them, and how they go.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use rewarm_autoscaler::ledger::Memory;
use rewarm_autoscaler::moment::Moment;
use rewarm_autoscaler::policy::Event;
use rewarm_autoscaler::pool::{ReplicaId, Retired, State, Tier};
use rewarm_gateway::Upstream;
use rewarm_report::Timing;

use super::dial::Inside;
use super::inner::Inner;
use super::room::Obstacle;
use super::spans::StartSpan;
use super::{Heard, tell};
use crate::link::ToParent;
use crate::replicas::{Existing, Started};
use crate::status::{Notice, STARTS_MAX, StartOutcome, StartStatus, UnixMs};

/// So many requests in a row that a replica does not answer end it.
pub(super) const BROKEN_MAX: u32 = 3;
/// Where neither the file nor the snapshot names a port.
const PORT: u16 = 8000;
/// A replica that has served for so long was no failed start, whatever becomes of it.
const PROOF: std::time::Duration = std::time::Duration::from_secs(10);
/// How long after a failure warm replicas are made again.
const WARM_REST: std::time::Duration = std::time::Duration::from_secs(10);

/// What the book does not know of a replica.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) name: String,
    pub(super) upstream: Arc<Upstream>,
    pub(super) port: u16,
    pub(super) source: Option<String>,
    pub(super) since: UnixMs,
    /// When its start, or its drain, has taken too long.
    pub(super) deadline: Option<Moment>,
    /// When its start, or its wake, began.
    began: Moment,
    began_at: UnixMs,
    /// It is being paused after a restore, in order to wait.
    pausing_to_park: bool,
    pub(super) broken_in_a_row: u32,
    /// It has answered a request.
    pub(super) answered: bool,
    /// When its start is known to have worked; nothing where that is known, or it was there before this process.
    proven: Option<Moment>,
    /// Why it goes, where that is not that nobody needs it.
    pub(super) lost: Option<String>,
    pub(super) start_span: StartSpan,
}

impl Member {
    /// How much it wants a session.
    pub(super) fn weigh(&self, session: &[u8]) -> u64 {
        let mut hasher = DefaultHasher::new();
        (session, &self.name).hash(&mut hasher);
        hasher.finish()
    }
}

impl Inner {
    pub(super) fn name(&self, id: ReplicaId) -> String {
        self.members.get(&id).map_or_else(|| format!("{id:?}"), |member| member.name.clone())
    }

    /// Writes down that a replica has changed its state, and gives its name.
    pub(super) fn told(&mut self, id: ReplicaId) -> String {
        let state = self.pool.find(id).map_or(State::Cold, |replica| replica.state());
        let now = crate::status::now();
        let Some(member) = self.members.get_mut(&id) else { return String::new() };
        member.since = now;
        let name = member.name.clone();
        let pool = self.config.name.clone();
        // Nobody may be listening.
        let _ = self.shared.notices.send(Notice::Replica { pool, name: name.clone(), state });
        name
    }

    pub(super) fn order(&self, message: &ToParent) {
        tell(&self.shared.line, message);
    }

    fn enter(&mut self, id: ReplicaId, name: &str, port: Option<u16>) {
        let known = self.known.as_ref().and_then(|known| known.port);
        let port = self.config.port.or(port).or(known).unwrap_or(PORT);
        let dial = Inside { dialler: self.shared.dialler.clone(), name: name.to_owned(), port };
        let member = Member {
            name: name.to_owned(),
            upstream: Arc::new(Upstream::new(name, Arc::new(dial), self.config.protocol)),
            port,
            source: None,
            since: crate::status::now(),
            deadline: None,
            began: self.now,
            began_at: crate::status::now(),
            pausing_to_park: false,
            broken_in_a_row: 0,
            answered: false,
            proven: None,
            lost: None,
            start_span: StartSpan::default(),
        };
        self.members.insert(id, member);
        self.names.insert(name.to_owned(), id);
    }

    /// A replica leaves the book. It keeps its memory until the parent says that it is gone.
    fn leave(&mut self, id: ReplicaId, hold: Option<rewarm_autoscaler::ledger::Hold>, why: Option<&str>) {
        self.told(id);
        self.unawaited(id);
        let Some(member) = self.members.remove(&id) else { return };
        self.names.remove(&member.name);
        let name = member.name;
        let message = match why {
            Some(why) => ToParent::Stop { name: name.clone(), why: why.to_owned() },
            None => ToParent::GiveUp { name: name.clone() },
        };
        self.order(&message);
        self.stopping.insert(name, hold);
    }

    /// Begins a restore or a cold start.
    pub(super) fn start(&mut self, parking: bool) -> Result<(ReplicaId, String), Obstacle> {
        self.prove();
        let Some(tier) = self.tiers.choose(self.now) else {
            let reason = self.tiers.open(self.now).map_or(String::new(), |open| open.reason);
            return Err(Obstacle::Circuit(reason));
        };
        let expected = self.now + std::time::Duration::from_secs_f64(self.times.of(tier));
        let begun = match parking {
            true => self.pool.start_parking(tier, expected),
            false => self.pool.start(tier, expected),
        };
        let id = begun?;
        let name = format!("{}-{:06x}", self.config.name, random());
        self.enter(id, &name, None);
        let deadline = self.now + self.start_timeout(tier);
        self.members.get_mut(&id).expect("just entered").deadline = Some(deadline);
        self.told(id);
        self.order(&ToParent::Start { pool: self.config.name.clone(), name: name.clone(), tier });
        let how = if tier == Tier::Cold { "started cold" } else { "restored" };
        Ok((id, format!("{name} is {how}{}", if parking { " in order to wait" } else { "" })))
    }

    /// Begins to wake a warm replica.
    pub(super) fn wake(&mut self, id: ReplicaId) -> Result<String, Obstacle> {
        let expected = self.now + std::time::Duration::from_secs_f64(self.times.of(Tier::Wake));
        self.pool.wake(id, expected)?;
        let deadline = self.now + self.start_timeout(Tier::Wake);
        let now = self.now;
        let member = self.members.get_mut(&id).expect("every replica is a member");
        (member.began, member.began_at, member.deadline) = (now, crate::status::now(), Some(deadline));
        let name = self.told(id);
        self.order(&ToParent::Wake { name: name.clone() });
        Ok(format!("{name} is woken"))
    }

    /// Ends a replica that has drained, or a start that is not wanted.
    pub(super) fn retire(&mut self, id: ReplicaId) {
        let starting = self.pool.find(id).is_some_and(|replica| replica.state() == State::Restoring);
        if self.members.get(&id).is_some_and(|member| member.answered) {
            self.worked(id);
        }
        match self.pool.retire(id, self.now) {
            Retired::Pausing => {
                let name = self.told(id);
                if let Some(member) = self.members.get_mut(&id) {
                    member.deadline = None;
                    member.upstream.hang_up();
                }
                self.order(&ToParent::Pause { name });
            }
            Retired::Removed(hold) if starting => {
                self.record(id, StartOutcome::GivenUp, Vec::new(), None);
                self.leave(id, hold, None);
            }
            Retired::Removed(hold) => {
                let lost = self.members.get_mut(&id).and_then(|member| member.lost.take());
                self.leave(id, hold, Some(lost.as_deref().unwrap_or("it is not needed")));
            }
        }
    }

    /// A replica that was to wait is to serve.
    pub(super) fn claimed(&mut self, id: ReplicaId) {
        self.told(id);
    }

    /// This replica is to go for good, as soon as it has answered what it has.
    pub(super) fn dismiss(&mut self, id: ReplicaId) {
        let Some(state) = self.pool.find(id).map(|replica| replica.state()) else { return };
        self.pool.dismiss(id);
        match state {
            State::Ready | State::Busy => self.drain(id),
            State::Warm | State::Restoring | State::Waking => self.retire(id),
            // It is on its way out, or comes to a state in which it is looked at again.
            State::Draining | State::Pausing | State::Cold | State::Failed => {}
        }
    }

    /// Ends every replica that waits.
    pub(super) fn dismiss_warm(&mut self) {
        let waiting =
            self.pool.replicas().filter(|replica| replica.state() == State::Warm || replica.is_parking());
        let ids: Vec<ReplicaId> = waiting.map(|replica| replica.id()).collect();
        ids.into_iter().for_each(|id| self.dismiss(id));
    }

    /// Ends warm replicas beyond what the configuration wants.
    pub(super) fn dismiss_surplus(&mut self) {
        let warm = self.pool.replicas().filter(|replica| replica.state() == State::Warm);
        let surplus: Vec<ReplicaId> =
            warm.map(|replica| replica.id()).skip(self.config.warm as usize).collect();
        surplus.into_iter().for_each(|id| self.dismiss(id));
    }

    /// A replica is lost: what it had in flight is cut off, and what is left of it is ended.
    pub(super) fn lose(&mut self, id: ReplicaId, why: &str) {
        self.totals.died += 1;
        self.count_loss(id, why);
        self.totals.cut_off += u64::from(self.pool.fail(id, self.now));
        tracing::warn!(pool = self.config.name, replica = self.name(id), why, "a replica is lost");
        let hold = self.pool.remove(id, self.now);
        self.leave(id, hold, Some(why));
        self.serve(Event::Timer);
    }

    /// A replica does not serve as it should. Where it has not served for long, its start is to blame.
    pub(super) fn count_loss(&mut self, id: ReplicaId, why: &str) {
        self.prove();
        if self.members.get_mut(&id).is_some_and(|member| member.proven.take().is_some()) {
            self.tiers.lost(self.origin(id), self.now, why);
        }
    }

    /// The tier that made a replica, whether it was paused in between or not.
    fn origin(&self, id: ReplicaId) -> Tier {
        let tier = self.pool.find(id).map_or(Tier::Restore, |replica| replica.tier());
        let restored = self.members.get(&id).is_none_or(|member| member.source.is_some());
        match tier {
            Tier::Wake if restored => Tier::Restore,
            Tier::Wake => Tier::Cold,
            tier => tier,
        }
    }

    /// The start of this replica has worked.
    fn worked(&mut self, id: ReplicaId) {
        if self.members.get_mut(&id).is_some_and(|member| member.proven.take().is_some()) {
            self.tiers.worked(self.origin(id));
        }
    }

    /// Takes in which replicas have served for long enough.
    fn prove(&mut self) {
        let over = |member: &Member| member.proven.is_some_and(|moment| moment <= self.now);
        let ids: Vec<ReplicaId> =
            self.members.iter().filter(|(_, member)| over(member)).map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.worked(id));
    }

    /// A start failed, or took too long.
    fn failed(&mut self, id: ReplicaId, outcome: StartOutcome, reason: &str) {
        let (tier, state) =
            self.pool.find(id).map(|replica| (replica.tier(), replica.state())).expect("it was found");
        tracing::warn!(pool = self.config.name, replica = self.name(id), reason, "a start failed");
        self.record(id, outcome, Vec::new(), Some(reason.to_owned()));
        self.totals.cut_off += u64::from(self.pool.fail(id, self.now));
        let hold = self.pool.remove(id, self.now);
        self.prove();
        self.tiers.failed(tier, self.now, reason);
        if state == State::Restoring {
            self.leave(id, hold, None);
        } else {
            self.leave(id, hold, Some(reason));
        }
        self.serve(Event::Timer);
    }

    /// What took too long: starts are failed, drains are cut off.
    pub(super) fn time_out(&mut self) {
        let late = |deadline: Option<Moment>| deadline.is_some_and(|deadline| deadline <= self.now);
        let late: Vec<ReplicaId> =
            self.members.iter().filter(|(_, member)| late(member.deadline)).map(|(id, _)| *id).collect();
        for id in late {
            match self.pool.find(id).map(|replica| replica.state()) {
                Some(State::Restoring | State::Waking) => {
                    self.took.late(self.pool.find(id).map_or(Tier::Restore, |replica| replica.tier()));
                    let member = &self.members[&id];
                    let limit = member.deadline.map(|deadline| deadline.since(member.began));
                    let reason = format!("it took more than {} ms", limit.unwrap_or_default().as_millis());
                    self.failed(id, StartOutcome::TimedOut, &reason);
                }
                Some(State::Draining) => {
                    self.totals.killed_in_flight += u64::from(self.pool.fail(id, self.now));
                    let hold = self.pool.remove(id, self.now);
                    self.leave(id, hold, Some("its drain took longer than the pool allows"));
                }
                _ => {
                    if let Some(member) = self.members.get_mut(&id) {
                        member.deadline = None;
                    }
                }
            }
        }
    }

    /// Takes in what the parent says of a replica, and does what was waiting for it.
    pub(super) fn heard(&mut self, name: &str, heard: Heard) {
        match heard {
            Heard::Captured(problem) => self.captured(name, problem),
            heard => self.take_in(name, heard),
        }
        self.fill_warm();
        self.roll();
        self.capture();
    }

    fn take_in(&mut self, name: &str, heard: Heard) {
        if matches!(heard, Heard::Stopped) {
            self.stopping.remove(name);
            // Its memory may be what a start waits for.
            return self.serve(Event::Timer);
        }
        let Some(id) = self.names.get(name).copied() else { return };
        let Some((state, parking)) =
            self.pool.find(id).map(|replica| (replica.state(), replica.is_parking()))
        else {
            return;
        };
        match (heard, state) {
            (Heard::Started(started), State::Restoring) => self.started(id, started, parking),
            (Heard::Woken, State::Waking | State::Restoring) => self.serves(id),
            (Heard::Paused, State::Pausing) => match self.pool.paused(id, self.now) {
                Ok(()) if self.pool.find(id).is_some_and(|replica| replica.is_dismissed()) => self.retire(id),
                Ok(()) => {
                    self.told(id);
                    self.serve(Event::Timer);
                }
                Err(short) => self.lose_quietly(id, &short.to_string()),
            },
            (Heard::Paused, State::Restoring) if parking => match self.pool.parked(id, self.now) {
                Ok(()) => {
                    if let Some(member) = self.members.get_mut(&id) {
                        (member.pausing_to_park, member.deadline) = (false, None);
                    }
                    self.unawaited(id);
                    self.told(id);
                    self.serve(Event::Timer);
                }
                Err(short) => self.lose_quietly(id, &short.to_string()),
            },
            // It was claimed while it was being paused.
            (Heard::Paused, State::Restoring) => self.order(&ToParent::Wake { name: name.to_owned() }),
            (Heard::Failed(reason), State::Restoring | State::Waking) => {
                self.failed(id, StartOutcome::Failed, &reason);
            }
            // A replica that cannot be paused is not worth more trouble.
            (Heard::Failed(reason), State::Pausing) => self.lose_quietly(id, &reason),
            (Heard::Ended(reason), State::Restoring | State::Waking) => {
                self.failed(id, StartOutcome::Failed, &format!("it ended: {reason}"));
            }
            (Heard::Ended(reason), _) => self.lose(id, &format!("it ended: {reason}")),
            _ => {}
        }
    }

    /// A replica that has nothing in flight is ended because it cannot be kept.
    fn lose_quietly(&mut self, id: ReplicaId, why: &str) {
        self.pool.fail(id, self.now);
        let hold = self.pool.remove(id, self.now);
        self.leave(id, hold, Some(why));
        self.serve(Event::Timer);
    }

    /// A start is done: the replica serves, or is paused in order to wait.
    fn started(&mut self, id: ReplicaId, started: Started, parking: bool) {
        let tier = self.pool.find(id).map_or(Tier::Restore, |replica| replica.tier());
        self.tiers.started(tier);
        let took = self.record(id, StartOutcome::Ready, started.stages, None);
        self.times.record(tier, took);
        self.took.record(tier, took);
        if let Some(member) = self.members.get_mut(&id) {
            member.source = started.source;
        }
        self.dial_at(id, started.port);
        if parking {
            let name = self.name(id);
            self.order(&ToParent::Pause { name });
            if let Some(member) = self.members.get_mut(&id) {
                member.pausing_to_park = true;
            }
            return;
        }
        self.serve_with(id);
    }

    /// A wake is done.
    fn serves(&mut self, id: ReplicaId) {
        let parked =
            self.members.get_mut(&id).is_some_and(|member| std::mem::take(&mut member.pausing_to_park));
        if !parked {
            let took = self.record(id, StartOutcome::Ready, Vec::new(), None);
            self.times.record(Tier::Wake, took);
            self.took.record(Tier::Wake, took);
            self.tiers.started(Tier::Wake);
        }
        self.serve_with(id);
    }

    fn serve_with(&mut self, id: ReplicaId) {
        self.pool.started(id, self.now);
        self.roll();
        if let Some(member) = self.members.get_mut(&id) {
            member.deadline = None;
            member.broken_in_a_row = 0;
            (member.answered, member.proven) = (false, Some(self.now + PROOF));
        }
        self.told(id);
        // Those who waited come first; then is known whether anybody did.
        self.release();
        self.unawaited(id);
        self.serve(Event::Started);
    }

    /// The snapshot names the port, which was not known before.
    fn dial_at(&mut self, id: ReplicaId, port: Option<u16>) {
        let Some(port) = self.config.port.or(port) else { return };
        let (dialler, protocol) = (self.shared.dialler.clone(), self.config.protocol);
        let Some(member) = self.members.get_mut(&id).filter(|member| member.port != port) else { return };
        member.port = port;
        let dial = Inside { dialler, name: member.name.clone(), port };
        member.upstream = Arc::new(Upstream::new(member.name.clone(), Arc::new(dial), protocol));
    }

    /// Writes a start down, and gives the seconds that it took.
    fn record(
        &mut self,
        id: ReplicaId,
        outcome: StartOutcome,
        stages: Vec<Timing>,
        reason: Option<String>,
    ) -> f64 {
        let tier = self.pool.find(id).map_or(Tier::Restore, |replica| replica.tier());
        let Some(member) = self.members.get(&id) else { return 0.0 };
        let took = self.now.seconds_since(member.began);
        let start = StartStatus {
            at: member.began_at,
            replica: member.name.clone(),
            tier,
            outcome,
            took_ms: took * 1e3,
            stages,
            reason,
        };
        self.start_failed = (outcome != StartOutcome::Ready).then_some(self.now);
        self.trace_start(id, &start);
        match self.totals.starts.iter_mut().find(|(of, how, _)| (*of, *how) == (tier, outcome)) {
            Some((.., count)) => *count += 1,
            None => self.totals.starts.push((tier, outcome, 1)),
        }
        let _ =
            self.shared.notices.send(Notice::Start { pool: self.config.name.clone(), start: start.clone() });
        if self.starts.len() == STARTS_MAX {
            self.starts.pop_front();
        }
        self.starts.push_back(start);
        took
    }

    /// These replicas were there before this process. All of them are in the book before anything is decided: one that
    /// waits would be woken for one that serves and is not known yet.
    pub(super) fn adopt(&mut self, existing: &[&Existing]) {
        for replica in existing {
            match self.pool.adopt(Tier::Restore, replica.warm, self.now) {
                Ok(id) => {
                    self.enter(id, &replica.name, replica.port);
                    self.members.get_mut(&id).expect("just entered").source.clone_from(&replica.source);
                    self.told(id);
                }
                Err(short) => {
                    // It has its memory until it is gone.
                    let (serving, paused) = self.memory();
                    let mut hold = self.shared.ledger.take(Memory::default()).ok();
                    if let Some(hold) = &mut hold {
                        hold.correct(if replica.warm { paused } else { serving });
                    }
                    self.stopping.insert(replica.name.clone(), hold);
                    self.order(&ToParent::Stop { name: replica.name.clone(), why: short.to_string() });
                }
            }
        }
        self.serve(Event::Started);
    }

    /// Makes a replica that waits, where one is missing and nothing is more urgent.
    pub(super) fn fill_warm(&mut self) {
        let serves = !self.finishing && !self.paused && !self.shared.room.is_short();
        if serves && self.warm_missing() && self.warm_again().is_none() {
            // Where memory is short there is one less, which is what the limit is for.
            let _ = self.start(true);
        }
    }

    fn warm_missing(&self) -> bool {
        let waiting = self.pool.count(State::Warm) + self.pool.count(State::Pausing) + self.pool.parking();
        // What serves beyond the minimum comes back when it is not needed.
        let away = self.pool.charged().saturating_sub(self.config.min_replicas);
        let busy = !self.queue.is_empty() || self.pool.starting() > 0 || self.pool.parking() > 0;
        self.config.warm > waiting + away && !busy && self.tiers.restores(self.now)
    }

    /// When warm replicas are made again after a start that failed, or wakes that did.
    pub(super) fn warm_again(&self) -> Option<Moment> {
        if self.finishing || self.paused || !self.warm_missing() {
            return None;
        }
        let rested = self.start_failed.map(|failed| failed + WARM_REST);
        rested.max(self.tiers.wakes_again()).filter(|again| *again > self.now)
    }

    /// Replaces replicas of an older snapshot, one at a time: a new one is made first where there is room for it, then an
    /// old one is let go.
    pub(super) fn roll(&mut self) {
        if self.finishing || self.paused || self.removed {
            return;
        }
        let Some(current) = self.known.as_ref().map(|known| known.source.clone()) else { return };
        let old = |id: &ReplicaId| {
            self.members
                .get(id)
                .is_some_and(|member| member.source.as_ref().is_some_and(|source| *source != current))
        };
        let waiting: Vec<ReplicaId> =
            self.pool.replicas().filter(|r| r.state() == State::Warm).map(|r| r.id()).filter(old).collect();
        let serving: Vec<(ReplicaId, u32)> = self
            .pool
            .replicas()
            .filter(|replica| matches!(replica.state(), State::Ready | State::Busy))
            .map(|replica| (replica.id(), replica.in_flight()))
            .filter(|(id, _)| old(id))
            .collect();
        waiting.into_iter().for_each(|id| self.dismiss(id));
        let Some((idlest, _)) = serving.iter().copied().min_by_key(|(_, in_flight)| *in_flight) else {
            return;
        };
        match self.rolling.and_then(|id| self.pool.find(id)).map(|replica| replica.state()) {
            Some(State::Restoring) => return,
            Some(State::Ready | State::Busy) => {
                self.rolling = None;
                return self.dismiss(idlest);
            }
            _ => self.rolling = None,
        }
        if self.pool.starting() > 0 {
            return;
        }
        if self.pool.charged() < self.config.max_replicas {
            // Where nothing can be started, the old ones go on.
            self.rolling = self.start(false).ok().map(|(id, _)| id);
        } else if self.pool.active() >= self.desired {
            self.dismiss(idlest);
        }
    }
}

/// Six hexadecimal digits' worth of chance, so that names are not used again soon.
pub(super) fn random() -> u32 {
    let mut bytes = [0; 4];
    if getrandom::fill(&mut bytes).is_err() {
        bytes = (crate::status::now() as u32).to_le_bytes();
    }
    u32::from_le_bytes(bytes) & 0xff_ffff
}
