//! What the crate does with a real CRIU, and with peers that play one.

mod connections;
mod dump;
mod hostile;
mod lazy_peer;
mod needs;
mod page_peer;
mod program;
mod stops;
mod timers;
mod world;
