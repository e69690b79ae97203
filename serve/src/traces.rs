//! Spans on their way to a collector: OpenTelemetry's protocol (OTLP) over HTTP.
//!
//! Spans that are over wait in a bounded queue, in which a request never waits for room: what does not fit is dropped. A thread of
//! the SDK sends them in batches. A collector that does not answer costs a line in the log now and then.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_http::hyper::HyperClient;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SdkTracer, SdkTracerProvider, SpanData, SpanExporter,
};
use tokio::runtime::Handle;

/// How the spans' service and instrumentation are called.
const NAME: &str = "rewarm";
/// Where a collector takes spans, below its address.
const PATH: &str = "/v1/traces";
/// Spans that wait, at most: some megabytes.
const WAITING_MAX: usize = 8192;
const BATCH_MAX: usize = 512;
/// How long a span waits for others.
const DELAY: Duration = Duration::from_secs(1);
/// How long the collector may take for one batch.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often is said that it does not answer.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

/// A collector, as long as spans go to it. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Traces(SdkTracerProvider);

impl Traces {
    /// Sends spans to the collector at this address from now on. Connections live on the runtime that this is called on.
    ///
    /// # Errors
    /// The address cannot be used.
    pub(crate) fn begin(collector: &str) -> io::Result<Self> {
        let client = OnRuntime {
            client: HyperClient::with_default_connector(PATIENCE, None),
            runtime: Handle::current(),
        };
        let endpoint = format!("{}{PATH}", collector.trim_end_matches('/'));
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_http()
            .with_http_client(client)
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(&endpoint)
            .with_timeout(PATIENCE)
            .build()
            .map_err(io::Error::other)?;
        let exporter = Complaining { exporter, endpoint, last: Mutex::default() };
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(WAITING_MAX)
            .with_max_export_batch_size(BATCH_MAX)
            .with_scheduled_delay(DELAY)
            .build();
        let service = Resource::builder()
            .with_service_name(NAME)
            .with_attribute(opentelemetry::KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
        let provider = SdkTracerProvider::builder()
            .with_span_processor(BatchSpanProcessor::builder(exporter).with_batch_config(batches).build())
            .with_resource(service.build())
            .build();
        Ok(Self(provider))
    }

    /// What makes spans.
    pub(crate) fn tracer(&self) -> SdkTracer {
        self.0.tracer(NAME)
    }

    /// Sends what waits, and makes no further span. Blocks for at most so long; what the collector has not taken by then is lost.
    pub(crate) fn end(&self, most: Duration) {
        if let Err(error) = self.0.shutdown_with_timeout(most) {
            tracing::debug!(%error, "the last spans");
        }
    }
}

/// A client that the SDK's own thread can use, which belongs to no runtime.
#[derive(Debug)]
struct OnRuntime {
    client: HyperClient,
    runtime: Handle,
}

#[async_trait]
impl HttpClient for OnRuntime {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let client = self.client.clone();
        self.runtime.spawn(async move { client.send_bytes(request).await }).await?
    }
}

/// Says that spans are lost, and not with each batch.
#[derive(Debug)]
struct Complaining<E> {
    exporter: E,
    endpoint: String,
    /// When that was said last; nothing while batches arrive.
    last: Mutex<Option<Instant>>,
}

impl<E: SpanExporter> SpanExporter for Complaining<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let outcome = self.exporter.export(batch).await;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match &outcome {
            Ok(()) => {
                if last.take().is_some() {
                    tracing::info!(collector = self.endpoint, "the collector takes spans again");
                }
            }
            Err(error) if last.is_none_or(|last| last.elapsed() >= COMPLAIN_EVERY) => {
                *last = Some(Instant::now());
                tracing::warn!(
                    collector = self.endpoint,
                    spans,
                    %error,
                    "the collector does not take spans, which are lost until it does; requests go on"
                );
            }
            Err(_) => {}
        }
        outcome
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}
