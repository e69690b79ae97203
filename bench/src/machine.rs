//! What the machine is, and how much processor time it has spent.

use std::io;

use procfs::{CurrentSI, KernelStats};
use serde::Serialize;

use crate::error::{Error, Result};

/// The machine on which figures were measured.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Model of the processor.
    pub processor: String,
    /// Processors that this process may use.
    pub cores: usize,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Release of the kernel.
    pub kernel: String,
}

impl Machine {
    /// This machine.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn here() -> Result<Self> {
        let read = |name: &str| {
            std::fs::read_to_string(format!("/proc/{name}")).map_err(Error::io(format!("read /proc/{name}")))
        };
        let value = |text: &str, key: &str| {
            let line = text.lines().find(|line| line.starts_with(key))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let memory = value(&read("meminfo")?, "MemTotal").unwrap_or_default();
        let kib: u64 = memory.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0);
        Ok(Self {
            processor: value(&read("cpuinfo")?, "model name")
                .unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: kib << 10,
            kernel: read("sys/kernel/osrelease")?.trim().to_owned(),
        })
    }
}

/// Milliseconds of processor time that all processes and the kernel have spent since the start of the machine. A difference
/// of two holds what a case cost, wherever it was spent (shim, pager, CRIU), and whatever else ran meanwhile.
pub(crate) fn busy_ms() -> Result<f64> {
    let stats = KernelStats::current()
        .map_err(io::Error::other)
        .map_err(Error::io("read the processor times in /proc/stat"))?;
    let cpu = stats.total;
    let rest = [cpu.irq, cpu.softirq].into_iter().flatten().sum::<u64>();
    let ticks = cpu.user + cpu.nice + cpu.system + rest;
    Ok(ticks as f64 * 1000.0 / procfs::ticks_per_second() as f64)
}
