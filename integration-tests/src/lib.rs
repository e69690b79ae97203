//! Whole-system tests, as a user: the harness.
//!
//! A test makes a [`World`] (a state folder, a store and a name of its own, so that tests run side by side), starts one
//! of the servers that [`server`] describes with the `rewarm` program, does something to it, and calls the checkers of
//! [`checks`]: the server answers as before, nothing is left behind, the store verifies. Dropping the world ends
//! whatever it started, by process id, also when the test failed.

pub mod checks;
pub mod cloud;
pub mod command;
pub mod devices;
pub mod fuzz;
pub mod garage;
pub mod http;
pub mod load;
pub mod mounts;
pub mod needs;
pub mod pool;
pub mod replica;
pub mod residue;
pub mod server;
pub mod slots;
pub mod slow;
pub mod world;

pub use command::{Output, Rewarm, Running};
pub use needs::Need;
pub use replica::Replica;
pub use slow::Slow;
pub use world::World;
