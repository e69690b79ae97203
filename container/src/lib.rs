//! Containers: what a replica consists of and the process that owns it.
//!
//! [`State`] is the directory in which replicas are found by name. [`Spec`] is what a user asked for, [`bundle`] turns it
//! into what runc reads. [`shim`] is the process that owns one replica: its mounts, network namespace, stdio, exit status
//! and published ports. [`tree`] carries a directory (the root file system's delta, `/dev/shm`) from one replica to another.
//! This crate knows neither the store nor CRIU's images.

pub mod bundle;
pub mod cgroup;
pub mod dial;
mod error;
pub mod namespaces;
pub mod record;
mod removal;
pub mod rootfs;
pub mod runc;
pub mod shim;
pub mod spec;
pub mod state;
pub mod tree;

pub use error::{Error, Refusal};
pub use record::{Cause, Device, Exit, ExitStatus, Memory, Origin, Record, Status, WakeCost};
pub use spec::{Gpu, Mount, Name, Net, Publish, Spec, User};
pub use state::{Claim, Entry, State};
