//! Bad input and bad luck: a clear error, the right exit code, the server still serving, nothing left behind.

mod awkward;
mod contents;
mod criu;
mod disk_cache;
mod executed;
mod filling;
mod forged;
mod freeze;
mod input;
mod killed;
mod machine;
mod servers;
mod shared_memory;
mod signatures;
mod slow_stores;
mod stores;
