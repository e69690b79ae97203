//! The span of a request, where somebody collects spans.
//!
//! It is part of its client's trace (W3C `traceparent`) where that is recorded, and begins one where the client has none. A client
//! that says that its trace is not recorded decides so for everybody behind it: no span is made, and its header goes on as
//! it came. A replica is told the request's span as its own parent.

use std::time::Duration;

use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, StatusCode};
use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::{Span as _, SpanContext, SpanKind, Status, TraceContextExt as _, Tracer as _};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::HeaderExtractor;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, Span};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// Spans wait for their collector by the thousand: what strangers write into them is bounded. W3C asks for so much of a `tracestate`.
const STATE_BYTES_MAX: usize = 512;
const PATH_BYTES_MAX: usize = 1024;
/// How the conventions call a method that they do not know.
const OTHER: &str = "_OTHER";

/// From the head of a request to the last byte of its answer: it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct RequestSpan {
    span: Span,
    /// The last one that it was given to, and how long it was held for it.
    replica: Option<(String, Option<Duration>)>,
}

impl RequestSpan {
    /// `None` where the client does not want its trace to be recorded. In a box, since most requests carry none.
    pub(crate) fn begin(tracer: &SdkTracer, parts: &mut Parts) -> Option<Box<Self>> {
        let state: usize = parts.headers.get_all(TRACESTATE).iter().map(HeaderValue::len).sum();
        if state > STATE_BYTES_MAX {
            parts.headers.remove(TRACESTATE);
        }
        let headers = HeaderExtractor(&parts.headers);
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &headers);
        let client = parent.span().span_context().clone();
        if client.is_valid() && !client.is_sampled() {
            return None;
        }
        let (name, method) = named(&parts.method);
        let attributes = vec![
            KeyValue::new("http.request.method", method),
            KeyValue::new("url.path", beginning(parts.uri.path(), PATH_BYTES_MAX).to_owned()),
        ];
        let builder = tracer.span_builder(name).with_kind(SpanKind::Server).with_attributes(attributes);
        let span = tracer.build_with_context(builder, &parent);
        span.is_recording().then(|| Box::new(Self { span, replica: None }))
    }

    pub(crate) fn context(&self) -> SpanContext {
        self.span.span_context().clone()
    }

    /// Makes it the parent of what the replica does.
    pub(crate) fn hand_on(&self, headers: &mut HeaderMap) {
        let own = self.span.span_context();
        let text = format!("00-{}-{}-{:02x}", own.trace_id(), own.span_id(), own.trace_flags().to_u8());
        if let Ok(value) = HeaderValue::from_str(&text) {
            headers.insert(TRACEPARENT, value);
        }
        // What belongs to no trace, or cannot be read, goes no further.
        if own.trace_state().header().is_empty() {
            headers.remove(TRACESTATE);
        }
    }

    pub(crate) fn for_pool(&mut self, name: &str) {
        self.span.set_attribute(KeyValue::new("rewarm.pool", name.to_owned()));
    }

    /// It has a slot; a second one where the first replica did not answer.
    pub(crate) fn for_replica(&mut self, name: &str, held: Option<Duration>) {
        self.replica = Some((name.to_owned(), held));
    }

    pub(crate) fn answered(&mut self, status: StatusCode) {
        self.span.set_attribute(KeyValue::new("http.response.status_code", i64::from(status.as_u16())));
        if status.is_server_error() {
            self.failed(status.as_str().to_owned());
        }
    }

    /// The replica was lost in the middle of its answer.
    pub(crate) fn broke_off(&mut self) {
        self.failed("broken_off".to_owned());
    }

    fn failed(&mut self, kind: String) {
        self.span.set_attribute(KeyValue::new("error.type", kind));
        self.span.set_status(Status::error(""));
    }
}

impl Drop for RequestSpan {
    fn drop(&mut self) {
        let Some((name, held)) = self.replica.take() else { return };
        self.span.set_attribute(KeyValue::new("rewarm.replica", name));
        if let Some(held) = held {
            self.span.set_attribute(KeyValue::new("rewarm.held_ms", held.as_secs_f64() * 1e3));
        }
    }
}

/// What a span is called, and the method that it names. Methods come from strangers: only known ones become names.
fn named(method: &Method) -> (&'static str, &'static str) {
    const KNOWN: [&str; 9] = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT"];
    let known = KNOWN.into_iter().find(|known| *known == method.as_str());
    known.map_or(("HTTP", OTHER), |name| (name, name))
}

/// A text up to so many bytes, in whole characters.
fn beginning(text: &str, most: usize) -> &str {
    let end = (0..=most.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}
