//! Pauses a replica, so that it takes no device memory and no processor, and wakes it.
//!
//! A server that uses CUDA has its device memory moved into its host memory by the driver before it is frozen; any other
//! server is only frozen. The state belongs to the replica and not to the command that asked: it stays when the command
//! goes. The driver's calls are made by a helper process of this shim, started when the first server with the driver's
//! library is paused.

use std::time::{Duration, Instant};

use rewarm_gpu::order;
use rewarm_gpu::place::InProcess;
use rewarm_gpu::preflight::Purpose;

use crate::error::Error;
use crate::record::{Device, Status, WakeCost};
use crate::shim::device::{Away, Tasks};
use crate::shim::protocol::{Paused, Woken};
use crate::shim::replica::{Asker, Replica};

/// Whether a process is going to die as soon as it runs.
fn is_killed(pid: u32) -> bool {
    const KILL: u64 = 1 << (nix::libc::SIGKILL - 1);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let pending = |line: &str| {
        let digits = line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:"))?;
        u64::from_str_radix(digits.trim(), 16).ok()
    };
    status.lines().filter_map(pending).any(|signals| signals & KILL != 0)
}

impl Replica {
    /// Moves device memory to the host and freezes the server.
    pub(super) fn pause(&self, asker: Asker<'_>, lock_timeout: Duration) -> Result<Paused, Error> {
        let began = Instant::now();
        let (_busy, parts) = self.begin("pause", asker.id)?;
        if self.lock().frozen_by.is_some() {
            return Err(self.busy_with("it is frozen"));
        }
        let mut looked = self.examine(parts, Purpose::Pause, false)?;
        let mut helper = self.helper.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let tasks = Tasks(&parts.cgroup);
        let (found, state) = (std::mem::take(&mut looked.processes), &mut InProcess::default());
        let suspended = order::suspend_found(&mut helper, &tasks, found, lock_timeout, state)
            .map_err(|failure| self.not_suspended(&helper, failure))?;
        let (bytes, in_driver) = (suspended.bytes(), suspended.driver);
        let away = Away::new(suspended.processes, &looked);
        self.change(|inner| inner.paused = Some(away));
        let first = WakeCost::guess(began.elapsed().saturating_sub(in_driver), in_driver, bytes);
        self.device(|device| {
            device.bytes = bytes;
            device.wake.get_or_insert(first);
        });
        self.set_status(Status::Paused)?;
        let wake =
            self.lock().record.as_ref().and_then(|record| record.device).and_then(|device| device.wake);
        let wakes_in = wake.map_or(Duration::ZERO, |wake| wake.estimate(bytes));
        Ok(Paused { device_bytes: bytes, took: began.elapsed(), in_driver, wakes_in })
    }

    /// Moves device memory back and lets the server go on.
    pub(super) fn wake(&self, asker: Asker<'_>) -> Result<Woken, Error> {
        let began = Instant::now();
        if self.waits_drained() {
            let (_busy, _) = self.begin("wake", asker.id)?;
            self.take_over(asker);
            return Ok(Woken { device_bytes: 0, took: Duration::ZERO, in_driver: Duration::ZERO });
        }
        let (_busy, parts) = self.begin_paused("wake", asker.id)?;
        if self.lock().init.is_some_and(is_killed) {
            // Frozen by cgroup v1, it dies only when it is thawed. Nothing else of it can be done.
            parts.cgroup.thaw()?;
            return Err(self.out_of_order("wake", Status::Exited, "paused"));
        }
        let away = self.lock().paused.clone().unwrap_or_default();
        let mut helper = self.helper.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let resumed = self.bring_back(&mut helper, parts, &away, Duration::ZERO)?;
        let bytes = away.bytes();
        let committed = self.change(|inner| {
            inner.paused = None;
            inner.kept = None;
            inner.committed
        });
        let other = began.elapsed().saturating_sub(resumed.restore);
        self.device(|device| {
            device.wake = Some(device.wake.unwrap_or_default().corrected(other, resumed.restore, bytes));
        });
        self.take_over(asker);
        self.set_status(if committed { Status::Ready } else { Status::Starting })?;
        let in_driver = resumed.restore + resumed.unlock;
        Ok(Woken { device_bytes: bytes, took: began.elapsed(), in_driver })
    }

    /// Changes what is written down about the replica's device memory.
    pub(super) fn device(&self, change: impl FnOnce(&mut Device)) {
        self.change(|inner| {
            if let Some(record) = &mut inner.record {
                change(record.device.get_or_insert_default());
            }
        });
    }

    /// Before the server is ended: one that only stands still is let go, so that it may handle the signal. One whose device
    /// memory lies in its host memory cannot do anything, and is killed as it stands.
    pub(super) fn thaw_to_stop(&self) -> Result<bool, Error> {
        let Some(away) = self.change(|inner| inner.paused.take()) else { return Ok(true) };
        let plain = away.processes.is_empty();
        if plain && let Some(parts) = self.parts.get() {
            parts.cgroup.thaw()?;
        }
        Ok(plain)
    }
}
