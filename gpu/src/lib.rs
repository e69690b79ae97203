//! The device plane: the CUDA driver's checkpoint calls, made by one helper process for each replica.
//!
//! [`helper`] is that process, the only one that loads the driver ([`driver`]); [`client`] starts it, asks it over
//! [`wire`] and replaces it when a call hangs. [`order`] is what snapshot, restore, pause and wake use: all processes of a
//! server go from running ([`states`]) to checkpointed and back, in the only order that works, and after a failure it is
//! known what is true. [`place`] says where device memory is meanwhile, [`custom`] how it gets past the process. [`carried`] is what a snapshot keeps of it. [`topology`] maps devices to those of another machine. [`ranges`] finds the driver's copies of
//! device memory. [`preflight`] refuses what cannot work before anything is locked; [`nvml`] tells what devices have and who
//! uses them. [`provide`] says what a container needs to use them.

pub mod carried;
pub mod client;
pub mod custom;
pub mod driver;
pub mod helper;
pub mod nvml;
pub mod order;
pub mod place;
pub mod preflight;
pub mod provide;
pub mod ranges;
pub mod states;
pub mod topology;
pub mod wire;

pub use client::{CallError, Helper, Kept, Launch};
pub use driver::{Code, Driver, DriverError, Version};
pub use order::{Aftermath, Cause, Failure, Group, Process, Resumed, Suspended};
pub use states::{State, Step};
pub use topology::{Device, Pair, Uuid, Wish};
