//! What the proxy needs of a pool: a slot for a request, or a reason why not.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper::header::HeaderName;
use hyper::{HeaderMap, StatusCode};
use opentelemetry::trace::SpanContext;

use crate::upstream::Upstream;

/// What is known of a request before its body is read.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Host name without its port, in lower case as far as clients send it so.
    pub host: Option<&'a str>,
    /// Its path.
    pub path: &'a str,
    /// Its headers.
    pub headers: &'a HeaderMap,
}

/// Which pool a request is for.
#[derive(Clone)]
pub enum Choice {
    /// This one.
    Desk(Arc<dyn Desk>),
    /// That depends on the field `model` of its body.
    ByModel,
    /// None.
    Nobody,
}

/// Chooses among the pools of one address.
pub trait Router: Send + Sync + 'static {
    /// By what stands in the head of a request.
    fn choose(&self, asked: &Asked<'_>) -> Choice;

    /// By its model as well, where that was looked for; `None` where the body names none.
    fn choose_by_model(&self, asked: &Asked<'_>, model: Option<&str>) -> Option<Arc<dyn Desk>>;
}

/// What a request wants.
#[derive(Debug, Clone, Default)]
pub struct Want {
    /// The value of the header by which requests belong together, if the pool has one.
    pub session: Option<Vec<u8>>,
    /// The names of replicas that lost it before. Where there are any it goes before all that are held, and to another replica.
    pub lost_by: Vec<String>,
    /// The span of the request, where it is traced.
    pub trace: Option<SpanContext>,
}

/// Why a request gets no slot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// As many are held as may be.
    #[error("{held} requests are held already, the limit is {max}")]
    Full {
        /// Requests held.
        held: usize,
        /// The limit.
        max: usize,
    },
    /// Its deadline passed.
    #[error("no replica had a free slot within {} ms", after.as_millis())]
    Late {
        /// How long it was held.
        after: Duration,
    },
    /// The pool does not serve.
    #[error("{why}")]
    Closed {
        /// Why not.
        why: String,
    },
}

/// How a pool treats requests, all of them alike.
#[derive(Debug, Clone, Default)]
pub struct Manners {
    /// The header by which requests belong together.
    pub affinity: Option<HeaderName>,
    /// Whether a request that no replica began to answer may be tried once elsewhere.
    pub retries: bool,
    /// How long a replica may take from the beginning of a request to the head of its answer; without it as long as that
    /// takes.
    pub patience: Option<Duration>,
}

/// What becomes of a request that wants a slot.
pub enum Turn {
    /// It has one.
    Now(Slot),
    /// It is held. Dropping the future gives the wait up.
    Held(Pin<Box<dyn Future<Output = Result<Slot, Refusal>> + Send>>),
    /// It gets none.
    Refused(Refusal),
}

impl Turn {
    /// Waits where that is necessary.
    ///
    /// # Errors
    /// Why there is no slot.
    pub async fn slot(self) -> Result<Slot, Refusal> {
        match self {
            Turn::Now(slot) => Ok(slot),
            Turn::Held(held) => held.await,
            Turn::Refused(refusal) => Err(refusal),
        }
    }
}

/// One pool.
pub trait Desk: Send + Sync + 'static {
    /// Its name.
    fn name(&self) -> &str;

    /// How it treats requests from now on.
    fn manners(&self) -> Arc<Manners>;

    /// A slot, now or after a while, or a reason why there is none.
    fn slot(&self, want: &Want) -> Turn;

    /// When a refused client should come again.
    fn retry_after(&self) -> Duration;

    /// What goes through.
    fn traffic(&self) -> &Arc<Traffic>;
}

/// What has gone through a pool, counted by whoever carries it and without anybody's lock. It only grows.
#[derive(Debug)]
pub struct Traffic {
    /// Bytes of bodies from clients.
    pub requests: AtomicU64,
    /// Bytes of bodies to clients.
    pub responses: AtomicU64,
    /// Requests that no replica began to answer and that were tried again.
    pub retried: AtomicU64,
    /// Answers, of a replica or of the gateway, by status.
    statuses: Box<[AtomicU64]>,
}

/// The least status that an answer can have, and the first that it cannot.
const STATUSES: std::ops::Range<u16> = 100..1000;

impl Default for Traffic {
    fn default() -> Self {
        let [requests, responses, retried] = [0; 3].map(AtomicU64::new);
        Self { requests, responses, retried, statuses: STATUSES.map(|_| AtomicU64::new(0)).collect() }
    }
}

impl Traffic {
    /// Answers by their status; those that there were.
    #[must_use]
    pub fn by_status(&self) -> BTreeMap<u16, u64> {
        let counts = self.statuses.iter().map(|count| count.load(Ordering::Relaxed));
        STATUSES.zip(counts).filter(|(_, count)| *count > 0).collect()
    }

    pub(crate) fn answered(&self, status: StatusCode) {
        Self::add(&self.statuses[usize::from(status.as_u16() - STATUSES.start)], 1);
    }

    pub(crate) fn add(to: &AtomicU64, count: usize) {
        to.fetch_add(count as u64, Ordering::Relaxed);
    }
}

/// A place in a replica. Dropping it gives it back: that is the end of the request.
pub struct Slot {
    /// The replica.
    pub upstream: Arc<Upstream>,
    /// How long the request was held; nothing where a slot was free.
    pub held: Option<Duration>,
    /// What gives the slot back.
    pub lease: Box<dyn Lease>,
}

/// A slot that is taken, until it is dropped.
pub trait Lease: Send + Sync {
    /// The replica broke off before the end of an answer.
    fn broken(&mut self, why: &str);

    /// Nobody listens at the replica's port: it does not serve.
    fn unreachable(&mut self, why: &str);
}
