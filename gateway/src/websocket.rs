//! WebSocket of clients that speak HTTP/2 (RFC 8441), for replicas that speak HTTP/1.1.
//!
//! Such a client sends an extended CONNECT, which has no handshake. The gateway makes the one of HTTP/1.1 in its place: a key of its
//! own for the replica, whose answer to it is checked, and 200 instead of 101 for the client.

use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hyper::ext::Protocol;
use hyper::header::{CONNECTION, HeaderMap, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE};
use hyper::http::request::Parts;
use hyper::{Method, Response, StatusCode};

/// What a replica puts behind the key before it hashes it (RFC 6455).
const MAGIC: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
const WEBSOCKET: &str = "websocket";

/// The handshake with a replica, on behalf of a client of HTTP/2.
#[derive(Debug)]
pub(crate) struct Handshake {
    accept: String,
}

/// Whether it is the CONNECT of a client that wants WebSocket.
pub(crate) fn is_asked_for(parts: &Parts) -> bool {
    let protocol = parts.extensions.get::<Protocol>().map(Protocol::as_str);
    parts.method == Method::CONNECT && protocol.is_some_and(|name| name.eq_ignore_ascii_case(WEBSOCKET))
}

impl Handshake {
    /// Makes the request one of HTTP/1.1.
    pub(crate) fn begin(parts: &mut Parts) -> Self {
        // The key protects nothing: it shows that whoever answers has read it.
        let key = BASE64_STANDARD.encode(rand::random::<[u8; 16]>());
        let accept = accept(&key);
        parts.method = Method::GET;
        parts.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        parts.headers.insert(UPGRADE, HeaderValue::from_static(WEBSOCKET));
        if let Ok(key) = HeaderValue::from_str(&key) {
            parts.headers.insert(SEC_WEBSOCKET_KEY, key);
        }
        Self { accept }
    }

    /// Whether a replica's answer says no in a way that the client understands: every status but 101 and those that mean yes.
    ///
    /// # Errors
    /// It says neither yes nor no.
    pub(crate) fn check<B>(&self, response: &Response<B>) -> Result<(), &'static str> {
        match response.status() {
            StatusCode::SWITCHING_PROTOCOLS if self.is_accepted(response.headers()) => Ok(()),
            StatusCode::SWITCHING_PROTOCOLS => Err("its Sec-WebSocket-Accept is not that of the request"),
            status if status.is_success() => Err("it did not change to WebSocket"),
            _ => Ok(()),
        }
    }

    fn is_accepted(&self, headers: &HeaderMap) -> bool {
        headers.get(SEC_WEBSOCKET_ACCEPT).is_some_and(|accept| accept.as_bytes() == self.accept.as_bytes())
    }

    /// Makes an answer that was checked and is 101 one to the client's CONNECT.
    pub(crate) fn end<B>(response: &mut Response<B>) {
        *response.status_mut() = StatusCode::OK;
        for name in [CONNECTION, UPGRADE, SEC_WEBSOCKET_ACCEPT] {
            response.headers_mut().remove(name);
        }
    }
}

fn accept(key: &str) -> String {
    BASE64_STANDARD.encode(digest(&SHA1_FOR_LEGACY_USE_ONLY, format!("{key}{MAGIC}").as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_accepted_as_the_rfc_has_it() {
        assert_eq!(accept("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[test]
    fn only_an_answer_to_the_own_key_is_a_yes() {
        let handshake = Handshake { accept: "right".to_owned() };
        let answer = |status: u16, accept: &str| {
            let answer = Response::builder().status(status).header(SEC_WEBSOCKET_ACCEPT, accept);
            handshake.check(&answer.body(()).expect("good")).is_ok()
        };
        let answers = [(101, "right"), (101, "wrong"), (200, "right"), (403, "wrong")];
        assert_eq!(answers.map(|(status, accept)| answer(status, accept)), [true, false, false, true]);
    }
}
