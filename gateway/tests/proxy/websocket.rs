//! WebSocket of clients that speak HTTP/2, with replicas that speak HTTP/1.1.

use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http_body_util::Full;
use hyper::{Request, Version};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::fixture::{Gateway, Server, Setup, Talk};
use crate::http2::speak;

/// Asks for WebSocket over HTTP/2; the replica answers with this status and with the key's own or another accept.
async fn websocket(status: &str, right: bool) -> (hyper::Response<hyper::body::Incoming>, Talk, Gateway) {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    let mut sender = speak(TcpStream::connect(gateway.address).await.expect("it listens")).await;
    // A client may ask for it once it has seen that the other side understands.
    let first = Request::builder().uri("http://a.example/").body(Full::default()).expect("good");
    let first = tokio::spawn(sender.send_request(first));
    let mut replica = server.accept().await;
    replica.head().await;
    replica.say("HTTP/1.1 204 No Content\r\n\r\n").await;
    first.await.expect("no panic").expect("an answer");
    let request = Request::builder()
        .method("CONNECT")
        .uri("http://a.example/ws?x=1")
        .extension(hyper::ext::Protocol::from_static("websocket"))
        .header("sec-websocket-version", "13")
        .header("sec-websocket-protocol", "chat")
        .body(Full::default());
    let asked = tokio::spawn(sender.send_request(request.expect("good")));
    let head = replica.hear("\r\n\r\n").await;
    let seen = head.to_lowercase();
    for line in [
        "get /ws?x=1 http/1.1\r\n",
        "\r\nhost: a.example\r\n",
        "upgrade: websocket\r\n",
        "connection: upgrade",
    ] {
        assert!(seen.contains(line), "{line:?} in {seen}");
    }
    let key = head.lines().find_map(|line| line.strip_prefix("sec-websocket-key: ")).expect("a key");
    let accept = format!("{key}{}", if right { "258EAFA5-E914-47DA-95CA-C5AB0DC85B11" } else { "" });
    let accept = BASE64_STANDARD.encode(digest(&SHA1_FOR_LEGACY_USE_ONLY, accept.as_bytes()));
    let head = format!("HTTP/1.1 {status}\r\nconnection: upgrade\r\nupgrade: websocket\r\n");
    replica
        .say(format!("{head}sec-websocket-protocol: chat\r\nsec-websocket-accept: {accept}\r\n\r\n"))
        .await;
    (asked.await.expect("no panic").expect("an answer"), replica, gateway)
}

#[tokio::test]
async fn a_client_of_http2_speaks_websocket_with_a_replica_of_http1() {
    let (mut response, mut replica, gateway) = websocket("101 Switching Protocols", true).await;
    assert_eq!((response.status().as_u16(), response.version()), (200, Version::HTTP_2));
    assert_eq!(response.headers()["sec-websocket-protocol"], "chat");
    assert!(!response.headers().contains_key("sec-websocket-accept"));
    let mut client = TokioIo::new(hyper::upgrade::on(&mut response).await.expect("it left HTTP"));
    client.write_all(b"ping").await.expect("it is read");
    replica.hear("ping").await;
    replica.say("pong").await;
    let mut heard = [0; 4];
    client.read_exact(&mut heard).await.expect("an answer");
    assert_eq!(&heard, b"pong");
    gateway.await_taken(1).await;
    drop((client, replica, response));
    gateway.await_taken(0).await;
}

#[tokio::test]
async fn a_replica_that_does_not_change_to_websocket_is_no_success() {
    for (status, right) in [("101 Switching Protocols", false), ("200 OK", true)] {
        let (response, replica, gateway) = websocket(status, right).await;
        assert_eq!(response.status(), 502, "{status}");
        drop((response, replica));
        gateway.await_taken(0).await;
    }
}
