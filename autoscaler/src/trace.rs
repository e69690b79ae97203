//! Request traces: when each request came, and how long its answer takes.
//!
//! Three formats, told apart by the first line: CSV with `TIMESTAMP,ContextTokens,GeneratedTokens` (Azure's traces), JSON
//! lines with `timestamp` in milliseconds, `input_length` and `output_length` (Mooncake's), and CSV with
//! `arrival_s,service_s`. Where a trace has tokens, a [`ServiceTime`] makes seconds of them.

mod rows;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::Duration;

use self::rows::Format;
use crate::error::{Error, Result};
use crate::moment::Moment;

/// Longest line of a trace. Mooncake's lines list a prefix hash for each 512 tokens.
const LINE_BYTES_MAX: usize = 1 << 20;

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Since the trace's first request.
    pub arrival: Moment,
    /// From its slot to its last byte.
    pub service: Duration,
}

/// A trace, in order of arrival.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// The requests.
    pub requests: Vec<Request>,
}

/// How long an answer takes, from its tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ServiceTime {
    /// Seconds that every answer takes.
    pub base_s: f64,
    /// Tokens of the prompt that are read in a second.
    pub input_per_s: f64,
    /// Seconds for each token of the answer.
    pub output_s: f64,
}

impl Default for ServiceTime {
    fn default() -> Self {
        Self { base_s: 0.05, input_per_s: 8000.0, output_s: 0.02 }
    }
}

impl ServiceTime {
    fn seconds(&self, input: f64, output: f64) -> f64 {
        self.base_s + input / self.input_per_s + output * self.output_s
    }
}

impl Trace {
    /// Requests at these seconds, each with its service time in seconds; in any order.
    #[must_use]
    pub fn new(requests: impl IntoIterator<Item = (f64, f64)>) -> Self {
        let mut seconds: Vec<(f64, f64)> = requests.into_iter().collect();
        seconds.sort_by(|a, b| a.0.total_cmp(&b.0));
        let first = seconds.first().map_or(0.0, |(arrival, _)| *arrival);
        let request = |(arrival, service): (f64, f64)| Request {
            arrival: Moment::from_seconds(arrival - first),
            service: Duration::from_secs_f64(service),
        };
        Self { requests: seconds.into_iter().map(request).collect() }
    }

    /// Reads a trace from a file.
    ///
    /// # Errors
    /// The file cannot be read, has no requests, or has a line that no format allows; the error has its number.
    pub fn read(path: &Path, service: &ServiceTime) -> Result<Self> {
        let failed = |source| Error::ReadFile { what: "trace", path: path.to_owned(), source };
        let mut reader = BufReader::new(File::open(path).map_err(failed)?);
        let (mut bytes, mut line) = (Vec::new(), 0);
        let mut format = None;
        let mut requests = Vec::new();
        loop {
            bytes.clear();
            let mut limited = std::io::Read::take(&mut reader, LINE_BYTES_MAX as u64 + 1);
            if limited.read_until(b'\n', &mut bytes).map_err(failed)? == 0 {
                break;
            }
            line += 1;
            let bad = |field, seen: &str, expected| Error::BadLine {
                path: path.to_owned(),
                line,
                field,
                seen: seen.chars().take(60).collect(),
                expected,
            };
            if bytes.len() > LINE_BYTES_MAX {
                return Err(bad("line", &String::from_utf8_lossy(&bytes[..64]), "at most 1 MiB"));
            }
            let text = std::str::from_utf8(&bytes)
                .map_err(|_| bad("line", &String::from_utf8_lossy(&bytes), "UTF-8"))?;
            let text = text.trim_start_matches('\u{feff}').trim();
            if text.is_empty() {
                continue;
            }
            let known = match format {
                Some(known) => known,
                None => {
                    let (found, is_header) =
                        Format::of(text).ok_or_else(|| bad("line", text, rows::FIRST_LINES))?;
                    format = Some(found);
                    if is_header {
                        continue;
                    }
                    found
                }
            };
            let row = known
                .row(text, service)
                .map_err(|bad_field| bad(bad_field.field, &bad_field.seen, bad_field.expected))?;
            requests.push(row);
        }
        if requests.is_empty() {
            return Err(Error::Empty {
                what: "trace",
                path: path.to_owned(),
                expected: "at least one request",
            });
        }
        Ok(Self::new(requests))
    }
}
