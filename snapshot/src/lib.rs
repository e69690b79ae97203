//! The dump pipeline: a running server becomes a snapshot in a store, and goes on.
//!
//! [`run`] is the whole of it; `pipeline.rs` has one line for each stage. Whatever fails, the server is serving
//! afterwards, and the error says so.

mod arena;
mod aside;
mod budget;
mod capture;
mod direct;
mod dump;
mod error;
mod facts;
mod own;
mod peers;
mod pipeline;
mod preflight;
mod receive;
mod skeleton;
mod stream;
#[cfg(feature = "testing")]
pub mod testing;

pub use arena::ARENA_BYTES_MIN;
pub use error::{Cause, Error, Result};
pub use pipeline::{Context, Outcome, Request, run};
pub use preflight::{Obstacle, Owner};
