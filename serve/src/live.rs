//! One pool while it serves: requests, replicas and the policy, behind one lock.
//!
//! Everything that happens comes here: a request ([`Desk::slot`]), its end ([`Lease`]), what the parent says of replicas
//! ([`Live::heard`]), and time ([`Live::run`]). Each takes the lock, changes the book, lets the policy look and carries its
//! steps out by telling the parent. Queue, book, policies and steps are those of the simulator.

mod capture;
mod circuit;
mod dial;
mod inner;
mod members;
mod picture;
mod removed;
mod requests;
mod room;
mod spans;
mod took;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use opentelemetry_sdk::trace::SdkTracer;
use rewarm_autoscaler::ledger::{Ledger, Memory};
use rewarm_autoscaler::moment::Moment;
use rewarm_autoscaler::pool::{Pool, Shape};
use rewarm_autoscaler::queue::{Queue, QueueLimits};
use rewarm_autoscaler::start_times::StartTimes;
use rewarm_gateway::desk::{Manners, Traffic};
use tokio::sync::{Notify, broadcast};

use self::capture::Capture;
use self::circuit::Tiers;
pub(crate) use self::dial::Dialler;
use self::inner::Inner;
pub(crate) use self::room::Room;
use self::took::{FIRST_GUESS, Took};
use crate::config::{Cold, PoolConfig};
use crate::link::{Line, ToParent};
use crate::replicas::{Existing, Known, Started};
use crate::status::{Command, Notice, PoolStatus, Refused, Totals};

/// Time since this process began, for all pools.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ticker(Instant);

impl Ticker {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn now(self) -> Moment {
        Moment::from_nanos(u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
}

/// What a pool shares with the others.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) ticker: Ticker,
    pub(crate) line: Line,
    pub(crate) notices: broadcast::Sender<Notice>,
    pub(crate) dialler: Arc<Dialler>,
    pub(crate) ledger: Ledger,
    pub(crate) room: Room,
    /// Makes spans, where somebody collects them.
    pub(crate) tracer: Option<SdkTracer>,
}

/// One pool.
pub(crate) struct Live {
    name: String,
    shared: Shared,
    traffic: Arc<Traffic>,
    /// Asked for at each request, so not behind the lock.
    manners: ArcSwap<Manners>,
    /// Everybody who may still bring a request has one of these.
    open: Arc<()>,
    /// Something may have to happen earlier than [`Live::run`] thinks.
    sooner: Notify,
    inner: Mutex<Inner>,
}

/// What the parent says of a replica.
#[derive(Debug)]
pub(crate) enum Heard {
    Started(Started),
    Paused,
    Woken,
    Failed(String),
    Stopped,
    Ended(String),
    /// A capture is over, with what went wrong.
    Captured(Option<String>),
}

fn shape(config: &PoolConfig, serving: Memory, paused: Memory) -> Shape {
    let (concurrency, max, warm) = (config.concurrency, config.max_replicas, config.warm);
    Shape { concurrency, max, warm, serving, paused }
}

fn queue_limits(config: &PoolConfig) -> QueueLimits {
    QueueLimits { max: config.queue.max, deadline: config.queue.deadline }
}

fn manners(config: &PoolConfig) -> Manners {
    let affinity = config.affinity.clone();
    Manners { affinity, retries: config.retry, patience: config.answer_timeout }
}

impl Live {
    pub(crate) fn new(config: PoolConfig, shared: Shared) -> Arc<Self> {
        let limits = inner::limits(&config);
        let policy = config.policy.spec.build(&limits);
        let host = config.replica_memory.unwrap_or(0);
        let memory = Memory { host, device: 0 };
        let name = config.name.clone();
        let manners = ArcSwap::from_pointee(manners(&config));
        Arc::new_cyclic(|me| {
            shared.room.enter(me.clone());
            let inner = Inner {
                me: me.clone(),
                pool: Pool::new(shape(&config, memory, memory), shared.ledger.clone()),
                queue: Queue::new(queue_limits(&config)),
                victim: policy.victim(),
                policy,
                times: StartTimes::new(FIRST_GUESS),
                tiers: Tiers::new(config.cold != Cold::Never),
                limits,
                members: HashMap::new(),
                names: HashMap::new(),
                stopping: HashMap::new(),
                known: None,
                fixed: None,
                paused: false,
                finishing: false,
                removed: false,
                rolling: None,
                capture: Capture::default(),
                desired: 0,
                obstacle: None,
                lack: None,
                armed: Moment::NEVER,
                decisions: VecDeque::new(),
                starts: VecDeque::new(),
                start_failed: None,
                took: Took::default(),
                totals: Totals::default(),
                refused: Vec::new(),
                now: shared.ticker.now(),
                shared: shared.clone(),
                config,
            };
            let (traffic, open, sooner) = (Arc::default(), Arc::default(), Notify::new());
            Self { name, shared, traffic, manners, open, sooner, inner: Mutex::new(inner) }
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn config(&self) -> PoolConfig {
        self.look(|inner| inner.config.clone())
    }

    /// Does something under the lock, at one moment. What it could not hand over is dropped afterwards: giving a slot back
    /// takes the lock again.
    fn with<T>(&self, work: impl FnOnce(&mut Inner) -> T) -> T {
        let (result, leftovers, sooner) = {
            // A panic in the book is a broken invariant, and the process ends: nobody comes here after it.
            let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
            inner.now = self.shared.ticker.now();
            let result = work(&mut inner);
            let sooner = inner.next_moment() < inner.armed;
            (result, std::mem::take(&mut inner.refused), sooner)
        };
        drop(leftovers);
        if sooner {
            self.sooner.notify_one();
        }
        result
    }

    /// Reads or counts something under the lock, which changes nothing of what happens and when.
    fn look<T>(&self, work: impl FnOnce(&mut Inner) -> T) -> T {
        work(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Lets time pass, until the pool is over.
    pub(crate) async fn run(self: Arc<Self>) {
        while !self.is_over() {
            let (next, short) = self.with(|inner| {
                inner.pass();
                let short = inner.asks_for_room();
                inner.armed = inner.next_moment();
                (inner.armed, short)
            });
            if let Some(short) = short {
                self.shared.room.make(&self, short);
            }
            // Far enough away to be never, and near enough for every clock.
            let wait = next.since(self.shared.ticker.now()).min(Duration::from_secs(3600));
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.sooner.notified() => {}
            }
        }
    }

    /// Takes in what the parent says of a replica.
    pub(crate) fn heard(&self, name: &str, heard: Heard) {
        let gone = matches!(heard, Heard::Stopped | Heard::Captured(_));
        self.with(|inner| inner.heard(name, heard));
        if gone || self.shared.room.is_short() {
            self.shared.room.given_back();
        }
    }

    /// The pool's snapshot was looked at.
    pub(crate) fn known(&self, known: Known) {
        self.with(|inner| inner.learn(known));
    }

    /// These replicas were there before this process.
    pub(crate) fn adopt(&self, existing: &[&Existing]) {
        self.with(|inner| inner.adopt(existing));
    }

    /// Whether a replica of this name is in the book.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.with(|inner| {
            inner.names.contains_key(name) || inner.stopping.contains_key(name) || inner.captures(name)
        })
    }

    /// Changes what holds from now on.
    pub(crate) fn change(&self, config: PoolConfig) {
        self.manners.store(Arc::new(manners(&config)));
        self.with(|inner| inner.change(config));
    }

    /// Starts nothing more. What is held is answered as long as there are replicas.
    pub(crate) fn finish(&self) {
        self.with(|inner| inner.finishing = true);
    }

    /// The pool is not in the file any more: what it has and holds is answered, and its replicas go after that.
    pub(crate) fn close(&self) {
        self.with(Inner::close);
    }

    /// Whether nothing is left of a pool that is not in the file any more, and nobody can ask it.
    pub(crate) fn is_over(&self) -> bool {
        let asked = Arc::strong_count(&self.open) > 1;
        !asked && self.look(|inner| inner.removed && inner.queue.is_empty()) && self.is_empty()
    }

    /// Whether nothing is in flight and nothing held.
    pub(crate) fn is_idle(&self) -> bool {
        self.with(|inner| inner.pool.in_flight() == 0 && inner.queue.is_empty())
    }

    /// Whether no replica is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.with(|inner| {
            inner.members.is_empty() && inner.stopping.is_empty() && !inner.capture.is_running()
        })
    }

    /// The pool as others see it.
    pub(crate) fn status(&self) -> PoolStatus {
        let traffic = self.traffic.clone();
        self.with(|inner| inner.picture(&traffic))
    }

    /// The port of a replica's server.
    pub(crate) fn port_of(&self, name: &str) -> Option<u16> {
        self.with(|inner| {
            inner.names.get(name).and_then(|id| inner.members.get(id)).map(|member| member.port)
        })
    }

    /// Does what a person asks for.
    pub(crate) fn command(&self, command: &Command) -> Result<String, Refused> {
        self.with(|inner| inner.command(command))
    }
}

/// Tells the parent. It is gone only when this process is about to end, too.
fn tell(line: &Line, message: &ToParent) {
    if let Err(error) = line.tell(message, &[]) {
        tracing::error!(%error, "the parent cannot be told");
    }
}

#[cfg(test)]
mod tests;
