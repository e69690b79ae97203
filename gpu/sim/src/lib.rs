//! A simulated CUDA driver for machines without a GPU. Nothing here computes, and all that it tells says "simulated".
//!
//! The library is loaded as `libcuda.so.1` (and, under a second name, as `libnvidia-ml.so.1`) on both sides: by the server
//! that uses "device" memory ([`target`]) and by the helper that checkpoints it ([`caller`]). It is built so that the real
//! engine under the real CRIU can go wrong with it in the ways in which it could with the real driver:
//!
//! - The state lies in the server's memory ([`page`]), so it goes where CRIU takes it. A real thread of the server does the
//!   work; a server that is stopped or frozen as a whole really blocks the call.
//! - A device is a tmpfs of limited size, its memory files without a name in it ([`device`]): they are freed when the process
//!   dies, a full device is really full. A device's descriptor is that of a real character device, which CRIU refuses.
//! - A checkpoint copies into new private memory and unmaps the device's ranges; a restore reads the copy as the real driver
//!   pins it (through `/proc/self/mem`, which fails where a page is absent under a userfaultfd) and maps the ranges back
//!   at their old place, over whatever lies there by then.
//! - The order of steps, the rules of device maps and the rights of the caller are enforced.
//! - Every failure can be had on demand ([`control`]).
//!
//! What of this the real driver shares is listed in `docs/gpu.md`; nothing has been compared with hardware unless that page
//! says so.

#![allow(unsafe_code)]

pub mod caller;
pub mod control;
mod custom;
pub mod device;
mod exports;
mod nvml;
pub mod page;
pub mod target;
pub mod workload;

/// Folder that holds one folder for each simulated device: a tmpfs with a file `uuid` (32 hexadecimal digits) and, if it is
/// not to be the usual one, a file `name`.
pub const DEVICES_ENV: &str = "REWARM_SIM_DEVICES";
/// Character devices that a process with a context holds open, separated by colons. Default: `/dev/loop-control`.
pub const NODES_ENV: &str = "REWARM_SIM_NODES";
/// What `cuDriverGetVersion` tells. Default: 13000.
pub const VERSION_ENV: &str = "REWARM_SIM_VERSION";
/// What NVML tells as the driver's release. Default: `580.0 (simulated)`.
pub const RELEASE_ENV: &str = "REWARM_SIM_RELEASE";
/// The file that [`control`] describes; read by the caller's side at each call.
pub const CONTROL_ENV: &str = "REWARM_SIM_CONTROL";
/// If set, a restore does not need `cuInit` in the caller.
pub const PERSISTENCE_ENV: &str = "REWARM_SIM_PERSISTENCE";
/// If set in the server, a restore moves pages in place of copying them onto a device, as fast as a real driver or as a rule of
/// [`control`] says; the restored memory counts for no device. For measurements.
pub const MOVES_ENV: &str = "REWARM_SIM_MOVES";

/// Results of the driver, as far as they are simulated.
pub mod code {
    /// Done.
    pub const SUCCESS: u32 = 0;
    /// No such process, or arguments that do not fit.
    pub const INVALID_VALUE: u32 = 1;
    /// Too little device memory.
    pub const OUT_OF_MEMORY: u32 = 2;
    /// `cuInit` was not called.
    pub const NOT_INITIALIZED: u32 = 3;
    /// No device.
    pub const NO_DEVICE: u32 = 100;
    /// No such device.
    pub const INVALID_DEVICE: u32 = 101;
    /// Rights are missing, or what the operating system refused.
    pub const OPERATING_SYSTEM: u32 = 304;
    /// A context of a device is missing in the caller.
    pub const INVALID_CONTEXT: u32 = 201;
    /// The state does not allow the step.
    pub const ILLEGAL_STATE: u32 = 401;
    /// The lock's time is over.
    pub const NOT_READY: u32 = 600;
    /// The caller has not initialised the driver.
    pub const NOT_PERMITTED: u32 = 800;
    /// The driver cannot do this with this process.
    pub const NOT_SUPPORTED: u32 = 801;
}
