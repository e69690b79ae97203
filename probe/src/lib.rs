//! Asks a server questions and compares the answers: ready checks, hooks, recorded probes.
//!
//! Three users share it: `run` waits until a server is [`Ready`], `snapshot` runs a [`Hook`] and [`Probe::record`]s answers,
//! `restore` [`replay`]s them before a replica is declared ready. How a socket into a replica is made, and how a command
//! runs there, is the caller's business: it gives a [`Dial`].

mod compare;
mod dial;
pub mod engine;
mod error;
mod file;
mod hook;
mod http;
mod json;
mod keys;
pub mod limits;
mod ready;
mod recorded;
mod resume;
mod target;

pub use compare::{Compare, Difference, Located, Selection};
pub use dial::{Dial, ExecOutput};
pub use engine::Engine;
pub use error::{Error, RequestError, Result};
pub use file::{Probe, Request};
pub use hook::{Hook, HookReport};
pub use ready::{Ready, wait_ready};
pub use recorded::{Answer, Body, Exchange, Question, Recorded, ReplayReport, replay};
pub use resume::Resume;
