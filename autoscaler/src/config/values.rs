//! Values of a configuration; nothing where one makes no sense.

use std::path::Path;
use std::time::Duration;

use toml::Value;

use super::bad;
use crate::error::{Error, Result};
use crate::policy::kpa::windows::Aggregation;
use crate::simulate::StartSamples;

/// Longest start that makes sense; more is a mistake of units.
const START_MAX: Duration = Duration::from_secs(86_400);

pub(super) fn bool_value(value: &Value) -> Option<bool> {
    value.as_bool()
}

/// A finite number from 0 up.
pub(super) fn number(value: &Value) -> Option<f64> {
    let number = value.as_float().or_else(|| value.as_integer().map(|whole| whole as f64))?;
    (number.is_finite() && number >= 0.0).then_some(number)
}

pub(super) fn positive(value: &Value) -> Option<f64> {
    number(value).filter(|number| *number > 0.0)
}

/// Above 0, at most 1.
pub(super) fn share(value: &Value) -> Option<f64> {
    positive(value).filter(|share| *share <= 1.0)
}

pub(super) fn percent_above_100(value: &Value) -> Option<f64> {
    number(value).filter(|percent| *percent >= 100.0)
}

pub(super) fn whole(value: &Value) -> Option<i64> {
    value.as_integer()
}

/// A number of replicas or slots.
pub(super) fn count(value: &Value) -> Option<u32> {
    whole(value).and_then(|whole| u32::try_from(whole).ok()).filter(|count| *count <= 10_000)
}

pub(super) fn optional_count(value: &Value) -> Option<Option<u32>> {
    count(value).map(Some)
}

pub(super) fn duration(value: &Value) -> Option<Duration> {
    humantime::parse_duration(value.as_str()?).ok()
}

pub(super) fn aggregation(value: &Value) -> Option<Aggregation> {
    match value.as_str()? {
        "linear" => Some(Aggregation::Linear),
        "weighted-exponential" => Some(Aggregation::WeightedExponential),
        _ => None,
    }
}

/// A time, or the path of a file with measured times.
pub(super) fn start_samples(
    key: &str,
    value: &Value,
    place: &str,
    expected: &'static str,
) -> Result<StartSamples> {
    let text = value.as_str().ok_or_else(|| bad(key, place, value, expected))?;
    start_samples_of(text)
}

pub(super) fn start_samples_of(text: &str) -> Result<StartSamples> {
    match humantime::parse_duration(text) {
        Ok(time) => Ok(StartSamples::Fixed(time.min(START_MAX))),
        Err(_) => samples_from_file(Path::new(text)),
    }
}

/// One time a line, `0.89` (seconds) or with its unit.
fn samples_from_file(path: &Path) -> Result<StartSamples> {
    let what = "start times";
    let text = std::fs::read_to_string(path).map_err(|source| Error::ReadFile {
        what,
        path: path.to_owned(),
        source,
    })?;
    let mut times = Vec::new();
    for (index, line) in text.lines().map(str::trim).enumerate().filter(|(_, line)| !line.is_empty()) {
        let seconds = line.parse::<f64>().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let time = seconds.or_else(|| humantime::parse_duration(line).ok()).filter(|time| *time <= START_MAX);
        times.push(time.ok_or_else(|| Error::BadLine {
            path: path.to_owned(),
            line: index + 1,
            field: "time",
            seen: line.chars().take(60).collect(),
            expected: "seconds, or a time with its unit such as 890ms, of at most a day",
        })?);
    }
    if times.is_empty() {
        return Err(Error::Empty { what, path: path.to_owned(), expected: "at least one time" });
    }
    Ok(StartSamples::Measured(times))
}
