//! A probe with the answers of the running server, as the manifest carries it, and the replay of it.
//!
//! The recording holds the questions too: a restore needs the manifest and nothing else.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::compare::{Compare, Difference, Located, Point};
use crate::dial::Dial;
use crate::error::{Error, Result};
use crate::file::{Probe, Request};
use crate::http::{Call, Reply, call};
use crate::json::{cut, parse};
use crate::limits::RECORDED_BYTES_MAX;

/// Questions and the answers that the server gave before it was dumped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recorded {
    /// In the order in which they are asked.
    pub exchanges: Vec<Exchange>,
}

/// One question and its answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Exchange {
    /// What is asked.
    pub question: Question,
    /// What was answered, as far as it is compared.
    pub answer: Answer,
}

/// One HTTP request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Question {
    /// Name in messages.
    pub name: String,
    /// HTTP method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// Request headers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<(String, String)>,
    /// Request body.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<Body>,
    /// Port inside the replica.
    pub port: u16,
    /// Limit for connect, request and whole answer, in milliseconds.
    pub timeout_ms: u64,
    /// Which part of the answer counts.
    pub compare: Compare,
    /// Response headers that count, in lower case.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub compare_headers: Vec<String>,
}

/// The part of an answer that is compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The compared headers; one that the answer did not have is absent.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    /// The body, where it is compared whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<Body>,
    /// The selected values, where the comparison is by JSON paths.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<Located>,
}

/// A body inside JSON: text where it is UTF-8, hexadecimal digits otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Body {
    /// UTF-8.
    Text(String),
    /// Anything else.
    Hex(String),
}

impl Body {
    /// Wraps bytes.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(text) => Body::Text(text.to_owned()),
            Err(_) => Body::Hex(bytes.iter().map(|byte| format!("{byte:02x}")).collect()),
        }
    }

    /// The bytes; nothing when a recording was tampered with and holds no hexadecimal digits.
    #[must_use]
    pub fn bytes(&self) -> Option<Vec<u8>> {
        match self {
            Body::Text(text) => Some(text.clone().into_bytes()),
            Body::Hex(digits) if digits.is_ascii() && digits.len() % 2 == 0 => (0..digits.len())
                .step_by(2)
                .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).ok())
                .collect(),
            Body::Hex(_) => None,
        }
    }
}

/// What a replay that found no difference did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ReplayReport {
    /// Answers that were equal; all of them.
    pub equal: usize,
    /// Milliseconds that each request took, in order, by name.
    pub took_ms: Vec<(String, f64)>,
}

impl Recorded {
    /// The same questions, to be asked of another server: each must be answered with the status that was recorded.
    ///
    /// # Errors
    /// [`Error::Unrecordable`] when a body is not what a recording holds.
    pub fn questions(&self) -> Result<Probe> {
        let requests = self.exchanges.iter().map(|Exchange { question, answer }| {
            Ok(Request {
                name: question.name.clone(),
                method: question.method.clone(),
                path: question.path.clone(),
                headers: question.headers.clone(),
                body: body(question)?,
                port: Some(question.port),
                timeout: Duration::from_millis(question.timeout_ms),
                status: Some(answer.status),
                compare: question.compare.clone(),
                compare_headers: question.compare_headers.clone(),
            })
        });
        Ok(Probe { requests: requests.collect::<Result<_>>()? })
    }

    /// Reads a recording from the manifest.
    ///
    /// # Errors
    /// [`Error::BadRecording`] when it is none.
    pub fn from_json(value: serde_json::Value) -> Result<Self> {
        serde_json::from_value(value).map_err(Error::BadRecording)
    }

    /// The recording as the manifest carries it.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self).expect("a recording has string keys and finite tolerances only")
    }
}

/// Asks the recorded questions again and compares.
///
/// # Errors
/// [`Error::Differs`] with the first difference, [`Error::Ask`] when the server does not answer.
pub async fn replay(recorded: &Recorded, dial: &dyn Dial) -> Result<ReplayReport> {
    let mut report = ReplayReport { equal: 0, took_ms: Vec::new() };
    for Exchange { question, answer } in &recorded.exchanges {
        let start = Instant::now();
        let reply = ask(question, dial).await?;
        report.took_ms.push((question.name.clone(), start.elapsed().as_secs_f64() * 1000.0));
        if let Some(difference) = differ(question, &reply, answer) {
            return Err(Error::Differs(Box::new(difference)));
        }
        report.equal += 1;
    }
    Ok(report)
}

/// Asks one question.
pub(crate) async fn ask(question: &Question, dial: &dyn Dial) -> Result<Reply> {
    let body = body(question)?.map_or_else(Bytes::new, Bytes::from);
    let request = Call {
        port: question.port,
        method: &question.method,
        path: &question.path,
        headers: &question.headers,
        body,
        timeout: Duration::from_millis(question.timeout_ms),
    };
    call(dial, &request).await.map_err(|source| Error::Ask { request: question.name.clone(), source })
}

fn body(question: &Question) -> Result<Option<Vec<u8>>> {
    let Some(body) = &question.body else { return Ok(None) };
    let bytes = body.bytes().ok_or_else(|| Error::Unrecordable {
        request: question.name.clone(),
        problem: "its recorded body is not hexadecimal".to_owned(),
    });
    bytes.map(Some)
}

/// Keeps of a reply what will be compared; says why it cannot be kept.
pub(crate) fn keep(question: &Question, reply: &Reply) -> std::result::Result<Answer, String> {
    let mut answer = Answer {
        status: reply.status.as_u16(),
        headers: compared_headers(question, reply),
        body: None,
        values: Vec::new(),
    };
    match &question.compare {
        Compare::Status => {}
        Compare::Body => answer.body = Some(Body::new(&reply.body)),
        Compare::Json(selection) => {
            let value = parse(&reply.body).map_err(|error| {
                format!("its body is no JSON ({error}): {}", cut(&String::from_utf8_lossy(&reply.body)))
            })?;
            answer.values = selection.select(value)?;
        }
    }
    Ok(answer)
}

/// Refuses recordings that would make the manifest slow to fetch.
pub(crate) fn check_size(recorded: &Recorded) -> Result<()> {
    let mut sum = 0;
    for exchange in &recorded.exchanges {
        sum += serde_json::to_vec(exchange).map_err(Error::BadRecording)?.len();
        if sum > RECORDED_BYTES_MAX {
            return Err(Error::Unrecordable {
                request: exchange.question.name.clone(),
                problem: format!(
                    "the recording is {sum} bytes with it, at most {RECORDED_BYTES_MAX}; select less by `compare = {{ json = [...] }}`"
                ),
            });
        }
    }
    Ok(())
}

fn compared_headers(question: &Question, reply: &Reply) -> BTreeMap<String, String> {
    let value = |name: &String| {
        let value = reply.headers.get(name)?;
        Some((name.clone(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
    };
    question.compare_headers.iter().filter_map(value).collect()
}

fn differ(question: &Question, reply: &Reply, expected: &Answer) -> Option<Difference> {
    differ_head(question, reply, expected)
        .or_else(|| match &question.compare {
            Compare::Status => None,
            Compare::Body => differ_body(reply, expected),
            Compare::Json(selection) => match keep(question, reply) {
                Ok(answer) => selection.differ(&answer.values, &expected.values),
                Err(problem) => Some(Point {
                    path: "body".to_owned(),
                    seen: cut(&String::from_utf8_lossy(&reply.body)),
                    expected: format!("a body from which the paths select something; {problem}"),
                }),
            },
        })
        .map(|point| point.of(&question.name))
}

fn differ_head(question: &Question, reply: &Reply, expected: &Answer) -> Option<Point> {
    if reply.status.as_u16() != expected.status {
        return Some(Point {
            path: "status".to_owned(),
            seen: reply.status.as_u16().to_string(),
            expected: expected.status.to_string(),
        });
    }
    let seen = compared_headers(question, reply);
    let show = |value: Option<&String>| value.map_or("absent".to_owned(), |value| cut(&format!("{value:?}")));
    question.compare_headers.iter().find(|name| seen.get(*name) != expected.headers.get(*name)).map(|name| {
        Point {
            path: format!("header {name}"),
            seen: show(seen.get(name)),
            expected: show(expected.headers.get(name)),
        }
    })
}

fn differ_body(reply: &Reply, expected: &Answer) -> Option<Point> {
    let wanted = expected.body.as_ref().and_then(Body::bytes).unwrap_or_default();
    if reply.body == wanted {
        return None;
    }
    let same = reply.body.iter().zip(&wanted).take_while(|(a, b)| a == b).count();
    let show = |bytes: &[u8]| match bytes.get(same..) {
        None | Some([]) => format!("its end ({} bytes)", bytes.len()),
        Some(rest) => format!("{:?}", cut(&String::from_utf8_lossy(&rest[..rest.len().min(400)]))),
    };
    Some(Point { path: format!("body at byte {same}"), seen: show(&reply.body), expected: show(&wanted) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_survive_json_whatever_their_bytes_are() {
        for bytes in [&b"plain"[..], b"", &[0xff, 0x00, 0x7f], "snow\u{2603}".as_bytes()] {
            let json = serde_json::to_string(&Body::new(bytes)).expect("serializes");
            let back: Body = serde_json::from_str(&json).expect("parses");
            assert_eq!(back.bytes().as_deref(), Some(bytes));
        }
        assert_eq!(Body::Hex("0".to_owned()).bytes(), None);
        assert_eq!(Body::Hex("zz".to_owned()).bytes(), None);
        assert_eq!(Body::Hex("\u{e9}".to_owned()).bytes(), None);
    }

    #[test]
    fn a_question_survives_json_with_each_kind_of_comparison() {
        for compare in ["\"status\"", "\"body\"", r#"{"json":["$.a"],"tolerance":0.5,"relative":0.0}"#] {
            let parsed: Compare = serde_json::from_str(compare).expect("parses");
            assert_eq!(serde_json::to_string(&parsed).expect("serializes"), compare);
        }
    }
}
