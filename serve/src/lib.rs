//! Pools of replicas that follow their load: what `rewarm serve` is made of.
//!
//! Two processes. [`keeper`] is the parent: root, makes and ends replicas by way of [`replicas::Replicas`], parses nothing
//! from clients. [`control`] is the gateway: without any rights, it has the clients, and each pool's `live` loop decides.
//! `link` is what they say to each other. [`config`] is the file that describes the pools. [`status`] is what others (admin
//! API, metrics, KEDA scaler) see of them and can ask for.

pub mod config;
pub mod control;
mod error;
pub mod keeper;
mod link;
mod live;
pub mod replicas;
pub mod status;

pub use error::{Error, Result};
