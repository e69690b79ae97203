//! Bodies on their way through: counted, limited, never collected. A client that says nothing in the middle of one is waited for
//! only so long, since it has a slot meanwhile.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Sleep, sleep};

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
    /// The client was waited for, and sent nothing.
    #[error("no byte of the body came within {} ms", after.as_millis())]
    Silent {
        /// For so long.
        after: Duration,
    },
}

/// The body of a request, as it comes from its client, which may be silent only for so long. Only what is asked for and is not
/// there is waited for: while a replica does not take what has come, nobody asks, and no time passes.
#[derive(Debug)]
pub(crate) struct Arriving<B = Incoming> {
    incoming: B,
    patience: Option<Duration>,
    /// There while the client is waited for, so that bodies that are complete at once cost none.
    clock: Option<Pin<Box<Sleep>>>,
}

impl<B> Arriving<B> {
    /// Without `patience` the client may be silent for ever.
    pub(crate) fn new(incoming: B, patience: Option<Duration>) -> Self {
        Self { incoming, patience, clock: None }
    }

    /// From now on the client may be silent for ever.
    fn take_your_time(&mut self) {
        self.patience = None;
        self.clock = None;
    }
}

impl<B> Body for Arriving<B>
where
    B: Body<Data = Bytes, Error = hyper::Error> + Unpin,
{
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let Self { incoming, patience, clock } = self.get_mut();
        if let Poll::Ready(frame) = Pin::new(incoming).poll_frame(context) {
            *clock = None;
            return Poll::Ready(frame.map(|frame| frame.map_err(Broken::from)));
        }
        let Some(after) = *patience else { return Poll::Pending };
        ready!(clock.get_or_insert_with(|| Box::pin(sleep(after))).as_mut().poll(context));
        Poll::Ready(Some(Err(Broken::Silent { after })))
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

/// How the body of a request fares. A replica is not to blame for what its clients do: whoever judges it asks here first.
#[derive(Debug, Default)]
pub(crate) struct Upload {
    state: AtomicU8,
    /// The replica has begun its answer. From then on the two may be talking, and a client that listens is not slow.
    answered: AtomicBool,
    /// How long the client may be silent before that.
    patience: Duration,
}

/// What has gone wrong with a body, on the client's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It broke off, or was none.
    BrokenOff,
    /// More came than may come.
    TooLong,
    /// Nothing came for so long.
    Silent(Duration),
}

impl Upload {
    const FLOWS: u8 = 0;
    const AWAITED: u8 = 1;
    const BROKEN_OFF: u8 = 2;
    const TOO_LONG: u8 = 3;
    const SILENT: u8 = 4;

    fn set(&self, state: u8) {
        self.state.store(state, Ordering::Relaxed);
    }

    /// Whether the client is to send more, and has not.
    pub(crate) fn is_awaited(&self) -> bool {
        self.state.load(Ordering::Relaxed) == Self::AWAITED
    }

    /// The replica has begun its answer.
    pub(crate) fn answer_begins(&self) {
        self.answered.store(true, Ordering::Relaxed);
    }

    pub(crate) fn fault(&self) -> Option<Fault> {
        match self.state.load(Ordering::Relaxed) {
            Self::BROKEN_OFF => Some(Fault::BrokenOff),
            Self::TOO_LONG => Some(Fault::TooLong),
            Self::SILENT => Some(Fault::Silent(self.patience)),
            _ => None,
        }
    }
}

/// The body of a request, on its way to a replica. Most requests have none, and it is moved with them.
#[derive(Debug, Default)]
pub struct Outgoing(Option<Box<Content>>);

#[derive(Debug)]
struct Content {
    /// What was read already, to look for the model.
    first: Option<Bytes>,
    rest: Option<Arriving>,
    max: Option<u64>,
    seen: u64,
    traffic: Arc<Traffic>,
    upload: Arc<Upload>,
}

impl Outgoing {
    pub(crate) fn new(
        first: Option<Bytes>,
        rest: Option<Arriving>,
        max: Option<u64>,
        traffic: &Arc<Traffic>,
    ) -> Self {
        let rest = rest.filter(|rest| !rest.is_end_stream());
        let first = first.filter(|first| !first.is_empty());
        if first.is_none() && rest.is_none() {
            return Self(None);
        }
        let patience = rest.as_ref().and_then(|rest| rest.patience).unwrap_or_default();
        let upload = Arc::new(Upload { patience, ..Upload::default() });
        Self(Some(Box::new(Content { first, rest, max, seen: 0, traffic: traffic.clone(), upload })))
    }

    /// How it fares, also when it is gone; nothing where it has no content.
    pub(crate) fn upload(&self) -> Option<Arc<Upload>> {
        self.0.as_ref().map(|content| content.upload.clone())
    }
}

impl Content {
    fn poll_frame(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let frame = match (self.first.take(), &mut self.rest) {
            (Some(first), _) => Frame::data(first),
            (None, None) => return Poll::Ready(None),
            (None, Some(rest)) => {
                if self.upload.answered.load(Ordering::Relaxed) {
                    rest.take_your_time();
                }
                let Poll::Ready(frame) = Pin::new(rest).poll_frame(context) else {
                    self.upload.set(Upload::AWAITED);
                    return Poll::Pending;
                };
                self.upload.set(Upload::FLOWS);
                match frame {
                    Some(Ok(frame)) => frame,
                    Some(Err(error)) => {
                        let silent = matches!(error, Broken::Silent { .. });
                        self.upload.set(if silent { Upload::SILENT } else { Upload::BROKEN_OFF });
                        return Poll::Ready(Some(Err(error)));
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

impl Body for Outgoing {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        self.get_mut().0.as_mut().map_or(Poll::Ready(None), |content| content.poll_frame(context))
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(|content| content.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map_or_else(|| SizeHint::with_exact(0), |content| content.size_hint())
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
    upload: Option<Arc<Upload>>,
}

impl Answer {
    pub(crate) fn carried(
        inner: Incoming,
        slot: Slot,
        connection: Connection,
        traffic: Arc<Traffic>,
        upload: Option<Arc<Upload>>,
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
                    && carried.upload.as_ref().is_none_or(|upload| upload.fault().is_none())
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

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use futures::channel::mpsc;
    use http_body_util::{BodyExt, StreamBody};
    use tokio::time::{Instant, advance};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    type Pieces = mpsc::UnboundedReceiver<Result<Frame<Bytes>, hyper::Error>>;
    type Client = mpsc::UnboundedSender<Result<Frame<Bytes>, hyper::Error>>;

    fn body() -> (Client, Arriving<StreamBody<Pieces>>) {
        let (client, pieces) = mpsc::unbounded();
        (client, Arriving::new(StreamBody::new(pieces), Some(PATIENCE)))
    }

    fn send(client: &Client) {
        client.unbounded_send(Ok(Frame::data(Bytes::from_static(b"x")))).expect("the body is there");
    }

    async fn is_silent(body: &mut Arriving<StreamBody<Pieces>>) -> bool {
        matches!(body.frame().await, Some(Err(Broken::Silent { after: PATIENCE })))
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_goes_on_is_never_too_slow_and_one_that_stops_is() {
        let (client, mut body) = body();
        let begun = Instant::now();
        for _ in 0..10 {
            let almost = PATIENCE - Duration::from_secs(1);
            assert!(tokio::time::timeout(almost, body.frame()).await.is_err(), "nothing is there yet");
            send(&client);
            assert!(matches!(body.frame().await, Some(Ok(_))));
        }
        assert!(begun.elapsed() > 9 * PATIENCE);
        let last = Instant::now();
        assert!(is_silent(&mut body).await);
        let waited = last.elapsed();
        assert!(waited >= PATIENCE && waited < PATIENCE + Duration::from_secs(1), "{waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn no_time_passes_while_nobody_asks_or_something_is_there() {
        let (client, mut body) = body();
        advance(10 * PATIENCE).await;
        assert!(body.frame().now_or_never().is_none(), "asked for the first time");
        send(&client);
        advance(10 * PATIENCE).await;
        assert!(
            matches!(body.frame().now_or_never(), Some(Some(Ok(_)))),
            "what is there counts, however late"
        );
        assert!(body.clock.is_none(), "no clock runs while nobody waits");
        advance(10 * PATIENCE).await;
        assert!(body.frame().now_or_never().is_none(), "time begins when it is asked for again");
        assert!(is_silent(&mut body).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_may_be_silent_once_its_answer_has_begun() {
        let (client, mut body) = body();
        assert!(body.frame().now_or_never().is_none());
        body.take_your_time();
        let asked = tokio::time::timeout(10 * PATIENCE, body.frame()).await;
        assert!(asked.is_err(), "nothing came, and nothing broke");
        send(&client);
        assert!(matches!(body.frame().await, Some(Ok(_))));
    }
}
