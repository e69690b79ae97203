//! The restore pipeline: a snapshot into running replicas.
//!
//! [`run`] is the whole of it; `pipeline.rs` has one line for each stage. A replica is handed out only after its answers
//! were compared with the recorded ones; whatever fails before, nothing of it is left.

mod admit;
mod begun;
mod blueprint;
pub mod cold;
mod device;
mod direct;
mod error;
mod fetch;
mod lazy;
mod look;
mod machine;
pub mod mappings;
mod mode;
pub mod pager;
mod pages;
mod pipeline;
mod prefetch;
mod recording;
mod replica;
mod request;
pub mod resident;
mod rest;
mod shared;
mod verdict;

pub use admit::{Here, against};
pub use begun::Ground;
pub use error::{Cause, Error, Result};
pub use look::{Seen, look};
pub use machine::{HostView, here};
pub use mode::Mode;
pub use pipeline::run;
pub use prefetch::prefetch;
pub use request::{Context, Outcome, Request, Restored};
pub use verdict::{Lookup, Machine, Reason, reasons};
