//! A second request where the answer to the first is late, and whichever answers first is taken.
//!
//! Of many requests over a network now and then one hangs: its connection was forgotten on the way, or the server that took it
//! is in trouble. A whole restore would wait for it, up to [`crate::limits::READ_TIMEOUT`]. What is late is measured by what
//! else is answered meanwhile, so a store that is slow altogether is not asked twice.

use std::collections::VecDeque;
use std::ops::Range;
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::{Either, select};
use object_store::path::Path;
use tokio::time::{Instant, timeout};

use crate::error::Result;
use crate::limits::{
    HEDGE_ANSWERS, HEDGE_ANSWERS_MIN, HEDGE_BUDGET_PARTS, HEDGE_FACTOR, HEDGE_LOOK, HEDGE_WAIT_MIN,
};
use crate::objects::Objects;

/// What the requests of one fetch know of each other.
#[derive(Debug, Default)]
pub struct Hedges {
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// Lengths of the last answers and how long they took.
    answers: VecDeque<(u64, Duration)>,
    /// Bytes that were asked for, second requests left out.
    asked_bytes: u64,
    /// Bytes that were asked for a second time.
    hedged_bytes: u64,
}

impl Seen {
    fn answered(&mut self, bytes: u64, took: Duration) {
        if self.answers.len() == HEDGE_ANSWERS {
            self.answers.pop_front();
        }
        self.answers.push_back((bytes, took));
    }

    /// From when on an answer of this length is late; `None` while too few of about that length have come.
    fn late_after(&self, bytes: u64) -> Option<Duration> {
        // Short answers tell nothing of how long a long one takes.
        let like = self.answers.iter().filter(|(length, _)| *length >= bytes / 2);
        let mut times: Vec<Duration> = like.map(|(_, took)| *took).collect();
        if times.len() < HEDGE_ANSWERS_MIN {
            return None;
        }
        times.sort_unstable();
        let slow = times[(times.len() * 95).div_ceil(100) - 1];
        Some((slow * HEDGE_FACTOR).max(HEDGE_WAIT_MIN))
    }

    /// Whether so many bytes may be asked for again: a twentieth of all, but one request always.
    fn take(&mut self, bytes: u64) -> bool {
        let may =
            self.hedged_bytes == 0 || self.hedged_bytes + bytes <= self.asked_bytes / HEDGE_BUDGET_PARTS;
        if may {
            self.hedged_bytes += bytes;
        }
        may
    }
}

/// An answer of the store.
pub(crate) struct Answer {
    pub(crate) content: Bytes,
    /// It was asked for twice.
    pub(crate) hedged: bool,
}

impl Hedges {
    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`Objects::get_range`], and once more when the answer is late.
    pub(crate) async fn get(&self, objects: &Objects, path: &Path, range: Range<u64>) -> Result<Answer> {
        let (bytes, begun) = (range.end - range.start, Instant::now());
        self.lock().asked_bytes += bytes;
        let mut first = pin!(objects.get_range(path, range.clone()));
        loop {
            if let Ok(answer) = timeout(HEDGE_LOOK, &mut first).await {
                // What failed says nothing of how long content takes.
                let content = answer?;
                self.lock().answered(bytes, begun.elapsed());
                return Ok(Answer { content, hedged: false });
            }
            let mut seen = self.lock();
            if seen.late_after(bytes).is_some_and(|late| begun.elapsed() >= late) && seen.take(bytes) {
                break;
            }
        }
        tracing::info!(object = %path, ?range, waited = ?begun.elapsed(), "the answer is late: asking once more");
        let second = pin!(objects.get_range(path, range));
        // Whoever loses is dropped, and its connection with it.
        let content = match select(first, second).await {
            Either::Left((Err(_), second)) => second.await,
            Either::Right((Err(_), first)) => first.await,
            Either::Left((content, _)) | Either::Right((content, _)) => content,
        };
        Ok(Answer { content: content?, hedged: true })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::REQUEST_BYTES;

    fn answered(times: impl IntoIterator<Item = u64>) -> Seen {
        let mut seen = Seen::default();
        for ms in times {
            seen.answered(REQUEST_BYTES, Duration::from_millis(ms));
        }
        seen
    }

    #[test]
    fn what_is_late_is_measured_by_the_slow_ones_of_about_that_length() {
        let mut seen = answered((1..=20).map(|n| n * 100));
        assert_eq!(seen.late_after(REQUEST_BYTES), Some(Duration::from_millis(3 * 1900)), "the 19th of 20");
        assert_eq!(answered([1, 1, 1]).late_after(REQUEST_BYTES), Some(HEDGE_WAIT_MIN));
        // A thousand short ones that took no time say nothing of a long one, which waits as it did.
        seen = answered([]);
        for _ in 0..HEDGE_ANSWERS {
            seen.answered(4096, Duration::ZERO);
        }
        assert_eq!(seen.late_after(REQUEST_BYTES), None);
        assert_eq!(seen.late_after(4096), Some(HEDGE_WAIT_MIN));
        assert_eq!(answered([10, 10]).late_after(REQUEST_BYTES), None, "two are too few");
    }

    #[test]
    fn a_twentieth_may_be_asked_for_twice_and_one_request_always() {
        let mut seen = Seen { asked_bytes: REQUEST_BYTES, ..Seen::default() };
        assert!(seen.take(REQUEST_BYTES));
        assert!(!seen.take(REQUEST_BYTES));
        seen.asked_bytes = 39 * REQUEST_BYTES;
        assert!(!seen.take(REQUEST_BYTES));
        seen.asked_bytes = 40 * REQUEST_BYTES;
        assert!(seen.take(REQUEST_BYTES));
        assert!(!seen.take(1));
        assert_eq!(seen.hedged_bytes, 2 * REQUEST_BYTES);
    }
}
