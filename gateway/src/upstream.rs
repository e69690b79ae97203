//! Connections to the server in one replica: made when needed and kept while idle. In HTTP/1.1 two requests never share one; in
//! HTTP/2 without TLS (h2c, for servers of gRPC) all share one.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::header::{CONNECTION, HOST, HeaderValue, UPGRADE};
use hyper::http::uri::{Authority, Scheme};
use hyper::{Request, Response, Uri, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use crate::body::Outgoing;
use crate::lanes;

/// So many requests borrow a connection of another lane before one of them gets its own in its place.
const BORROWED_MAX: u32 = 32;
/// How long a kept connection may take to be done with its last answer before another one is used.
const SETTLE: Duration = Duration::from_millis(20);
/// Header lines and values of a response, together, at most.
const HEAD_BYTES_MAX: usize = 256 << 10;
/// Bytes of an answer of HTTP/2 that are taken before its client reads them.
const STREAM_BYTES: u32 = 256 << 10;
/// The same of all answers on one connection: more than a replica gives at once, so that a client which does not read its
/// answer leaves room for those of others.
const CONNECTION_BYTES: u32 = 1 << 30;

/// Makes connections into a replica.
#[async_trait::async_trait]
pub trait Dial: Send + Sync + 'static {
    /// A new connection to the server's port.
    ///
    /// # Errors
    /// The server does not listen, or the replica is gone.
    async fn dial(&self) -> io::Result<TcpStream>;
}

/// What the server in a replica speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protocol {
    /// HTTP/1.1.
    #[default]
    Http1,
    /// HTTP/2 without TLS, begun without asking. It carries no upgrades.
    H2c,
}

/// Sends requests over one connection.
enum Sender {
    One(http1::SendRequest<Outgoing>),
    Two(http2::SendRequest<Outgoing>),
}

impl Sender {
    /// Completes when it can take a request.
    async fn ready(&mut self) -> hyper::Result<()> {
        match self {
            Sender::One(sender) => sender.ready().await,
            Sender::Two(sender) => sender.ready().await,
        }
    }
}

/// A connection that is kept.
struct Idle {
    sender: Sender,
    /// The lane on which its bytes are read and written.
    lane: usize,
}

/// Connections that are kept.
#[derive(Default)]
struct Kept {
    /// Those of HTTP/1.1 that carry nothing, and that of HTTP/2 whatever it carries.
    idle: Vec<Idle>,
    /// Requests that took one of another lane since one was closed for that.
    borrowed: u32,
}

/// A replica's server.
pub struct Upstream {
    name: String,
    /// The same, where it can be a header: made once.
    header: Option<HeaderValue>,
    dial: Arc<dyn Dial>,
    protocol: Protocol,
    kept: Mutex<Kept>,
}

impl std::fmt::Debug for Upstream {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(to, "Upstream({})", self.name)
    }
}

/// A connection that one request has for itself.
pub(crate) struct Connection {
    sender: Sender,
    lane: usize,
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
    pub fn new(name: impl Into<String>, dial: Arc<dyn Dial>, protocol: Protocol) -> Self {
        let name = name.into();
        let header = HeaderValue::from_str(&name).ok();
        Self { name, header, dial, protocol, kept: Mutex::default() }
    }

    /// The replica's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its name as a header, if it can be one.
    pub(crate) fn header(&self) -> Option<&HeaderValue> {
        self.header.as_ref()
    }

    /// Closes all connections that carry nothing, as a replica needs it that is to be paused.
    pub fn hang_up(&self) {
        self.lock().idle.clear();
    }

    /// A connection that can take a request: a kept one, or a new one.
    pub(crate) async fn connection(&self) -> io::Result<Connection> {
        loop {
            let kept = self.kept();
            // What is rare is in boxes, so that no request has to have room for it.
            let Some(Idle { mut sender, lane }) = kept else { return Box::pin(self.connect()).await };
            // Most are ready, and a clock is only for those that are not.
            let settled = match sender.ready().now_or_never() {
                Some(settled) => settled.is_ok(),
                None => {
                    let settled = Box::pin(tokio::time::timeout(SETTLE, sender.ready()));
                    matches!(settled.await, Ok(Ok(())))
                }
            };
            if settled {
                return Ok(Connection { sender, lane, kept: true });
            }
        }
    }

    /// One of this lane, else one of another: a replica never has more connections than requests at once, and a server that
    /// has a thread for each would not take more. To borrow wakes the other lane twice for each request, so a lane that does
    /// it often makes a connection of its own, and one of the others is closed for that.
    fn kept(&self) -> Option<Idle> {
        let (mut kept, here) = (self.lock(), lanes::here());
        if let Some(Idle { sender: Sender::Two(sender), lane }) = kept.idle.last()
            && !sender.is_closed()
        {
            return Some(Idle { sender: Sender::Two(sender.clone()), lane: *lane });
        }
        if let Some(own) = kept.idle.iter().rposition(|idle| idle.lane == here) {
            return Some(kept.idle.swap_remove(own));
        }
        let other = kept.idle.pop()?;
        kept.borrowed += 1;
        if kept.borrowed < BORROWED_MAX {
            return Some(other);
        }
        kept.borrowed = 0;
        None
    }

    async fn connect(&self) -> io::Result<Connection> {
        let lane = lanes::here();
        let stream = self.dial.dial().await?;
        // Requests and tokens are small and wait for each other.
        let _ = stream.set_nodelay(true);
        let stream = TokioIo::new(stream);
        // Each ends when both sides are done with it; how is told to whoever waits for an answer.
        let sender = match self.protocol {
            Protocol::Http1 => {
                let mut builder = http1::Builder::new();
                // As for clients: one buffer, no list.
                builder.max_buf_size(HEAD_BYTES_MAX).writev(false);
                let (sender, connection) = builder.handshake(stream).await.map_err(io::Error::other)?;
                tokio::spawn(connection.with_upgrades());
                Sender::One(sender)
            }
            Protocol::H2c => {
                let mut builder = http2::Builder::new(TokioExecutor::new());
                builder
                    .max_header_list_size(HEAD_BYTES_MAX as u32)
                    .initial_stream_window_size(STREAM_BYTES)
                    .initial_connection_window_size(CONNECTION_BYTES);
                let (sender, connection) = builder.handshake(stream).await.map_err(io::Error::other)?;
                tokio::spawn(connection);
                self.lock().idle.push(Idle { sender: Sender::Two(sender.clone()), lane });
                Sender::Two(sender)
            }
        };
        Ok(Connection { sender, lane, kept: false })
    }

    /// Keeps a connection whose answer has been read to its end.
    pub(crate) fn keep(&self, connection: Connection) {
        match &connection.sender {
            Sender::One(sender) if !sender.is_closed() => {
                let Connection { sender, lane, .. } = connection;
                self.lock().idle.push(Idle { sender, lane });
            }
            // One of HTTP/2 was there all the time.
            Sender::One(_) | Sender::Two(_) => {}
        }
    }

    /// No critical section can panic.
    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    /// Sends a request and waits for the head of its answer.
    pub(crate) async fn ask(&mut self, request: Request<Outgoing>) -> Result<Response<Incoming>, Unanswered> {
        let asked = match &mut self.sender {
            Sender::One(sender) => sender.try_send_request(request).await,
            Sender::Two(sender) => sender.try_send_request(as_two(request)).await,
        };
        match asked {
            Ok(response) => Ok(response),
            Err(mut error) => Err(match error.take_message() {
                Some(request) => Unanswered::Unsent(Box::new(request)),
                None => Unanswered::Lost(error.into_error()),
            }),
        }
    }
}

/// A request as HTTP/2 has it: the host is part of the target, and no header is about the connection.
fn as_two(mut request: Request<Outgoing>) -> Request<Outgoing> {
    let headers = request.headers_mut();
    headers.remove(CONNECTION);
    headers.remove(UPGRADE);
    let host = headers.remove(HOST).and_then(|host| host.to_str().ok()?.parse::<Authority>().ok());
    if request.uri().authority().is_none() {
        let mut target = request.uri().clone().into_parts();
        target.scheme = Some(Scheme::HTTP);
        target.authority = Some(host.unwrap_or(Authority::from_static("localhost")));
        *request.uri_mut() = Uri::from_parts(target).unwrap_or_default();
    }
    *request.version_mut() = Version::HTTP_2;
    request
}
