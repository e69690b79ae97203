//! Which headers go on, which belong to one connection alone, and which are ours.

use std::time::Duration;

use hyper::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE,
};
use hyper::http::request::Parts;
use hyper::http::uri::Authority;
use hyper::{Method, StatusCode, Version};

use crate::websocket;

/// Says how long a request was held, in milliseconds.
const HELD: HeaderName = HeaderName::from_static("x-rewarm-held-ms");
/// Says which replica answered.
const REPLICA: HeaderName = HeaderName::from_static("x-rewarm-replica");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// A request that is not carried on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rejected {
    pub(crate) status: StatusCode,
    pub(crate) why: &'static str,
}

/// How many [`HOP_BY_HOP`] are.
const HOPS: usize = 8;
/// Headers of one connection, beside those that its `Connection` header names.
static HOP_BY_HOP: [HeaderName; HOPS] = [
    CONNECTION,
    KEEP_ALIVE,
    PROXY_CONNECTION,
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// What the gateway looks for among headers, found in one pass: a map that is asked for each of them hashes each time, and
/// most requests have none but `Host`.
#[derive(Debug, Default)]
struct Seen {
    /// Which of [`HOP_BY_HOP`].
    hop_by_hop: [bool; HOPS],
    hosts: usize,
    lengths: usize,
    encoded: bool,
    expects: bool,
    has_id: bool,
}

impl Seen {
    fn among(headers: &HeaderMap) -> Self {
        let mut seen = Self::default();
        for name in headers.iter().map(|(name, _)| name) {
            if *name == HOST {
                seen.hosts += 1;
            } else if *name == CONTENT_LENGTH {
                seen.lengths += 1;
            } else if let Some(which) = HOP_BY_HOP.iter().position(|hop| hop == name) {
                seen.hop_by_hop[which] = true;
                seen.encoded |= *name == TRANSFER_ENCODING;
            } else {
                seen.expects |= *name == EXPECT;
                seen.has_id |= *name == REQUEST_ID;
            }
        }
        seen
    }
}

/// Refuses what two servers could read in two ways, and what no server behind a gateway is for.
pub(crate) fn check(parts: &Parts) -> Result<(), Rejected> {
    let bad = |why| Err(Rejected { status: StatusCode::BAD_REQUEST, why });
    if parts.method == Method::CONNECT && !websocket::is_asked_for(parts) {
        return Err(Rejected { status: StatusCode::METHOD_NOT_ALLOWED, why: "CONNECT is not for a gateway" });
    }
    let seen = Seen::among(&parts.headers);
    if seen.hosts > 1 {
        return bad("a request has one Host header");
    }
    let target = parts.uri.host();
    if seen.hosts == 0 && parts.version == Version::HTTP_11 && target.is_none() {
        return bad("a request has a Host header");
    }
    if let Some(target) = target
        && let Some(told) =
            parts.headers.get(HOST).and_then(|host| host.to_str().ok()?.parse::<Authority>().ok())
        && !target.eq_ignore_ascii_case(told.host())
    {
        return bad("the target of a request and its Host header name the same host");
    }
    if seen.encoded && seen.lengths > 0 {
        return bad("a request has either Content-Length or Transfer-Encoding");
    }
    if seen.lengths > 1 {
        return bad("a request has one Content-Length header");
    }
    Ok(())
}

/// What the connection is to become, where client and server agree on that.
pub(crate) fn upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let protocol = headers.get(UPGRADE)?;
    let asked = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let asked =
        asked.flat_map(|value| value.split(',')).any(|word| word.trim().eq_ignore_ascii_case("upgrade"));
    asked.then(|| protocol.clone())
}

/// Takes out what belongs to the connection that it came by.
fn strip(headers: &mut HeaderMap, seen: &Seen) {
    if !seen.hop_by_hop.contains(&true) {
        return;
    }
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(',').map(str::trim))
        // What most connections say, and is no name of another header.
        .filter(|word| {
            !["keep-alive", "close", "upgrade"].iter().any(|usual| word.eq_ignore_ascii_case(usual))
        })
        .filter_map(|name| name.parse().ok())
        .collect();
    let trailers = headers.get(TE).is_some_and(|te| {
        te.to_str().is_ok_and(|te| te.split(',').any(|word| word.trim().eq_ignore_ascii_case("trailers")))
    });
    for name in &named {
        headers.remove(name);
    }
    for (name, _) in HOP_BY_HOP.iter().zip(seen.hop_by_hop).filter(|(_, seen)| *seen) {
        headers.remove(name);
    }
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

/// Makes a client's headers those of a request to a replica.
pub(crate) fn for_replica(parts: &mut Parts) {
    let seen = Seen::among(&parts.headers);
    let upgrade = upgrade(&parts.headers);
    strip(&mut parts.headers, &seen);
    if seen.expects {
        // The gateway answers it itself, when the body is wanted.
        parts.headers.remove(EXPECT);
    }
    // A header that `Connection` names is gone, whichever it was.
    let is_there = |seen: bool, name: HeaderName| seen && parts.headers.contains_key(name);
    let [host, id] =
        [(seen.hosts > 0, HOST), (seen.has_id, REQUEST_ID)].map(|(seen, name)| is_there(seen, name));
    if !host {
        // HTTP/2 has it in its target, HTTP/1.0 may have none.
        let host = parts.uri.authority().and_then(|authority| HeaderValue::from_str(authority.as_str()).ok());
        parts.headers.insert(HOST, host.unwrap_or(HeaderValue::from_static("localhost")));
    }
    if let Some(protocol) = upgrade {
        parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        parts.headers.insert(UPGRADE, protocol);
    }
    if !id && let Ok(id) = HeaderValue::from_bytes(&random_digits::<32>()) {
        parts.headers.insert(REQUEST_ID, id);
    }
    if parts.uri.scheme().is_some() || parts.uri.authority().is_some() {
        let path = parts.uri.path_and_query().map_or("/", hyper::http::uri::PathAndQuery::as_str);
        parts.uri = path.parse().unwrap_or_default();
    }
    parts.version = Version::HTTP_11;
}

/// The id of a request, as its replica was given it.
pub(crate) fn request_id(headers: &HeaderMap) -> Option<HeaderValue> {
    headers.get(REQUEST_ID).cloned()
}

/// Makes a replica's headers those of an answer to a client. `replica` is its name, where that can be a header.
pub(crate) fn for_client(
    headers: &mut HeaderMap,
    request_id: Option<HeaderValue>,
    replica: Option<&HeaderValue>,
    held: Option<Duration>,
) {
    let seen = Seen::among(headers);
    let upgrade = upgrade(headers);
    strip(headers, &seen);
    if let Some(protocol) = upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, protocol);
    }
    if let Some(id) = request_id {
        headers.entry(REQUEST_ID).or_insert(id);
    }
    if let Some(name) = replica {
        headers.insert(REPLICA, name.clone());
    }
    if let Some(held) = held {
        headers.insert(HELD, HeaderValue::from(u64::try_from(held.as_millis()).unwrap_or(u64::MAX)));
    }
}

/// So many random hexadecimal digits.
fn random_digits<const COUNT: usize>() -> [u8; COUNT] {
    let mut digits = [0_u8; COUNT];
    rand::fill(&mut digits[..]);
    digits.map(|random| b"0123456789abcdef"[usize::from(random & 15)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::Request;

    fn parts(request: hyper::http::request::Builder) -> Parts {
        request.body(()).expect("a good request").into_parts().0
    }

    #[test]
    fn what_can_be_read_in_two_ways_is_refused() {
        let ok = || Request::builder().uri("/").header("host", "a");
        let whole = Request::builder().uri("http://a.example/").header("host", "A.example:80");
        for request in [ok(), whole] {
            assert_eq!(check(&parts(request)), Ok(()));
        }
        for (request, why) in [
            (ok().header("host", "b"), "a request has one Host header"),
            (Request::builder().uri("/"), "a request has a Host header"),
            (
                Request::builder().uri("http://a.example:80/").header("host", "b.example:80"),
                "the target of a request and its Host header name the same host",
            ),
            (
                ok().header("content-length", "3").header("transfer-encoding", "chunked"),
                "a request has either Content-Length or Transfer-Encoding",
            ),
            (
                ok().header("content-length", "3").header("content-length", "3"),
                "a request has one Content-Length header",
            ),
            (ok().method("CONNECT"), "CONNECT is not for a gateway"),
        ] {
            assert_eq!(check(&parts(request)).expect_err("refused").why, why);
        }
    }

    #[test]
    fn what_belongs_to_one_connection_stays_there() {
        let mut parts = parts(
            Request::builder()
                .uri("http://a.example/v1?q=1")
                .header("connection", "close, X-Secret")
                .header("x-secret", "1")
                .header("te", "trailers, gzip")
                .header("keep-alive", "timeout=5")
                .header("expect", "100-continue")
                .header("x-request-id", "mine"),
        );
        for_replica(&mut parts);
        let seen: Vec<String> = parts
            .headers
            .iter()
            .map(|(name, value)| format!("{name}: {}", value.to_str().expect("text")))
            .collect();
        assert_eq!(seen, ["te: trailers", "x-request-id: mine", "host: a.example"]);
        assert_eq!(parts.uri, "/v1?q=1");
    }

    #[test]
    fn what_the_connection_names_goes_whichever_it_is() {
        let mut parts = parts(
            Request::builder()
                .uri("/")
                .header("host", "a")
                .header("x-request-id", "mine")
                .header("connection", "keep-alive, Host, X-Request-Id, te")
                .header("connection", "x-second")
                .header("te", "gzip")
                .header("x-second", "1")
                .header("proxy-connection", "keep-alive")
                .header("x-third", "stays"),
        );
        for_replica(&mut parts);
        let mut names: Vec<&str> = parts.headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["host", "x-request-id", "x-third"]);
        assert_eq!(parts.headers[HOST], "localhost");
        assert_ne!(
            parts.headers[REQUEST_ID], "mine",
            "one of its own: that of the client was for its connection"
        );
    }

    #[test]
    fn an_answer_keeps_what_is_not_of_its_connection() {
        let response = hyper::Response::builder()
            .header("connection", "close, x-hop")
            .header("x-hop", "1")
            .header("transfer-encoding", "chunked")
            .header("x-request-id", "the server's")
            .header("set-cookie", "a")
            .header("set-cookie", "b");
        let mut headers = response.body(()).expect("good").into_parts().0.headers;
        let id = Some(HeaderValue::from_static("ours"));
        for_client(&mut headers, id, Some(&HeaderValue::from_static("one")), Some(Duration::from_millis(7)));
        let mut seen: Vec<(&str, &str)> =
            headers.iter().map(|(name, value)| (name.as_str(), value.to_str().expect("text"))).collect();
        seen.sort_unstable();
        let expected = [
            ("set-cookie", "a"),
            ("set-cookie", "b"),
            ("x-request-id", "the server's"),
            ("x-rewarm-held-ms", "7"),
            ("x-rewarm-replica", "one"),
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn an_upgrade_is_carried_on() {
        let mut parts = parts(
            Request::builder()
                .uri("/")
                .header("connection", "keep-alive, Upgrade")
                .header("upgrade", "websocket"),
        );
        for_replica(&mut parts);
        assert_eq!(
            (&parts.headers[CONNECTION], &parts.headers[UPGRADE]),
            (&"upgrade".parse().expect("good"), &"websocket".parse().expect("good"))
        );
    }
}
