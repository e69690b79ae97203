//! Pools of replicas that follow their load: what `rewarm serve` is made of.
//!
//! [`config`] is the file that describes the pools. [`status`] is what others (admin API, metrics, KEDA scaler) see of
//! them and can ask for.

pub mod config;
mod error;
pub mod status;

pub use error::{Error, Result};
