//! Connections to the server in one replica: made when needed, kept while idle, never shared by two requests at once.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use crate::body::Outgoing;

/// How long a kept connection may take to be done with its last answer before another one is used.
const SETTLE: Duration = Duration::from_millis(20);
/// Header lines and values of a response, together, at most.
const HEAD_BYTES_MAX: usize = 256 << 10;

/// Makes connections into a replica.
#[async_trait::async_trait]
pub trait Dial: Send + Sync + 'static {
    /// A new connection to the server's port.
    ///
    /// # Errors
    /// The server does not listen, or the replica is gone.
    async fn dial(&self) -> io::Result<TcpStream>;
}

/// A replica's server.
pub struct Upstream {
    name: String,
    dial: Arc<dyn Dial>,
    idle: Mutex<Vec<SendRequest<Outgoing>>>,
}

impl std::fmt::Debug for Upstream {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(to, "Upstream({})", self.name)
    }
}

/// A connection that one request has for itself.
pub(crate) struct Connection {
    sender: SendRequest<Outgoing>,
    /// It has carried requests before, so its server may have closed it meanwhile.
    pub(crate) kept: bool,
}

/// Why a request was not answered.
pub(crate) enum Unanswered {
    /// Not a byte of it was sent: here it is again.
    Unsent(Box<Request<Outgoing>>),
    /// The connection broke after it was sent, or in the middle.
    Lost(hyper::Error),
}

impl Upstream {
    /// A replica of this name, reached so.
    #[must_use]
    pub fn new(name: impl Into<String>, dial: Arc<dyn Dial>) -> Self {
        Self { name: name.into(), dial, idle: Mutex::default() }
    }

    /// The replica's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Closes all connections that carry nothing, as a replica needs it that is to be paused.
    pub fn hang_up(&self) {
        self.lock().clear();
    }

    /// A connection that carries nothing: a kept one, or a new one.
    pub(crate) async fn connection(&self) -> io::Result<Connection> {
        loop {
            let Some(mut sender) = self.lock().pop() else { return self.connect().await };
            let settled = tokio::time::timeout(SETTLE, sender.ready()).await;
            if matches!(settled, Ok(Ok(()))) {
                return Ok(Connection { sender, kept: true });
            }
        }
    }

    async fn connect(&self) -> io::Result<Connection> {
        let stream = self.dial.dial().await?;
        // Requests and tokens are small and wait for each other.
        let _ = stream.set_nodelay(true);
        let mut builder = http1::Builder::new();
        builder.max_buf_size(HEAD_BYTES_MAX);
        let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        // It ends when both sides are done with it; how is told to whoever waits for an answer.
        tokio::spawn(connection.with_upgrades());
        Ok(Connection { sender, kept: false })
    }

    /// Keeps a connection whose answer has been read to its end.
    pub(crate) fn keep(&self, connection: Connection) {
        if !connection.sender.is_closed() {
            self.lock().push(connection.sender);
        }
    }

    /// No critical section can panic.
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<SendRequest<Outgoing>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    /// Sends a request and waits for the head of its answer.
    pub(crate) async fn ask(&mut self, request: Request<Outgoing>) -> Result<Response<Incoming>, Unanswered> {
        match self.sender.try_send_request(request).await {
            Ok(response) => Ok(response),
            Err(mut error) => Err(match error.take_message() {
                Some(request) => Unanswered::Unsent(Box::new(request)),
                None => Unanswered::Lost(error.into_error()),
            }),
        }
    }
}
