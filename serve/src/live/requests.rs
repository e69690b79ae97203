//! Requests: a slot at once, a place in the queue, or a refusal.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use opentelemetry::trace::{Span as _, Status};
use opentelemetry_sdk::trace::Span;
use rewarm_autoscaler::moment::Moment;
use rewarm_autoscaler::policy::Event;
use rewarm_autoscaler::pool::{Replica, ReplicaId, State, Tier};
use rewarm_autoscaler::queue::Ticket;
use rewarm_gateway::desk::{Desk, Lease, Manners, Refusal, Slot, Traffic, Turn, Want};
use tokio::sync::oneshot;

use super::Live;
use super::inner::Inner;
use super::members::BROKEN_MAX;
use crate::config::Routing;
use crate::status::Notice;

/// A lost request keeps away from the replica that lost it for so long at least, though requests are to wait for nothing.
const ELSEWHERE_MIN: Duration = Duration::from_millis(100);

/// A pool as the gateway's proxy sees it. Who has one may bring requests.
#[derive(Clone)]
pub(crate) struct LiveDesk(Arc<Live>, #[expect(dead_code, reason = "it is counted")] Arc<()>);

/// What decides to which replica a request goes.
#[derive(Default)]
struct Seeks {
    session: Option<Vec<u8>>,
    /// Those that lost it before.
    lost_by: Vec<ReplicaId>,
    /// How long it keeps away from them.
    until: Moment,
}

/// A held request, as the queue keeps it.
pub(super) struct Waiter {
    pub(super) answer: oneshot::Sender<Result<Granted, Refusal>>,
    seeks: Seeks,
    /// From here to its slot, or to its end without one.
    pub(super) span: Option<Box<Span>>,
}

impl Waiter {
    /// It gets no slot.
    fn refuse(mut self, refusal: Refusal) {
        if let Some(span) = &mut self.span {
            span.set_status(Status::error(refusal.to_string()));
        }
        // Nobody may be waiting any more.
        let _ = self.answer.send(Err(refusal));
    }
}

/// A slot that was given out under the lock. It is wrapped into a [`Slot`] outside of it.
pub(super) struct Granted {
    id: ReplicaId,
    upstream: Arc<rewarm_gateway::Upstream>,
    began: Moment,
    waited: Duration,
    early: bool,
    /// Gives the slot back where nobody takes it.
    live: Option<Arc<Live>>,
}

impl Drop for Granted {
    fn drop(&mut self) {
        if let Some(live) = self.live.take() {
            live.ended(self.id, self.began, self.early);
        }
    }
}

/// A place in the queue. Dropping it gives it up.
struct Waiting {
    live: Arc<Live>,
    ticket: Ticket,
    answer: oneshot::Receiver<Result<Granted, Refusal>>,
    over: bool,
}

impl Future for Waiting {
    type Output = Result<Granted, Refusal>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = ready!(Pin::new(&mut self.answer).poll(context));
        self.over = true;
        Poll::Ready(answer.unwrap_or_else(|_| Err(Refusal::Closed { why: "the pool is gone".to_owned() })))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if !self.over {
            self.live.with(|inner| inner.left(self.ticket));
        }
    }
}

/// A slot in use.
struct Taken {
    live: Arc<Live>,
    id: ReplicaId,
    began: Moment,
    early: bool,
    broken: bool,
}

impl Lease for Taken {
    fn broken(&mut self, why: &str) {
        self.broken = true;
        self.live.with(|inner| inner.broke(self.id, why));
    }

    fn unreachable(&mut self, why: &str) {
        self.broken = true;
        self.live.with(|inner| inner.silent(self.id, why));
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.live.with(|inner| {
            if !self.broken {
                inner.answered(self.id);
            }
            inner.ended(self.id, self.began, self.early);
        });
    }
}

impl Live {
    /// The pool for clients.
    pub(crate) fn desk(self: &Arc<Self>) -> LiveDesk {
        LiveDesk(self.clone(), self.open.clone())
    }

    fn ended(&self, id: ReplicaId, began: Moment, early: bool) {
        self.with(|inner| inner.ended(id, began, early));
    }
}

enum Arrived {
    Slot(Granted),
    Held(Ticket, oneshot::Receiver<Result<Granted, Refusal>>),
}

impl Granted {
    /// The slot, of which its holder has to know that it was held.
    fn into_slot(mut self, held: Option<Duration>) -> Slot {
        let live = self.live.take().expect("it was just given out");
        let lease = Taken { live, id: self.id, began: self.began, early: self.early, broken: false };
        Slot { upstream: self.upstream.clone(), held, lease: Box::new(lease) }
    }
}

impl Desk for LiveDesk {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn manners(&self) -> Arc<Manners> {
        self.0.manners.load_full()
    }

    fn slot(&self, want: &Want) -> Turn {
        let live = &self.0;
        match live.with(|inner| inner.arrive(want)) {
            Ok(Arrived::Slot(granted)) => Turn::Now(granted.into_slot(None)),
            Ok(Arrived::Held(ticket, answer)) => {
                let waiting = Waiting { live: live.clone(), ticket, answer, over: false };
                Turn::Held(Box::pin(async move {
                    let granted = waiting.await?;
                    let held = granted.waited;
                    Ok(granted.into_slot(Some(held)))
                }))
            }
            Err(refusal) => Turn::Refused(refusal),
        }
    }

    fn retry_after(&self) -> Duration {
        self.0.look(|inner| Duration::from_secs_f64(inner.expected().restore.clamp(1.0, 60.0)))
    }

    fn traffic(&self) -> &Arc<Traffic> {
        &self.0.traffic
    }
}

impl Inner {
    fn arrive(&mut self, want: &Want) -> Result<Arrived, Refusal> {
        let again = !want.lost_by.is_empty();
        if !again {
            self.totals.requests += 1;
        }
        if self.paused {
            return Err(Refusal::Closed { why: format!("pool {} is paused", self.config.name) });
        }
        let lost_by = want.lost_by.iter().filter_map(|name| self.names.get(name).copied()).collect();
        let until = self.now + self.config.target_wait.max(ELSEWHERE_MIN);
        let seeks = Seeks { session: want.session.clone(), lost_by, until };
        let first = again || self.queue.is_empty();
        let direct = if first { self.choose(self.now, &seeks) } else { None };
        let arrived = match direct {
            Some(id) => Ok(Arrived::Slot(self.grant(id, self.now))),
            None => self.hold(want, seeks),
        };
        self.serve(Event::Arrival);
        arrived
    }

    fn hold(&mut self, want: &Want, seeks: Seeks) -> Result<Arrived, Refusal> {
        let (answer, hear) = oneshot::channel();
        let span = self.held_span(want.trace.as_ref());
        let waiter = Waiter { answer, seeks, span };
        let held = match want.lost_by.is_empty() {
            true => self.queue.hold(self.now, waiter),
            false => Ok(self.queue.hold_first(self.now, waiter)),
        };
        match held {
            Ok(ticket) => {
                self.totals.held += 1;
                if self.queue.len() == 1 {
                    // Nobody may be listening.
                    let _ = self.shared.notices.send(Notice::FirstHeld { pool: self.config.name.clone() });
                }
                Ok(Arrived::Held(ticket, hear))
            }
            Err((full, _)) => {
                self.totals.refused_full += 1;
                Err(Refusal::Full { held: full.held, max: full.max })
            }
        }
    }

    /// Takes a slot for a request that came then, where there is one for it.
    fn choose(&mut self, came: Moment, seeks: &Seeks) -> Option<ReplicaId> {
        if self.pool.free_slots() == 0 {
            return None;
        }
        let avoided = if self.goes_elsewhere(seeks) { &seeks.lost_by[..] } else { &[] };
        if let Some(id) = seeks.session.as_ref().and_then(|session| self.at_home(session, avoided))
            && self.pool.assign_to(id, self.now)
        {
            return Some(id);
        }
        if !avoided.is_empty() {
            return self.elsewhere(avoided);
        }
        if self.config.routing == Routing::LeastInFlight {
            return self.pool.assign_idlest(self.now);
        }
        let spare = self.policy.spare(&self.view());
        let spare = if self.now.since(came) >= spare.age { 0 } else { spare.replicas };
        self.pool.assign(self.now, spare)
    }

    /// The replica to which a session belongs: each weighs the session with its own name, and the heaviest has it. A replica
    /// that comes or goes moves only the sessions that become or were its own.
    fn at_home(&self, session: &[u8], avoided: &[ReplicaId]) -> Option<ReplicaId> {
        let serving =
            self.pool.replicas().filter(|replica| matches!(replica.state(), State::Ready | State::Busy));
        serving
            .map(|replica| replica.id())
            .filter(|id| !avoided.contains(id))
            .max_by_key(|id| self.members.get(id).map(|member| member.weigh(session)))
    }

    /// Whether a request keeps away from those that lost it: as long as another one serves or is on its way, and for `target_wait`
    /// at most. One that lost a request may have been unlucky, and a second try there is better than none.
    fn goes_elsewhere(&self, seeks: &Seeks) -> bool {
        let comes = |replica: &Replica| {
            replica.is_starting() || matches!(replica.state(), State::Ready | State::Busy)
        };
        let other = |replica: &Replica| comes(replica) && !seeks.lost_by.contains(&replica.id());
        !seeks.lost_by.is_empty() && self.now < seeks.until && self.pool.replicas().any(other)
    }

    /// Takes a slot of another replica than these, of the busiest or the idlest that has one. It has waited before, so none is spared.
    fn elsewhere(&mut self, avoided: &[ReplicaId]) -> Option<ReplicaId> {
        let free = |replica: &&Replica| {
            matches!(replica.state(), State::Ready | State::Busy)
                && replica.in_flight() < self.config.concurrency
                && !avoided.contains(&replica.id())
        };
        let busiest = self.config.routing != Routing::LeastInFlight;
        let rank = |replica: &&Replica| {
            let busy = i64::from(replica.in_flight());
            (if busiest { -busy } else { busy }, replica.id())
        };
        let id = self.pool.replicas().filter(free).min_by_key(rank)?.id();
        self.pool.assign_to(id, self.now).then_some(id)
    }

    /// When a request that waits for another replica takes one that lost it.
    pub(super) fn second_best(&self) -> Option<Moment> {
        let held = (0..).map_while(|place| self.queue.get(place));
        let lost = held.map(|(_, waiter)| &waiter.seeks).take_while(|seeks| !seeks.lost_by.is_empty());
        lost.map(|seeks| seeks.until).filter(|until| *until > self.now).min()
    }

    fn grant(&mut self, id: ReplicaId, came: Moment) -> Granted {
        let waited = self.now.since(came);
        self.totals.wait_seconds.record(waited.as_secs_f64());
        let replica = self.pool.find(id).expect("it was just assigned");
        let early =
            replica.tier() != Tier::Wake && replica.assigned() <= u64::from(self.pool.shape().concurrency);
        let upstream = self.members[&id].upstream.clone();
        Granted { id, upstream, began: self.now, waited, early, live: self.me.upgrade() }
    }

    /// Gives held requests to free slots, tells the policy and does what it wants.
    pub(super) fn serve(&mut self, event: Event) {
        self.release();
        self.note(event);
        self.decide(event);
        self.release();
    }

    pub(super) fn release(&mut self) {
        let mut place = 0;
        while let Some((came, waiter)) = self.queue.get_mut(place) {
            // Taken out for a moment: to choose takes a slot.
            let seeks = std::mem::take(&mut waiter.seeks);
            let chosen = self.choose(came, &seeks);
            let Some(id) = chosen else {
                let lost = !seeks.lost_by.is_empty();
                if let Some((_, waiter)) = self.queue.get_mut(place) {
                    waiter.seeks = seeks;
                }
                if !lost {
                    return;
                }
                // The slots that are free are not for it: it keeps nobody from them.
                place += 1;
                continue;
            };
            let Some((came, mut waiter)) = self.queue.take(place) else { return };
            self.waited_for(id, came, waiter.span.take());
            let granted = self.grant(id, came);
            if let Err(Ok(unwanted)) = waiter.answer.send(Ok(granted)) {
                self.refused.push(unwanted);
            }
        }
    }

    /// A held request's client has left.
    fn left(&mut self, ticket: Ticket) {
        if self.queue.cancel(ticket).is_some() {
            self.totals.left += 1;
            self.note(Event::Left);
            self.decide(Event::Left);
        }
    }

    /// Refuses everything that is held.
    pub(super) fn refuse_held(&mut self, why: &str) {
        while let Some((_, waiter)) = self.queue.release() {
            waiter.refuse(Refusal::Closed { why: why.to_owned() });
        }
    }

    /// Refuses what has been held for too long.
    pub(super) fn expire(&mut self) {
        let mut late = 0;
        while let Some(waiter) = self.queue.expire(self.now) {
            late += 1;
            waiter.refuse(Refusal::Late { after: self.config.queue.deadline });
        }
        if late > 0 {
            self.totals.refused_late += late;
            self.note(Event::Left);
        }
    }

    /// A replica broke a request off, or could not be reached.
    fn broke(&mut self, id: ReplicaId, why: &str) {
        let Some(member) = self.members.get_mut(&id) else { return };
        member.broken_in_a_row += 1;
        if member.broken_in_a_row >= BROKEN_MAX {
            let reason =
                format!("{BROKEN_MAX} requests in a row were not answered, the last one because {why}");
            self.lose(id, &reason);
        }
    }

    /// Nobody listens at a replica's port. What it still answers is not cut off: it goes after that, which is at once where the request
    /// that says so is its only one.
    fn silent(&mut self, id: ReplicaId, why: &str) {
        if self.pool.find(id).is_none_or(|replica| replica.is_dismissed()) {
            return;
        }
        tracing::warn!(
            pool = self.config.name,
            replica = self.name(id),
            why,
            "its server cannot be reached: it finishes what it has, and goes"
        );
        self.totals.died += 1;
        self.count_loss(id, why);
        if let Some(member) = self.members.get_mut(&id) {
            member.lost = Some(format!("its server cannot be reached: {why}"));
        }
        self.dismiss(id);
        self.serve(Event::Timer);
    }

    fn answered(&mut self, id: ReplicaId) {
        if let Some(member) = self.members.get_mut(&id) {
            (member.broken_in_a_row, member.answered) = (0, true);
        }
    }
}
