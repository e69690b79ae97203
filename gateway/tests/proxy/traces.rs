//! Spans of requests: whose trace they belong to, when they end, and what the replica is told.

use std::sync::{Arc, Mutex};

use opentelemetry::Value;
use opentelemetry::trace::{SpanKind, Status, TracerProvider as _};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter};

use crate::fixture::{Server, Setup, until};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CLIENT: &str = "b7ad6b7169203331";
const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// Spans that are over.
#[derive(Debug, Clone, Default)]
struct Kept(Arc<Mutex<Vec<SpanData>>>);

impl SpanExporter for Kept {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.lock().expect("no panic").extend(batch);
        Ok(())
    }
}

impl Kept {
    fn count(&self) -> usize {
        self.0.lock().expect("no panic").len()
    }

    /// The only span, once there is one.
    async fn one(&self) -> SpanData {
        until("a span is over", || self.count() == 1).await;
        self.0.lock().expect("no panic")[0].clone()
    }
}

fn traced() -> (Kept, Setup) {
    let kept = Kept::default();
    let provider = SdkTracerProvider::builder().with_simple_exporter(kept.clone()).build();
    let setup = Setup { tracer: Some(provider.tracer("test")), ..Setup::default() };
    (kept, setup)
}

fn attribute(span: &SpanData, name: &str) -> Option<Value> {
    let mut found = span.attributes.iter().filter(|attribute| attribute.key.as_str() == name);
    let value = found.next().map(|attribute| attribute.value.clone());
    assert!(found.next().is_none(), "{name} twice: {span:?}");
    value
}

fn header(head: &str, name: &str) -> Option<String> {
    head.lines().find_map(|line| line.strip_prefix(&format!("{name}: "))).map(str::to_owned)
}

fn get(headers: &str) -> String {
    format!("GET /a?b=c HTTP/1.1\r\nhost: a\r\n{headers}\r\n")
}

#[tokio::test]
async fn a_request_is_part_of_its_client_s_trace_and_the_replica_of_its_own() {
    let server = Server::start().await;
    let (kept, setup) = traced();
    let gateway = setup.before(server.address).await;
    let mut client = gateway.client().await;
    client.say(get(&format!("traceparent: 00-{TRACE}-{CLIENT}-01\r\ntracestate: x=1\r\n"))).await;
    let mut replica = server.accept().await;
    let head = replica.head().await;
    replica.say("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n").await;
    client.hear("\r\na\r\n").await;
    assert_eq!(kept.count(), 0, "it ends with the last byte");
    replica.say("0\r\n\r\n").await;
    client.hear("0\r\n\r\n").await;
    let span = kept.one().await;
    let own = span.span_context.span_id().to_string();
    assert_eq!(header(&head, "traceparent"), Some(format!("00-{TRACE}-{own}-01")));
    assert_eq!(header(&head, "tracestate").as_deref(), Some("x=1"));
    assert_eq!(span.span_context.trace_id().to_string(), TRACE);
    assert_eq!((span.parent_span_id.to_string().as_str(), span.parent_span_is_remote), (CLIENT, true));
    assert_eq!(
        (span.name.as_ref(), &span.span_kind, &span.status),
        ("GET", &SpanKind::Server, &Status::Unset)
    );
    for (name, value) in [
        ("http.request.method", Some("GET".into())),
        ("url.path", Some("/a".into())),
        ("http.response.status_code", Some(200.into())),
        ("rewarm.pool", Some("pool".into())),
        ("rewarm.replica", Some("replica-1".into())),
        ("rewarm.held_ms", None),
    ] {
        assert_eq!(attribute(&span, name), value, "{name}");
    }
}

#[tokio::test]
async fn a_trace_that_is_not_recorded_goes_on_as_it_came() {
    let server = Server::start().await;
    let (kept, setup) = traced();
    let gateway = setup.before(server.address).await;
    let mut client = gateway.client().await;
    let mut replica = None;
    let unrecorded = format!("00-{TRACE}-{CLIENT}-00");
    for (headers, parent) in [
        (format!("traceparent: {unrecorded}\r\n"), Some(unrecorded.as_str())),
        ("traceparent: nonsense\r\ntracestate: x=1\r\n".to_owned(), None),
    ] {
        client.say(get(&headers)).await;
        if replica.is_none() {
            replica = Some(server.accept().await);
        }
        let replica = replica.as_mut().expect("just made");
        let head = replica.head().await;
        replica.say(OK).await;
        client.hear("ok").await;
        let handed = header(&head, "traceparent").expect("it has one or is given one");
        match parent {
            Some(parent) => assert_eq!(handed, parent),
            None => {
                let span = kept.one().await;
                let context = &span.span_context;
                assert_eq!(handed, format!("00-{}-{}-01", context.trace_id(), context.span_id()));
                assert_eq!(header(&head, "tracestate"), None, "it belongs to no trace");
            }
        }
    }
}

#[tokio::test]
async fn what_goes_wrong_is_an_error_of_its_span() {
    for (answer, status, kind) in [
        ("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\nok", 503, "503"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok", 200, "broken_off"),
        ("", 502, "502"),
    ] {
        let server = Server::start().await;
        let (kept, setup) = traced();
        let gateway = setup.before(server.address).await;
        let mut client = gateway.client().await;
        client.say("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nz").await;
        let mut replica = server.accept().await;
        replica.hear("\r\n\r\nz").await;
        replica.say(answer).await;
        drop(replica);
        let span = kept.one().await;
        assert_eq!(attribute(&span, "http.response.status_code"), Some(status.into()), "{answer:?}");
        assert_eq!(attribute(&span, "error.type"), Some(kind.into()), "{answer:?}");
        assert!(matches!(span.status, Status::Error { .. }), "{span:?}");
    }
}

#[tokio::test]
async fn an_upgraded_connection_is_one_span_to_its_end() {
    let server = Server::start().await;
    let (kept, setup) = traced();
    let gateway = setup.before(server.address).await;
    let mut client = gateway.client().await;
    client.say(get("connection: upgrade\r\nupgrade: websocket\r\n")).await;
    let mut replica = server.accept().await;
    replica.head().await;
    replica.leave_http().await;
    client.head().await;
    client.say("ping").await;
    replica.hear("ping").await;
    assert_eq!(kept.count(), 0);
    drop((client, replica));
    let span = kept.one().await;
    assert_eq!(attribute(&span, "http.response.status_code"), Some(101.into()));
}

#[tokio::test]
async fn what_a_stranger_writes_into_a_span_is_bounded() {
    let server = Server::start().await;
    let (kept, setup) = traced();
    let gateway = setup.before(server.address).await;
    let mut client = gateway.client().await;
    let (path, state) = (format!("/{}", "a".repeat(50_000)), format!("x={}", "b".repeat(20_000)));
    client
        .say(format!(
            "GET {path} HTTP/1.1\r\nhost: a\r\ntraceparent: 00-{TRACE}-{CLIENT}-01\r\ntracestate: {state}\r\n\r\n"
        ))
        .await;
    let mut replica = server.accept().await;
    let head = replica.head().await;
    replica.say(OK).await;
    client.hear("ok").await;
    assert!(head.contains(&path), "the replica gets all of it");
    assert_eq!(header(&head, "tracestate"), None);
    let span = kept.one().await;
    assert_eq!(span.span_context.trace_id().to_string(), TRACE);
    assert_eq!(span.span_context.trace_state().header(), "");
    assert_eq!(attribute(&span, "url.path"), Some(path[..1024].to_owned().into()));
}
