//! The Linux calls that the other crates need, made safe.

#![allow(unsafe_code)]

mod abi;
pub mod machine;
pub mod procmem;
pub mod uffd;
