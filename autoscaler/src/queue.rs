//! Requests that are held until a replica has a free slot: first in, first out, bounded, with a deadline.
//!
//! The gateway and the simulator hold requests in the same queue. Where a request goes is chosen when it leaves, not when
//! it comes.

use std::collections::VecDeque;
use std::time::Duration;

use crate::moment::Moment;

/// A place in the queue, by which a request whose client left is taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(i64);

/// Limits of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueLimits {
    /// Most requests held; one more is refused.
    pub max: usize,
    /// How long a request is held.
    pub deadline: Duration,
}

impl QueueLimits {
    /// Neither bound.
    pub const NONE: QueueLimits = QueueLimits { max: usize::MAX, deadline: Duration::MAX };
}

/// The queue is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{held} requests are held, the limit is {max}")]
pub struct Full {
    /// Requests in the queue.
    pub held: usize,
    /// Its limit.
    pub max: usize,
}

/// Held requests.
#[derive(Debug)]
pub struct Queue<T> {
    limits: QueueLimits,
    /// When each request came, in order. Beside the requests, so that a policy can look at the times alone.
    arrivals: VecDeque<Moment>,
    requests: VecDeque<(Ticket, T)>,
    /// The tickets before the first that was ever given and after the last: they rise from front to back.
    before: i64,
    next: i64,
}

impl<T> Queue<T> {
    /// An empty queue.
    #[must_use]
    pub fn new(limits: QueueLimits) -> Self {
        Self { limits, arrivals: VecDeque::new(), requests: VecDeque::new(), before: -1, next: 0 }
    }

    /// Holds a request that came now.
    ///
    /// # Errors
    /// Where as many are held as may be; the request comes back.
    pub fn hold(&mut self, now: Moment, request: T) -> Result<Ticket, (Full, T)> {
        if self.requests.len() >= self.limits.max {
            return Err((Full { held: self.requests.len(), max: self.limits.max }, request));
        }
        let ticket = Ticket(self.next);
        self.next += 1;
        self.arrivals.push_back(now);
        self.requests.push_back((ticket, request));
        Ok(ticket)
    }

    /// Holds a request before all others that was given out and has come back. It was let in before, so no limit of places holds
    /// for it, and it came before them: it counts as having come with the first of them.
    pub fn hold_first(&mut self, now: Moment, request: T) -> Ticket {
        let ticket = Ticket(self.before);
        self.before -= 1;
        self.arrivals.push_front(self.arrivals.front().copied().unwrap_or(now));
        self.requests.push_front((ticket, request));
        ticket
    }

    /// Takes out the request at this place from the front, and when it came.
    pub fn take(&mut self, place: usize) -> Option<(Moment, T)> {
        let (_, request) = self.requests.remove(place)?;
        Some((self.arrivals.remove(place)?, request))
    }

    /// When the request at this place from the front came, and what it is.
    #[must_use]
    pub fn get(&self, place: usize) -> Option<(Moment, &T)> {
        Some((*self.arrivals.get(place)?, &self.requests.get(place)?.1))
    }

    /// The same, to be changed.
    pub fn get_mut(&mut self, place: usize) -> Option<(Moment, &mut T)> {
        Some((*self.arrivals.get(place)?, &mut self.requests.get_mut(place)?.1))
    }

    /// Takes out the request that has waited longest, and when it came.
    pub fn release(&mut self) -> Option<(Moment, T)> {
        let (_, request) = self.requests.pop_front()?;
        Some((self.arrivals.pop_front()?, request))
    }

    /// Changes its limits. What is held already stays, whatever they are.
    pub fn limit(&mut self, limits: QueueLimits) {
        self.limits = limits;
    }

    /// Takes out a request whose client has left; nothing where it is not held any more.
    pub fn cancel(&mut self, ticket: Ticket) -> Option<T> {
        let place = self.requests.binary_search_by_key(&ticket, |(ticket, _)| *ticket).ok()?;
        self.arrivals.remove(place);
        self.requests.remove(place).map(|(_, request)| request)
    }

    /// Takes out the oldest request if its deadline has passed.
    pub fn expire(&mut self, now: Moment) -> Option<T> {
        let first = *self.arrivals.front()?;
        if now < first + self.limits.deadline {
            return None;
        }
        self.release().map(|(_, request)| request)
    }

    /// When the oldest request's deadline passes.
    #[must_use]
    pub fn next_expiry(&self) -> Option<Moment> {
        self.arrivals.front().map(|first| *first + self.limits.deadline)
    }

    /// When each held request came, oldest first.
    #[must_use]
    pub fn arrivals(&self) -> &VecDeque<Moment> {
        &self.arrivals
    }

    /// How many are held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether none is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(seconds: f64) -> Moment {
        Moment::from_seconds(seconds)
    }

    #[test]
    fn a_full_queue_gives_the_request_back() {
        let mut queue = Queue::new(QueueLimits { max: 1, ..QueueLimits::NONE });
        queue.hold(at(0.0), 'a').expect("room");
        let (full, request) = queue.hold(at(0.0), 'b').expect_err("full");
        assert_eq!((full.to_string().as_str(), request), ("1 requests are held, the limit is 1", 'b'));
    }

    #[test]
    fn what_has_come_back_goes_before_all_others_whatever_the_limit() {
        let mut queue = Queue::new(QueueLimits { max: 1, ..QueueLimits::NONE });
        queue.hold(at(1.0), 'a').expect("room");
        let back = ['b', 'c'].map(|request| queue.hold_first(at(2.0), request));
        assert_eq!(
            (queue.get(0), queue.get(2), queue.get(3)),
            (Some((at(1.0), &'c')), Some((at(1.0), &'a')), None)
        );
        assert_eq!((queue.cancel(back[0]), queue.cancel(back[0])), (Some('b'), None));
        assert_eq!(queue.take(1), Some((at(1.0), 'a')));
        assert_eq!((queue.release(), queue.release()), (Some((at(1.0), 'c')), None));
    }

    #[test]
    fn the_deadline_counts_from_the_arrival() {
        let mut queue = Queue::new(QueueLimits { max: 9, deadline: Duration::from_secs(30) });
        queue.hold(at(1.0), 'a').expect("room");
        queue.hold(at(2.0), 'b').expect("room");
        assert_eq!(queue.next_expiry(), Some(at(31.0)));
        assert_eq!(queue.expire(at(30.9)), None);
        assert_eq!(queue.expire(at(31.0)), Some('a'));
        assert_eq!(queue.expire(at(31.0)), None);
        assert_eq!(queue.len(), 1);
    }

    proptest! {
        /// Whatever is held, cancelled and released: requests leave in the order in which they came, each once.
        #[test]
        fn first_in_first_out(steps in proptest::collection::vec(0..4_u8, 1..200)) {
            let mut queue = Queue::new(QueueLimits::NONE);
            let (mut tickets, mut model) = (Vec::new(), Vec::new());
            for (index, step) in steps.into_iter().enumerate() {
                match step {
                    0 | 1 => {
                        let ticket = queue.hold(at(index as f64), index).map_err(|(full, _)| full).expect("room");
                        tickets.push((ticket, index));
                        model.push(index);
                    }
                    2 => {
                        let expected = if model.is_empty() { None } else { Some(model.remove(0)) };
                        prop_assert_eq!(queue.release(),
                            expected.map(|request| (at(request as f64), request)));
                    }
                    _ => if let Some((ticket, request)) = tickets.get(index / 2).copied() {
                        let held = model.iter().position(|held| *held == request);
                        prop_assert_eq!(queue.cancel(ticket), held.map(|place| model.remove(place)));
                    }
                }
                prop_assert_eq!(queue.len(), model.len());
                prop_assert_eq!(queue.arrivals().len(), model.len());
            }
        }
    }
}
