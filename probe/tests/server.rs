//! Probe, ready checks and hooks against a real HTTP server on a real socket.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rewarm_probe::{
    Dial, Engine, Error, ExecOutput, Hook, Probe, Ready, Recorded, engine, replay, wait_ready,
};
use rewarm_report::{Class, Classify};
use tokio::net::{TcpListener, TcpStream};

/// Dials 127.0.0.1 of this machine, whatever port is asked for, and runs commands here.
struct Here {
    server: SocketAddr,
    asked: Mutex<Vec<u16>>,
}

#[async_trait]
impl Dial for Here {
    async fn dial(&self, port: u16) -> io::Result<TcpStream> {
        self.asked.lock().expect("no panic").push(port);
        TcpStream::connect(self.server).await
    }

    async fn exec(&self, command: &str, timeout: Duration) -> io::Result<ExecOutput> {
        let child = tokio::process::Command::new("sh").arg("-c").arg(command).kill_on_drop(true).output();
        match tokio::time::timeout(timeout, child).await {
            Err(_) => Ok(ExecOutput { status: None, output: b"partial".to_vec() }),
            Ok(ended) => {
                let ended = ended?;
                Ok(ExecOutput { status: Some(ended.status), output: [ended.stdout, ended.stderr].concat() })
            }
        }
    }
}

/// A server whose answers are given by path; the value may hold `{n}`, which counts requests to that path from 1.
async fn serve(answers: &[(&'static str, u16, &'static str)]) -> Here {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let server = listener.local_addr().expect("address");
    let answers: HashMap<&str, (u16, &str)> = answers.iter().map(|(p, s, b)| (*p, (*s, *b))).collect();
    let (answers, counts) = (Arc::new(answers), Arc::new(Mutex::new(HashMap::<String, usize>::new())));
    tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else { return };
            let (answers, counts) = (answers.clone(), counts.clone());
            let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                let (answers, counts) = (answers.clone(), counts.clone());
                async move { Ok::<_, Infallible>(answer(request, &answers, &counts).await) }
            });
            tokio::spawn(
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
            );
        }
    });
    Here { server, asked: Mutex::default() }
}

async fn answer(
    request: Request<Incoming>,
    answers: &HashMap<&str, (u16, &str)>,
    counts: &Mutex<HashMap<String, usize>>,
) -> Response<Full<Bytes>> {
    let path = request.uri().path().to_owned();
    let (head, body) = request.into_parts();
    let kind = head.headers.get("content-type").map_or("-", |v| v.to_str().expect("text"));
    let body = body.collect().await.expect("body").to_bytes();
    let described = format!("{} {kind} {}", head.method, String::from_utf8_lossy(&body));
    let count = {
        let mut counts = counts.lock().expect("no panic");
        let count = counts.entry(path.clone()).or_default();
        *count += 1;
        *count
    };
    if path == "/slow" {
        tokio::time::sleep(Duration::from_secs(20)).await;
    }
    if path == "/huge" {
        return Response::new(Full::new(Bytes::from(vec![b'x'; 17 << 20])));
    }
    let (status, body) = answers.get(path.as_str()).copied().unwrap_or((404, "no such path"));
    // "503 twice, then 200" is what a server that loads looks like.
    let status = if status == 503 && count > 2 { 200 } else { status };
    let body = body.replace("{n}", &count.to_string()).replace("{request}", &described);
    Response::builder()
        .status(status)
        .header("x-count", count.to_string())
        .body(Full::new(body.into()))
        .expect("valid")
}

fn probe(text: &str) -> Probe {
    Probe::parse(text, Path::new("p.toml")).expect("a good probe")
}

async fn record(here: &Here, text: &str) -> Result<Recorded, Error> {
    let recorded = probe(text).record(here, Some(8000)).await?;
    // Through the manifest and back: what is replayed is what was stored.
    Recorded::from_json(recorded.to_json())
}

fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[tokio::test]
async fn answers_that_are_equal_in_what_counts_replay_as_equal() {
    let here = serve(&[
        ("/embed", 200, r#"{"embedding":[0.25,NaN],"id":{n}}"#),
        ("/text", 200, "fixed"),
        ("/gone", 410, "{n}"),
        ("/echo", 200, "{request}"),
    ])
    .await;
    let recorded = record(
        &here,
        r#"
        timeout = "5s"
        [[request]]
        name = "embed"
        path = "/embed"
        body_json = { text = "hello" }
        compare = { json = ["$"], ignore = ["$.id"], tolerance = 1e-6 }
        [[request]]
        path = "/text"
        [[request]]
        path = "/gone"
        status = 410
        port = 9000
        compare = "status"
        [[request]]
        path = "/echo"
        body_json = { n = 1 }
        "#,
    )
    .await
    .expect("records");
    let echo = recorded.exchanges[3].answer.body.as_ref().expect("kept").bytes().expect("text");
    assert_eq!(String::from_utf8_lossy(&echo), r#"POST application/json {"n":1}"#);
    let report = replay(&recorded, &here).await.expect("equal");
    assert_eq!(report.equal, 4);
    assert_eq!(report.took_ms[1].0, "GET /text");
    assert_eq!(here.asked.lock().expect("no panic")[..4], [8000, 8000, 9000, 8000]);
}

#[tokio::test]
async fn a_difference_names_request_place_and_both_values() {
    let here = serve(&[("/count", 200, r#"{"n":{n},"same":true}"#), ("/text", 200, "count {n}.")]).await;
    let differs = async |text: &str| {
        let recorded = record(&here, text).await.expect("records");
        let error = replay(&recorded, &here).await.expect_err("differs");
        assert_eq!(error.class(), Class::Integrity);
        error.to_string()
    };
    assert_eq!(
        differs("[[request]]\nname = 'count'\npath = '/count'\ncompare = { json = ['$.same', '$.n'], tolerance = 0.5 }")
            .await,
        r#"answer of request "count" differs: $.n is 2, expected 1 (+/- 0.5)"#
    );
    assert_eq!(
        differs("[[request]]\npath = '/text'").await,
        r#"answer of request "GET /text" differs: body at byte 6 is "2.", expected "1.""#
    );
    assert_eq!(
        differs("[[request]]\npath = '/text'\ncompare = 'status'\ncompare_headers = ['X-Count']").await,
        r#"answer of request "GET /text" differs: header x-count is "4", expected "3""#
    );
}

#[tokio::test]
async fn a_status_that_changed_is_a_difference() {
    let here = serve(&[("/s", 200, "x")]).await;
    let mut recorded = record(&here, "[[request]]\npath = '/s'\ncompare = 'status'").await.expect("records");
    recorded.exchanges[0].answer.status = 204;
    let error = replay(&recorded, &here).await.expect_err("differs");
    assert_eq!(error.to_string(), r#"answer of request "GET /s" differs: status is 200, expected 204"#);
}

#[tokio::test]
async fn what_would_prove_nothing_is_not_recorded() {
    let here = serve(&[("/bad", 500, "oops"), ("/html", 200, "<html>"), ("/json", 200, "{}")]).await;
    let refused = async |text: &str| chain(&record(&here, text).await.expect_err("refused"));
    assert_eq!(
        refused("[[request]]\npath = '/bad'").await,
        r#"record request "GET /bad": status is 500, expected one below 400 (or say `status = 500`)"#
    );
    assert_eq!(
        refused("[[request]]\npath = '/html'\ncompare = { json = ['$'] }").await,
        r#"record request "GET /html": its body is no JSON (expected value at line 1 column 1): <html>"#
    );
    assert_eq!(
        refused("[[request]]\npath = '/json'\ncompare = { json = ['$.a'] }").await,
        r#"record request "GET /json": path $.a selects nothing"#
    );
    assert_eq!(
        refused("[[request]]\npath = '/huge'").await,
        r#"ask request "GET /huge": answer is longer than 16777216 bytes"#
    );
    assert_eq!(
        refused("[[request]]\npath = '/slow'\ntimeout = '100ms'").await,
        r#"ask request "GET /slow": no whole answer from port 8000 within 100ms"#
    );
}

#[tokio::test]
async fn a_request_without_any_port_is_refused_before_it_is_sent() {
    let here = serve(&[]).await;
    let error = probe("[[request]]\npath = '/'").record(&here, None).await.expect_err("no port");
    assert_eq!(error.to_string(), r#"request "GET /" names no port and the replica declares none"#);
    assert!(here.asked.lock().expect("no panic").is_empty());
}

#[tokio::test]
async fn ready_passes_when_the_server_stops_saying_503() {
    let here = serve(&[("/health", 503, "loading")]).await;
    let ready: Ready = "http://ignored.example/health".parse().expect("parses");
    let took = wait_ready(&ready, &here, Some(8000), Duration::from_secs(10), std::future::pending()).await;
    // Two pauses, of 1 and 2 ms, and three requests: a second is ample, and 100 ms backoff steps would show.
    assert!(took.expect("ready") < Duration::from_secs(1));
    assert_eq!(here.asked.lock().expect("no panic").len(), 3);
}

#[tokio::test]
async fn ready_that_never_comes_says_what_the_last_attempt_saw() {
    let here = serve(&[("/no", 500, "broken model")]).await;
    let wait = async |check: &str| {
        let ready: Ready = check.parse().expect("parses");
        let start = Instant::now();
        let limit = Duration::from_millis(200);
        let error = wait_ready(&ready, &here, None, limit, std::future::pending()).await.expect_err("never");
        assert!(start.elapsed() < Duration::from_secs(5), "{check} took {:?}", start.elapsed());
        error.to_string()
    };
    assert_eq!(
        wait("http://h:8000/no").await,
        "ready check http://h:8000/no did not pass within 200ms: answered 500 and said \"broken model\""
    );
    assert_eq!(
        wait("http://h:8000/slow").await,
        "ready check http://h:8000/slow did not pass within 200ms: port 8000 gave no whole answer"
    );
    assert!(
        wait("cmd:echo not yet; exit 3")
            .await
            .contains("command ended with exit status: 3 and said \"not yet\"")
    );
}

#[tokio::test]
async fn a_server_that_ends_ends_the_wait() {
    let closed = Here { server: "127.0.0.1:9".parse().expect("address"), asked: Mutex::default() };
    let ended = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        "exit status 7".to_owned()
    };
    let error = wait_ready(&Ready::tcp(8000), &closed, None, Duration::from_secs(30), ended).await;
    assert_eq!(
        error.expect_err("ended").to_string(),
        "server ended before ready check tcp:8000 passed: exit status 7"
    );
}

#[tokio::test]
async fn hooks_post_or_run_and_their_output_is_in_the_error() {
    let here = serve(&[("/drain", 200, "{request}"), ("/fail", 500, "still busy")]).await;
    let run = async |hook: &str| {
        let hook: Hook = hook.parse().expect("parses");
        hook.run(&here, Some(8000), Duration::from_millis(500)).await
    };
    assert_eq!(run("http://localhost/drain").await.expect("runs").output.trim(), "POST -");
    assert_eq!(run("echo a; echo b >&2").await.expect("runs").output, "a\nb");
    assert_eq!(
        run("http://localhost/fail").await.expect_err("fails").to_string(),
        "hook http://localhost/fail answered 500; its output:\nstill busy"
    );
    assert_eq!(
        run("echo why; exit 4").await.expect_err("fails").to_string(),
        "hook echo why; exit 4 ended with exit status: 4; its output:\nwhy"
    );
    assert_eq!(
        run("exec sleep 20").await.expect_err("fails").to_string(),
        "hook exec sleep 20 was killed, it did not end within 500ms; its output:\npartial"
    );
    assert_eq!(
        run("http://localhost/slow").await.expect_err("fails").to_string(),
        "hook http://localhost/slow did not answer within 500ms"
    );
}

#[tokio::test]
async fn a_step_of_an_engine_that_does_not_end_in_its_time_is_tried_again_as_told_and_named() {
    let here = serve(&[("/fine", 200, "{}")]).await;
    let folder = tempfile::tempdir().expect("a folder");
    let notes = folder.path().join("notes");
    let noted = || std::fs::read_to_string(&notes).unwrap_or_default().lines().count();
    let take = async |step: &str| {
        let text = format!("[[before]]\nname = 'first'\ntimeout = '200ms'\npause = '1ms'\n{step}");
        let steps = Engine::parse(&text, Path::new("e.toml")).expect("good steps").before;
        engine::take(&steps, &here, Some(8000)).await
    };
    let failed = async |step: &str| take(step).await.expect_err("it does not end").to_string();
    let command = |then: &str| format!("command = \"echo >> '{}'; {then}\"\n", notes.display());
    assert_eq!(
        failed(&(command("exec sleep 20") + "retries = 2")).await,
        r#"step "first" failed 3 times: did not end within 200ms"#
    );
    assert_eq!(noted(), 3);
    assert_eq!(failed("get = '/slow'").await, r#"step "first" failed at once: no answer within 200ms"#);
    assert_eq!(here.asked.lock().expect("no panic").len(), 1);
    assert_eq!(
        failed("post = '/slow'\nretries = 1").await,
        r#"step "first" failed 2 times: no answer within 200ms"#
    );
    assert_eq!(here.asked.lock().expect("no panic").len(), 3);
    // One that ends in time when it is tried again, with another step after it.
    let once = format!("test -e '{0}.again' && exit 0; touch '{0}.again'; exec sleep 20", notes.display());
    let next = "\n[[before]]\nname = 'next'\nget = '/fine'\n";
    take(&(command(&once) + "retries = 5" + next)).await.expect("done at the second time");
    assert_eq!((noted(), here.asked.lock().expect("no panic").len()), (5, 4));
}

#[tokio::test]
async fn a_peer_that_speaks_no_http_is_an_error_and_no_hang() {
    static SEEN: AtomicUsize = AtomicUsize::new(0);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let here = Here { server: listener.local_addr().expect("address"), asked: Mutex::default() };
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let bytes: &[u8] = match SEEN.fetch_add(1, Ordering::SeqCst) {
                0 => b"SSH-2.0-x\r\n",
                1 => b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc",
                _ => b"",
            };
            let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, bytes).await;
        }
    });
    for _ in 0..3 {
        let error = record(&here, "[[request]]\npath = '/'\ntimeout = '5s'").await.expect_err("no answer");
        assert!(
            chain(&error).starts_with("ask request \"GET /\": exchange HTTP with port 8000: "),
            "{}",
            chain(&error)
        );
    }
}
