//! How many replicas are wanted: one trait, five policies.
//!
//! A policy is a function of the recent past and the pool. The past is what [`Policy::note`] was told; the pool is the
//! [`View`]. It reads no clock and does no I/O, so the same events give the same decisions in the live loop, behind the
//! KEDA scaler and in the simulator.

pub mod fixed;
pub mod hpa;
pub mod kpa;
pub mod reason;
pub mod rewarm;
pub mod tracker;

use std::collections::VecDeque;
use std::time::Duration;

pub use reason::Reason;

use crate::moment::Moment;
use crate::pool::{Pool, Tier};
use crate::steer::Victim;

/// What a pool may be, whatever its policy.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests that one replica answers at once, at most.
    pub concurrency: u32,
    /// Fewest replicas.
    pub min: u32,
    /// Most replicas.
    pub max: u32,
    /// How long a request may wait for a slot.
    pub target_wait: Duration,
}

/// How long a start of each tier takes, in seconds: as far as known, the time that nine of ten keep to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StartSeconds {
    /// A warm replica is woken.
    pub wake: f64,
    /// The snapshot is restored, or, where that is not possible, the server is started by its command.
    pub restore: f64,
}

impl StartSeconds {
    /// Of one tier.
    #[must_use]
    pub fn of(&self, tier: Tier) -> f64 {
        match tier {
            Tier::Wake => self.wake,
            Tier::Restore | Tier::Cold => self.restore,
        }
    }
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Event {
    /// A request came.
    Arrival,
    /// A held request's client left, or its deadline passed.
    Left,
    /// A request was answered to its last byte.
    Finished {
        /// From its dispatch on, in seconds.
        service: f64,
        /// Whether it was among the first of a replica that had just been started: those are slower than usual.
        early: bool,
    },
    /// A replica serves.
    Started,
    /// The policy's own timer.
    Timer,
}

/// What a decision is made from.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// The time.
    pub now: Moment,
    /// The replicas.
    pub pool: &'a Pool,
    /// When each held request came, oldest first.
    pub held: &'a VecDeque<Moment>,
    /// The pool's limits.
    pub limits: &'a Limits,
    /// What a start would take.
    pub start: StartSeconds,
}

impl View<'_> {
    /// Requests held and in flight.
    #[must_use]
    pub fn requests(&self) -> u32 {
        self.pool.in_flight() + self.held.len() as u32
    }
}

/// What a policy wants, and why.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Decision {
    /// Replicas that serve or are on their way there, before the pool's limits.
    pub wanted: u32,
    /// With its inputs; displays as a sentence.
    pub reason: Reason,
}

/// Replicas that are to become idle.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Spare {
    /// How many, the idlest first.
    pub replicas: u32,
    /// How long a request waits for a slot in the others.
    pub age: Duration,
}

/// A way to decide.
pub trait Policy: Send {
    /// Takes in what happened. `requests` are those held and in flight, after it.
    fn note(&mut self, now: Moment, event: Event, requests: u32);

    /// Decides, where this policy does so on this event.
    fn decide(&mut self, view: &View<'_>, event: Event) -> Option<Decision>;

    /// When it wants an [`Event::Timer`] next; nothing while only an arrival can change its mind.
    fn timer(&self, view: &View<'_>) -> Option<Moment>;

    /// How many of the idlest replicas get only requests that have waited for [`Spare::age`] already.
    fn spare(&self, _view: &View<'_>) -> Spare {
        Spare::default()
    }

    /// Whether a draining replica may be taken back. Where it may not, it finishes and another one is started.
    fn undrains(&self) -> bool {
        false
    }

    /// Whom it lets go first.
    fn victim(&self) -> Victim {
        Victim::Idlest
    }
}
