//! What goes through in HTTP/1.1, and what becomes of a request whose replica fails.

use std::sync::atomic::Ordering;

use rewarm_gateway::{Limits, Refusal};

use crate::fixture::{Gateway, LIMITS, Server, Setup, Talk, until};

const GET: &str = "GET /a?b=c HTTP/1.1\r\nhost: x.example\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

#[tokio::test]
async fn a_request_and_its_answer_over_kept_connections() {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    let mut client = gateway.client().await;
    client.say(GET).await;
    let mut replica = server.accept().await;
    for round in 0..3 {
        let head = replica.head().await;
        assert!(
            head.starts_with("get /a?b=c http/1.1\r\n") && head.contains("host: x.example\r\n"),
            "{head}"
        );
        // A trace that nobody records would keep the replica from recording its own.
        assert!(head.contains("x-request-id: ") && !head.contains("traceparent"), "{head}");
        replica.say(OK).await;
        let answer = client.hear("ok").await.to_lowercase();
        assert!(
            answer.contains("x-rewarm-replica: replica-1") && answer.contains("x-request-id: "),
            "{answer}"
        );
        if round < 2 {
            client.say(GET).await;
        }
    }
    gateway.await_taken(0).await;
}

/// Whoever traces on both sides finds the two together, though nothing here records anything.
#[tokio::test]
async fn a_clients_trace_goes_through_as_it_came() {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    let mut client = gateway.client().await;
    let trace =
        "traceparent: 00-11111111111111111111111111111111-2222222222222222-01\r\ntracestate: a=1,b=2\r\n";
    client.say(&GET.replace("\r\n\r\n", &format!("\r\n{trace}\r\n"))).await;
    let mut replica = server.accept().await;
    let head = replica.head().await;
    assert!(trace.lines().all(|line| head.contains(&format!("{line}\r\n"))), "{head}");
    answered(&gateway, &mut client, &mut replica).await;
}

/// A request of a client and its answer, over a connection to the replica that is there already.
async fn carried(gateway: &Gateway, client: &mut Talk, replica: &mut Talk) {
    client.say(GET).await;
    replica.head().await;
    answered(gateway, client, replica).await;
}

/// The answer to a request that the replica has read.
async fn answered(gateway: &Gateway, client: &mut Talk, replica: &mut Talk) {
    replica.say(OK).await;
    client.hear("ok").await;
    gateway.await_taken(0).await;
}

/// Two clients are carried by two threads: what one has left is used by the other, as servers with a thread for each connection
/// need it.
#[tokio::test]
async fn a_replica_has_as_many_connections_as_requests_at_once_whichever_thread_carries_them() {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    let (mut first, mut second) = (gateway.client().await, gateway.client().await);
    first.say(GET).await;
    let mut replica = server.accept().await;
    replica.head().await;
    answered(&gateway, &mut first, &mut replica).await;
    for _ in 0..3 {
        carried(&gateway, &mut second, &mut replica).await;
        carried(&gateway, &mut first, &mut replica).await;
    }
    first.say(GET).await;
    replica.head().await;
    second.say(GET).await;
    let mut another = server.accept().await;
    another.head().await;
    gateway.await_taken(2).await;
}

/// As before, but the second goes on: in the end it has a connection of its own thread, and the replica as many as before.
#[tokio::test]
async fn a_thread_that_often_borrows_a_connection_gets_one_of_its_own_in_its_place() {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    let (mut first, mut second) = (gateway.client().await, gateway.client().await);
    first.say(GET).await;
    let mut replica = server.accept().await;
    replica.head().await;
    answered(&gateway, &mut first, &mut replica).await;
    for _ in 1..32 {
        carried(&gateway, &mut second, &mut replica).await;
    }
    second.say(GET).await;
    let mut own = server.accept().await;
    own.head().await;
    assert_eq!(replica.rest().await, "", "the borrowed one is closed");
    answered(&gateway, &mut second, &mut own).await;
    for _ in 0..40 {
        carried(&gateway, &mut second, &mut own).await;
    }
}

#[tokio::test]
async fn a_stream_arrives_piece_by_piece_and_holds_its_slot_to_the_last() {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    let mut client = gateway.client().await;
    client.say(GET).await;
    let mut replica = server.accept().await;
    replica.head().await;
    replica
        .say("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        .await;
    for number in 0..3 {
        replica.say(format!("9\r\ndata: {number}\n\n\r\n")).await;
        client.hear(&format!("data: {number}\n\n")).await;
        gateway.await_taken(1).await;
    }
    replica.say("0\r\n\r\n").await;
    client.hear("0\r\n\r\n").await;
    gateway.await_taken(0).await;
}

#[tokio::test]
async fn trailers_go_both_ways() {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    let mut client = gateway.client().await;
    client
        .say(
            "POST / HTTP/1.1\r\nhost: a\r\nte: trailers\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n\
             3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n",
        )
        .await;
    let mut replica = server.accept().await;
    let head = replica.head().await;
    assert!(head.contains("te: trailers") && head.contains("trailer: x-sum"), "{head}");
    let body = replica.hear("\r\n\r\n").await;
    assert!(body.contains("abc") && body.ends_with("0\r\nx-sum: 1\r\n\r\n"), "{body:?}");
    replica
        .say("HTTP/1.1 200 OK\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n1\r\nd\r\n0\r\nx-sum: 2\r\n\r\n")
        .await;
    client.head().await;
    let body = client.hear("\r\n\r\n").await;
    assert!(body.ends_with("0\r\nx-sum: 2\r\n\r\n"), "{body:?}");
}

#[tokio::test]
async fn an_upgraded_connection_holds_its_slot_until_it_is_closed() {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    let mut client = gateway.client().await;
    client.say("GET /ws HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n").await;
    let mut replica = server.accept().await;
    let head = replica.head().await;
    assert!(head.contains("connection: upgrade") && head.contains("upgrade: websocket"), "{head}");
    replica.leave_http().await;
    let head = client.head().await;
    assert!(head.starts_with("http/1.1 101 ") && head.contains("upgrade: websocket"), "{head}");
    client.say("ping").await;
    replica.hear("ping").await;
    replica.say("pong").await;
    client.hear("pong").await;
    gateway.await_taken(1).await;
    drop((client, replica));
    gateway.await_taken(0).await;
}

#[tokio::test]
async fn a_client_that_waits_for_leave_gets_it_when_its_turn_comes() {
    let server = Server::start().await;
    let gateway = Setup { slots: 1, ..Setup::default() }.before(server.address).await;
    let mut first = gateway.client().await;
    first.say(GET).await;
    let mut replica = server.accept().await;
    replica.head().await;
    let mut second = gateway.client().await;
    second.say("POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 3\r\n\r\n").await;
    until("it waits", || gateway.pool.waiting.load(Ordering::SeqCst) == 1).await;
    replica.say(OK).await;
    first.hear("ok").await;
    second.hear("HTTP/1.1 100 Continue\r\n\r\n").await;
    second.say("abc").await;
    let head = replica.head().await;
    assert!(!head.contains("expect"), "{head}");
    replica.hear("abc").await;
    replica.say(OK).await;
    second.hear("ok").await;
}

#[tokio::test]
async fn a_long_body_goes_through_without_being_collected() {
    const BLOCK: usize = 1 << 20;
    const BLOCKS: usize = 64;
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    let mut client = gateway.client().await;
    client.say(format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n", BLOCK * BLOCKS)).await;
    let mut replica = server.accept().await;
    let head = replica.head().await;
    assert!(head.contains(&format!("content-length: {}\r\n", BLOCK * BLOCKS)), "{head}");
    // Each block ends with a mark that must arrive before the next one is sent.
    for number in 0..BLOCKS {
        let mark = format!("<{number}>");
        client.say("x".repeat(BLOCK - mark.len()) + &mark).await;
        replica.hear(&mark).await;
    }
    replica.say(OK).await;
    client.hear("ok").await;
}

#[tokio::test]
async fn a_kept_connection_that_its_server_has_closed_costs_nothing() {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    let mut client = gateway.client().await;
    for _ in 0..3 {
        client.say("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nz").await;
        let mut replica = server.accept().await;
        replica.hear("\r\n\r\nz").await;
        replica.say(OK).await;
        client.hear("ok").await;
    }
    assert_eq!(gateway.pool.broken.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_request_that_is_lost_is_tried_once_more_only_if_it_can_be_repeated() {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    let mut client = gateway.client().await;
    client.say(GET).await;
    for _ in 0..2 {
        server.accept().await.head().await;
    }
    let answer = client.hear("}}").await;
    assert!(answer.starts_with("HTTP/1.1 502 ") && answer.contains("replica_lost"), "{answer}");
    assert_eq!(gateway.pool.traffic.retried.load(Ordering::SeqCst), 1);
    client.say("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nz").await;
    server.accept().await.head().await;
    let answer = client.hear("}}").await;
    assert!(answer.starts_with("HTTP/1.1 502 "), "{answer}");
    assert_eq!(gateway.pool.traffic.retried.load(Ordering::SeqCst), 1);
    gateway.await_taken(0).await;
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_cut_short_for_the_client_too() {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    let mut client = gateway.client().await;
    client.say(GET).await;
    let mut replica = server.accept().await;
    replica.head().await;
    replica.say("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf").await;
    drop(replica);
    let all = client.rest().await;
    assert!(all.ends_with("half"), "{all}");
    gateway.await_taken(0).await;
    assert_eq!(gateway.pool.broken.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn nobody_who_listens_is_an_answer_of_the_gateway() {
    let server = Server::start().await;
    let address = server.address;
    drop(server);
    let gateway = Setup::default().before(address).await;
    let mut client = gateway.client().await;
    client.say("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nz").await;
    let answer = client.hear("}}").await;
    assert!(answer.starts_with("HTTP/1.1 502 ") && answer.contains("refused"), "{answer}");
    gateway.await_taken(0).await;
}

#[tokio::test]
async fn a_refused_request_is_told_why_and_when_to_come_again() {
    let server = Server::start().await;
    for (refusal, status, kind) in [
        (Refusal::Full { held: 3, max: 3 }, 429, "queue_full"),
        (Refusal::Late { after: std::time::Duration::from_secs(2) }, 503, "queue_deadline"),
        (Refusal::Closed { why: "it is paused".to_owned() }, 503, "pool_closed"),
    ] {
        let gateway = Setup { refusal: Some(refusal), ..Setup::default() }.before(server.address).await;
        let mut client = gateway.client().await;
        client.say(GET).await;
        let answer = client.hear("}}").await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        assert!(answer.contains("retry-after: 2\r\n") && answer.contains(kind), "{answer}");
    }
}

#[tokio::test]
async fn the_model_of_a_body_chooses_the_pool_and_the_body_arrives_whole() {
    let server = Server::start().await;
    let gateway = Setup { model: Some("llama"), ..Setup::default() }.before(server.address).await;
    let ask = |model: &str| {
        let body = format!("{{\"messages\":[],\"model\":\"{model}\"}}");
        format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    };
    let mut client = gateway.client().await;
    client.say(ask("llama")).await;
    let mut replica = server.accept().await;
    let head = replica.head().await;
    assert!(head.contains("content-length: 31\r\n"), "{head}");
    replica.hear("{\"messages\":[],\"model\":\"llama\"}").await;
    replica.say(OK).await;
    client.hear("ok").await;
    client.say(ask("other")).await;
    let answer = client.hear("}}").await;
    assert!(answer.starts_with("HTTP/1.1 404 ") && answer.contains("no_pool"), "{answer}");
}

#[tokio::test]
async fn a_model_is_looked_for_in_the_first_64_kib_only() {
    let server = Server::start().await;
    let gateway = Setup { model: Some("llama"), ..Setup::default() }.before(server.address).await;
    let text = "x".repeat(100 << 10);
    let ask =
        |body: &str| format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let mut client = gateway.client().await;
    client.say(ask(&format!("{{\"messages\":\"{text}\",\"model\":\"llama\"}}"))).await;
    let answer = client.hear("}}").await;
    assert!(answer.starts_with("HTTP/1.1 404 ") && answer.contains("no_pool"), "{answer}");
    let mut client = gateway.client().await;
    client.say(ask(&format!("{{\"model\":\"llama\",\"messages\":\"{text}\"}}"))).await;
    let mut replica = server.accept().await;
    replica.hear(&format!("{text}\"}}")).await;
    replica.say(OK).await;
    client.hear("ok").await;
}

#[tokio::test]
async fn a_body_that_is_too_long_is_refused_or_cut_off() {
    let server = Server::start().await;
    let limits = Limits { body_max: Some(4), ..LIMITS };
    let gateway = Setup { limits, ..Setup::default() }.before(server.address).await;
    let mut client = gateway.client().await;
    client.say("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\n").await;
    let answer = client.hear("}}").await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    let mut client = gateway.client().await;
    client
        .say("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n")
        .await;
    let mut replica = server.accept().await;
    let seen = replica.rest().await;
    assert!(!seen.contains("abcde"), "{seen}");
    let answer = client.hear("}}").await;
    assert!(answer.starts_with("HTTP/1.1 413 ") && answer.contains("longer than it may be"), "{answer}");
    assert_eq!(gateway.pool.broken.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_front_that_closes_lets_what_is_in_flight_be_answered() {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    let mut client = gateway.client().await;
    client.say(GET).await;
    let mut replica = server.accept().await;
    replica.head().await;
    gateway.front.close();
    replica.say(OK).await;
    let answer = client.rest().await;
    assert!(answer.ends_with("ok"), "{answer}");
    gateway.front.closed().await;
    tokio::net::TcpStream::connect(gateway.address).await.expect_err("nobody listens");
}

#[tokio::test]
async fn a_replica_that_never_answers_is_waited_for_as_long_as_was_set() {
    let server = Server::start().await;
    let patience = Some(std::time::Duration::from_millis(100));
    let gateway = Setup { patience, ..Setup::default() }.before(server.address).await;
    let mut client = gateway.client().await;
    client.say(GET).await;
    let mut replica = server.accept().await;
    replica.head().await;
    let answer = client.hear("}}").await.to_lowercase();
    assert!(answer.starts_with("http/1.1 504 ") && answer.contains("within 100 ms"), "{answer}");
    assert_eq!(gateway.pool.broken.load(Ordering::SeqCst), 1);
    assert_eq!(gateway.pool.traffic.retried.load(Ordering::SeqCst), 0);
    assert_eq!(replica.rest().await, "", "the connection to the replica is closed");
    gateway.await_taken(0).await;
}
