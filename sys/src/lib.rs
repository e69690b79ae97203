//! The Linux calls that the other crates need, made safe.

#![allow(unsafe_code)]

mod abi;
pub mod confine;
pub mod fdpass;
pub mod fresh;
pub mod guard;
pub mod hold;
pub mod machine;
pub mod mount;
pub mod netns;
pub mod pidfd;
pub mod priority;
pub mod process;
pub mod procmem;
pub mod shared;
#[cfg(feature = "testing")]
pub mod trial;
pub mod uffd;
