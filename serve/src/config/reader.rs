//! Reads tables of a TOML file key by key. A key that nobody asked for is a mistake, and the nearest of those that were
//! asked for is named.

use std::time::Duration;

use toml::{Table, Value};

use crate::error::{Error, Result};

/// A table that is being read.
pub(super) struct Reader {
    place: String,
    left: Table,
    asked: Vec<&'static str>,
}

impl Reader {
    /// Over a table; `place` names it in errors.
    pub(super) fn new(place: impl Into<String>, table: Table) -> Self {
        Self { place: place.into(), left: table, asked: Vec::new() }
    }

    pub(super) fn place(&self) -> &str {
        &self.place
    }

    /// The value of a key, if it is there.
    pub(super) fn value(&mut self, key: &'static str) -> Option<Value> {
        self.asked.push(key);
        self.left.remove(key)
    }

    /// A value that `read` understands.
    pub(super) fn get<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        read(&value).map(Some).ok_or_else(|| self.bad(key, plain(&value), expected))
    }

    /// A value that must be there.
    pub(super) fn required<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<T> {
        let found = self.get(key, expected, read)?;
        found.ok_or_else(|| self.bad(key, "missing".to_owned(), expected))
    }

    /// A table inside this one.
    pub(super) fn table(&mut self, key: &'static str) -> Result<Option<Reader>> {
        let table = self.get(key, "a table", |value| value.as_table().cloned())?;
        Ok(table.map(|table| Reader::new(format!("{}, {key}", self.place), table)))
    }

    pub(super) fn string(&mut self, key: &'static str) -> Result<Option<String>> {
        self.get(key, "a text", text)
    }

    pub(super) fn time(&mut self, key: &'static str) -> Result<Option<Duration>> {
        self.get(key, TIME, time)
    }

    pub(super) fn flag(&mut self, key: &'static str) -> Result<Option<bool>> {
        self.get(key, "true or false", Value::as_bool)
    }

    /// A whole number of at least `from`.
    pub(super) fn count(&mut self, key: &'static str, from: u32) -> Result<Option<u32>> {
        let expected = format!("a whole number from {from} to {COUNT_MAX}");
        self.get(key, &expected, |value| {
            let count = u32::try_from(value.as_integer()?).ok()?;
            (from..=COUNT_MAX).contains(&count).then_some(count)
        })
    }

    /// A value of this table that makes no sense.
    pub(super) fn bad(&self, key: &'static str, seen: String, expected: &str) -> Error {
        Error::BadValue { key, place: self.place.clone(), seen, expected: expected.to_owned() }
    }

    /// Everything has been asked for: what is left is unknown.
    pub(super) fn finish(self) -> Result<()> {
        let Some(key) = self.left.keys().next().cloned() else { return Ok(()) };
        let likeness = |known: &&'static str| strsim::jaro_winkler(&key, known);
        let nearest = self.asked.iter().copied().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
        Err(Error::UnknownKey { nearest: nearest.expect("every table has keys"), key, place: self.place })
    }
}

/// More replicas or slots than this is a mistake of units.
const COUNT_MAX: u32 = 100_000;
const TIME: &str = "a time with its unit, such as \"500ms\" or \"30s\"";
/// What [`bytes`] expects.
pub(super) const BYTES: &str = "a size such as \"512MiB\" or \"20GiB\"";

pub(super) fn text(value: &Value) -> Option<String> {
    value.as_str().filter(|text| !text.is_empty()).map(str::to_owned)
}

fn time(value: &Value) -> Option<Duration> {
    humantime::parse_duration(value.as_str()?).ok()
}

/// A size with a binary unit.
pub(super) fn bytes(value: &Value) -> Option<u64> {
    let text = value.as_str()?;
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim() {
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        "TiB" => 40,
        _ => return None,
    };
    let bytes = number.parse::<f64>().ok()? * (1_u64 << shift) as f64;
    (bytes.is_finite() && bytes >= 1.0 && bytes < u64::MAX as f64).then_some(bytes as u64)
}

/// A value as it is written, without the quotes of a text.
pub(super) fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
