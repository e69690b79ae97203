//! Why a policy wants what it wants, in words, with the numbers that it looked at.

use std::fmt;

/// A reason and its inputs. Displayed only where somebody reads it: the simulator makes millions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Reason {
    /// Held requests would wait too long.
    Rescue {
        /// Requests whose last moment for help is now.
        due: u32,
        /// How many of them the replicas there are will take in time.
        served: f64,
        /// Within how many seconds.
        within_s: f64,
        /// Replicas added.
        added: u32,
    },
    /// No warm replica is left, and there are more requests than slots.
    Ahead {
        /// Requests held and in flight.
        requests: u32,
        /// Replicas that they would fill.
        replicas: u32,
    },
    /// Nothing is there to answer.
    Wakeup {
        /// Requests held.
        held: u32,
    },
    /// The load of the last minute needs so many replicas.
    Floor {
        /// Requests in flight that the arrivals of the last minute amount to.
        load: f64,
        /// Replicas.
        replicas: u32,
    },
    /// Starts take longer than requests may wait, and bursts were seen.
    Burst {
        /// Replicas that the remembered bursts needed.
        replicas: u32,
    },
    /// A replica was idle longer than a new start would cost.
    Idle {
        /// Seconds.
        idle_s: f64,
        /// Seconds after which it goes.
        keep_s: f64,
    },
    /// Nothing to change.
    Steady,
    /// Knative's windows.
    Windows {
        /// Average concurrency of the stable window.
        stable: f64,
        /// Average concurrency of the panic window.
        panic: f64,
        /// Whether it is panicking.
        panicking: bool,
    },
    /// Knative holds the last replica for a while before zero.
    HoldAtOne,
    /// Requests divided by the target.
    Target {
        /// Requests held and in flight, or their average.
        requests: f64,
        /// Of them for each replica.
        target: f64,
    },
    /// An earlier, higher decision still holds.
    Delayed {
        /// What would be wanted now.
        now: u32,
        /// What was wanted.
        highest: u32,
    },
    /// The number that was configured.
    Configured,
}

impl fmt::Display for Reason {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Reason::Rescue { due, served, within_s, added } => write!(
                to,
                "{due} held requests would wait too long: {served:.1} of them get a slot within {within_s:.2} s, {added} more replicas are started"
            ),
            Reason::Ahead { requests, replicas } => {
                write!(to, "{requests} requests would fill {replicas} replicas, and no warm one is left")
            }
            Reason::Wakeup { held } => write!(to, "{held} requests are held and no replica is there"),
            Reason::Floor { load, replicas } => {
                write!(to, "the last minute's load of {load:.1} requests in flight needs {replicas} replicas")
            }
            Reason::Burst { replicas } => {
                write!(
                    to,
                    "starts are slower than requests may wait, and remembered bursts need {replicas} replicas"
                )
            }
            Reason::Idle { idle_s, keep_s } => {
                write!(
                    to,
                    "a replica was idle for {idle_s:.1} s, longer than the {keep_s:.1} s that it is kept"
                )
            }
            Reason::Steady => write!(to, "nothing to change"),
            Reason::Windows { stable, panic, panicking } => {
                let mode = if panicking { "panicking" } else { "stable" };
                write!(
                    to,
                    "average concurrency {stable:.2} (stable window), {panic:.2} (panic window), {mode}"
                )
            }
            Reason::HoldAtOne => write!(to, "the last replica is held for a while before zero"),
            Reason::Target { requests, target } => {
                write!(to, "{requests:.1} requests, {target:.1} for each replica")
            }
            Reason::Delayed { now, highest } => {
                write!(to, "{now} would do, but {highest} were wanted a short while ago")
            }
            Reason::Configured => write!(to, "the configured number"),
        }
    }
}
