//! The process that owns a replica.
//!
//! ```text
//! command --- lease ---> shim --- runc ---> criu
//!                         |  \
//!                         |   residents (the pager), children of the shim
//!                         v
//!                       server, in its own namespaces and cgroup
//! ```
//!
//! **What it owns**: a mount namespace in which the overlay root and the tmpfs lie, the network namespace, the stdio pipes
//! and their log files, the published ports, the lock of the replica's directory. When it ends, the kernel takes back all
//! mounts and the namespace; what remains (cgroup, runc's state, files) it removes itself, and the next command sweeps it
//! where the shim was killed.
//!
//! **Leases**: the connection that made the replica is its lease until `commit`: if it breaks, everything is killed and
//! removed, the directory included. A connection that asked for a dump or a freeze holds a lease on that: if it breaks,
//! the dump is given up and the server goes on. One that drained the server for that is bound to let it go on, and the shim
//! does it in its place.
//!
//! **States**: `starting -> ready <-> frozen`, `ready <-> paused` (which outlasts the command that asked for it), `ready ->
//! stranded` where the driver left a process that cannot go on, any of them `-> stopping -> exited`, and any `-> crashed` if the shim dies.

mod children;
pub mod client;
mod device;
mod drained;
mod dump;
mod exec;
mod executable;
mod life;
mod logs;
mod paths;
mod pause;
pub mod protocol;
mod publish;
mod replica;
pub mod resident;
mod restore;
mod server;
mod start;
mod supervise;

pub use client::{Client, RunningExec};
pub use paths::Paths;
pub use protocol::{
    DeviceRequest, DumpRequest, ExecOutput, ExecRequest, Paused, Prepare, Prepared, ResidentRequest,
    RestoreRequest, Woken,
};
pub use server::main;

/// The number under which the shim finds the locked file of its replica's directory.
pub const LOCK_FD: i32 = 3;
/// The number under which the shim finds the connection to the command that started it.
pub const LEASE_FD: i32 = 4;
