//! Traces as a collector gets them, and what becomes of requests whose collector does not answer.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use prost::Message;
use rewarm_integration_tests::http;
use rewarm_integration_tests::pool::free_port;

use super::{config, pool_world};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CLIENT: &str = "b7ad6b7169203331";

/// A collector that keeps everything.
struct Collector {
    port: u16,
    seen: Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
}

impl Collector {
    fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let seen = Arc::<Mutex<Vec<ExportTraceServiceRequest>>>::default();
        let keep = seen.clone();
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let keep = keep.clone();
                std::thread::spawn(move || while take(&stream, &keep).is_ok() {});
            }
        });
        Self { port, seen }
    }

    fn requests(&self) -> Vec<ExportTraceServiceRequest> {
        self.seen.lock().expect("no panic").clone()
    }

    fn spans(&self) -> Vec<Span> {
        let resources = self.requests().into_iter().flat_map(|request| request.resource_spans);
        resources.flat_map(|resource| resource.scope_spans).flat_map(|scope| scope.spans).collect()
    }
}

/// Takes one request in, and says thanks.
fn take(mut stream: &TcpStream, keep: &Mutex<Vec<ExportTraceServiceRequest>>) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).expect("a head is text").to_lowercase();
    assert!(head.starts_with("post /v1/traces http/1.1\r\n"), "{head}");
    assert!(head.contains("content-type: application/x-protobuf\r\n"), "{head}");
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).expect("a length");
    let mut body = vec![0; length.parse().expect("a number")];
    stream.read_exact(&mut body)?;
    let request = ExportTraceServiceRequest::decode(&body[..]).expect("OTLP");
    keep.lock().expect("no panic").push(request);
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n")
}

fn hex(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attribute<'a>(attributes: &'a [KeyValue], name: &str) -> Option<&'a Value> {
    let found = attributes.iter().find(|attribute| attribute.key == name)?;
    found.value.as_ref().and_then(|AnyValue { value }| value.as_ref())
}

fn text(value: Option<&Value>) -> &str {
    match value {
        Some(Value::StringValue(text)) => text,
        other => panic!("{other:?}, expected a text"),
    }
}

#[test]
fn a_held_request_and_the_restore_that_it_waited_for_are_one_trace() {
    let Some(world) = pool_world() else { return };
    let (collector, port) = (Collector::start(), free_port());
    let otlp = format!("otlp = 'http://127.0.0.1:{}'\nadmin = false", collector.port);
    let serving = world.serve(&config(&world, port, "").replace("admin = false", &otlp));
    let sampled = format!("traceparent: 00-{TRACE}-{CLIENT}-01");
    let answer = http::get_with(port, "/headers", &sampled).expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.text());
    let unsampled = format!("traceparent: 00-{}-{CLIENT}-00", "2".repeat(32));
    assert_eq!(http::get_with(port, "/check", &unsampled).expect("an answer").status, 200);
    // What is over is sent before the end.
    serving.end();
    let all = collector.spans();
    assert!(all.iter().all(|span| hex(&span.trace_id) != "2".repeat(32)), "{all:#?}");
    let spans: Vec<&Span> = all.iter().filter(|span| hex(&span.trace_id) == TRACE).collect();
    let one = |name: &str| {
        let found: Vec<_> = spans.iter().filter(|span| span.name == name).collect();
        assert_eq!(found.len(), 1, "{name} in {spans:#?}");
        *found[0]
    };
    let (request, held, restore) = (one("GET"), one("held"), one("restore"));
    assert_eq!((hex(&request.parent_span_id).as_str(), request.kind()), (CLIENT, SpanKind::Server));
    assert_eq!(held.parent_span_id, request.span_id);
    assert_eq!(restore.parent_span_id, held.span_id);
    for stage in ["admit", "sandbox", "fetch", "skeleton", "identity", "ready"] {
        let stage = one(stage);
        assert_eq!(stage.parent_span_id, restore.span_id, "{stage:#?}");
        assert!(stage.start_time_unix_nano >= restore.start_time_unix_nano, "{stage:#?} in {restore:#?}");
        assert!(stage.end_time_unix_nano <= restore.end_time_unix_nano, "{stage:#?} in {restore:#?}");
    }
    assert!(held.end_time_unix_nano >= restore.end_time_unix_nano, "{held:#?} {restore:#?}");
    // The replica is told the request's own span as its parent.
    let headers = answer.json()["headers"].to_string();
    assert!(headers.contains(&format!("00-{TRACE}-{}-01", hex(&request.span_id))), "{headers}");
    let attributes = &request.attributes;
    assert_eq!(text(attribute(attributes, "rewarm.pool")), world.name("p"));
    assert_eq!(attribute(attributes, "http.response.status_code"), Some(&Value::IntValue(200)));
    assert_eq!(
        attribute(attributes, "rewarm.replica"),
        attribute(&restore.attributes, "rewarm.replica"),
        "{restore:#?}"
    );
    assert!(matches!(attribute(attributes, "rewarm.held_ms"), Some(Value::DoubleValue(held)) if *held > 0.0));
    let requests = collector.requests();
    let service = requests[0].resource_spans[0].resource.as_ref().expect("a service");
    assert_eq!(text(attribute(&service.attributes, "service.name")), "rewarm");
    world.finish();
}

#[test]
fn a_collector_that_never_answers_costs_no_request_and_a_line_in_the_log() {
    let Some(world) = pool_world() else { return };
    // It takes connections, by its backlog, and nothing else.
    let collector = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let address = collector.local_addr().expect("its address");
    let otlp = format!("otlp = 'http://{address}'\nadmin = false");
    let port = free_port();
    let file = config(&world, port, "min_replicas = 1\n").replace("admin = false", &otlp);
    let serving = world.serve(&file);
    serving.running().await_stderr("the collector does not take spans");
    for _ in 0..20 {
        assert_eq!(http::get(port, "/check").expect("an answer").status, 200);
        std::thread::sleep(Duration::from_millis(50));
    }
    let output = serving.end();
    let complaints = output.stderr.matches("the collector does not take spans").count();
    assert_eq!(complaints, 1, "{}", output.stderr);
    world.finish();
}
