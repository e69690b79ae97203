//! What the servers in the replicas say of themselves, passed on under each replica's own identity.
//!
//! A restored server believes that it is the one that was snapshotted: labels that name it (`worker_id`, `pod`, ...)
//! came out of the snapshot and are equal in all clones. They are replaced here, and `pool` and `replica` are added, so
//! that a planner or a picker of endpoints sees as many servers as there are.
//!
//! Only names that such planners read are passed on, and the text is not trusted: it is bounded, and a line that is not
//! understood is left out.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io;
use std::time::Duration;

use axum::extract::State;
use axum::http::header::{CONTENT_TYPE, HOST};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use futures::stream;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use prometheus_client::encoding::prometheus_text;
use rewarm_autoscaler::pool::State as ReplicaState;

use crate::status::Handle;

/// vLLM's own metrics, and those of the endpoint pickers in front of it, under their present and former names.
const PREFIXES: &[&str] =
    &["vllm:", "llm_d_epp_", "inference_pool_", "inference_extension_", "inference_objective_"];
/// Labels that tell a server from others, and would be those of the server that was snapshotted.
const IDENTITY: &[&str] = &[
    "pool",
    "replica",
    "worker_id",
    "worker",
    "pod",
    "pod_name",
    "instance",
    "hostname",
    "model_server_pod",
];
/// A server that does not answer by then is left out of this scrape.
const TIMEOUT: Duration = Duration::from_secs(2);
/// vLLM says about 100 KiB.
const BYTES_MAX: usize = 1 << 20;
/// How many are asked at once.
const AT_ONCE: usize = 8;

/// The handler of `/metrics/replicas`.
pub(crate) async fn of_replicas(State(handle): State<Handle>) -> Response {
    let status = handle.status();
    let serves = |state| matches!(state, ReplicaState::Ready | ReplicaState::Busy | ReplicaState::Draining);
    let serving = status.pools.into_iter().flat_map(|pool| {
        let name = pool.name;
        pool.replicas
            .into_iter()
            .filter(move |replica| serves(replica.state))
            .map(move |replica| (name.clone(), replica.name))
    });
    let texts: Vec<(String, String, String)> = stream::iter(serving)
        .map(|(pool, replica)| {
            let handle = handle.clone();
            async move {
                // A server without metrics is none that failed.
                let text = tokio::time::timeout(TIMEOUT, ask(&handle, &replica)).await;
                text.ok().and_then(Result::ok).map(|text| (pool, replica, text))
            }
        })
        .buffered(AT_ONCE)
        .filter_map(|found| async move { found })
        .collect()
        .await;
    let mut families = Families::default();
    for (pool, replica, text) in &texts {
        families.take(pool, replica, text);
    }
    ([(CONTENT_TYPE, prometheus_text::CONTENT_TYPE)], families.text()).into_response()
}

async fn ask(handle: &Handle, replica: &str) -> io::Result<String> {
    let socket = handle.dial(replica).await?;
    let (mut client, connection) = http1::handshake(TokioIo::new(socket)).await.map_err(io::Error::other)?;
    // Takes the client along: the connection ends with it.
    let exchange = async move {
        let request = Request::get("/metrics").header(HOST, "localhost").body(Empty::<Bytes>::new());
        let response =
            client.send_request(request.map_err(io::Error::other)?).await.map_err(io::Error::other)?;
        if response.status() != StatusCode::OK {
            return Err(io::Error::other(format!("status {}", response.status())));
        }
        let body = Limited::new(response.into_body(), BYTES_MAX).collect().await.map_err(io::Error::other)?;
        String::from_utf8(body.to_bytes().into()).map_err(io::Error::other)
    };
    futures::future::join(exchange, connection).await.0
}

/// Families by name: Prometheus wants all values of one together.
#[derive(Debug, Default)]
struct Families(BTreeMap<String, Family>);

#[derive(Debug, Default)]
struct Family {
    /// The lines `# HELP` and `# TYPE` of the first replica that had them.
    head: Vec<String>,
    values: Vec<String>,
}

impl Families {
    fn take(&mut self, pool: &str, replica: &str, text: &str) {
        let mut family = String::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# ") {
                let mut words = rest.splitn(3, ' ');
                let (Some("HELP" | "TYPE"), Some(name)) = (words.next(), words.next()) else { continue };
                name.clone_into(&mut family);
                if is_passed_on(name) {
                    let head = &mut self.0.entry(name.to_owned()).or_default().head;
                    let kind = &line[..6];
                    if !head.iter().any(|known| known.starts_with(kind)) {
                        head.push(line.to_owned());
                    }
                }
            } else if let Some(value) = Value::parse(line).filter(|value| is_passed_on(value.name)) {
                // `name_bucket` and `name_sum` belong to the family `name`.
                let own =
                    if value.name.starts_with(&family) && !family.is_empty() { &family } else { value.name };
                let line = value.identified(pool, replica);
                self.0.entry(own.to_owned()).or_default().values.push(line);
            }
        }
    }

    fn text(&self) -> String {
        let lines = self.0.values().filter(|family| !family.values.is_empty());
        let lines = lines.flat_map(|family| family.head.iter().chain(&family.values));
        lines.fold(String::new(), |mut text, line| {
            text.push_str(line);
            text.push('\n');
            text
        })
    }
}

fn is_passed_on(name: &str) -> bool {
    PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// One line with a value.
#[derive(Debug, PartialEq)]
struct Value<'a> {
    name: &'a str,
    /// Names, and values with their escapes.
    labels: Vec<(&'a str, &'a str)>,
    value: &'a str,
}

impl<'a> Value<'a> {
    /// `name{label="value",...} value [time]`. The time is left out: it is the scrape's.
    fn parse(line: &'a str) -> Option<Self> {
        let end = line.find(['{', ' '])?;
        let name = &line[..end];
        let mut labels = Vec::new();
        let mut rest = &line[end..];
        if let Some(inside) = rest.strip_prefix('{') {
            rest = inside;
            loop {
                rest = rest.trim_start_matches([' ', ',']);
                if let Some(after) = rest.strip_prefix('}') {
                    rest = after;
                    break;
                }
                let (label, after) = rest.split_once("=\"")?;
                let end = closing_quote(after)?;
                labels.push((label.trim(), &after[..end]));
                rest = &after[end + 1..];
            }
        }
        let value = rest.split_whitespace().next()?;
        let good = |name: &str| {
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_:".contains(&b))
        };
        let number = value.parse::<f64>().is_ok() || ["+Inf", "-Inf", "NaN"].contains(&value);
        (number && good(name) && labels.iter().all(|(label, _)| good(label))).then_some(Self {
            name,
            labels,
            value,
        })
    }

    /// The same line with this replica's identity.
    fn identified(&self, pool: &str, replica: &str) -> String {
        let mut line = format!("{}{{pool=\"{pool}\",replica=\"{replica}\"", self.name);
        for (label, value) in &self.labels {
            let value = if IDENTITY.contains(label) { replica } else { value };
            if !["pool", "replica"].contains(label) {
                write!(line, ",{label}=\"{value}\"").expect("a string takes everything");
            }
        }
        write!(line, "}} {}", self.value).expect("a string takes everything");
        line
    }
}

/// The first quote that no backslash stands before.
fn closing_quote(text: &str) -> Option<usize> {
    let mut escaped = false;
    text.bytes().position(|byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const VLLM: &str = "\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine=\"0\",model_name=\"llama \\\"8B\\\"\"} 3.0
# HELP vllm:e2e_request_latency_seconds Histogram.
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_bucket{le=\"+Inf\",worker_id=\"\"} 2.0
vllm:e2e_request_latency_seconds_sum{worker_id=\"\"} 0.5 1700000000
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{generation=\"0\"} 5.0
vllm:broken{engine=\"0 1.0
vllm:no_number{} x
vllm:bad-label{a-b=\"c\"} 1
";

    #[test]
    fn each_replica_has_its_own_identity_and_families_stay_together() {
        let mut families = Families::default();
        families.take("llama", "llama-1", VLLM);
        families.take("llama", "llama-2", VLLM);
        insta::assert_snapshot!(families.text(), @r#"
        # HELP vllm:e2e_request_latency_seconds Histogram.
        # TYPE vllm:e2e_request_latency_seconds histogram
        vllm:e2e_request_latency_seconds_bucket{pool="llama",replica="llama-1",le="+Inf",worker_id="llama-1"} 2.0
        vllm:e2e_request_latency_seconds_sum{pool="llama",replica="llama-1",worker_id="llama-1"} 0.5
        vllm:e2e_request_latency_seconds_bucket{pool="llama",replica="llama-2",le="+Inf",worker_id="llama-2"} 2.0
        vllm:e2e_request_latency_seconds_sum{pool="llama",replica="llama-2",worker_id="llama-2"} 0.5
        # HELP vllm:num_requests_running Number of requests in model execution batches.
        # TYPE vllm:num_requests_running gauge
        vllm:num_requests_running{pool="llama",replica="llama-1",engine="0",model_name="llama \"8B\""} 3.0
        vllm:num_requests_running{pool="llama",replica="llama-2",engine="0",model_name="llama \"8B\""} 3.0
        "#);
    }

    #[test]
    fn whatever_a_server_says_only_whole_lines_are_passed_on() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..2000 {
            let mut text = VLLM.as_bytes().to_vec();
            for _ in 0..4 {
                let at = random.usize(..text.len());
                text[at] = *random.choice(b"{}\"\\,= #\n\xc3").expect("one");
            }
            let mut families = Families::default();
            families.take("p", "r", &String::from_utf8_lossy(&text));
            for line in families.text().lines().filter(|line| !line.starts_with('#')) {
                let value = Value::parse(line).unwrap_or_else(|| panic!("{line}"));
                assert!(is_passed_on(value.name) && value.labels.contains(&("replica", "r")), "{line}");
            }
        }
    }
}
