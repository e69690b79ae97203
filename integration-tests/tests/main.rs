//! Whole-system tests: real CRIU, real runc, real servers, real stores.
//!
//! Each test makes a world of its own, so all of them run in parallel. A test whose need is missing prints
//! `skipped: needs ...`, and fails where `REWARM_TEST_NEEDS` says that the need is met.

mod cli;
mod devices;
mod faults;
mod lifecycle;
mod serve;
mod setup;

use rewarm_integration_tests::server::Server;
use rewarm_integration_tests::{Need, World};

/// A world with the program that was built with the tests; nothing where a need is missing.
fn world(needs: &[Need]) -> Option<World> {
    World::new(env!("CARGO_BIN_EXE_rewarm-under-test"), needs)
}

/// A world for tests with `server`.
fn world_for(server: &Server) -> Option<World> {
    world(&server.all_needs())
}
