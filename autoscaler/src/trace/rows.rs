//! One line of a trace.

use jiff::Timestamp;
use jiff::civil::DateTime;
use serde::Deserialize;

use super::ServiceTime;

/// What a first line may be, for errors.
pub(super) const FIRST_LINES: &str =
    "TIMESTAMP,ContextTokens,GeneratedTokens or arrival_s,service_s or a JSON object with timestamp";

/// A century: later arrivals and longer answers are mistakes of units.
const SECONDS_MAX: f64 = 100.0 * 366.0 * 86_400.0;

/// The formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// `TIMESTAMP,ContextTokens,GeneratedTokens`
    Tokens,
    /// `arrival_s,service_s`
    Seconds,
    /// `{"timestamp": ms, "input_length": n, "output_length": n, ...}`
    Json,
}

/// A field that cannot be understood.
#[derive(Debug)]
pub(super) struct BadField {
    pub(super) field: &'static str,
    pub(super) seen: String,
    pub(super) expected: &'static str,
}

fn bad(field: &'static str, seen: &str, expected: &'static str) -> BadField {
    BadField { field, seen: seen.to_owned(), expected }
}

#[derive(Deserialize)]
struct JsonRow {
    timestamp: f64,
    input_length: f64,
    output_length: f64,
}

impl Format {
    /// The format that a first line belongs to, and whether that line is a header.
    pub(super) fn of(line: &str) -> Option<(Format, bool)> {
        if line.starts_with('{') {
            return Some((Format::Json, false));
        }
        let fields: Vec<String> = line.split(',').map(|field| field.trim().to_ascii_lowercase()).collect();
        match fields.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
            ["timestamp", "contexttokens", "generatedtokens"] => Some((Format::Tokens, true)),
            ["arrival_s", "service_s"] => Some((Format::Seconds, true)),
            [arrival, service] if arrival.parse::<f64>().is_ok() && service.parse::<f64>().is_ok() => {
                Some((Format::Seconds, false))
            }
            _ => None,
        }
    }

    /// Arrival and service time of a line, in seconds.
    pub(super) fn row(self, line: &str, service: &ServiceTime) -> Result<(f64, f64), BadField> {
        match self {
            Format::Tokens => {
                let [at, input, output] = fields(line, "three fields, separated by commas")?;
                let (input, output) = (tokens("ContextTokens", input)?, tokens("GeneratedTokens", output)?);
                Ok((timestamp(at)?, limited("service time", service.seconds(input, output))?))
            }
            Format::Seconds => {
                let [arrival, taken] = fields(line, "two fields, separated by a comma")?;
                Ok((seconds("arrival_s", arrival)?, seconds("service_s", taken)?))
            }
            Format::Json => {
                let expected = "a JSON object with the numbers timestamp, input_length and output_length";
                let row: JsonRow = serde_json::from_str(line).map_err(|_| bad("line", line, expected))?;
                let at = limited("timestamp", row.timestamp / 1000.0)?;
                let input = limited("input_length", row.input_length)?;
                let output = limited("output_length", row.output_length)?;
                Ok((at, limited("service time", service.seconds(input, output))?))
            }
        }
    }
}

fn fields<'a, const N: usize>(line: &'a str, expected: &'static str) -> Result<[&'a str; N], BadField> {
    let fields: Vec<&str> = line.split(',').map(str::trim).collect();
    fields.try_into().map_err(|_| bad("line", line, expected))
}

fn tokens(field: &'static str, text: &str) -> Result<f64, BadField> {
    let count: u32 = text.parse().map_err(|_| bad(field, text, "a number of tokens"))?;
    Ok(f64::from(count))
}

fn seconds(field: &'static str, text: &str) -> Result<f64, BadField> {
    let seconds: f64 = text.parse().map_err(|_| bad(field, text, "a number of seconds"))?;
    limited(field, seconds)
}

fn limited(field: &'static str, value: f64) -> Result<f64, BadField> {
    if (0.0..=SECONDS_MAX).contains(&value) {
        Ok(value)
    } else {
        Err(bad(field, &value.to_string(), "a number from 0 to a century of seconds"))
    }
}

/// `2023-11-16 18:17:03.9799600`, with or without an offset, as seconds since some fixed day.
fn timestamp(text: &str) -> Result<f64, BadField> {
    let expected = "a date and time such as 2023-11-16 18:17:03.97";
    let at = match text.parse::<Timestamp>() {
        Ok(at) => at,
        // Without an offset only differences count, so any zone will do.
        Err(_) => {
            let civil: DateTime = text.parse().map_err(|_| bad("TIMESTAMP", text, expected))?;
            civil.in_tz("UTC").map_err(|_| bad("TIMESTAMP", text, expected))?.timestamp()
        }
    };
    // Seconds since 1970 leave a double too few digits for the microseconds; those since 2020 fit.
    let since = at.as_nanosecond() - 1_577_836_800_000_000_000;
    Ok(since as f64 / 1e9)
}
