//! What Rewarm is for: servers are started, snapshotted, stopped and brought back, and nothing about them changes.

mod clones;
mod cold;
mod hooks;
mod machines;
mod network;
mod probe;
mod root;
mod servers;
mod store_verbs;
mod stores;
mod timers;
mod verbs;
