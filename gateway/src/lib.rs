//! The reverse proxy in front of replicas: the data plane.
//!
//! [`front`] takes connections of clients, each of them on one of the [`lanes`], and reads HTTP/1.1 and HTTP/2 from them. `proxy` answers one request: it asks
//! the [`desk`] of a pool for a slot, which may take a while, and carries the request to that slot's replica and the
//! answer back, through the connections that [`upstream`] keeps. How many replicas there are, who gets a slot and who is
//! refused is the desk's matter, and the desk is somebody else's.
//!
//! hyper does the protocols: it is the HTTP implementation that most Rust services run on, fuzzed continuously, and it
//! leaves pool, queue and routing to us, which is what this project has opinions about. pingora brings its own of
//! each, and its own runtime.

pub mod body;
pub mod desk;
pub mod front;
mod headers;
pub mod lanes;
mod model;
mod proxy;
pub mod tls;
mod trace;
pub mod upstream;
mod websocket;

pub use desk::{Asked, Choice, Desk, Lease, Manners, Refusal, Router, Slot, Traffic, Turn, Want};
pub use front::{Front, Limits};
pub use lanes::Lanes;
pub use upstream::{Dial, Protocol, Upstream};
