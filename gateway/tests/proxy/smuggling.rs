//! What HTTP/2 can carry and HTTP/1.1 cannot, spoken frame by frame: a replica behind the gateway must never read it as
//! anything else, least of all as a second request.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fixture::{Server, Setup};

/// Kinds of frames, and flags.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
/// No answer takes as long on any machine.
const PATIENCE: Duration = Duration::from_secs(30);

type Field<'a> = (&'a str, &'a str);

const GOOD: [Field<'_>; 4] = [(":method", "POST"), (":scheme", "http"), (":path", "/"), (":authority", "a")];

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a short frame").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Fields as they are, in no table and not compressed.
fn block(fields: &[Field<'_>]) -> Vec<u8> {
    let text = |text: &str| [&[u8::try_from(text.len()).expect("a short text")], text.as_bytes()].concat();
    fields.iter().flat_map(|(name, value)| [vec![0], text(name), text(value)].concat()).collect()
}

async fn open(address: std::net::SocketAddr, frames: &[Vec<u8>]) -> TcpStream {
    let mut client = TcpStream::connect(address).await.expect("it listens");
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let said = [&[preface, frame(SETTINGS, 0, 0, &[])], frames].concat().concat();
    client.write_all(&said).await.expect("it reads");
    client
}

/// The kind of the first frame that says what became of a request; nothing where the connection has ended without one.
async fn outcome(client: &mut TcpStream, of: &[Field<'_>]) -> Option<u8> {
    let reading = async {
        loop {
            let mut head = [0; 9];
            client.read_exact(&mut head).await.ok()?;
            let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            client.read_exact(&mut payload).await.ok()?;
            if matches!(head[3], HEADERS | RST_STREAM | GOAWAY) {
                return Some(head[3]);
            }
        }
    };
    let outcome = tokio::time::timeout(PATIENCE, reading).await;
    outcome.unwrap_or_else(|_| panic!("nothing became of {of:?}"))
}

#[tokio::test]
async fn what_http2_could_smuggle_into_http1_reaches_no_replica() {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    let with = |more: &[Field<'static>]| [&GOOD[..], more].concat();
    let instead = |name: &'static str, value: &'static str| {
        GOOD.map(|(good, is)| if good == name { (name, value) } else { (good, is) }).to_vec()
    };
    for fields in [
        with(&[("transfer-encoding", "chunked")]),
        with(&[("connection", "close")]),
        with(&[("keep-alive", "timeout=5")]),
        with(&[("upgrade", "websocket")]),
        with(&[("x", "1\r\nevil: 1")]),
        with(&[("x", "1\nevil: 1")]),
        with(&[("x", "1\0")]),
        with(&[("x\r\nevil", "1")]),
        with(&[("x: y", "1")]),
        with(&[("X-Upper", "1")]),
        with(&[("", "1")]),
        with(&[(":path", "/evil")]),
        with(&[("x", "1"), (":path", "/evil")]),
        with(&[("content-length", "3")]),
        with(&[("content-length", "0"), ("content-length", "3")]),
        with(&[("host", "b")]),
        instead(":path", "/ HTTP/1.1\r\nevil: 1"),
        instead(":path", "/a b"),
        instead(":path", ""),
        instead(":authority", "a\r\nevil: 1"),
        instead(":method", "GET / HTTP/1.1\r\nevil: 1\r\n\r\nGET"),
        instead(":method", "CONNECT"),
    ] {
        let asked = frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(&fields));
        let mut client = open(gateway.address, &[asked]).await;
        // A replica that had been asked would not answer, and there would be no outcome.
        outcome(&mut client, &fields).await;
        assert_eq!(gateway.pool.taken.load(Ordering::SeqCst), 0, "{fields:?}");
    }
}

#[tokio::test]
async fn what_follows_a_body_is_never_another_request() {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    let fields = [&GOOD[..], &[("content-length", "3")]].concat();
    let frames = [
        frame(HEADERS, END_HEADERS, 1, &block(&fields)),
        frame(DATA, END_STREAM, 1, b"abcGET /evil HTTP/1.1\r\nhost: a\r\n\r\n"),
    ];
    let mut client = open(gateway.address, &frames).await;
    outcome(&mut client, &fields).await;
    drop(client);
    gateway.await_taken(0).await;
    // Whether the replica was asked before the second frame was looked at is a matter of chance.
    let accepted = tokio::time::timeout(Duration::from_millis(200), server.accept()).await;
    if let Ok(mut replica) = accepted {
        let seen = replica.rest().await;
        assert!(!seen.contains("evil"), "{seen}");
    }
}
