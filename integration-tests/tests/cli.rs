//! What the program prints is interface: its outputs and errors as snapshots.

mod errors;
mod outputs;
