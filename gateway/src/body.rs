//! Bodies on their way through: counted, limited, never collected.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use crate::desk::{Slot, Traffic};
use crate::trace::RequestSpan;
use crate::upstream::Connection;

/// Why a body ended early.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The other side of the gateway broke off.
    #[error(transparent)]
    Connection(#[from] hyper::Error),
    /// More came than may come.
    #[error("the body is longer than {max} bytes")]
    TooLong {
        /// The limit.
        max: u64,
    },
}

/// How the body of a request fares. A replica is not to blame for what its clients do: whoever judges it asks here first.
#[derive(Debug, Default)]
pub(crate) struct Upload(AtomicU8);

/// What has gone wrong with a body, on the client's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It broke off, or was none.
    BrokenOff,
    /// More came than may come.
    TooLong,
}

impl Upload {
    const FLOWS: u8 = 0;
    const AWAITED: u8 = 1;
    const BROKEN_OFF: u8 = 2;
    const TOO_LONG: u8 = 3;

    fn set(&self, state: u8) {
        self.0.store(state, Ordering::Relaxed);
    }

    /// Whether the client is to send more, and has not.
    pub(crate) fn is_awaited(&self) -> bool {
        self.0.load(Ordering::Relaxed) == Self::AWAITED
    }

    pub(crate) fn fault(&self) -> Option<Fault> {
        match self.0.load(Ordering::Relaxed) {
            Self::BROKEN_OFF => Some(Fault::BrokenOff),
            Self::TOO_LONG => Some(Fault::TooLong),
            _ => None,
        }
    }
}

/// The body of a request, on its way to a replica.
#[derive(Debug)]
pub struct Outgoing {
    /// What was read already, to look for the model.
    first: Option<Bytes>,
    rest: Option<Incoming>,
    max: Option<u64>,
    seen: u64,
    traffic: Arc<Traffic>,
    upload: Arc<Upload>,
}

impl Outgoing {
    pub(crate) fn new(
        first: Option<Bytes>,
        rest: Option<Incoming>,
        max: Option<u64>,
        traffic: Arc<Traffic>,
    ) -> Self {
        let rest = rest.filter(|rest| !rest.is_end_stream());
        let first = first.filter(|first| !first.is_empty());
        Self { first, rest, max, seen: 0, traffic, upload: Arc::default() }
    }

    /// How it fares, also when it is gone.
    pub(crate) fn upload(&self) -> Arc<Upload> {
        self.upload.clone()
    }

    /// Another body without content, for a request that had none.
    pub(crate) fn copy_of_nothing(&self) -> Self {
        Self::new(None, None, self.max, self.traffic.clone())
    }
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let frame = match (self.first.take(), &mut self.rest) {
            (Some(first), _) => Frame::data(first),
            (None, None) => return Poll::Ready(None),
            (None, Some(rest)) => {
                let Poll::Ready(frame) = Pin::new(rest).poll_frame(context) else {
                    self.upload.set(Upload::AWAITED);
                    return Poll::Pending;
                };
                self.upload.set(Upload::FLOWS);
                match frame {
                    Some(Ok(frame)) => frame,
                    Some(Err(error)) => {
                        self.upload.set(Upload::BROKEN_OFF);
                        return Poll::Ready(Some(Err(error.into())));
                    }
                    None => return Poll::Ready(None),
                }
            }
        };
        if let Some(data) = frame.data_ref() {
            self.seen += data.len() as u64;
            Traffic::add(&self.traffic.requests, data.len());
            if let Some(max) = self.max.filter(|max| self.seen > *max) {
                self.upload.set(Upload::TOO_LONG);
                return Poll::Ready(Some(Err(Broken::TooLong { max })));
            }
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.rest.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let first = self.first.as_ref().map_or(0, Bytes::len) as u64;
        let rest = self.rest.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint);
        let mut hint = SizeHint::new();
        hint.set_lower(first + rest.lower());
        if let Some(upper) = rest.upper() {
            hint.set_upper(first + upper);
        }
        hint
    }
}

/// The body of a response, on its way to a client.
pub struct Answer {
    from: Source,
    /// Ends with the last byte, or when no more can come.
    span: Option<Box<RequestSpan>>,
}

/// Where an answer comes from.
enum Source {
    /// From a replica.
    Carried(Carried),
    /// The gateway's own.
    Own(Option<Bytes>),
}

/// A replica's answer. Its end, or its loss, is the end of the request.
struct Carried {
    inner: Incoming,
    traffic: Arc<Traffic>,
    /// Given back together, at the end.
    held: Option<(Slot, Connection)>,
    /// The body of the request, which may still be on its way.
    upload: Arc<Upload>,
}

impl Answer {
    pub(crate) fn carried(
        inner: Incoming,
        slot: Slot,
        connection: Connection,
        traffic: Arc<Traffic>,
        upload: Arc<Upload>,
    ) -> Self {
        let carried = Carried { inner, traffic, held: Some((slot, connection)), upload };
        Self { from: Source::Carried(carried), span: None }
    }

    /// The gateway's own answer; without a text it is empty.
    pub(crate) fn own(text: Option<Bytes>) -> Self {
        Self { from: Source::Own(text), span: None }
    }

    /// Keeps the request's span until the answer is over.
    pub(crate) fn keep(&mut self, span: Box<RequestSpan>) {
        self.span = Some(span);
    }
}

impl Carried {
    /// The answer has been read to its end, so its connection can carry another one.
    fn finish(&mut self) {
        if let Some((slot, connection)) = self.held.take() {
            slot.upstream.keep(connection);
        }
    }
}

impl Drop for Carried {
    /// The end may be known before anybody asks for it: an answer without a body.
    fn drop(&mut self) {
        if self.inner.is_end_stream() {
            self.finish();
        }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let Self { from, span } = self.get_mut();
        let carried = match from {
            Source::Own(text) => return Poll::Ready(text.take().map(|text| Ok(Frame::data(text)))),
            Source::Carried(carried) => carried,
        };
        match ready!(Pin::new(&mut carried.inner).poll_frame(context)) {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    Traffic::add(&carried.traffic.responses, data.len());
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                if let Some((slot, _)) = &mut carried.held
                    && carried.upload.fault().is_none()
                {
                    slot.lease.broken("it broke off in the middle of an answer");
                }
                if let Some(span) = span {
                    span.broke_off();
                }
                Poll::Ready(Some(Err(error.into())))
            }
            None => {
                carried.finish();
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.from {
            Source::Own(text) => text.is_none(),
            Source::Carried(carried) => carried.inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.from {
            Source::Own(text) => SizeHint::with_exact(text.as_ref().map_or(0, Bytes::len) as u64),
            Source::Carried(carried) => carried.inner.size_hint(),
        }
    }
}
