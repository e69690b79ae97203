//! The probe file: TOML that a person writes. Its schema is `docs/probe.md`.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::compare::{Compare, Selection, check_path};
use crate::dial::Dial;
use crate::error::{Error, Result};
use crate::keys;
use crate::limits::{PROBE_FILE_BYTES_MAX, REQUEST_BODY_BYTES_MAX, REQUEST_TIMEOUT, REQUESTS_MAX};
use crate::recorded::{Body, Exchange, Question, Recorded, ask, check_size, keep};

/// Questions for a server.
#[derive(Debug, Clone, PartialEq)]
pub struct Probe {
    /// In the order in which they are asked.
    pub requests: Vec<Request>,
}

/// One question.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Name in messages: as given, else method and path.
    pub name: String,
    /// HTTP method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// Request headers.
    pub headers: Vec<(String, String)>,
    /// Request body.
    pub body: Option<Vec<u8>>,
    /// Port inside the replica; absent means the first that the replica declares.
    pub port: Option<u16>,
    /// Limit for connect, request and whole answer.
    pub timeout: Duration,
    /// The status that a recording must see; absent means any below 400.
    pub status: Option<u16>,
    /// Which part of the answer counts.
    pub compare: Compare,
    /// Response headers that count, in lower case.
    pub compare_headers: Vec<String>,
}

#[derive(Deserialize)]
struct RawFile {
    port: Option<u16>,
    timeout: Option<String>,
    #[serde(default)]
    request: Vec<RawRequest>,
}

#[derive(Deserialize)]
struct RawRequest {
    name: Option<String>,
    method: Option<String>,
    path: Option<String>,
    #[serde(default)]
    headers: toml::Table,
    body: Option<String>,
    body_json: Option<serde_json::Value>,
    body_file: Option<PathBuf>,
    port: Option<u16>,
    timeout: Option<String>,
    status: Option<u16>,
    compare: Option<RawCompare>,
    #[serde(default)]
    compare_headers: Vec<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawCompare {
    Word(String),
    Json(Selection),
    Other(toml::Value),
}

impl Probe {
    /// Reads a probe file and the body files that it names, relative to its own folder.
    ///
    /// # Errors
    /// Names the file, the request, the key, the value seen and the one expected.
    pub fn load(path: &Path) -> Result<Self> {
        let text = read_bounded(path, PROBE_FILE_BYTES_MAX)
            .and_then(|bytes| {
                String::from_utf8(bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
            })
            .map_err(|source| Error::ReadFile { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// Reads a probe from TOML; `path` is how errors call it and whose folder body files are relative to.
    ///
    /// # Errors
    /// As [`Probe::load`].
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let parse_error = |source| Error::ParseFile { path: path.to_owned(), source: Box::new(source) };
        let file = format!("probe file {}", path.display());
        let table: toml::Table = text.parse().map_err(parse_error)?;
        keys::check(&table, &file)?;
        // From the text and not from the table: only so does a wrong type name its line.
        let raw: RawFile = toml::from_str(text).map_err(parse_error)?;
        let bad = |key, seen: String, expected| Error::BadValue { key, table: file.clone(), seen, expected };
        if raw.request.is_empty() || raw.request.len() > REQUESTS_MAX {
            return Err(bad(
                "request",
                format!("given {} times", raw.request.len()),
                "1 to 64 of [[request]]",
            ));
        }
        let timeout = parse_timeout(raw.timeout.as_deref(), REQUEST_TIMEOUT, &file)?;
        let defaults = Defaults { port: raw.port, timeout, folder: path.parent().unwrap_or(Path::new("")) };
        let requests = (raw.request.into_iter().enumerate())
            .map(|(index, request)| {
                let place = keys::place(&file, index, request.name.as_deref());
                request.check(&defaults, &place)
            })
            .collect::<Result<Vec<Request>>>()?;
        for (index, request) in requests.iter().enumerate() {
            if requests[..index].iter().any(|earlier| earlier.name == request.name) {
                let expected = "a name of its own, so that a difference says which request it is";
                return Err(bad("name", format!("{:?} twice", request.name), expected));
            }
        }
        Ok(Self { requests })
    }

    /// Asks the running server every question and keeps the answers. `port` is the first that the replica declares.
    ///
    /// # Errors
    /// [`Error::Ask`] when there is no answer, [`Error::Unrecordable`] when it proves nothing, [`Error::NoPort`].
    pub async fn record(&self, dial: &dyn Dial, port: Option<u16>) -> Result<Recorded> {
        let mut exchanges = Vec::with_capacity(self.requests.len());
        for request in &self.requests {
            let question = request.question(port)?;
            let reply = ask(&question, dial).await?;
            let unrecordable = |problem| Error::Unrecordable { request: question.name.clone(), problem };
            let status = reply.status.as_u16();
            match request.status {
                Some(wanted) if wanted != status => {
                    return Err(unrecordable(format!("status is {status}, expected {wanted}")));
                }
                None if status >= 400 => {
                    let problem =
                        format!("status is {status}, expected one below 400 (or say `status = {status}`)");
                    return Err(unrecordable(problem));
                }
                _ => {}
            }
            let answer = keep(&question, &reply).map_err(unrecordable)?;
            exchanges.push(Exchange { question, answer });
        }
        let recorded = Recorded { exchanges };
        check_size(&recorded)?;
        Ok(recorded)
    }
}

impl Request {
    fn question(&self, declared: Option<u16>) -> Result<Question> {
        let no_port = || Error::NoPort { what: format!("request {:?}", self.name) };
        Ok(Question {
            name: self.name.clone(),
            method: self.method.clone(),
            path: self.path.clone(),
            headers: self.headers.clone(),
            body: self.body.as_deref().map(Body::new),
            port: self.port.or(declared).ok_or_else(no_port)?,
            timeout_ms: u64::try_from(self.timeout.as_millis()).unwrap_or(u64::MAX),
            compare: self.compare.clone(),
            compare_headers: self.compare_headers.clone(),
        })
    }
}

struct Defaults<'a> {
    port: Option<u16>,
    timeout: Duration,
    folder: &'a Path,
}

impl RawRequest {
    fn check(self, defaults: &Defaults<'_>, place: &str) -> Result<Request> {
        let bad =
            |key, seen: String, expected| Error::BadValue { key, table: place.to_owned(), seen, expected };
        let path = self.path.as_deref().unwrap_or_default();
        if !path.starts_with('/') || path.parse::<hyper::Uri>().is_err() {
            return Err(bad("path", format!("{path:?}"), "a path that starts with / and is percent-encoded"));
        }
        let mut headers = self.headers(place)?;
        let is_json = self.body_json.is_some();
        let body = self.body(defaults.folder, place)?;
        if is_json && !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-type")) {
            headers.push(("content-type".to_owned(), "application/json".to_owned()));
        }
        let method = self.method.unwrap_or_else(|| if body.is_some() { "POST" } else { "GET" }.to_owned());
        if method.is_empty() || !method.bytes().all(|b| b.is_ascii_uppercase()) {
            return Err(bad("method", format!("{method:?}"), "an HTTP method in capitals, such as \"POST\""));
        }
        if let Some(status) = self.status.filter(|status| !(100..=599).contains(status)) {
            return Err(bad("status", status.to_string(), "100 to 599"));
        }
        let port = self.port.or(defaults.port);
        if port == Some(0) {
            return Err(bad("port", "0".to_owned(), "1 to 65535"));
        }
        let compare_headers: Vec<String> =
            self.compare_headers.iter().map(|h| h.to_ascii_lowercase()).collect();
        if let Some(name) = compare_headers.iter().find(|h| hyper::header::HeaderName::try_from(*h).is_err())
        {
            return Err(bad("compare_headers", format!("{name:?}"), "names of response headers"));
        }
        Ok(Request {
            name: self.name.unwrap_or_else(|| format!("{method} {path}")),
            path: path.to_owned(),
            method,
            headers,
            body,
            port,
            timeout: parse_timeout(self.timeout.as_deref(), defaults.timeout, place)?,
            status: self.status,
            compare: parse_compare(self.compare, place)?,
            compare_headers,
        })
    }

    fn headers(&self, place: &str) -> Result<Vec<(String, String)>> {
        use hyper::header::{HeaderName, HeaderValue};
        let bad = |seen: String| Error::BadValue {
            key: "headers",
            table: place.to_owned(),
            seen,
            expected: "a table of header names and text values",
        };
        (self.headers.iter())
            .map(|(name, value)| {
                let text = value.as_str().ok_or_else(|| bad(format!("{name} = {value}")))?;
                if HeaderName::try_from(name).is_err() || HeaderValue::try_from(text).is_err() {
                    return Err(bad(format!("{name} = {text:?}")));
                }
                Ok((name.to_ascii_lowercase(), text.to_owned()))
            })
            .collect()
    }

    fn body(&self, folder: &Path, place: &str) -> Result<Option<Vec<u8>>> {
        let bad =
            |seen: String, expected| Error::BadValue { key: "body", table: place.to_owned(), seen, expected };
        let body = match (&self.body, &self.body_json, &self.body_file) {
            (None, None, None) => return Ok(None),
            (Some(text), None, None) => text.clone().into_bytes(),
            (None, Some(json), None) => json.to_string().into_bytes(),
            (None, None, Some(file)) => {
                let path = folder.join(file);
                let limit = u64::try_from(REQUEST_BODY_BYTES_MAX).expect("usize is at most 64 bits");
                read_bounded(&path, limit).map_err(|source| Error::ReadFile { path, source })?
            }
            _ => return Err(bad("given twice".to_owned(), "one of body, body_json and body_file")),
        };
        if body.len() > REQUEST_BODY_BYTES_MAX {
            return Err(bad(format!("{} bytes long", body.len()), "at most 1 MiB"));
        }
        Ok(Some(body))
    }
}

fn parse_compare(raw: Option<RawCompare>, place: &str) -> Result<Compare> {
    let bad = |key, seen: String, expected| Error::BadValue { key, table: place.to_owned(), seen, expected };
    const EXPECTED: &str = "\"status\", \"body\" or { json = [PATHS], tolerance = NUMBER }";
    let selection = match raw {
        None => return Ok(Compare::Body),
        Some(RawCompare::Word(word)) => match word.as_str() {
            "status" => return Ok(Compare::Status),
            "body" => return Ok(Compare::Body),
            _ => return Err(bad("compare", format!("{word:?}"), EXPECTED)),
        },
        Some(RawCompare::Json(selection)) => selection,
        Some(RawCompare::Other(value)) => {
            return Err(bad("compare", value.to_string().trim().to_owned(), EXPECTED));
        }
    };
    if selection.json.is_empty() {
        return Err(bad("compare.json", "empty".to_owned(), "at least one JSON path, such as \"$\" for all"));
    }
    for path in selection.json.iter().chain(&selection.ignore) {
        if let Err(problem) = check_path(path) {
            let seen = format!("{path:?} ({problem})");
            return Err(bad("compare", seen, "JSON paths as in RFC 9535, such as \"$.data[0].embedding\""));
        }
    }
    for (key, number) in [("tolerance", selection.tolerance), ("relative", selection.relative)] {
        if !number.is_finite() || number < 0.0 {
            return Err(bad(key, number.to_string(), "a number from 0 up"));
        }
    }
    Ok(Compare::Json(selection))
}

fn parse_timeout(text: Option<&str>, default: Duration, place: &str) -> Result<Duration> {
    let Some(text) = text else { return Ok(default) };
    match humantime::parse_duration(text) {
        Ok(timeout) if !timeout.is_zero() => Ok(timeout),
        _ => Err(Error::BadValue {
            key: "timeout",
            table: place.to_owned(),
            seen: format!("{text:?}"),
            expected: "a time such as \"500ms\" or \"10s\"",
        }),
    }
}

pub(crate) fn read_bounded(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("longer than {limit} bytes")));
    }
    Ok(bytes)
}
