//! Cold start, stock CRIU and Rewarm, side by side on one machine.
//!
//! Answers for `rewarm bench`: what is measured ([`Case`], [`Place`]), on which server ([`Subject`]), and how the rounds
//! alternate ([`run`]). It uses the `rewarm` and `criu` programs as a person would, so its figures hold what a person
//! waits for, process starts included. Every answer of every arm is compared with that of the running server: an arm that
//! answers otherwise ends the benchmark.

mod case;
mod chart;
mod client;
mod error;
mod files;
mod machine;
mod outcome;
mod own;
mod rewarm;
mod rounds;
mod sample;
mod server;
mod stock;
mod subject;

pub use case::{Case, Place};
pub use chart::draw;
pub use error::{Error, Result};
pub use machine::Machine;
pub use outcome::{Outcome, Row};
pub use rounds::{Options, run};
pub use sample::Spread;
pub use server::{make_weights, serve};
pub use subject::Subject;
