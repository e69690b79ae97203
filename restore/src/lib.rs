//! The restore pipeline: a snapshot into running replicas.

pub mod pager;
