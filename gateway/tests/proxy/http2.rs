//! HTTP/2: with prior knowledge, and as TLS agrees on it.

use std::future::ready;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use http_body::Body;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rewarm_gateway::{Protocol, tls};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::fixture::{Gateway, HELD, PATIENCE, Server, Setup, until};

pub(crate) async fn speak<B>(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> SendRequest<B>
where
    B: Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Send + Unpin + 'static,
{
    let (sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("HTTP/2");
    tokio::spawn(connection);
    sender
}

/// Two requests at once, of which the second is answered first.
async fn ask(mut sender: SendRequest<Full<Bytes>>, server: &Server) {
    let request = |path: &str| {
        let request = Request::builder().method("POST").uri(format!("https://a.example{path}"));
        request.header("te", "trailers").body(Full::new(Bytes::from("abc"))).expect("good")
    };
    let (first, second) = (sender.send_request(request("/1")), sender.send_request(request("/2")));
    let (first, second) = (tokio::spawn(first), tokio::spawn(second));
    let mut replicas = [server.accept().await, server.accept().await];
    let mut heads = [replicas[0].head().await, replicas[1].head().await];
    if heads[0].starts_with("post /2 ") {
        replicas.swap(0, 1);
        heads.swap(0, 1);
    }
    assert!(
        heads[0].starts_with("post /1 http/1.1\r\n") && heads[0].contains("host: a.example\r\n"),
        "{}",
        heads[0]
    );
    let [mut one, mut two] = replicas;
    for (replica, asked, answer) in [(&mut two, second, "two"), (&mut one, first, "one")] {
        replica.hear("abc").await;
        let trailer = "trailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n3\r\n";
        replica.say(format!("HTTP/1.1 200 OK\r\n{trailer}{answer}\r\n0\r\nx-sum: 9\r\n\r\n")).await;
        let response = asked.await.expect("no panic").expect("an answer");
        assert_eq!((response.status().as_u16(), response.version()), (200, Version::HTTP_2));
        let whole = response.into_body().collect().await.expect("a body");
        assert_eq!(whole.trailers().expect("trailers")["x-sum"], "9");
        assert_eq!(whole.to_bytes(), answer);
    }
}

#[tokio::test]
async fn with_prior_knowledge() {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    let stream = TcpStream::connect(gateway.address).await.expect("it listens");
    ask(speak(stream).await, &server).await;
    gateway.await_taken(0).await;
}

#[tokio::test]
async fn as_tls_agrees_on_it() {
    let server = Server::start().await;
    let made = rcgen::generate_simple_self_signed(["a.example".to_owned()]).expect("a certificate");
    let acceptor = tls::acceptor(made.cert.pem().as_bytes(), made.signing_key.serialize_pem().as_bytes());
    let tls = Some(acceptor.expect("good"));
    let gateway = Setup { tls, ..Setup::default() }.before(server.address).await;
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).expect("a certificate");
    let client = |protocol: &str| {
        let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots.clone())
            .with_no_client_auth();
        config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
        TlsConnector::from(Arc::new(config))
    };
    let connect = async |protocol: &str| {
        let stream = TcpStream::connect(gateway.address).await.expect("it listens");
        let name = ServerName::try_from("a.example").expect("a name");
        client(protocol).connect(name, stream).await.expect("TLS")
    };
    ask(speak(connect("h2").await).await, &server).await;
    gateway.await_taken(0).await;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(connect("http/1.1").await))
            .await
            .expect("HTTP/1.1");
    tokio::spawn(connection);
    let request = Request::builder().uri("/").header("host", "a.example").body(Full::new(Bytes::new()));
    let asked = tokio::spawn(sender.send_request(request.expect("good")));
    let mut replica = server.accept().await;
    replica.head().await;
    replica.say("HTTP/1.1 204 No Content\r\n\r\n").await;
    assert_eq!(asked.await.expect("no panic").expect("an answer").status(), 204);
    gateway.await_taken(0).await;
}

/// A server of HTTP/2 that answers with what it saw of a request, and the request's trailer.
pub(crate) async fn echo(server: Server) {
    let mut connections = 0;
    loop {
        let stream = server.accept().await.into_stream();
        connections += 1;
        let service = service_fn(move |request: Request<Incoming>| async move {
            let (head, body) = request.into_parts();
            let body = body.collect().await?;
            let trailers = body.trailers().cloned().unwrap_or_default();
            let has_host = head.headers.contains_key("host");
            let text = format!("{connections} {:?} {} {has_host} ", head.version, head.uri);
            let data = [Bytes::from(text), body.to_bytes()].concat();
            let body = Full::new(Bytes::from(data)).with_trailers(ready(Some(Ok(trailers))));
            Ok::<_, hyper::Error>(Response::new(body))
        });
        let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        tokio::spawn(builder.serve_connection(TokioIo::new(stream), service));
    }
}

#[tokio::test]
async fn to_a_replica_over_one_connection() {
    let server = Server::start().await;
    let gateway = Setup { protocol: Protocol::H2c, ..Setup::default() }.before(server.address).await;
    let server = tokio::spawn(echo(server));
    let stream = TcpStream::connect(gateway.address).await.expect("it listens");
    let (mut sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("HTTP/2");
    tokio::spawn(connection);
    for round in 0..3 {
        let trailers = HeaderMap::from_iter([(HeaderName::from_static("x-sum"), HeaderValue::from(round))]);
        let body = Full::new(Bytes::from("abc")).with_trailers(ready(Some(Ok(trailers))));
        let request = Request::builder().method("POST").uri("https://a.example/rpc").header("te", "trailers");
        let asked = sender.send_request(request.body(body).expect("good")).await;
        let whole = asked.expect("an answer").into_body().collect().await.expect("a body");
        assert_eq!(whole.trailers().expect("trailers")["x-sum"], round.to_string());
        assert_eq!(whole.to_bytes(), "1 HTTP/2.0 http://a.example/rpc false abc");
    }
    // A client of HTTP/1.1 gets there too.
    let mut client = gateway.client().await;
    client.say("GET /a?b=c HTTP/1.1\r\nhost: b.example\r\nconnection: close\r\n\r\n").await;
    let answer = client.rest().await;
    assert!(answer.contains("1 HTTP/2.0 http://b.example/a?b=c false "), "{answer}");
    gateway.await_taken(0).await;
    server.abort();
}

/// More than any window that either side would give by itself.
const LONG: usize = 8 << 20;

fn long(gateway: &Gateway, path: &str) -> Request<Full<Bytes>> {
    let target = format!("http://{}{path}", gateway.address);
    Request::builder()
        .method("POST")
        .uri(target)
        .body(Full::new(Bytes::from(vec![b'x'; LONG])))
        .expect("good")
}

async fn connection(gateway: &Gateway) -> SendRequest<Full<Bytes>> {
    let stream = TcpStream::connect(gateway.address).await.expect("it listens");
    stream.set_nodelay(true).expect("set");
    speak(stream).await
}

#[tokio::test]
async fn what_is_held_leaves_room_for_the_bodies_of_others_on_its_connection() {
    let server = Server::start().await;
    let gateway = Setup { protocol: Protocol::H2c, ..Setup::default() }.before(server.address).await;
    let server = tokio::spawn(echo(server));
    let mut sender = connection(&gateway).await;
    let held: Vec<_> = (0..20).map(|_| tokio::spawn(sender.send_request(long(&gateway, HELD)))).collect();
    until("all are held", || gateway.full.waiting.load(Ordering::SeqCst) == 20).await;
    let asked = async {
        let answer = sender.send_request(long(&gateway, "/other")).await.expect("an answer");
        answer.into_body().collect().await.expect("a body").to_bytes()
    };
    let answer = tokio::time::timeout(PATIENCE, asked).await.expect("its body has room");
    assert!(answer.len() > LONG && answer.ends_with(b"x"));
    assert!(held.iter().all(|asked| !asked.is_finished()));
    held.into_iter().for_each(|asked| asked.abort());
    until("all are forgotten", || gateway.full.waiting.load(Ordering::SeqCst) == 0).await;
    server.abort();
}

#[tokio::test]
async fn an_answer_that_nobody_reads_leaves_room_for_those_of_others() {
    let server = Server::start().await;
    let gateway = Setup { protocol: Protocol::H2c, ..Setup::default() }.before(server.address).await;
    let server = tokio::spawn(echo(server));
    let mut unread = Vec::new();
    for _ in 0..5 {
        let mut sender = connection(&gateway).await;
        unread.push((sender.send_request(long(&gateway, "/unread")).await.expect("an answer"), sender));
    }
    let asked = async {
        let mut sender = connection(&gateway).await;
        let answer = sender.send_request(long(&gateway, "/read")).await.expect("an answer");
        answer.into_body().collect().await.expect("a body").to_bytes()
    };
    let answer = tokio::time::timeout(PATIENCE, asked).await.expect("its answer has room");
    assert!(answer.starts_with(b"1 ") && answer.len() > LONG, "over the same connection");
    gateway.await_taken(unread.len() as i64).await;
    drop(unread);
    gateway.await_taken(0).await;
    server.abort();
}
