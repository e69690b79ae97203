//! A pool that is not in the file any more.
//!
//! Clients whose requests came before know nothing of the file: what is in flight and what is held is answered as if nothing had
//! happened, and by further replicas where that is needed. A replica goes as soon as nothing is held.

use rewarm_autoscaler::policy::Event;

use super::inner::{Inner, limits};
use super::shape;

impl Inner {
    /// The pool is not in the file any more.
    pub(super) fn close(&mut self) {
        (self.removed, self.fixed, self.rolling) = (true, None, None);
        let config = &mut self.config;
        (config.min_replicas, config.warm, config.capture) = (0, 0, false);
        self.limits = limits(&self.config);
        let (serving, paused) = self.memory();
        self.pool.reshape(shape(&self.config, serving, paused));
        self.serve(Event::Timer);
    }

    /// Whether a pool that is not in the file any more needs no replica.
    pub(super) fn is_left(&self) -> bool {
        self.removed && self.queue.is_empty()
    }
}
