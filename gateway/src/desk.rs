//! What the proxy needs of a pool: a slot for a request, or a reason why not.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper::HeaderMap;
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
    /// It was lost by a replica before: it goes before all that are held.
    pub again: bool,
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

/// One pool.
#[async_trait::async_trait]
pub trait Desk: Send + Sync + 'static {
    /// Its name.
    fn name(&self) -> &str;

    /// The header by which requests belong together.
    fn affinity(&self) -> Option<String>;

    /// Whether a request that no replica began to answer may be tried once elsewhere.
    fn retries(&self) -> bool;

    /// How long a replica may take from the beginning of a request to the head of its answer; without it as long as that
    /// takes.
    fn patience(&self) -> Option<Duration>;

    /// A slot, now or after a while. Dropping the future gives the wait up.
    ///
    /// # Errors
    /// Why there is none.
    async fn slot(&self, want: Want) -> Result<Slot, Refusal>;

    /// When a refused client should come again.
    fn retry_after(&self) -> Duration;

    /// A request was answered with this status, by a replica or by the gateway.
    fn answered(&self, status: u16);

    /// A request that no replica began to answer is tried again.
    fn retried(&self);

    /// Bytes of bodies that went through.
    fn traffic(&self) -> Arc<Traffic>;
}

/// Bytes of bodies.
#[derive(Debug, Default)]
pub struct Traffic {
    /// From clients.
    pub requests: AtomicU64,
    /// To clients.
    pub responses: AtomicU64,
}

impl Traffic {
    pub(crate) fn add(to: &AtomicU64, bytes: usize) {
        to.fetch_add(bytes as u64, Ordering::Relaxed);
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
