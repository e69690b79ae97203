//! One request, from its head to the last byte of its answer.
//!
//! What was never sent (nobody listens, or a kept connection that its server had closed) is offered elsewhere whatever it
//! is. What was sent and not answered is sent at most once more, and only if its method promises that twice is as good
//! as once and it has no body.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body::Body as _;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::http::request::Parts;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;

use crate::body::{Answer, Arriving, Broken, Fault, Outgoing};
use crate::desk::{Asked, Choice, Desk, Refusal, Slot, Traffic, Want};
use crate::front::{Front, Limits};
use crate::headers;
use crate::model::{LOOKED_AT_BYTES, model};
use crate::trace::RequestSpan;
use crate::upstream::{Connection, Unanswered};
use crate::websocket::{self, Handshake};

/// To so many replicas a request is offered that do not listen.
const UNSENT_MAX: u32 = 3;

/// Answers a request, by a replica or, where that is not possible, with a reason.
pub(crate) async fn answer(mut request: Request<Incoming>, front: &Front) -> Response<Answer> {
    let client = hyper::upgrade::on(&mut request);
    let (mut parts, body) = request.into_parts();
    let mut span = front.tracer().and_then(|tracer| RequestSpan::begin(tracer, &mut parts));
    let mut response = answer_within(parts, body, client, front, &mut span).await;
    if let Some(mut span) = span {
        span.answered(response.status());
        response.body_mut().keep(span);
    }
    response
}

/// As [`answer`]. A span that is taken belongs to what outlives the answer.
async fn answer_within(
    mut parts: Parts,
    body: Incoming,
    client: OnUpgrade,
    front: &Front,
    span: &mut Option<Box<RequestSpan>>,
) -> Response<Answer> {
    if let Err(rejected) = headers::check(&parts) {
        return own(rejected.status, "bad_request", rejected.why);
    }
    let Limits { body_max: max, body_timeout, .. } = front.limits();
    if let Some(max) = max.filter(|max| announced(&parts).is_some_and(|bytes| bytes > *max)) {
        let why = format!("the body is longer than {max} bytes");
        return own(StatusCode::PAYLOAD_TOO_LARGE, "too_large", &why);
    }
    let router = front.router();
    let asked = asked(&parts);
    let body = Arriving::new(body, body_timeout);
    let (desk, first, body) = match router.choose(&asked) {
        Choice::Desk(desk) => (Some(desk), None, Some(body)),
        Choice::Nobody => (None, None, None),
        Choice::ByModel => match look_for_model(body).await {
            Ok((first, body, model)) => (router.choose_by_model(&asked, model.as_deref()), Some(first), body),
            Err(silent @ Broken::Silent { .. }) => {
                return own(StatusCode::REQUEST_TIMEOUT, "body_late", &silent.to_string());
            }
            // The client is gone in the middle of its body.
            Err(_) => return own(StatusCode::BAD_REQUEST, "bad_request", "the body broke off"),
        },
    };
    let Some(desk) = desk else {
        return own(StatusCode::NOT_FOUND, "no_pool", "no pool takes this request");
    };
    if let Some(span) = span {
        span.for_pool(desk.name());
    }
    let handshake = websocket::is_asked_for(&parts).then(|| Handshake::begin(&mut parts));
    let upgrade = headers::upgrade(&parts.headers).map(|_| Leaving { client, handshake });
    let body = Outgoing::new(first, body, max, desk.traffic());
    let response = carry(parts, body, upgrade, &*desk, span).await;
    desk.answered(response.status().as_u16());
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
    Unsent(Box<(Parts, Outgoing)>, String),
    /// It can be repeated safely.
    Again(Box<(Parts, Outgoing)>, String),
    /// The replica has been waited for long enough.
    Late(Duration),
    /// The client has not sent its body for that long.
    Slow(Duration),
    /// The client's body is not what it should be.
    Client(Fault),
    Not(String),
}

async fn carry(
    mut parts: Parts,
    mut body: Outgoing,
    upgrade: Option<Leaving>,
    desk: &dyn Desk,
    span: &mut Option<Box<RequestSpan>>,
) -> Response<Answer> {
    let session =
        desk.affinity().and_then(|name| parts.headers.get(name)).map(|value| value.as_bytes().to_vec());
    headers::for_replica(&mut parts);
    let id = headers::request_id(&parts.headers);
    if let Some(span) = span {
        span.hand_on(&mut parts.headers);
    }
    let trace = span.as_ref().map(|span| span.context());
    let mut want = Want { session, again: false, trace };
    let mut unsent = 0;
    loop {
        let slot = match desk.slot(want.clone()).await {
            Ok(slot) => slot,
            Err(refusal) => return refused(&refusal, desk.retry_after()),
        };
        let (upstream, held) = (slot.upstream.clone(), slot.held);
        let name = upstream.name();
        if let Some(span) = span {
            span.for_replica(name, held);
        }
        let upload = body.upload();
        // In a box, since requests are held by the thousand and none of them needs room for this until its turn comes.
        match Box::pin(try_once(parts, body, slot, desk.patience())).await {
            Ok((mut response, slot, connection)) => {
                let handshake = upgrade.as_ref().and_then(|leaving| leaving.handshake.as_ref());
                if let Some(Err(why)) = handshake.map(|handshake| handshake.check(&response)) {
                    let why = format!("replica {name} was asked for WebSocket: {why}");
                    return own(StatusCode::BAD_GATEWAY, "no_websocket", &why);
                }
                headers::for_client(response.headers_mut(), id, upstream.header(), held);
                return match (response.status(), upgrade) {
                    (StatusCode::SWITCHING_PROTOCOLS, Some(Leaving { client, handshake })) => {
                        let server = hyper::upgrade::on(&mut response);
                        if handshake.is_some() {
                            Handshake::end(&mut response);
                        }
                        let mut span = span.take();
                        if let Some(span) = &mut span {
                            span.answered(response.status());
                        }
                        tokio::spawn(tunnel(client, server, slot, desk.traffic(), span));
                        response.map(|_| Answer::own(None))
                    }
                    _ => {
                        response.map(|inner| Answer::carried(inner, slot, connection, desk.traffic(), upload))
                    }
                };
            }
            Err(Failed::Unsent(request, _)) if unsent < UNSENT_MAX => {
                unsent += 1;
                desk.retried();
                (parts, body) = *request;
                want.again = true;
            }
            Err(Failed::Again(request, _)) if desk.retries() && !want.again => {
                desk.retried();
                (parts, body) = *request;
                want.again = true;
            }
            Err(Failed::Late(after)) => {
                let why = format!("replica {name} did not answer within {} ms", after.as_millis());
                return own(StatusCode::GATEWAY_TIMEOUT, "replica_late", &why);
            }
            Err(Failed::Slow(after)) => {
                let why = format!("the body of the request did not arrive within {} ms", after.as_millis());
                return own(StatusCode::REQUEST_TIMEOUT, "body_late", &why);
            }
            Err(Failed::Client(Fault::TooLong)) => {
                return own(StatusCode::PAYLOAD_TOO_LARGE, "too_large", "the body is longer than it may be");
            }
            Err(Failed::Client(Fault::Silent(after))) => {
                let why = Broken::Silent { after }.to_string();
                return own(StatusCode::REQUEST_TIMEOUT, "body_late", &why);
            }
            Err(Failed::Client(Fault::BrokenOff)) => {
                return own(StatusCode::BAD_REQUEST, "bad_request", "the body broke off");
            }
            Err(Failed::Unsent(_, why) | Failed::Again(_, why) | Failed::Not(why)) => {
                let why = format!("replica {name} did not answer: {why}");
                return own(StatusCode::BAD_GATEWAY, "replica_lost", &why);
            }
        }
    }
}

/// Sends a request to the slot's replica. A kept connection that turns out to be closed is replaced, which the server has
/// never seen and no try.
async fn try_once(
    parts: Parts,
    body: Outgoing,
    mut slot: Slot,
    patience: Option<Duration>,
) -> Result<(Response<Incoming>, Slot, Connection), Failed> {
    let upload = body.upload();
    let repeatable = parts.method.is_safe() && parts.method != Method::CONNECT && body.is_end_stream();
    let copy = repeatable.then(|| (parts.clone(), body.copy_of_nothing()));
    let mut request = Request::from_parts(parts, body);
    loop {
        let mut connection = match slot.upstream.connection().await {
            Ok(connection) => connection,
            Err(error) => {
                slot.lease.unreachable(&error.to_string());
                return Err(Failed::Unsent(Box::new(request.into_parts()), error.to_string()));
            }
        };
        let asked = connection.ask(request);
        let answered = match patience {
            Some(patience) => tokio::time::timeout(patience, asked).await.map_err(|_| patience),
            None => Ok(asked.await),
        };
        let answered = answered.map_err(|patience| {
            if upload.is_awaited() {
                return Failed::Slow(patience);
            }
            slot.lease.broken(&format!("there was no answer within {} ms", patience.as_millis()));
            Failed::Late(patience)
        })?;
        match answered {
            Ok(response) => {
                upload.answer_begins();
                return Ok((response, slot, connection));
            }
            Err(Unanswered::Unsent(again)) if connection.kept => {
                // What else is kept is as old.
                slot.upstream.hang_up();
                request = *again;
            }
            Err(Unanswered::Unsent(again)) => {
                slot.lease.broken("it closed a new connection");
                return Err(Failed::Again(
                    Box::new(again.into_parts()),
                    "it closed a new connection".to_owned(),
                ));
            }
            Err(Unanswered::Lost(_)) if let Some(fault) = upload.fault() => {
                return Err(Failed::Client(fault));
            }
            Err(Unanswered::Lost(error)) => {
                let why = chain(&error);
                slot.lease.broken(&why);
                return Err(match copy {
                    Some(copy) => Failed::Again(Box::new(copy), why),
                    None => Failed::Not(why),
                });
            }
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
    traffic: std::sync::Arc<Traffic>,
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
