//! One request, from its head to the last byte of its answer.
//!
//! What was never sent (nobody listens, or a kept connection that its server had closed) is offered elsewhere whatever it
//! is. What was sent and not answered is sent at most once more, and only if its method promises that twice is as good
//! as once and it has no body.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::http::request::Parts;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;

use crate::body::{Answer, Arriving, Broken, Fault, Outgoing, Upload};
use crate::desk::{Asked, Choice, Desk, Manners, Refusal, Slot, Traffic, Want};
use crate::front::{Front, Limits};
use crate::headers;
use crate::model::{LOOKED_AT_BYTES, model};
use crate::trace::RequestSpan;
use crate::upstream::{Connection, Unanswered};
use crate::websocket::{self, Handshake};

/// To so many replicas a request is offered that do not listen.
const UNSENT_MAX: u32 = 3;

/// Answers a request, by a replica or, where that is not possible, with a reason.
///
/// What can be known at once is done before there is a future: it is then small, and it is moved for each request.
pub(crate) fn answer(
    mut request: Request<Incoming>,
    front: &Arc<Front>,
) -> impl Future<Output = Response<Answer>> + Send + use<> {
    let client = hyper::upgrade::on(&mut request);
    let (mut parts, body) = request.into_parts();
    let span = front.tracer().and_then(|tracer| RequestSpan::begin(tracer, &mut parts));
    let begun = begin(parts, body, client, span, front);
    async move {
        match begun {
            Begun::Errand(errand) => errand.run().await,
            Begun::Looking(looking) => match looking.await {
                Ok(errand) => errand.run().await,
                Err(response) => response,
            },
            Begun::Refused(response) => *response,
        }
    }
}

/// How a request goes on.
enum Begun {
    Errand(Box<Errand>),
    /// Its model is looked for first.
    Looking(BoxFuture<'static, Result<Box<Errand>, Response<Answer>>>),
    Refused(Box<Response<Answer>>),
}

fn begin(
    parts: Parts,
    body: Incoming,
    client: OnUpgrade,
    span: Option<Box<RequestSpan>>,
    front: &Arc<Front>,
) -> Begun {
    let refused = |response, span| Begun::Refused(Box::new(spanned(response, span)));
    if let Err(rejected) = headers::check(&parts) {
        return refused(own(rejected.status, "bad_request", rejected.why), span);
    }
    let rules = front.rules();
    let Limits { body_max: max, body_timeout, .. } = rules.limits;
    if let Some(max) = max.filter(|max| announced(&parts).is_some_and(|bytes| bytes > *max)) {
        let why = format!("the body is longer than {max} bytes");
        return refused(own(StatusCode::PAYLOAD_TOO_LARGE, "too_large", &why), span);
    }
    let body = Arriving::new(body, body_timeout);
    match rules.router.choose(&asked(&parts)) {
        Choice::Desk(desk) => {
            let body = Outgoing::new(None, Some(body), max, desk.traffic());
            Begun::Errand(Errand::new(parts, body, client, desk, span))
        }
        Choice::Nobody => refused(no_pool(), span),
        Choice::ByModel => {
            let router = rules.router.clone();
            Begun::Looking(Box::pin(async move {
                let (first, body, model) = match look_for_model(body).await {
                    Ok(found) => found,
                    Err(broken) => return Err(spanned(without_model(&broken), span)),
                };
                match router.choose_by_model(&asked(&parts), model.as_deref()) {
                    Some(desk) => {
                        let body = Outgoing::new(Some(first), body, max, desk.traffic());
                        Ok(Errand::new(parts, body, client, desk, span))
                    }
                    None => Err(spanned(no_pool(), span)),
                }
            }))
        }
    }
}

fn no_pool() -> Response<Answer> {
    own(StatusCode::NOT_FOUND, "no_pool", "no pool takes this request")
}

fn without_model(broken: &Broken) -> Response<Answer> {
    match broken {
        Broken::Silent { .. } => own(StatusCode::REQUEST_TIMEOUT, "body_late", &broken.to_string()),
        // The client is gone in the middle of its body.
        _ => own(StatusCode::BAD_REQUEST, "bad_request", "the body broke off"),
    }
}

/// The span of a request goes on to the last byte of its answer.
fn spanned(mut response: Response<Answer>, span: Option<Box<RequestSpan>>) -> Response<Answer> {
    if let Some(mut span) = span {
        span.answered(response.status());
        response.body_mut().keep(span);
    }
    response
}

/// A client that wants to leave HTTP.
struct Leaving {
    client: OnUpgrade,
    /// In its place, where it speaks HTTP/2.
    handshake: Option<Handshake>,
}

/// What the client says its body will have.
fn announced(parts: &Parts) -> Option<u64> {
    parts.headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn asked(parts: &Parts) -> Asked<'_> {
    let header =
        || parts.headers.get(hyper::header::HOST).and_then(|host| host.to_str().ok()).map(without_port);
    Asked { host: parts.uri.host().or_else(header), path: parts.uri.path(), headers: &parts.headers }
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

/// Reads the beginning of a body and looks for its model.
async fn look_for_model(mut body: Arriving) -> Result<(Bytes, Option<Arriving>, Option<String>), Broken> {
    let look = |first: &[u8]| model(&first[..first.len().min(LOOKED_AT_BYTES)]);
    let (mut first, mut next_look) = (BytesMut::new(), 0);
    while first.len() < LOOKED_AT_BYTES {
        let Some(frame) = body.frame().await else {
            let model = look(&first);
            return Ok((first.freeze(), None, model));
        };
        // Trailers: nothing follows, and nobody has asked for those of a body that ends here.
        let Ok(data) = frame?.into_data() else { break };
        first.extend_from_slice(&data);
        if first.len() < next_look {
            continue;
        }
        if let Some(model) = look(&first) {
            return Ok((first.freeze(), Some(body), Some(model)));
        }
        // A client that sends byte by byte does not have all of it read again for each.
        next_look = first.len() + first.len() / 8;
    }
    let model = look(&first);
    Ok((first.freeze(), Some(body), model))
}

/// Why a try with one slot gave no answer.
enum Failed {
    /// Not a byte of it was sent: it may be tried elsewhere whatever it is.
    Unsent(String),
    /// It can be repeated safely.
    Again(String),
    /// The replica has been waited for long enough.
    Late(Duration),
    /// The client has not sent its body for that long.
    Slow(Duration),
    /// The client's body is not what it should be.
    Client(Fault),
    Not(String),
}

/// A request that a pool takes. It is made once, in a box, and stays there: handed on by value it would need room in each
/// future that it passes.
struct Errand {
    /// Away while it is with a replica, and back where it was not sent, or may be sent again.
    request: Option<Request<Outgoing>>,
    upload: Option<Arc<Upload>>,
    upgrade: Option<Leaving>,
    /// Its id, as its replica is told it.
    id: Option<HeaderValue>,
    want: Want,
    desk: Arc<dyn Desk>,
    manners: Arc<Manners>,
    span: Option<Box<RequestSpan>>,
}

impl Errand {
    /// Makes the head of a request that of one to a replica.
    fn new(
        mut parts: Parts,
        body: Outgoing,
        client: OnUpgrade,
        desk: Arc<dyn Desk>,
        mut span: Option<Box<RequestSpan>>,
    ) -> Box<Self> {
        if let Some(span) = &mut span {
            span.for_pool(desk.name());
        }
        let handshake = websocket::is_asked_for(&parts).then(|| Handshake::begin(&mut parts));
        let upgrade = headers::upgrade(&parts.headers).map(|_| Leaving { client, handshake });
        let manners = desk.manners();
        let session = manners.affinity.as_ref().and_then(|name| parts.headers.get(name));
        let session = session.map(|value| value.as_bytes().to_vec());
        headers::for_replica(&mut parts);
        let id = headers::request_id(&parts.headers);
        if let Some(span) = &span {
            span.hand_on(&mut parts.headers);
        }
        let want = Want { session, lost_by: Vec::new(), trace: span.as_ref().map(|span| span.context()) };
        let (upload, request) = (body.upload(), Some(Request::from_parts(parts, body)));
        Box::new(Self { request, upload, upgrade, id, want, desk, manners, span })
    }

    async fn run(mut self: Box<Self>) -> Response<Answer> {
        let response = self.carry().await;
        self.desk.traffic().answered(response.status());
        spanned(response, self.span.take())
    }

    async fn carry(&mut self) -> Response<Answer> {
        let mut unsent = 0;
        loop {
            let mut slot = match self.desk.slot(&self.want).slot().await {
                Ok(slot) => slot,
                Err(refusal) => return refused(&refusal, self.desk.retry_after()),
            };
            if let Some(span) = &mut self.span {
                span.for_replica(slot.upstream.name(), slot.held);
            }
            let failed = match self.try_once(&mut slot).await {
                Ok((response, connection)) => return self.answered(response, slot, connection),
                Err(failed) => failed,
            };
            let again = match failed {
                Failed::Unsent(_) if unsent < UNSENT_MAX => {
                    unsent += 1;
                    true
                }
                Failed::Again(_) => self.manners.retries && self.want.lost_by.is_empty(),
                _ => false,
            };
            if !again {
                return gave_up(slot.upstream.name(), &failed);
            }
            Traffic::add(&self.desk.traffic().retried, 1);
            self.want.lost_by.push(slot.upstream.name().to_owned());
        }
    }

    /// Sends the request to the slot's replica. A kept connection that turns out to be closed is replaced, which the server
    /// has never seen and no try.
    async fn try_once(&mut self, slot: &mut Slot) -> Result<(Response<Incoming>, Connection), Failed> {
        let mut request = self.request.take().expect("it is not with another replica");
        let repeatable =
            request.method().is_safe() && *request.method() != Method::CONNECT && self.upload.is_none();
        loop {
            let mut connection = match slot.upstream.connection().await {
                Ok(connection) => connection,
                Err(error) => {
                    slot.lease.unreachable(&error.to_string());
                    self.request = Some(request);
                    return Err(Failed::Unsent(error.to_string()));
                }
            };
            if repeatable {
                self.request = Some(copy(&request));
            }
            let asked = Box::pin(connection.ask(request));
            let answered = match self.manners.patience {
                Some(patience) => tokio::time::timeout(patience, asked).await.map_err(|_| patience),
                None => Ok(asked.await),
            };
            let upload = self.upload.as_deref();
            let answered = answered.map_err(|patience| {
                if upload.is_some_and(Upload::is_awaited) {
                    return Failed::Slow(patience);
                }
                slot.lease.broken(&format!("there was no answer within {} ms", patience.as_millis()));
                Failed::Late(patience)
            })?;
            match answered {
                Ok(response) => {
                    if let Some(upload) = upload {
                        upload.answer_begins();
                    }
                    return Ok((response, connection));
                }
                Err(Unanswered::Unsent(again)) if connection.kept => {
                    // What else is kept is as old.
                    slot.upstream.hang_up();
                    request = *again;
                }
                Err(Unanswered::Unsent(again)) => {
                    let why = "it closed a new connection";
                    slot.lease.broken(why);
                    self.request = Some(*again);
                    return Err(Failed::Again(why.to_owned()));
                }
                Err(Unanswered::Lost(_)) if let Some(fault) = upload.and_then(Upload::fault) => {
                    return Err(Failed::Client(fault));
                }
                Err(Unanswered::Lost(error)) => {
                    let why = chain(&error);
                    slot.lease.broken(&why);
                    return Err(if repeatable { Failed::Again(why) } else { Failed::Not(why) });
                }
            }
        }
    }

    /// A replica has begun its answer.
    fn answered(
        &mut self,
        mut response: Response<Incoming>,
        slot: Slot,
        connection: Connection,
    ) -> Response<Answer> {
        let upgrade = self.upgrade.take();
        let handshake = upgrade.as_ref().and_then(|leaving| leaving.handshake.as_ref());
        if let Some(Err(why)) = handshake.map(|handshake| handshake.check(&response)) {
            let why = format!("replica {} was asked for WebSocket: {why}", slot.upstream.name());
            return own(StatusCode::BAD_GATEWAY, "no_websocket", &why);
        }
        headers::for_client(response.headers_mut(), self.id.take(), slot.upstream.header(), slot.held);
        let traffic = self.desk.traffic().clone();
        match (response.status(), upgrade) {
            (StatusCode::SWITCHING_PROTOCOLS, Some(Leaving { client, handshake })) => {
                let server = hyper::upgrade::on(&mut response);
                if handshake.is_some() {
                    Handshake::end(&mut response);
                }
                let mut span = self.span.take();
                if let Some(span) = &mut span {
                    span.answered(response.status());
                }
                tokio::spawn(tunnel(client, server, slot, traffic, span));
                response.map(|_| Answer::own(None))
            }
            _ => {
                let upload = self.upload.take();
                response.map(|inner| Answer::carried(inner, slot, connection, traffic, upload))
            }
        }
    }
}

/// Another request like one that has no body.
fn copy(request: &Request<Outgoing>) -> Request<Outgoing> {
    let mut copy = Request::new(Outgoing::default());
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    *copy.headers_mut() = request.headers().clone();
    copy
}

/// What a client is told whose request is not tried any more.
fn gave_up(replica: &str, failed: &Failed) -> Response<Answer> {
    match failed {
        Failed::Late(after) => {
            let why = format!("replica {replica} did not answer within {} ms", after.as_millis());
            own(StatusCode::GATEWAY_TIMEOUT, "replica_late", &why)
        }
        Failed::Slow(after) => {
            let why = format!("the body of the request did not arrive within {} ms", after.as_millis());
            own(StatusCode::REQUEST_TIMEOUT, "body_late", &why)
        }
        Failed::Client(Fault::TooLong) => {
            own(StatusCode::PAYLOAD_TOO_LARGE, "too_large", "the body is longer than it may be")
        }
        Failed::Client(Fault::Silent(after)) => {
            let why = Broken::Silent { after: *after }.to_string();
            own(StatusCode::REQUEST_TIMEOUT, "body_late", &why)
        }
        Failed::Client(Fault::BrokenOff) => own(StatusCode::BAD_REQUEST, "bad_request", "the body broke off"),
        Failed::Unsent(why) | Failed::Again(why) | Failed::Not(why) => {
            let why = format!("replica {replica} did not answer: {why}");
            own(StatusCode::BAD_GATEWAY, "replica_lost", &why)
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

/// Carries bytes both ways once client and server have left HTTP. The slot is taken as long as either side is open.
async fn tunnel(
    client: OnUpgrade,
    server: OnUpgrade,
    slot: Slot,
    traffic: Arc<Traffic>,
    span: Option<Box<RequestSpan>>,
) {
    if let (Ok(client), Ok(server)) = tokio::join!(client, server)
        && let Ok((up, down)) =
            tokio::io::copy_bidirectional(&mut TokioIo::new(client), &mut TokioIo::new(server)).await
    {
        Traffic::add(&traffic.requests, up as usize);
        Traffic::add(&traffic.responses, down as usize);
    }
    drop((span, slot));
}

fn refused(refusal: &Refusal, retry_after: Duration) -> Response<Answer> {
    let (status, kind) = match refusal {
        Refusal::Full { .. } => (StatusCode::TOO_MANY_REQUESTS, "queue_full"),
        Refusal::Late { .. } => (StatusCode::SERVICE_UNAVAILABLE, "queue_deadline"),
        Refusal::Closed { .. } => (StatusCode::SERVICE_UNAVAILABLE, "pool_closed"),
    };
    let mut response = own(status, kind, &refusal.to_string());
    let seconds = retry_after.as_secs_f64().ceil().max(1.0) as u64;
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    response
}

/// An answer of the gateway itself, as clients of inference servers expect errors.
fn own(status: StatusCode, kind: &str, why: &str) -> Response<Answer> {
    let text =
        serde_json::json!({ "error": { "message": why, "type": kind, "code": status.as_u16() } }).to_string();
    let mut response = Response::new(Answer::own(Some(Bytes::from(text))));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
