//! Fuzzes what lies in a store: leaves of the index, boot objects, manifests, tags, chunks in each codec.
//!
//! Whatever is accepted must keep the rules that readers rely on without looking again. Each has a canary: the same cases
//! against a reader that has forgotten a rule must show the difference.

#[path = "store/boot.rs"]
mod boot;
#[path = "store/chunk.rs"]
mod chunk;
#[path = "store/index.rs"]
mod index;
#[path = "store/text.rs"]
mod text;
