//! The dump pipeline: a running server into a store.
