//! Clients that mean no good, or are gone.

use std::sync::atomic::Ordering;
use std::time::Duration;

use rewarm_gateway::Limits;

use crate::fixture::{LIMITS, Server, Setup, until};

/// Requests of which a gateway and a server could read different beginnings and ends.
#[tokio::test]
async fn what_can_be_read_in_two_ways_reaches_no_replica() {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    for request in [
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3, 4\r\n\r\nabcd",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +3\r\n\r\nabc",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nhost : a\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\n folded: b\r\n\r\n",
        "GET /a b HTTP/1.1\r\nhost: a\r\n\r\n",
        "CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n",
        "G\0T / HTTP/1.1\r\nhost: a\r\n\r\n",
        "\u{16}\u{3}\u{1}\u{2}\0\u{1}\0\u{1}\u{fc}\r\n\r\n",
        "nonsense\r\n\r\n",
    ] {
        let mut client = gateway.client().await;
        client.say(request).await;
        let answer = client.hear("\r\n\r\n").await;
        assert!(
            answer.starts_with("HTTP/1.1 4") || answer.starts_with("HTTP/1.0 4"),
            "{request:?}: {answer}"
        );
        assert_eq!(gateway.pool.taken.load(Ordering::SeqCst), 0, "{request:?}");
    }
}

/// The chunks count, and the replica is told of nothing else.
#[tokio::test]
async fn of_two_lengths_only_one_goes_on() {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    for lengths in [
        "content-length: 30\r\ntransfer-encoding: chunked\r\n",
        "transfer-encoding: chunked\r\ncontent-length: 30\r\n",
    ] {
        let mut client = gateway.client().await;
        client.say(format!("POST / HTTP/1.1\r\nhost: a\r\n{lengths}\r\n3\r\nabc\r\n0\r\n\r\n")).await;
        let mut replica = server.accept().await;
        let head = replica.head().await;
        assert!(
            head.contains("transfer-encoding: chunked\r\n") && !head.contains("content-length"),
            "{head}"
        );
        replica.hear("3\r\nabc\r\n0\r\n\r\n").await;
        replica.say("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok").await;
        client.hear("ok").await;
        drop(replica);
    }
}

/// What follows the end of a body is another request, whatever it looks like, and chunks are read strictly.
#[tokio::test]
async fn odd_chunks_end_the_request() {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    for chunk in ["-1\r\n", "0x3\r\nabc\r\n", "3\r\nabcd\r\n", "ffffffffffffffffff\r\n", "g\r\n", "3 \nabc"] {
        let mut client = gateway.client().await;
        client
            .say(format!("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n{chunk}0\r\n\r\nGET /evil HTTP/1.1\r\nhost: a\r\n\r\n"))
            .await;
        let mut replica = server.accept().await;
        // Its connection breaks off without the end of a body, and nothing else ever comes by it.
        let seen = replica.rest().await;
        assert!(!seen.contains("evil") && !seen.ends_with("0\r\n\r\n"), "{chunk:?}: {seen}");
        drop(client);
    }
    gateway.await_taken(0).await;
    assert_eq!(gateway.pool.broken.load(Ordering::SeqCst), 0, "that was none of the replica's faults");
}

/// Three requests in a row that break off end a replica; clients must not be able to bring that about.
#[tokio::test]
async fn a_client_that_leaves_in_the_middle_of_its_body_is_no_fault_of_the_replica() {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    for length in ["content-length: 9\r\n\r\nabc", "transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"] {
        let mut client = gateway.client().await;
        client.say(format!("POST / HTTP/1.1\r\nhost: a\r\n{length}")).await;
        let mut replica = server.accept().await;
        replica.hear("abc").await;
        drop(client);
        // The server is told, too.
        replica.rest().await;
        gateway.await_taken(0).await;
        assert_eq!(gateway.pool.broken.load(Ordering::SeqCst), 0, "{length:?}");
    }
}

#[tokio::test]
async fn a_client_that_is_slow_with_its_body_is_no_fault_of_the_replica() {
    let server = Server::start().await;
    let patience = Some(Duration::from_millis(150));
    let gateway = Setup { patience, ..Setup::default() }.before(server.address).await;
    let mut client = gateway.client().await;
    client.say("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nabc").await;
    let mut replica = server.accept().await;
    replica.hear("abc").await;
    let answer = client.hear("}}").await;
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("body_late"), "{answer}");
    gateway.await_taken(0).await;
    assert_eq!(gateway.pool.broken.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_client_that_is_slow_with_its_head_is_cut_off() {
    let server = Server::start().await;
    let limits = Limits { header_timeout: Duration::from_millis(150), ..LIMITS };
    let gateway = Setup { limits, ..Setup::default() }.before(server.address).await;
    for beginning in ["", "G", "PRI * HTTP/2.0\r\n", "GET / HTTP/1.1\r\nhost: a\r\nx-slow: "] {
        let mut client = gateway.client().await;
        client.say(beginning).await;
        let answer = client.rest().await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"), "{beginning:?}: {answer}");
    }
}

#[tokio::test]
async fn heads_have_a_limit() {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    let many: String = (0..200).map(|number| format!("x-{number}: 1\r\n")).collect();
    let long = format!("x-long: {}\r\n", "y".repeat(200 << 10));
    for headers in [many, long] {
        let mut client = gateway.client().await;
        client.say(format!("GET / HTTP/1.1\r\nhost: a\r\n{headers}\r\n")).await;
        let answer = client.hear("\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_while_it_waits_is_forgotten() {
    let server = Server::start().await;
    let gateway = Setup { slots: 0, ..Setup::default() }.before(server.address).await;
    let mut client = gateway.client().await;
    client.say("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc").await;
    until("it waits", || gateway.pool.waiting.load(Ordering::SeqCst) == 1).await;
    drop(client);
    until("it is forgotten", || gateway.pool.waiting.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test]
async fn a_client_that_leaves_in_the_middle_of_an_answer_gives_its_slot_back() {
    let server = Server::start().await;
    let gateway = Setup::default().before(server.address).await;
    let mut client = gateway.client().await;
    client.say("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let mut replica = server.accept().await;
    replica.head().await;
    replica.say("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n").await;
    client.hear("a\r\n").await;
    drop(client);
    gateway.await_taken(0).await;
    // The server is told, too.
    replica.rest().await;
}

#[tokio::test]
async fn who_comes_beyond_the_limit_of_connections_is_answered_when_one_ends() {
    let server = Server::start().await;
    let gateway = Setup { connections: 1, ..Setup::default() }.before(server.address).await;
    let ask = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    let answer = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
    let mut first = gateway.client().await;
    first.say(ask).await;
    let mut replica = server.accept().await;
    replica.head().await;
    let mut second = gateway.client().await;
    second.say(ask).await;
    replica.say(answer).await;
    first.hear("ok").await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(gateway.pool.taken.load(Ordering::SeqCst), 0, "nobody has read it");
    drop(first);
    replica.head().await;
    replica.say(answer).await;
    second.hear("ok").await;
}
