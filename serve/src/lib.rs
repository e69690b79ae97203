//! Pools of replicas that follow their load: what `rewarm serve` is made of.
//!
//! Two processes. [`keeper`] is the parent: root, makes and ends replicas by way of [`replicas::Replicas`], parses nothing
//! from clients. [`control`] is the gateway: without any rights, it has the clients, and each pool's `live` loop decides.
//! `link` is what they say to each other. [`config`] is the file that describes the pools. [`status`] is what others see
//! of them and can ask for: the [`admin`] API with its status page and metrics, and the [`keda`] scaler. `traces` sends spans to a
//! collector.

pub mod admin;
pub mod config;
pub mod control;
mod error;
pub mod keda;
pub mod keeper;
mod link;
mod live;
mod metrics;
mod operators;
pub mod replicas;
#[cfg(feature = "testing")]
pub mod scripted;
pub mod status;
mod traces;

pub use error::{Error, Result};
