//! `fixed`: always the same number. What a pool without an autoscaler costs.

use super::{Decision, Event, Policy, Reason, View};
use crate::moment::Moment;

/// The policy.
#[derive(Debug)]
pub struct Fixed {
    /// How many; without it the pool's maximum.
    replicas: Option<u32>,
}

impl Fixed {
    /// So many replicas, or as many as the pool may have.
    #[must_use]
    pub fn new(replicas: Option<u32>) -> Self {
        Self { replicas }
    }
}

impl Policy for Fixed {
    fn note(&mut self, _now: Moment, _event: Event, _requests: u32) {}

    fn decide(&mut self, view: &View<'_>, _event: Event) -> Option<Decision> {
        Some(Decision { wanted: self.replicas.unwrap_or(view.limits.max), reason: Reason::Configured })
    }

    fn timer(&self, _view: &View<'_>) -> Option<Moment> {
        None
    }
}
