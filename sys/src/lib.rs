//! The Linux calls that the other crates need, made safe.
