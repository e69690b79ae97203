//! The figures, as JSON and as a table.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::case::{Case, Place};
use crate::machine::Machine;
use crate::sample::Spread;

/// Everything that was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// Where.
    pub machine: Machine,
    /// When, in UTC: `2026-11-25`.
    pub date: String,
    /// One for each pair of case and place, in the order of a round.
    pub results: Vec<Row>,
}

/// One pair of case and place. What has no meaning for it is absent (`null`): the running server is not resumed, and a
/// cold start reads no snapshot.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The way to the answer.
    pub case: Case,
    /// Where the bytes lay.
    pub store: Place,
    /// How often.
    pub rounds: usize,
    /// From the start of the command until it says that the server runs.
    pub resume_ms: Option<Spread>,
    /// From the start of the command until the last byte of the first answer.
    pub first_answer_ms: Option<Spread>,
    /// From the start of the command until all memory is resident and no fault will wait any more.
    pub present_ms: Option<Spread>,
    /// Bytes that were read from the store or the images, in the last round.
    pub bytes_read: Option<u64>,
    /// Processor time of the whole machine from the start of the command until all memory was present.
    pub cpu_ms: Option<Spread>,
}

/// What one case gave in one round.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sample {
    pub(crate) resume_ms: Option<f64>,
    pub(crate) first_answer_ms: Option<f64>,
    pub(crate) present_ms: Option<f64>,
    pub(crate) bytes_read: Option<u64>,
    pub(crate) cpu_ms: Option<f64>,
}

/// The samples of all rounds.
#[derive(Debug, Default)]
pub(crate) struct Samples(BTreeMap<(Case, Place), Vec<Sample>>);

impl Samples {
    pub(crate) fn add(&mut self, pair: (Case, Place), sample: Sample) {
        self.0.entry(pair).or_default().push(sample);
    }

    pub(crate) fn rows(&self, pairs: &[(Case, Place)]) -> Vec<Row> {
        let row = |&(case, store): &(Case, Place)| {
            let samples = self.0.get(&(case, store)).map_or(&[][..], Vec::as_slice);
            let spread = |value: fn(&Sample) -> Option<f64>| {
                Spread::of(&samples.iter().filter_map(value).collect::<Vec<_>>())
            };
            Row {
                case,
                store,
                rounds: samples.len(),
                resume_ms: spread(|sample| sample.resume_ms),
                first_answer_ms: spread(|sample| sample.first_answer_ms),
                present_ms: spread(|sample| sample.present_ms),
                bytes_read: samples.last().and_then(|sample| sample.bytes_read),
                cpu_ms: spread(|sample| sample.cpu_ms),
            }
        };
        pairs.iter().map(row).collect()
    }
}

impl Outcome {
    /// One line for each row: case, place, then resume, first answer, present, bytes and processor time in words.
    #[must_use]
    pub fn table(&self) -> Vec<Vec<String>> {
        let spread = |value: Option<Spread>| match value {
            Some(value) => format!("{:.0} ({:.0} to {:.0})", value.median, value.min, value.max),
            None => "-".to_owned(),
        };
        let line = |row: &Row| {
            vec![
                row.case.name().to_owned(),
                row.store.name().to_owned(),
                spread(row.resume_ms),
                spread(row.first_answer_ms),
                spread(row.present_ms),
                row.bytes_read
                    .map_or_else(|| "-".to_owned(), |bytes| format!("{:.0}", bytes as f64 / 1048576.0)),
                spread(row.cpu_ms),
            ]
        };
        self.results.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_holds_the_medians_of_its_rounds_and_null_where_nothing_was_measured() {
        let mut samples = Samples::default();
        let pair = (Case::Cold, Place::None);
        for value in [3.0, 1.0, 2.0] {
            samples.add(pair, Sample { first_answer_ms: Some(value), ..Sample::default() });
        }
        let rows = samples.rows(&[pair]);
        let json = serde_json::to_value(&rows[0]).unwrap();
        assert_eq!(json["case"], "cold");
        assert_eq!(json["rounds"], 3);
        assert_eq!(json["first_answer_ms"]["median"], 2.0);
        assert!(json["bytes_read"].is_null());
    }
}
