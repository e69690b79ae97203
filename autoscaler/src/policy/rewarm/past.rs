//! What the policy remembers: how fast requests come, how long they take, and how high the bursts were.

use std::collections::VecDeque;
use std::time::Duration;

use crate::moment::Moment;
use crate::policy::Event;

/// Time constants of the two arrival rates, in seconds.
const FAST_S: f64 = 3.0;
const SLOW_S: f64 = 60.0;
/// Share of the newest answer in the average service time.
const SERVICE_SHARE: f64 = 0.02;
/// Length of the spans whose peaks are remembered.
const PEAK_SPAN: Duration = Duration::from_secs(10);

/// The recent past.
#[derive(Debug)]
pub(super) struct Past {
    fast: Rate,
    slow: Rate,
    /// Average service time in seconds; zero until the first answer.
    service_s: f64,
    answers: u32,
    /// End of the span that is going on, its peak, and those of the spans before it.
    span_end: Moment,
    peak: u32,
    peaks: VecDeque<u32>,
    peaks_max: usize,
}

impl Past {
    pub(super) fn new(burst_window: Duration) -> Self {
        let spans = burst_window.as_secs_f64() / PEAK_SPAN.as_secs_f64();
        Self {
            fast: Rate::new(FAST_S),
            slow: Rate::new(SLOW_S),
            service_s: 0.0,
            answers: 0,
            span_end: Moment::START + PEAK_SPAN,
            peak: 0,
            peaks: VecDeque::new(),
            peaks_max: (spans.ceil() as usize).max(1),
        }
    }

    pub(super) fn note(&mut self, now: Moment, event: Event, requests: u32) {
        match event {
            Event::Arrival => {
                self.fast.note(now);
                self.slow.note(now);
            }
            // The first answers of a new replica are slower than the rest; they count only while there are no others.
            Event::Finished { service, early } if !early || self.answers == 0 => {
                self.answers = self.answers.saturating_add(1);
                let share = SERVICE_SHARE.max(1.0 / f64::from(self.answers));
                self.service_s += (service - self.service_s) * share;
            }
            _ => {}
        }
        if now >= self.span_end {
            self.close_spans(now);
        }
        self.peak = self.peak.max(requests);
    }

    fn close_spans(&mut self, now: Moment) {
        // After a long silence only as many empty spans are remembered as are looked at.
        let passed = now.since(self.span_end).as_secs_f64() / PEAK_SPAN.as_secs_f64();
        let passed = 1 + (passed as usize).min(self.peaks_max);
        for _ in 0..passed {
            self.peaks.push_back(std::mem::take(&mut self.peak));
        }
        while self.peaks.len() > self.peaks_max {
            self.peaks.pop_front();
        }
        self.span_end = now.next_multiple_of(PEAK_SPAN);
    }

    /// Arrivals in a second, lately.
    pub(super) fn arrivals_fast(&self, now: Moment) -> f64 {
        self.fast.at(now)
    }

    /// Arrivals in a second, over the last minute.
    pub(super) fn arrivals_slow(&self, now: Moment) -> f64 {
        self.slow.at(now)
    }

    /// Average time of an answer, in seconds; zero while none is known.
    pub(super) fn service_s(&self) -> f64 {
        self.service_s
    }

    /// Answers that one busy slot gives in a second; zero while none is known.
    pub(super) fn answers_per_slot(&self) -> f64 {
        if self.answers > 0 { 1.0 / self.service_s.max(1e-6) } else { 0.0 }
    }

    /// A quantile of the remembered peaks, the one going on among them.
    pub(super) fn peak(&self, quantile: f64) -> u32 {
        let mut peaks: Vec<u32> = self.peaks.iter().copied().chain([self.peak]).collect();
        peaks.sort_unstable();
        peaks[((peaks.len() - 1) as f64 * quantile).round() as usize]
    }
}

/// Events in a second, older ones weighing less.
#[derive(Debug)]
struct Rate {
    constant_s: f64,
    rate: f64,
    changed: Moment,
}

impl Rate {
    fn new(constant_s: f64) -> Self {
        Self { constant_s, rate: 0.0, changed: Moment::START }
    }

    fn note(&mut self, now: Moment) {
        self.rate = self.at(now) + 1.0 / self.constant_s;
        self.changed = now;
    }

    fn at(&self, now: Moment) -> f64 {
        self.rate * (-now.seconds_since(self.changed) / self.constant_s).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64) -> Moment {
        Moment::from_seconds(seconds)
    }

    #[test]
    fn a_steady_stream_has_its_rate() {
        let mut past = Past::new(Duration::from_secs(60));
        for index in 0..6000 {
            past.note(at(f64::from(index) * 0.1), Event::Arrival, 1);
        }
        assert!((past.arrivals_fast(at(600.0)) - 10.0).abs() < 0.3);
        assert!((past.arrivals_slow(at(600.0)) - 10.0).abs() < 0.1);
        assert!(past.arrivals_fast(at(630.0)) < 0.01);
    }

    #[test]
    fn early_answers_count_only_while_there_are_no_others() {
        let mut past = Past::new(Duration::from_secs(60));
        past.note(at(0.0), Event::Finished { service: 9.0, early: true }, 0);
        assert_eq!(past.service_s(), 9.0);
        past.note(at(0.0), Event::Finished { service: 1.0, early: false }, 0);
        past.note(at(0.0), Event::Finished { service: 9.0, early: true }, 0);
        assert_eq!(past.service_s(), 5.0);
    }

    #[test]
    fn peaks_are_forgotten_after_the_window() {
        let mut past = Past::new(Duration::from_secs(30));
        past.note(at(1.0), Event::Arrival, 40);
        past.note(at(11.0), Event::Arrival, 4);
        past.note(at(21.0), Event::Arrival, 8);
        assert_eq!((past.peak(0.0), past.peak(1.0)), (4, 40));
        past.note(at(500.0), Event::Arrival, 1);
        assert_eq!(past.peak(1.0), 1);
    }
}
