//! Speaks CRIU: command line, image files, page-server and lazy-pages protocols.
//!
//! CRIU does the kernel objects of a process tree: threads, registers, files, sockets, namespaces. This crate finds the
//! program ([`binary`], [`kdat`]), tells it what to do ([`config`]), takes the memory that it sends while it dumps
//! ([`page_server`]), reads and mends the image files that it leaves ([`image`], [`patch`]), refuses those that ask for
//! more than a replica may have ([`admission`]), and hears from it which memory it expects to be filled later
//! ([`lazy_pages`]). It starts no container and knows no store.

pub mod admission;
pub mod binary;
pub mod config;
pub mod image;
pub mod kdat;
pub mod layout;
pub mod lazy_pages;
#[cfg(test)]
mod limited;
pub mod log;
pub mod page_server;
pub mod patch;
pub mod stats;
mod wire;

mod error;

pub use binary::Binary;
pub use error::{Error, Fault};

/// Result of the calls of this crate.
pub type Result<T> = std::result::Result<T, Error>;
