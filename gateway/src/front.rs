//! One address: connections of clients, from the first byte to the last.
//!
//! A connection speaks TLS where the address has a certificate. HTTP/2 is recognised by what TLS agreed on, or by the
//! preface with which every client of it begins (h2c with prior knowledge). A client that is slow with its first byte or
//! with the head of a request is cut off, and one that is silent in the middle of a body; one that waits for an answer is not.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use opentelemetry_sdk::trace::SdkTracer;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;

use crate::desk::Router;
use crate::lanes::Lanes;
use crate::proxy;
use crate::tls::H2;

/// Heads of requests, together with what is read ahead, at most.
const HEAD_BYTES_MAX: usize = 128 << 10;
/// Requests at once on one HTTP/2 connection.
const STREAMS_MAX: u32 = 1000;
/// Bytes of a body of HTTP/2 that are taken before anybody reads them: what each held request may cost. Clients assume as
/// many before they are told otherwise.
const STREAM_BYTES: u32 = 64 << 10;
/// The same of all bodies of one connection. Never less than its streams have together: what nobody reads of one, because it is held
/// or its replica does not read, would otherwise leave no room for the others.
const CONNECTION_BYTES: u32 = STREAMS_MAX * STREAM_BYTES;
/// An HTTP/2 client that says nothing for so long is asked whether it is still there.
const PING_AFTER: Duration = Duration::from_secs(30);
/// How long accepting rests where the process is out of descriptors.
const REST: Duration = Duration::from_millis(50);
/// With which every HTTP/2 connection begins.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What clients may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How long a client may take for the first byte, and for the head of a request.
    pub header_timeout: Duration,
    /// How long a client may send nothing of a body that is waited for, until its answer begins.
    pub body_timeout: Option<Duration>,
    /// Most bytes of a request's body.
    pub body_max: Option<u64>,
}

/// What may be changed while an address serves.
pub(crate) struct Rules {
    pub(crate) router: Arc<dyn Router>,
    pub(crate) limits: Limits,
    tls: Option<TlsAcceptor>,
}

/// One address.
pub struct Front {
    /// Read for each request, by all lanes, and hardly ever changed.
    rules: ArcSwap<Rules>,
    lanes: Arc<Lanes>,
    places: Arc<Semaphore>,
    tracer: Option<SdkTracer>,
    /// `true` from the moment on in which no further connection is taken.
    closing: watch::Sender<bool>,
    /// Kept by every connection, so that its end is noticed.
    open: watch::Sender<()>,
}

impl Front {
    /// `lanes` carries its connections; `places` bounds those of all addresses that share it; `tracer` makes a span of each
    /// request.
    #[must_use]
    pub fn new(
        router: Arc<dyn Router>,
        limits: Limits,
        tls: Option<TlsAcceptor>,
        lanes: Arc<Lanes>,
        places: Arc<Semaphore>,
        tracer: Option<SdkTracer>,
    ) -> Arc<Self> {
        Arc::new(Self {
            rules: ArcSwap::from_pointee(Rules { router, limits, tls }),
            lanes,
            places,
            tracer,
            closing: watch::Sender::new(false),
            open: watch::Sender::new(()),
        })
    }

    /// Changes what holds for requests that come from now on, and for connections where TLS is concerned.
    pub fn change(&self, router: Arc<dyn Router>, limits: Limits, tls: Option<TlsAcceptor>) {
        self.rules.store(Arc::new(Rules { router, limits, tls }));
    }

    /// Takes no further connection. Those that are open end when their requests are answered.
    pub fn close(&self) {
        self.closing.send_replace(true);
    }

    /// Waits until every connection has ended.
    pub async fn closed(&self) {
        self.open.closed().await;
    }

    pub(crate) fn rules(&self) -> arc_swap::Guard<Arc<Rules>> {
        self.rules.load()
    }

    pub(crate) fn tracer(&self) -> Option<&SdkTracer> {
        self.tracer.as_ref()
    }

    /// Takes connections until [`Front::close`].
    pub async fn serve(self: Arc<Self>, listener: TcpListener) {
        let mut closing = self.closing.subscribe();
        loop {
            let next = async {
                let place = self.places.clone().acquire_owned().await.ok()?;
                Some((place, listener.accept().await))
            };
            let (place, accepted) = tokio::select! {
                () = closed(&mut closing) => return,
                next = next => match next {
                    Some(next) => next,
                    None => return,
                },
            };
            // Into the runtime of its lane, out of this one.
            let accepted = accepted.and_then(|(stream, _)| stream.into_std());
            let stream = match accepted {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!(%error, "accept");
                    tokio::time::sleep(REST).await;
                    continue;
                }
            };
            let (front, open) = (self.clone(), self.open.subscribe());
            self.lanes.carry(|carried| async move {
                // How a connection ends is between its two ends.
                if let Err(error) = front.connection(stream).await {
                    tracing::debug!(%error, "a client's connection");
                }
                drop((open, place, carried));
            });
        }
    }

    async fn connection(
        self: Arc<Self>,
        stream: std::net::TcpStream,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let stream = TcpStream::from_std(stream)?;
        // Tokens are small and wait for each other.
        stream.set_nodelay(true)?;
        let rules = self.rules.load_full();
        let patience = rules.limits.header_timeout;
        match &rules.tls {
            None => {
                let stream = tokio::time::timeout(patience, Rewound::read_preface(stream)).await??;
                let two = stream.begins_with_preface();
                self.speak(stream, two).await
            }
            Some(tls) => {
                let stream = tokio::time::timeout(patience, tls.accept(stream)).await??;
                let two = stream.get_ref().1.alpn_protocol() == Some(H2);
                self.speak(stream, two).await
            }
        }
    }

    async fn speak<S>(
        self: Arc<Self>,
        stream: S,
        two: bool,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (mut closing, change) = (self.closing.subscribe(), self.closing.subscribe());
        let patience = self.rules.load().limits.header_timeout;
        let service = service_fn(move |request| {
            let answer = proxy::answer(request, &self);
            async move { Ok::<_, Infallible>(answer.await) }
        });
        // Both kinds of connections have the same methods and no common trait.
        macro_rules! until_closing {
            ($connection:expr) => {{
                let mut connection = std::pin::pin!($connection);
                let mut closing = std::pin::pin!(closed(&mut closing));
                // This comes by at each step of each request, and a connection is one task to its end: once it listens, it is
                // enough to see that nothing has changed.
                let (mut listens, mut closed) = (false, false);
                poll_fn(|context| {
                    let ended = connection.as_mut().poll(context);
                    if ended.is_ready() || closed || (listens && !change.has_changed().unwrap_or(true)) {
                        return ended;
                    }
                    listens = true;
                    if closing.as_mut().poll(context).is_pending() {
                        return Poll::Pending;
                    }
                    closed = true;
                    connection.as_mut().graceful_shutdown();
                    connection.as_mut().poll(context)
                })
                .await?;
            }};
        }
        if two {
            let mut builder = http2::Builder::new(TokioExecutor::new());
            builder
                .timer(TokioTimer::new())
                .max_concurrent_streams(STREAMS_MAX)
                .initial_stream_window_size(STREAM_BYTES)
                .initial_connection_window_size(CONNECTION_BYTES)
                .max_header_list_size(HEAD_BYTES_MAX as u32)
                .enable_connect_protocol()
                .keep_alive_interval(PING_AFTER)
                .keep_alive_timeout(patience);
            until_closing!(builder.serve_connection(TokioIo::new(stream), service));
        } else {
            let mut builder = http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(patience).max_buf_size(HEAD_BYTES_MAX);
            // A head and a small body in one buffer: to copy them costs less than to hand the kernel a list.
            builder.writev(false);
            until_closing!(builder.serve_connection(TokioIo::new(stream), service).with_upgrades());
        }
        Ok(())
    }
}

/// Completes when the address is closed.
async fn closed(closing: &mut watch::Receiver<bool>) {
    // The sender lives as long as the address.
    let _ = closing.wait_for(|closing| *closing).await;
}

/// A stream of which the beginning was read to see what it is, and comes again.
struct Rewound<S> {
    beginning: Bytes,
    stream: S,
}

impl<S: AsyncRead + Unpin> Rewound<S> {
    /// Reads as long as the stream may still turn out to begin with the preface.
    async fn read_preface(mut stream: S) -> io::Result<Self> {
        let mut beginning = [0; PREFACE.len()];
        let mut have = 0;
        while have < PREFACE.len() && PREFACE.starts_with(&beginning[..have]) {
            match stream.read(&mut beginning[have..]).await? {
                0 if have == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                0 => break,
                count => have += count,
            }
        }
        Ok(Self { beginning: Bytes::copy_from_slice(&beginning[..have]), stream })
    }

    fn begins_with_preface(&self) -> bool {
        self.beginning == PREFACE
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Rewound<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.beginning.is_empty() {
            return Pin::new(&mut self.stream).poll_read(context, to);
        }
        let count = to.remaining().min(self.beginning.len());
        to.put_slice(&self.beginning.split_to(count));
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Rewound<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, from)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, from)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
