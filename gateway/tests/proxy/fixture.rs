//! A front with one pool, whose replica is a server that the test scripts.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use std::time::Duration;

use opentelemetry_sdk::trace::SdkTracer;
use rewarm_gateway::{
    Asked, Choice, Desk, Dial, Front, Lanes, Lease, Limits, Manners, Protocol, Refusal, Router, Slot,
    Traffic, Turn, Upstream, Want,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;

/// No step of a test takes as long on any machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Limits that no test meets by accident.
pub(crate) const LIMITS: Limits = Limits { header_timeout: PATIENCE, body_timeout: None, body_max: None };

/// A pool of one replica.
pub(crate) struct Pool {
    pub(crate) upstream: Arc<Upstream>,
    slots: Arc<Semaphore>,
    /// Requests that wait for a slot.
    pub(crate) waiting: Arc<AtomicI64>,
    /// Slots that are taken.
    pub(crate) taken: Arc<AtomicI64>,
    pub(crate) broken: Arc<AtomicU32>,
    pub(crate) traffic: Arc<Traffic>,
    refusal: Option<Refusal>,
    patience: Option<Duration>,
}

struct To(SocketAddr);

#[async_trait::async_trait]
impl Dial for To {
    async fn dial(&self) -> io::Result<TcpStream> {
        TcpStream::connect(self.0).await
    }
}

struct Taken {
    _permit: OwnedSemaphorePermit,
    taken: Arc<AtomicI64>,
    broken: Arc<AtomicU32>,
}

impl Lease for Taken {
    fn broken(&mut self, _why: &str) {
        self.broken.fetch_add(1, Ordering::SeqCst);
    }

    fn unreachable(&mut self, _why: &str) {
        self.broken.fetch_add(1, Ordering::SeqCst);
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.taken.fetch_sub(1, Ordering::SeqCst);
    }
}

struct Count<'a>(&'a AtomicI64);

impl Drop for Count<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Desk for Pool {
    fn name(&self) -> &str {
        "pool"
    }

    fn manners(&self) -> Arc<Manners> {
        Arc::new(Manners { affinity: None, retries: true, patience: self.patience })
    }

    fn slot(&self, _want: &Want) -> Turn {
        if let Some(refusal) = &self.refusal {
            return Turn::Refused(refusal.clone());
        }
        let (slots, waiting, upstream) = (self.slots.clone(), self.waiting.clone(), self.upstream.clone());
        let (taken, broken) = (self.taken.clone(), self.broken.clone());
        Turn::Held(Box::pin(async move {
            waiting.fetch_add(1, Ordering::SeqCst);
            let _count = Count(&waiting);
            let permit = slots.acquire_owned().await.expect("never closed");
            taken.fetch_add(1, Ordering::SeqCst);
            Ok(Slot { upstream, held: None, lease: Box::new(Taken { _permit: permit, taken, broken }) })
        }))
    }

    fn retry_after(&self) -> Duration {
        Duration::from_millis(1500)
    }

    fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }
}

/// The path of requests that are held for ever.
pub(crate) const HELD: &str = "/held";

/// Everything goes to one pool, or to the one whose model a body names, but for what is held.
struct One {
    pool: Arc<Pool>,
    /// It has no slot.
    full: Arc<Pool>,
    model: Option<&'static str>,
}

impl Router for One {
    fn choose(&self, asked: &Asked<'_>) -> Choice {
        match self.model {
            _ if asked.path == HELD => Choice::Desk(self.full.clone()),
            Some(_) => Choice::ByModel,
            None => Choice::Desk(self.pool.clone()),
        }
    }

    fn choose_by_model(&self, _asked: &Asked<'_>, model: Option<&str>) -> Option<Arc<dyn Desk>> {
        (model == self.model).then(|| self.pool.clone() as Arc<dyn Desk>)
    }
}

/// A front that listens.
pub(crate) struct Gateway {
    pub(crate) address: SocketAddr,
    pub(crate) pool: Arc<Pool>,
    /// The pool of what is held for ever.
    pub(crate) full: Arc<Pool>,
    pub(crate) front: Arc<Front>,
}

/// What a gateway is to be like.
pub(crate) struct Setup {
    pub(crate) slots: usize,
    /// Connections of clients.
    pub(crate) connections: usize,
    pub(crate) limits: Limits,
    pub(crate) tls: Option<TlsAcceptor>,
    pub(crate) refusal: Option<Refusal>,
    pub(crate) patience: Option<Duration>,
    pub(crate) protocol: Protocol,
    pub(crate) model: Option<&'static str>,
    pub(crate) tracer: Option<SdkTracer>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            slots: 8,
            connections: 100,
            limits: LIMITS,
            tls: None,
            refusal: None,
            patience: None,
            protocol: Protocol::Http1,
            model: None,
            tracer: None,
        }
    }
}

impl Setup {
    /// Starts it in front of a server.
    pub(crate) async fn before(self, server: SocketAddr) -> Gateway {
        let upstream = Arc::new(Upstream::new("replica-1", Arc::new(To(server)), self.protocol));
        let pool = |slots| {
            Arc::new(Pool {
                upstream: upstream.clone(),
                slots: Arc::new(Semaphore::new(slots)),
                waiting: Arc::default(),
                taken: Arc::default(),
                broken: Arc::default(),
                traffic: Arc::default(),
                refusal: self.refusal.clone(),
                patience: self.patience,
            })
        };
        let (pool, full) = (pool(self.slots), pool(0));
        let router = Arc::new(One { pool: pool.clone(), full: full.clone(), model: self.model });
        let front = Front::new(
            router,
            self.limits,
            self.tls,
            Lanes::start(2).expect("threads"),
            Arc::new(Semaphore::new(self.connections)),
            self.tracer,
        );
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let address = listener.local_addr().expect("its address");
        tokio::spawn(front.clone().serve(listener));
        Gateway { address, pool, full, front }
    }
}

impl Gateway {
    /// A connection of a client.
    pub(crate) async fn client(&self) -> Talk {
        Talk::new(TcpStream::connect(self.address).await.expect("it listens"))
    }

    /// Waits until so many slots are taken.
    pub(crate) async fn await_taken(&self, count: i64) {
        until("slots are taken", || self.pool.taken.load(Ordering::SeqCst) == count).await;
    }
}

/// Waits until something is so.
pub(crate) async fn until(what: &str, mut so: impl FnMut() -> bool) {
    let waiting = async {
        while !so() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting)
        .await
        .unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"));
}

/// One side of a connection, spoken by hand.
pub(crate) struct Talk {
    stream: TcpStream,
    seen: Vec<u8>,
}

impl Talk {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self { stream, seen: Vec::new() }
    }

    pub(crate) fn into_stream(self) -> TcpStream {
        self.stream
    }

    pub(crate) async fn say(&mut self, text: impl AsRef<[u8]>) {
        self.stream.write_all(text.as_ref()).await.expect("the other side listens");
    }

    /// As a server: agrees to speak WebSocket from here on.
    pub(crate) async fn leave_http(&mut self) {
        self.say("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
            .await;
    }

    /// Everything up to and with `end`.
    pub(crate) async fn hear(&mut self, end: &str) -> String {
        loop {
            if let Some(at) = find(&self.seen, end.as_bytes()) {
                let rest = self.seen.split_off(at + end.len());
                return String::from_utf8_lossy(&std::mem::replace(&mut self.seen, rest)).into_owned();
            }
            let more = self.more().await;
            assert!(more, "the connection ended before {end:?}: {:?}", String::from_utf8_lossy(&self.seen));
        }
    }

    /// The head of a request or an answer, in lower case.
    pub(crate) async fn head(&mut self) -> String {
        self.hear("\r\n\r\n").await.to_lowercase()
    }

    /// Everything until the other side closes.
    pub(crate) async fn rest(&mut self) -> String {
        while self.more().await {}
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    async fn more(&mut self) -> bool {
        let mut buffer = [0; 64 << 10];
        let count = tokio::time::timeout(PATIENCE, self.stream.read(&mut buffer)).await;
        let count = count
            .unwrap_or_else(|_| panic!("nothing comes after {:?}", String::from_utf8_lossy(&self.seen)))
            .unwrap_or(0);
        self.seen.extend_from_slice(&buffer[..count]);
        count > 0
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// A server: its connections, in the order in which they come.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    listener: TcpListener,
}

impl Server {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        Self { address: listener.local_addr().expect("its address"), listener }
    }

    /// The next connection.
    pub(crate) async fn accept(&self) -> Talk {
        let accepted = tokio::time::timeout(PATIENCE, self.listener.accept()).await.expect("somebody comes");
        Talk::new(accepted.expect("a connection").0)
    }
}
