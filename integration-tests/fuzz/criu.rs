//! Fuzzes what CRIU's side says: page-server frames, lazy-pages messages, pagemap images.
//!
//! The first two are compared with a second, plain reading of `docs/protocols.md` that stands in this folder; a pagemap
//! that is accepted must keep the rules that everything behind it relies on. Each has canaries: the same cases against a
//! reader that has forgotten one rule must show the difference.

#[path = "criu/lazy_pages.rs"]
mod lazy_pages;
#[path = "criu/page_server.rs"]
mod page_server;
#[path = "criu/pagemap.rs"]
mod pagemap;
