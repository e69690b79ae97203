//! Decides how many replicas there are.
//!
//! [`policy`] is the decision: a function of the recent past and the [`pool`]. [`steer`] turns a wanted number into the
//! next thing to do, [`queue`] holds requests until a slot is free, [`ledger`] sees that memory is never overdrawn.
//! [`mod@simulate`] replays a [`trace`] through all of them in virtual time, as [`config`] says, and [`plot`] draws what
//! came of it. Replicas themselves are somebody else's: this crate starts no process.

pub mod config;
mod error;
pub mod ledger;
pub mod moment;
pub mod plot;
pub mod policy;
pub mod pool;
pub mod queue;
pub mod simulate;
pub mod start_times;
pub mod steer;
pub mod trace;

pub use error::{Error, Result};
