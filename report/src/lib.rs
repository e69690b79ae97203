//! What a long operation tells its caller.
//!
//! Answers for the vocabulary that both pipelines, the shim and the command line share: the list of [`Stage`]s, their
//! [`Timing`]s, the [`Progress`] that a caller may draw, the [`Class`] of a failure (what the caller can do about it), the
//! [`Remote`] form of an error that came from another process, and the [`Aftermath`] (what is true of the server
//! afterwards). It does nothing itself and depends on nothing of ours.

mod class;
mod progress;
mod remote;
mod stage;

pub use class::{Aftermath, Class, Classify};
pub use progress::{Hidden, Progress};
pub use remote::Remote;
pub use stage::{Clock, Operation, Pause, Stage, Timing};
