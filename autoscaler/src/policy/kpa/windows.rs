//! Averages of what was reported, over a window of one-second buckets, with Knative's own rounding and gaps.
//!
//! A second in which nothing was reported is not a second of zero: at the end of the window it leaves the divisor as well
//! as the sum, so the average stays, and can even rise while older zeros drop out.

use crate::moment::Moment;

/// How a window weighs its seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aggregation {
    /// All alike.
    Linear,
    /// Newer ones more. Not normalised: a constant load reads too low at first.
    WeightedExponential,
}

/// The buckets of one window.
#[derive(Debug, Clone)]
pub(super) struct Window {
    aggregation: Aggregation,
    buckets: Vec<f64>,
    /// Sum of the buckets, carried along as Knative carries it: the rounding of an average on the edge depends on it.
    total: f64,
    /// First and last second with a record since the window was last empty.
    written: Option<(i64, i64)>,
    /// Share of a second's value that the weighted average takes.
    coefficient: f64,
}

impl Window {
    /// A window of so many seconds, at least one.
    pub(super) fn new(seconds: u32, aggregation: Aggregation) -> Self {
        let seconds = seconds.max(1);
        // 99.99 % of the weight lies inside the window.
        let coefficient = (1.0 - (1.0_f64 - 0.9999).powf(1.0 / f64::from(seconds))).max(0.2);
        Self { aggregation, buckets: vec![0.0; seconds as usize], total: 0.0, written: None, coefficient }
    }

    fn len(&self) -> i64 {
        self.buckets.len() as i64
    }

    fn index(&self, second: i64) -> usize {
        second.rem_euclid(self.len()) as usize
    }

    /// Adds a report to the bucket of its second. Reports come in order of time.
    pub(super) fn record(&mut self, at: Moment, value: f64) {
        let second = at.whole_seconds() as i64;
        match self.written {
            Some((first, last)) if second - last < self.len() => {
                for passed in last + 1..=second {
                    let index = self.index(passed);
                    self.total -= std::mem::take(&mut self.buckets[index]);
                }
                self.written = Some((first, last.max(second)));
            }
            // After a whole window without a record the average begins anew, and divides by the few seconds it has.
            _ => {
                self.buckets.fill(0.0);
                self.total = 0.0;
                self.written = Some((second, second));
            }
        }
        let index = self.index(second);
        self.buckets[index] += value;
        self.total += value;
    }

    /// Whether nothing was recorded for more than the window, or ever.
    pub(super) fn is_empty(&self, now: Moment) -> bool {
        self.written.is_none_or(|(_, last)| now.whole_seconds() as i64 - last > self.len())
    }

    /// The average over the window that ends now.
    pub(super) fn average(&self, now: Moment) -> f64 {
        let Some((first, last)) = self.written else { return 0.0 };
        let silent = (now.whole_seconds() as i64 - last).max(0);
        if silent >= self.len() {
            return 0.0;
        }
        let inside = self.len() - silent;
        match self.aggregation {
            Aggregation::Linear => {
                let outside = (last + 1..=last + silent).map(|second| self.buckets[self.index(second)]);
                let total = outside.fold(self.total, |total, passed| total - passed);
                // Without the rounding, residues of the sum such as 1e-15 would become a replica.
                round(total / inside.min(last - first + 1) as f64)
            }
            Aggregation::WeightedExponential => {
                let keep = 1.0 - self.coefficient;
                let mut weight = self.coefficient * keep.powf(silent as f64);
                let mut total = 0.0;
                for back in 0..inside {
                    total += self.buckets[self.index(last - back)] * weight;
                    weight *= keep;
                }
                total
            }
        }
    }
}

/// To six decimals, halves away from zero.
fn round(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64) -> Moment {
        Moment::from_seconds(seconds)
    }

    #[test]
    fn silence_does_not_lower_the_average() {
        let mut window = Window::new(6, Aggregation::Linear);
        window.record(at(0.5), 0.0);
        window.record(at(1.5), 6.0);
        assert_eq!(window.average(at(1.9)), 3.0);
        // The divisor is the two seconds that were written, however long the silence, until the zero drops out.
        assert_eq!(window.average(at(5.0)), 3.0);
        assert_eq!(window.average(at(6.0)), 6.0);
        assert_eq!(window.average(at(7.0)), 0.0);
        assert!(!window.is_empty(at(7.9)) && window.is_empty(at(8.0)));
    }

    #[test]
    fn a_whole_window_without_a_record_begins_anew() {
        let mut window = Window::new(6, Aggregation::Linear);
        window.record(at(0.5), 6.0);
        window.record(at(6.5), 2.0);
        assert_eq!(window.average(at(6.9)), 2.0);
    }

    #[test]
    fn a_constant_load_reads_low_at_first_where_seconds_are_weighted() {
        let mut window = Window::new(60, Aggregation::WeightedExponential);
        for second in 0..5 {
            window.record(at(f64::from(second) + 0.5), 10.0);
        }
        let expected = 10.0 * (1.0 - 0.8_f64.powi(5));
        assert!((window.average(at(4.9)) - expected).abs() < 1e-9);
    }
}
