//! Clients that are silent in the middle of a body: what they lose, and what is not taken for silence.

use std::convert::Infallible;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures::channel::mpsc::{self, UnboundedReceiver, UnboundedSender};
use http_body_util::{BodyExt, StreamBody};
use hyper::Request;
use hyper::body::Frame;
use rewarm_gateway::{Limits, Protocol};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fixture::{Gateway, LIMITS, Server, Setup, until};
use crate::http2::{echo, speak};

/// How long a client may be silent that is silent for ever.
const SHORT: Duration = Duration::from_millis(150);
/// How long one may be silent that says something now and then, on a machine that is busy.
const LONG: Duration = Duration::from_secs(2);

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
/// Bodies that have begun, or have not, and do not go on.
const HALVES: [(&str, &str); 3] = [
    ("content-length: 9\r\n", "abc"),
    ("transfer-encoding: chunked\r\n", "3\r\nabc\r\n"),
    ("content-length: 9\r\n", ""),
];

type Piece = Result<Frame<Bytes>, Infallible>;
type Pieces = StreamBody<UnboundedReceiver<Piece>>;

fn limits(body_timeout: Duration) -> Limits {
    Limits { body_timeout: Some(body_timeout), ..LIMITS }
}

fn blames(gateway: &Gateway) -> u32 {
    gateway.pool.broken.load(Ordering::SeqCst)
}

/// A request of HTTP/2 of which the body goes on when something is sent.
fn upload() -> (UnboundedSender<Piece>, Request<Pieces>) {
    let (pieces, body) = mpsc::unbounded();
    let request = Request::builder().method("POST").uri("http://a.example/up").body(StreamBody::new(body));
    (pieces, request.expect("good"))
}

fn send(pieces: &UnboundedSender<Piece>, text: &'static str) {
    pieces.unbounded_send(Ok(Frame::data(Bytes::from(text)))).expect("the request goes on");
}

async fn connection(gateway: &Gateway) -> hyper::client::conn::http2::SendRequest<Pieces> {
    speak(TcpStream::connect(gateway.address).await.expect("it listens")).await
}

#[tokio::test]
async fn a_client_that_is_silent_in_its_body_gives_its_slot_back() {
    let server = Server::start().await;
    let setup = Setup { slots: 1, limits: limits(SHORT), ..Setup::default() };
    let gateway = setup.before(server.address).await;
    for (length, beginning) in HALVES {
        let mut client = gateway.client().await;
        client.say(format!("POST / HTTP/1.1\r\nhost: a\r\n{length}\r\n{beginning}")).await;
        let mut replica = server.accept().await;
        let mut another = gateway.client().await;
        another.say("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        let answer = client.rest().await;
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
        let why = "no byte of the body came within 150 ms";
        assert!(answer.contains("body_late") && answer.contains(why), "{answer}");
        // The server is told by the end of its connection, not by an end of the body.
        let seen = replica.rest().await;
        assert!(seen.ends_with(beginning), "{seen}");
        // Who waited for the slot has it.
        let mut replica = server.accept().await;
        replica.head().await;
        replica.say(OK).await;
        another.hear("ok").await;
        gateway.await_taken(0).await;
        assert_eq!(blames(&gateway), 0, "{length:?}");
        drop(replica);
        gateway.pool.upstream.hang_up();
    }
}

#[tokio::test]
async fn a_client_that_is_silent_before_its_model_is_known_asks_nobody() {
    let server = Server::start().await;
    let setup = Setup { model: Some("llama"), limits: limits(SHORT), ..Setup::default() };
    let gateway = setup.before(server.address).await;
    for (length, beginning) in HALVES {
        let mut client = gateway.client().await;
        client.say(format!("POST / HTTP/1.1\r\nhost: a\r\n{length}\r\n{beginning}")).await;
        let answer = client.rest().await;
        assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("body_late"), "{answer}");
    }
    assert_eq!(gateway.pool.taken.load(Ordering::SeqCst), 0);
}

/// Its connection goes on, and so does the replica's where that is of HTTP/2 as well.
#[tokio::test]
async fn a_stream_of_http2_that_is_silent_is_given_up_by_itself() {
    let server = Server::start().await;
    let setup = Setup { slots: 1, limits: limits(SHORT), protocol: Protocol::H2c, ..Setup::default() };
    let gateway = setup.before(server.address).await;
    let server = tokio::spawn(echo(server));
    let mut sender = connection(&gateway).await;
    for beginning in ["abc", ""] {
        let (pieces, request) = upload();
        if !beginning.is_empty() {
            send(&pieces, beginning);
        }
        let response = sender.send_request(request).await.expect("an answer");
        assert_eq!(response.status(), 408);
        let text = response.into_body().collect().await.expect("a body").to_bytes();
        assert!(String::from_utf8_lossy(&text).contains("no byte of the body came within 150 ms"));
        let (pieces, request) = upload();
        send(&pieces, "whole");
        drop(pieces);
        let response = sender.send_request(request).await.expect("an answer");
        let text = response.into_body().collect().await.expect("a body").to_bytes();
        assert!(text.starts_with(b"1 ") && text.ends_with(b" whole"), "on the first connection: {text:?}");
        gateway.await_taken(0).await;
        assert_eq!(blames(&gateway), 0);
    }
    server.abort();
}

#[tokio::test]
async fn a_body_that_comes_slowly_goes_through() {
    const PIECES: u32 = 12;
    let server = Server::start().await;
    let gateway = Setup { limits: limits(LONG), ..Setup::default() }.before(server.address).await;
    let mut client = gateway.client().await;
    client.say(format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {PIECES}\r\n\r\n")).await;
    let mut sender = connection(&gateway).await;
    let (pieces, request) = upload();
    let asked = tokio::spawn(sender.send_request(request));
    for _ in 0..PIECES {
        // Together longer than the limit, each far from it.
        tokio::time::sleep(LONG / 8).await;
        client.say("x").await;
        send(&pieces, "y");
    }
    drop(pieces);
    for _ in 0..2 {
        let mut replica = server.accept().await;
        let head = replica.head().await;
        replica.hear(if head.contains("content-length") { "xxxxxxxxxxxx" } else { "0\r\n\r\n" }).await;
        replica.say(OK).await;
    }
    client.hear("ok").await;
    assert_eq!(asked.await.expect("no panic").expect("an answer").status(), 200);
}

/// Neither the slot that is waited for, nor the replica that does not read, nor the answer is the client's matter.
#[tokio::test]
async fn what_others_take_their_time_for_is_no_silence() {
    let server = Server::start().await;
    let setup = Setup { slots: 1, limits: limits(SHORT), ..Setup::default() };
    let gateway = setup.before(server.address).await;
    let mut client = gateway.client().await;
    client.say("POST /1 HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc").await;
    let mut replica = server.accept().await;
    replica.hear("abc").await;
    let mut held = gateway.client().await;
    held.say("POST /2 HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\n").await;
    until("it is held", || gateway.pool.waiting.load(Ordering::SeqCst) == 1).await;
    tokio::time::sleep(4 * SHORT).await;
    held.say("def").await;
    replica.say(OK).await;
    client.hear("ok").await;
    replica.hear("def").await;
    tokio::time::sleep(4 * SHORT).await;
    replica.say(OK).await;
    held.hear("ok").await;
}

#[tokio::test]
async fn a_replica_that_does_not_read_is_waited_for() {
    const BYTES: usize = 64 << 20;
    let server = Server::start().await;
    let gateway = Setup { limits: limits(LONG), ..Setup::default() }.before(server.address).await;
    let mut client = gateway.client().await;
    client.say(format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {BYTES}\r\n\r\n")).await;
    let mut replica = server.accept().await;
    replica.head().await;
    // More than fits between the two: it ends only when the replica reads.
    let sent = tokio::spawn(async move {
        client.say(vec![b'x'; BYTES]).await;
        client
    });
    tokio::time::sleep(2 * LONG).await;
    assert!(!sent.is_finished(), "it fits into buffers");
    gateway.await_taken(1).await;
    let mut replica = replica.into_stream();
    let (mut seen, mut buffer) = (0, vec![0; 1 << 20]);
    while seen < BYTES {
        let count = replica.read(&mut buffer).await.expect("it goes on");
        assert!(count > 0 && buffer[..count].iter().all(|byte| *byte == b'x'), "after {seen} bytes");
        seen += count;
    }
    replica.write_all(OK.as_bytes()).await.expect("it listens");
    sent.await.expect("all was taken").hear("ok").await;
    gateway.await_taken(0).await;
}

/// The answer may be a stream for as long as it likes, and the body may go on after a silence.
#[tokio::test]
async fn a_client_that_listens_to_its_answer_may_be_silent() {
    let server = Server::start().await;
    let gateway = Setup { limits: limits(LONG), ..Setup::default() }.before(server.address).await;
    let mut client = gateway.client().await;
    client.say("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n").await;
    let mut sender = connection(&gateway).await;
    let (pieces, request) = upload();
    send(&pieces, "abc");
    let asked = tokio::spawn(sender.send_request(request));
    let mut replicas = [server.accept().await, server.accept().await];
    for replica in &mut replicas {
        replica.hear("abc\r\n").await;
        replica.say("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nyes\r\n").await;
    }
    client.hear("yes").await;
    let response = asked.await.expect("no panic").expect("an answer");
    tokio::time::sleep(LONG * 3 / 2).await;
    gateway.await_taken(2).await;
    client.say("4\r\nmore\r\n0\r\n\r\n").await;
    send(&pieces, "more");
    drop(pieces);
    for replica in &mut replicas {
        replica.hear("more\r\n0\r\n\r\n").await;
        replica.say("3\r\nend\r\n0\r\n\r\n").await;
    }
    client.hear("end").await;
    assert_eq!(response.into_body().collect().await.expect("a body").to_bytes(), "yesend");
    gateway.await_taken(0).await;
}

#[tokio::test]
async fn a_connection_that_has_left_http_may_be_silent() {
    let server = Server::start().await;
    let gateway = Setup { limits: limits(SHORT), ..Setup::default() }.before(server.address).await;
    let mut client = gateway.client().await;
    client.say("GET /ws HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n").await;
    let mut replica = server.accept().await;
    replica.head().await;
    replica.leave_http().await;
    client.head().await;
    for _ in 0..2 {
        tokio::time::sleep(4 * SHORT).await;
        client.say("ping").await;
        replica.hear("ping").await;
    }
}
