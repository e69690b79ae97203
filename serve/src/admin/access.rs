//! Who may use the admin API.
//!
//! With a token: whoever sends it. Without: whoever reaches loopback, but no web page that a browser on this machine has
//! open. Such a page can send requests here in two ways. Under its own name, which it lets resolve to 127.0.0.1: then
//! `Host` is not ours. Or across origins: then `Origin` is not ours.

use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Json;
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, HOST, ORIGIN, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::api::Problem;
use crate::error::{Error, Result};

/// Longest file of a token; what is longer is some other file.
const TOKEN_BYTES_MAX: u64 = 4096;

/// The rule for the admin address. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Access(Arc<Mutex<Option<String>>>);

impl Access {
    /// With this token, or without one.
    #[must_use]
    pub fn new(token: Option<String>) -> Self {
        Self(Arc::new(Mutex::new(token)))
    }

    /// Another token from now on.
    pub fn change(&self, token: Option<String>) {
        *self.token() = token;
    }

    fn token(&self) -> MutexGuard<'_, Option<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refusal(&self, headers: &HeaderMap) -> Option<(StatusCode, String)> {
        let refused = |text: &str| Some((StatusCode::UNAUTHORIZED, text.to_owned()));
        let Some(token) = self.token().clone() else {
            return foreign(headers).map(|problem| (StatusCode::FORBIDDEN, problem));
        };
        let sent = text(headers, &AUTHORIZATION).and_then(|value| value.split_once(' '));
        let sent =
            sent.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, token)| token.trim());
        match sent {
            // Digests are compared in constant time, and tell nothing of a common beginning.
            Some(sent) if blake3::hash(sent.as_bytes()) == blake3::hash(token.as_bytes()) => None,
            Some(_) => refused("the token is not the one in admin_token"),
            None => refused("a token is wanted: Authorization: Bearer ..."),
        }
    }
}

/// The token in a file: one word.
pub(crate) fn read_token(path: &Path) -> Result<String> {
    let failed = |source| Error::ReadFile { what: "admin token", path: path.to_owned(), source };
    let bad = |seen: String| Error::BadValue {
        key: "admin_token",
        place: "[serve]".to_owned(),
        seen: format!("{} with {seen}", path.display()),
        expected: "a file with one word".to_owned(),
    };
    let length = std::fs::metadata(path).map_err(failed)?.len();
    if length > TOKEN_BYTES_MAX {
        return Err(bad(format!("{length} bytes")));
    }
    let text = std::fs::read_to_string(path).map_err(failed)?;
    let words: Vec<&str> = text.split_whitespace().collect();
    match words.as_slice() {
        [token] => Ok((*token).to_owned()),
        _ => Err(bad(format!("{} words", words.len()))),
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// Why a request comes from a web page of somebody else.
fn foreign(headers: &HeaderMap) -> Option<String> {
    let host = text(headers, &HOST).unwrap_or_default();
    if !is_loopback(host) {
        return Some(format!("host {host:?}: without a token only this machine's own names are answered"));
    }
    let origin = text(headers, &ORIGIN)?;
    let own = origin.strip_prefix("http://").is_some_and(|authority| authority == host);
    (!own).then(|| format!("origin {origin:?}: without a token only pages of this server may ask"))
}

/// `localhost`, `127.0.0.1`, `[::1]`, with or without a port.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

/// Lets a request through, or answers why not.
pub(super) async fn check(State(access): State<Access>, request: Request, next: Next) -> Response {
    let Some((status, error)) = access.refusal(request.headers()) else { return next.run(request).await };
    let mut response = (status, Json(Problem { error })).into_response();
    if status == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(WWW_AUTHENTICATE, axum::http::HeaderValue::from_static("Bearer"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(list: &[(&'static str, &str)]) -> HeaderMap {
        list.iter()
            .map(|(name, value)| (HeaderName::from_static(name), value.parse().expect("good")))
            .collect()
    }

    #[test]
    fn without_a_token_only_this_machine_is_answered_and_no_page_of_others() {
        let own = ["localhost", "localhost:9901", "LOCALHOST", "127.0.0.1:9901", "[::1]:9901", "127.9.9.9"];
        for host in own {
            assert_eq!(foreign(&headers(&[("host", host)])), None, "{host}");
        }
        for host in
            ["", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example:9901", "10.0.0.1", "[::2]"]
        {
            assert!(foreign(&headers(&[("host", host)])).is_some(), "{host}");
        }
        let with = |origin| foreign(&headers(&[("host", "localhost:9901"), ("origin", origin)]));
        assert_eq!(with("http://localhost:9901"), None);
        for origin in ["http://evil.example", "null", "http://localhost:3000", "https://localhost:9901"] {
            assert!(with(origin).is_some(), "{origin}");
        }
    }

    #[test]
    fn a_token_is_one_word_in_a_file_and_can_be_exchanged() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("token");
        let missing = read_token(&file).expect_err("no file").to_string();
        assert!(missing.contains("admin token"), "{missing}");
        for (bad, seen) in
            [("", "0 words"), (" \n", "0 words"), ("two words", "2 words"), (&"x".repeat(5000), "5000 bytes")]
        {
            std::fs::write(&file, bad).expect("written");
            let error = read_token(&file).expect_err(bad).to_string();
            assert!(error.contains(seen) && error.contains("admin_token"), "{error}");
        }
        std::fs::write(&file, " secret\n").expect("written");
        let access = Access::new(Some(read_token(&file).expect("good")));
        let refused = |value| access.refusal(&headers(&[("authorization", value)])).map(|(status, _)| status);
        assert_eq!(refused("Bearer secret"), None);
        assert_eq!(refused("bearer secret"), None);
        for wrong in ["Bearer secre", "Bearer secrets", "Basic secret", "secret", "Bearer "] {
            assert_eq!(refused(wrong), Some(StatusCode::UNAUTHORIZED), "{wrong}");
        }
        access.change(Some("exchanged".to_owned()));
        assert_eq!(refused("Bearer exchanged"), None);
        assert_eq!(refused("Bearer secret"), Some(StatusCode::UNAUTHORIZED));
    }
}
