//! The admin API over scripted pools, asked as a program would.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rewarm_autoscaler::pool::{State, Tier};
use rewarm_report::{Stage, Timing};
use rewarm_serve::admin::{self, Access};
use rewarm_serve::scripted::Scripted;
use rewarm_serve::status::{
    Command, DecisionStatus, Notice, ReplicaStatus, StartOutcome, StartSecondsStatus, StartStatus,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Longer than a busy machine ever needs; reached only where nothing comes.
const PATIENCE: Duration = Duration::from_secs(60);

struct Served {
    pools: Arc<Scripted>,
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    served: JoinHandle<()>,
}

async fn served(pools: Arc<Scripted>, token: Option<&str>) -> Served {
    // An address of its own: beside other tests a port of a common one is taken again as soon as it is free.
    static SERVED: AtomicU8 = AtomicU8::new(1);
    let own = Ipv4Addr::new(127, 0, 1, SERVED.fetch_add(1, Ordering::Relaxed));
    let listener = TcpListener::bind((own, 0)).await.expect("bound");
    let address = listener.local_addr().expect("an address");
    assert!(is_listening(address), "{address} is seen to listen");
    let (stop, stopped) = oneshot::channel::<()>();
    let access = Access::new(token.map(str::to_owned));
    let served = tokio::spawn(admin::serve(listener, access, pools.handle(), async move {
        let _ = stopped.await;
    }));
    Served { pools, address, stop, served }
}

/// Whether a socket listens at exactly this address (state 0A of proc_net_tcp(5)). To connect would tell of a socket, too, that another
/// program has at all addresses of the machine under the same number.
fn is_listening(address: SocketAddr) -> bool {
    let IpAddr::V4(ip) = address.ip() else { unreachable!("it is in 127.0.1.0/24") };
    let local = format!("{:08X}:{:04X}", u32::from_ne_bytes(ip.octets()), address.port());
    let sockets = std::fs::read_to_string("/proc/self/net/tcp").expect("the kernel's");
    let fields = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    sockets.lines().map(fields).any(|fields| fields[1] == local && fields[3] == "0A")
}

impl Served {
    /// Sends a request with these headers and waits for the head of the answer.
    async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Response<Incoming> {
        let socket = TcpStream::connect(self.address).await.expect("connected");
        let (mut client, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(socket)).await.expect("HTTP");
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path);
        if !headers.iter().any(|(name, _)| *name == "host") {
            request = request.header("host", self.address.to_string());
        }
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        let request = request.body(Full::new(Bytes::from(body.to_owned()))).expect("a request");
        client.send_request(request).await.expect("an answer")
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> (StatusCode, String) {
        let response = self.send(method, path, headers, body).await;
        let status = response.status();
        let body = response.into_body().collect().await.expect("a body").to_bytes();
        (status, String::from_utf8(body.into()).expect("text"))
    }

    async fn get(&self, path: &str) -> Value {
        let (status, text) = self.ask(Method::GET, path, &[], "").await;
        assert_eq!(status, StatusCode::OK, "{path}: {text}");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}: {text}"))
    }

    async fn post(&self, path: &str, body: &str) -> (StatusCode, Value) {
        let (status, text) =
            self.ask(Method::POST, path, &[("content-type", "application/json")], body).await;
        (status, serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}: {text}")))
    }

    /// Ends it, which open event streams must not hinder.
    async fn end(self) {
        self.stop.send(()).expect("it runs");
        tokio::time::timeout(PATIENCE, self.served).await.expect("it ends").expect("no panic");
        assert!(!is_listening(self.address), "{} is free", self.address);
    }
}

fn replica(name: &str, state: State, in_flight: u32) -> ReplicaStatus {
    ReplicaStatus {
        name: name.to_owned(),
        state,
        in_flight,
        requests: 7,
        since: 1_700_000_000_000,
        tier: Tier::Restore,
        source: None,
        host_bytes: 1 << 30,
    }
}

fn decision(at: u64, desired: u32) -> DecisionStatus {
    DecisionStatus {
        at,
        wanted: desired,
        desired,
        active: 0,
        warm: 0,
        in_flight: 0,
        held: 4,
        oldest_held_ms: Some(1.5),
        start_seconds: StartSecondsStatus { wake: 0.03, restore: 0.4 },
        reason: "4 requests are held and no replica is there".to_owned(),
        steps: vec!["restore llama-1".to_owned()],
    }
}

fn start(replica: &str, outcome: StartOutcome) -> StartStatus {
    let timing = |stage, start_ms, took_ms| Timing { stage, start_ms, took_ms };
    StartStatus {
        at: 1_700_000_000_000,
        replica: replica.to_owned(),
        tier: Tier::Restore,
        outcome,
        took_ms: 400.0,
        stages: vec![timing(Stage::Admit, 0.0, 20.0), timing(Stage::Fetch, 20.0, 200.0)],
        reason: None,
    }
}

/// Two pools, of which one has a past.
fn two_pools() -> Arc<Scripted> {
    let pools = Scripted::new(&["llama", "bert"], None);
    pools.change_pool("llama", |pool| {
        pool.replicas = vec![replica("llama-1", State::Busy, 3), replica("llama-2", State::Warm, 0)];
        pool.decisions = vec![decision(1000, 1), decision(3000, 2), decision(5000, 1)];
        pool.starts = vec![start("llama-1", StartOutcome::Ready), start("llama-2", StartOutcome::Failed)];
        (pool.in_flight, pool.held, pool.desired) = (3, 4, 1);
        pool.totals.requests = 42;
        pool.totals.responses.insert(200, 40);
        pool.totals.starts =
            vec![(Tier::Restore, StartOutcome::Ready, 1), (Tier::Restore, StartOutcome::Failed, 1)];
        pool.totals.wait_seconds.record(0.3);
    });
    pools.change_pool("bert", |pool| pool.decisions = vec![decision(4000, 3)]);
    pools
}

#[tokio::test]
async fn what_is_there_can_be_read() {
    let served = served(two_pools(), None).await;
    let status = served.get("/admin/status").await;
    assert_eq!(status["pools"].as_array().map(Vec::len), Some(2));
    assert_eq!(status["pools"][0]["decisions"].as_array().map(Vec::len), Some(3));
    let brief = served.get("/admin/status?decisions=1&starts=0").await;
    assert_eq!(brief["pools"][0]["decisions"][0]["at"], 5000, "the last one");
    assert_eq!(brief["pools"][0]["starts"], json!([]));
    let names = |list: &Value| -> Vec<String> {
        list.as_array()
            .expect("a list")
            .iter()
            .map(|one| one["name"].as_str().expect("a name").to_owned())
            .collect()
    };
    let pools = served.get("/admin/pools").await;
    assert_eq!(names(&pools), ["llama", "bert"]);
    assert_eq!(pools[0]["decisions"], json!([]));
    assert_eq!(served.get("/admin/pools/llama").await, status["pools"][0]);
    assert_eq!(names(&served.get("/admin/pools/llama/replicas").await), ["llama-1", "llama-2"]);
    assert_eq!(served.get("/admin/pools/llama/starts").await[0]["stages"][1]["took_ms"], 200.0);

    let times = |list: Value| -> Vec<u64> {
        list.as_array().expect("a list").iter().map(|one| one["at"].as_u64().expect("a time")).collect()
    };
    let all = served.get("/admin/decisions").await;
    assert_eq!((&all[0]["pool"], &all[1]["pool"]), (&json!("llama"), &json!("bert")));
    assert_eq!(times(all), [5000, 4000, 3000, 1000]);
    assert_eq!(times(served.get("/admin/decisions?pool=llama&limit=2").await), [5000, 3000]);

    let history = loop {
        let history = served.get("/admin/history").await;
        if !history.as_array().expect("a list").is_empty() {
            break history;
        }
    };
    assert_eq!(names(&history), ["bert", "llama"]);
    let sample = &history[1]["samples"][0];
    assert_eq!(
        (&sample["in_flight"], &sample["held"], &sample["serving"]),
        (&json!(3), &json!(4), &json!(1))
    );
    served.end().await;
}

#[tokio::test]
async fn commands_reach_the_pools_and_refusals_say_why() {
    let served = served(two_pools(), None).await;
    let good = [
        ("/admin/pools/llama/scale", r#"{"replicas": 3}"#),
        ("/admin/pools/llama/scale", r#"{"replicas": null}"#),
        ("/admin/pools/llama/replicas/llama-1/drain", ""),
        ("/admin/pools/llama/pause", ""),
        ("/admin/pools/llama/resume", ""),
    ];
    for (path, body) in good {
        let (status, answer) = served.post(path, body).await;
        assert_eq!(status, StatusCode::OK, "{path}: {answer}");
        assert!(answer["done"].as_str().is_some_and(|text| !text.is_empty()), "{path}: {answer}");
    }
    let pool = || "llama".to_owned();
    let expected = [
        Command::Scale { pool: pool(), replicas: Some(3) },
        Command::Scale { pool: pool(), replicas: None },
        Command::Drain { pool: pool(), replica: "llama-1".to_owned() },
        Command::Pause { pool: pool() },
        Command::Resume { pool: pool() },
    ];
    assert_eq!(served.pools.commands(), expected);

    let bad = [
        (
            "/admin/pools/lama/scale",
            r#"{"replicas": 3}"#,
            StatusCode::NOT_FOUND,
            "no pool is called \"lama\"",
        ),
        (
            "/admin/pools/llama/scale",
            r#"{"replicas": 99}"#,
            StatusCode::CONFLICT,
            "99 replicas, expected at most 16",
        ),
        ("/admin/pools/llama/scale", r#"{"replicas": -1}"#, StatusCode::UNPROCESSABLE_ENTITY, "replicas"),
        (
            "/admin/pools/llama/scale",
            r#"{"replica": 1}"#,
            StatusCode::UNPROCESSABLE_ENTITY,
            "unknown field `replica`",
        ),
        ("/admin/pools/llama/scale", "{}", StatusCode::UNPROCESSABLE_ENTITY, "missing field `replicas`"),
        ("/admin/pools/llama/scale", "{", StatusCode::BAD_REQUEST, "EOF"),
        (
            "/admin/pools/llama/replicas/llama-9/drain",
            "",
            StatusCode::NOT_FOUND,
            "no replica of pool llama is called \"llama-9\"",
        ),
        ("/admin/pools/llama/stop", "", StatusCode::NOT_FOUND, "/admin/openapi.json"),
    ];
    for (path, body, expected, text) in bad {
        let (status, answer) = served.post(path, body).await;
        assert_eq!(status, expected, "{path} {body}: {answer}");
        assert!(
            answer["error"].as_str().is_some_and(|error| error.contains(text)),
            "{path} {body}: {answer}"
        );
    }
    let long = format!(r#"{{"replicas": {}1}}"#, " ".repeat(100_000));
    assert_eq!(served.post("/admin/pools/llama/scale", &long).await.0, StatusCode::PAYLOAD_TOO_LARGE);
    // A form of a web page elsewhere has no such type.
    let form = served
        .ask(Method::POST, "/admin/pools/llama/scale", &[("content-type", "text/plain")], good[0].1)
        .await;
    assert_eq!(form.0, StatusCode::UNSUPPORTED_MEDIA_TYPE);
    for path in ["/admin/status?decision=1", "/admin/decisions?limit=x", "/admin/pools/llama?a=b"] {
        let (status, text) = served.ask(Method::GET, path, &[], "").await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{path}: {text}");
        assert!(text.contains("\"error\""), "{path}: {text}");
    }
    served.end().await;
}

#[tokio::test]
async fn without_the_token_nothing_but_the_page_is_answered() {
    let served = served(two_pools(), Some("correct-horse")).await;
    let locked = ["/admin/status", "/admin/events", "/admin/openapi.json", "/metrics", "/metrics/replicas"];
    for path in locked {
        let response = served.send(Method::GET, path, &[], "").await;
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED, "{path}");
        assert_eq!(response.headers()["www-authenticate"], "Bearer");
        let wrong = served.send(Method::GET, path, &[("authorization", "Bearer correct")], "").await;
        assert_eq!(wrong.status(), StatusCode::UNAUTHORIZED, "{path}");
        let right = served.send(Method::GET, path, &[("authorization", "Bearer correct-horse")], "").await;
        assert_eq!(right.status(), StatusCode::OK, "{path}");
    }
    let refused = served.ask(Method::POST, "/admin/pools/llama/pause", &[], "").await;
    assert_eq!(refused.0, StatusCode::UNAUTHORIZED);
    assert_eq!(served.pools.commands(), []);
    for path in ["/", "/style.css", "/page.js", "/icon.svg"] {
        let response = served.send(Method::GET, path, &[], "").await;
        assert_eq!(response.status(), StatusCode::OK, "{path}");
        let policy = response.headers()["content-security-policy"].to_str().expect("text").to_owned();
        assert!(policy.starts_with("default-src 'none'"), "{policy}");
    }
    served.end().await;
}

/// A page of somebody else whose name resolves to this machine, or which asks across origins.
#[tokio::test]
async fn without_a_token_web_pages_of_others_get_nothing() {
    let served = served(two_pools(), None).await;
    let pause = "/admin/pools/llama/pause";
    for headers in [[("host", "evil.example:9901")], [("origin", "http://evil.example")]] {
        let (status, text) = served.ask(Method::POST, pause, &headers, "").await;
        assert_eq!(status, StatusCode::FORBIDDEN, "{headers:?}: {text}");
    }
    assert_eq!(served.pools.commands(), []);
    let own = format!("http://{}", served.address);
    let (status, text) = served.ask(Method::POST, pause, &[("origin", &own)], "").await;
    assert_eq!(status, StatusCode::OK, "{text}");
    served.end().await;
}

/// Reads events one by one.
struct Events {
    body: Incoming,
    text: String,
}

impl Events {
    async fn open(served: &Served) -> Self {
        let response = served.send(Method::GET, "/admin/events", &[], "").await;
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { body: response.into_body(), text: String::new() }
    }

    /// The next event's name and data; nothing at the end.
    async fn next(&mut self) -> Option<(String, Value)> {
        loop {
            if let Some((block, rest)) = self.text.split_once("\n\n") {
                let field =
                    |name: &str| block.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
                let found = field("event:").zip(field("data:"));
                let found =
                    found.map(|(name, data)| (name.to_owned(), serde_json::from_str(data).expect("JSON")));
                self.text = rest.to_owned();
                if found.is_some() {
                    return found;
                }
                continue;
            }
            let frame = tokio::time::timeout(PATIENCE, self.body.frame()).await.expect("something comes")?;
            if let Ok(data) = frame.expect("no error").into_data() {
                self.text.push_str(std::str::from_utf8(&data).expect("text"));
            }
        }
    }

    async fn next_called(&mut self, name: &str) -> Value {
        loop {
            let (found, data) = self.next().await.expect("it goes on");
            if found == name {
                return data;
            }
        }
    }
}

#[tokio::test]
async fn what_happens_is_told_as_it_happens() {
    let served = served(two_pools(), None).await;
    let mut events = Events::open(&served).await;
    let (name, first) = events.next().await.expect("the status at once");
    assert_eq!(name, "status");
    assert_eq!(first["pools"][0]["replicas"].as_array().map(Vec::len), Some(2));
    assert_eq!((&first["pools"][0]["decisions"], &first["pools"][0]["starts"]), (&json!([]), &json!([])));

    served.pools.change_pool("llama", |pool| pool.held = 5);
    served.pools.tell(Notice::Decision { pool: "llama".to_owned(), decision: decision(6000, 4) });
    let notice = events.next_called("notice").await;
    assert_eq!((&notice["notice"], &notice["pool"]), (&json!("decision"), &json!("llama")));
    assert_eq!(notice["decision"]["desired"], 4);
    assert_eq!(events.next_called("status").await["pools"][0]["held"], 5);

    // More at once than are kept for a reader that does not read.
    for _ in 0..1000 {
        served.pools.tell(Notice::FirstHeld { pool: "llama".to_owned() });
    }
    assert!(events.next_called("missed").await["notices"].as_u64().is_some_and(|missed| missed > 0));
    events.next_called("status").await;
    served.end().await;
    while events.next().await.is_some() {}
}

#[tokio::test]
async fn the_document_describes_every_call() {
    let served = served(two_pools(), None).await;
    let document = served.get("/admin/openapi.json").await;
    let paths = document["paths"].as_object().expect("paths");
    let calls: Vec<String> = paths
        .iter()
        .flat_map(|(path, item)| {
            item.as_object().expect("methods").keys().map(move |method| format!("{method} {path}"))
        })
        .collect();
    insta::assert_snapshot!(calls.join("\n"), @r"
    get /admin/decisions
    get /admin/events
    get /admin/history
    get /admin/pools
    get /admin/pools/{pool}
    post /admin/pools/{pool}/pause
    get /admin/pools/{pool}/replicas
    post /admin/pools/{pool}/replicas/{replica}/drain
    post /admin/pools/{pool}/resume
    post /admin/pools/{pool}/scale
    get /admin/pools/{pool}/starts
    get /admin/status
    ");
    // Each call is answered, and by the API.
    for call in &calls {
        let (method, path) = call.split_once(' ').expect("both");
        let path = path.replace("{pool}", "llama").replace("{replica}", "llama-1");
        let method: Method = method.to_uppercase().parse().expect("a method");
        let headers = [("content-type", "application/json")];
        let response = served.send(method, &path, &headers, r#"{"replicas":1}"#).await;
        assert_eq!(response.status(), StatusCode::OK, "{call}");
    }
    // No reference leads to nowhere.
    let text = document.to_string();
    let names: BTreeSet<&str> =
        text.split("#/components/schemas/").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    for name in &names {
        assert!(document["components"]["schemas"][name].is_object(), "{name}");
    }
    // What is answered has every key that is said to be there, and no other.
    let schema = |name: &str| {
        document["components"]["schemas"][name]["properties"].as_object().expect("an object").clone()
    };
    let status = served.get("/admin/status").await;
    let pool = &status["pools"][0];
    let seen = [
        ("Status", &status),
        ("MemoryStatus", &status["memory"]),
        ("PoolStatus", pool),
        ("LimitsStatus", &pool["limits"]),
        ("ReplicaStatus", &pool["replicas"][0]),
        ("DecisionStatus", &pool["decisions"][0]),
        ("StartStatus", &pool["starts"][0]),
        ("StageTiming", &pool["starts"][0]["stages"][0]),
        ("Totals", &pool["totals"]),
        ("Histogram", &pool["totals"]["wait_seconds"]),
    ];
    for (name, value) in seen {
        let described: BTreeSet<String> = schema(name).keys().cloned().collect();
        let answered: BTreeSet<String> = value.as_object().expect("an object").keys().cloned().collect();
        assert_eq!(described, answered, "{name}");
    }
    let states = &schema("ReplicaStatus")["state"]["enum"];
    assert!(states.as_array().expect("a list").contains(&pool["replicas"][0]["state"]), "{states}");
    served.end().await;
}

/// The value of one line of a scrape.
fn value(text: &str, series: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(series));
    line.unwrap_or_else(|| panic!("no {series} in\n{text}")).trim().parse().expect("a number")
}

#[tokio::test]
async fn metrics_say_what_the_status_says_and_are_all_documented() {
    let served = served(two_pools(), None).await;
    // Counted from the notice on: a start that failed says nothing about how long starts take.
    let text = loop {
        let ended = |outcome| Notice::Start { pool: "llama".to_owned(), start: start("llama-3", outcome) };
        served.pools.tell(ended(StartOutcome::Failed));
        served.pools.tell(ended(StartOutcome::Ready));
        let (status, text) = served.ask(Method::GET, "/metrics", &[], "").await;
        assert_eq!(status, StatusCode::OK);
        if text.contains("rewarm_start_seconds_count{") {
            break text;
        }
    };
    let expected = [
        (r#"rewarm_requests_in_flight{pool="llama"}"#, 3.0),
        (r#"rewarm_requests_held{pool="llama"}"#, 4.0),
        (r#"rewarm_requests_total{pool="llama"}"#, 42.0),
        (r#"rewarm_responses_total{pool="llama",code="200"}"#, 40.0),
        (r#"rewarm_replicas{pool="llama",state="busy"}"#, 1.0),
        (r#"rewarm_replicas{pool="llama",state="failed"}"#, 0.0),
        (r#"rewarm_replicas_desired{pool="llama"}"#, 1.0),
        (r#"rewarm_starts_total{pool="llama",tier="restore",outcome="failed"}"#, 1.0),
        (r#"rewarm_request_wait_seconds_count{pool="llama"}"#, 1.0),
        (r#"rewarm_request_wait_seconds_bucket{pool="llama",le="0.25"}"#, 0.0),
        (r#"rewarm_request_wait_seconds_bucket{pool="llama",le="0.5"}"#, 1.0),
        (r#"rewarm_request_wait_seconds_bucket{pool="llama",le="+Inf"}"#, 1.0),
        (r#"rewarm_request_wait_seconds_count{pool="bert"}"#, 0.0),
    ];
    for (series, expected) in expected {
        assert_eq!(value(&text, series), expected, "{series}");
    }
    let starts = value(&text, r#"rewarm_start_seconds_count{pool="llama",tier="restore"}"#);
    assert_eq!(value(&text, r#"rewarm_start_stage_seconds_count{pool="llama",stage="fetch"}"#), starts);
    assert!(
        (value(&text, r#"rewarm_start_stage_seconds_sum{pool="llama",stage="fetch"}"#) - 0.2 * starts).abs()
            < 1e-9
    );

    served.pools.change(|status| {
        (status.memory.host_limit, status.memory.cache_limit) = (Some(1 << 34), Some(1 << 32));
    });
    let (_, text) = served.ask(Method::GET, "/metrics", &[], "").await;
    let table = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/admin.md"))
        .expect("a page");
    let families: BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let documented: BTreeSet<&str> = table
        .lines()
        .filter_map(|line| line.strip_prefix("| `rewarm_"))
        .map(|rest| rest.split(['`', '{']).next().expect("a name"))
        .collect();
    let emitted: BTreeSet<&str> =
        families.iter().map(|name| name.strip_prefix("rewarm_").expect("our prefix")).collect();
    assert_eq!(emitted, documented, "docs/admin.md");
    let faults: Vec<String> = families.iter().flat_map(|family| against_conventions(&text, family)).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    served.end().await;
}

/// What `promtool check metrics` would find fault with in one family.
fn against_conventions(text: &str, family: &str) -> Vec<String> {
    let line = |word: &str| {
        let found = text.lines().find_map(|line| line.strip_prefix(&format!("# {word} {family} ")));
        found.unwrap_or_default()
    };
    let counter = line("TYPE") == "counter";
    let reserved = ["_count", "_sum", "_bucket"].iter().any(|ending| family.ends_with(ending));
    let small = family.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'));
    let words: Vec<&str> = family.split('_').collect();
    let unit = ["ms", "milliseconds", "minutes", "kib", "mib", "gib", "kilobytes", "percent"];
    let checks = [
        (line("HELP").is_empty(), "has no HELP"),
        (!matches!(line("TYPE"), "counter" | "gauge" | "histogram"), "has no TYPE that is known"),
        (counter != family.ends_with("_total"), "counters end in _total, and nothing else does"),
        (reserved, "ends as the series of a histogram do"),
        (!small, "has letters that are not small"),
        (words.iter().any(|word| unit.contains(word)), "has a unit that is not a base unit"),
    ];
    checks.into_iter().filter(|(fault, _)| *fault).map(|(_, why)| format!("{family}: {why}")).collect()
}

/// Answers every request with these metrics.
async fn metrics_server(text: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut head = [0; 1024];
            let read = client.read(&mut head).await.unwrap_or(0);
            assert!(head[..read].starts_with(b"GET /metrics HTTP/1.1\r\n"));
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{text}", text.len());
            let _ = client.write_all(answer.as_bytes()).await;
        }
    });
    address
}

#[tokio::test]
async fn what_restored_servers_say_of_themselves_is_passed_on_under_their_own_names() {
    let server = metrics_server("# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{worker_id=\"\"} 2.0\nprocess_open_fds 9\n").await;
    let pools = Scripted::new(&["llama"], Some(server));
    pools.change_pool("llama", |pool| {
        pool.replicas = vec![
            replica("llama-1", State::Busy, 1),
            replica("llama-2", State::Ready, 0),
            replica("llama-3", State::Warm, 0),
        ];
    });
    let served = served(pools, None).await;
    let (_, text) = served.ask(Method::GET, "/metrics/replicas", &[], "").await;
    insta::assert_snapshot!(text, @r#"
    # TYPE vllm:num_requests_running gauge
    vllm:num_requests_running{pool="llama",replica="llama-1",worker_id="llama-1"} 2.0
    vllm:num_requests_running{pool="llama",replica="llama-2",worker_id="llama-2"} 2.0
    "#);
    served.end().await;

    // Servers that cannot be reached are left out.
    let pools = Scripted::new(&["llama"], None);
    pools.change_pool("llama", |pool| pool.replicas = vec![replica("llama-1", State::Busy, 1)]);
    let served = self::served(pools, None).await;
    assert_eq!(served.ask(Method::GET, "/metrics/replicas", &[], "").await, (StatusCode::OK, String::new()));
    served.end().await;
}
