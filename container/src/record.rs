//! What is written down about a replica: `replica.json` while it lives, `exit.json` when it has ended.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use rewarm_probe::Resume;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Context, Error};
use crate::spec::{Name, Publish, Spec};

/// What a replica does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It is being made and nobody has committed it yet.
    Starting,
    /// It serves.
    Ready,
    /// It exists but its processes are frozen.
    Frozen,
    /// It was paused: it takes no device memory and no processor until it is woken.
    Paused,
    /// A pause or a snapshot left a process of it in a state of the CUDA driver from which it cannot go on. It can only be stopped.
    Stranded,
    /// It is being stopped.
    Stopping,
    /// Its server has ended.
    Exited,
    /// Its shim or its pager died, or the machine was restarted.
    Crashed,
}

impl Status {
    /// Whether nothing but the end follows.
    pub(crate) fn is_end(self) -> bool {
        matches!(self, Self::Stopping | Self::Exited | Self::Crashed)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Frozen => "frozen",
            Self::Paused => "paused",
            Self::Stranded => "stranded",
            Self::Stopping => "stopping",
            Self::Exited => "exited",
            Self::Crashed => "crashed",
        })
    }
}

/// Where a replica's first instruction came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "started")]
pub enum Origin {
    /// Its command was started.
    Cold,
    /// It was restored.
    Restored {
        /// The snapshot's reference, with its digest.
        source: String,
    },
}

/// `replica.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The replica.
    pub name: Name,
    /// Different for every replica, clones included.
    pub uuid: Uuid,
    /// 0 for a cold start, one more for each restore of a restored one.
    pub generation: u64,
    /// When it was made.
    pub created: Timestamp,
    /// Cold or restored.
    #[serde(flatten)]
    pub origin: Origin,
    /// What was asked for.
    pub spec: Spec,
    /// What it does.
    pub status: Status,
    /// Process number of the shim.
    pub shim_pid: u32,
    /// Process number of the server's first process, seen from the host.
    pub pid: Option<u32>,
    /// Name of its cgroup below each hierarchy.
    pub cgroup: String,
    /// Published ports, with the ports that the kernel chose.
    pub published: Vec<Publish>,
    /// Its device memory, from its first pause on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<Device>,
    /// Whether a restored replica's memory is complete; absent before it is restored, and after a cold start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// Set from the moment in which a command begins to drain it until it goes on: what it goes on by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drained: Option<Resume>,
}

/// Device memory of a replica.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// Bytes of device memory, as its restore or its last pause found them. While the replica is paused they lie in its host
    /// memory.
    pub bytes: u64,
    /// What waking it costs, from its restore or its first pause on.
    pub wake: Option<WakeCost>,
    /// How long the driver took to bring device memory back at the restore.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restored_in: Option<Duration>,
}

/// What it costs to wake a replica: a time that is always the same, and one for each byte of device memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct WakeCost {
    /// The former, in seconds.
    pub base_seconds: f64,
    /// The latter, in seconds for each GiB.
    pub seconds_per_gib: f64,
    /// How many wakes it was measured by; with none it is a guess from the pause.
    pub wakes: u32,
}

impl WakeCost {
    /// Before any wake: as long as the pause took.
    #[must_use]
    pub fn guess(other: Duration, driver: Duration, bytes: u64) -> Self {
        Self {
            base_seconds: other.as_secs_f64(),
            seconds_per_gib: per_gib(driver, bytes).unwrap_or(0.0),
            wakes: 0,
        }
    }

    /// How long waking takes with so much device memory.
    #[must_use]
    pub fn estimate(&self, bytes: u64) -> Duration {
        let seconds = self.base_seconds + self.seconds_per_gib * gib(bytes);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    /// With one more measurement, which counts half: a machine's speed changes with its other load.
    #[must_use]
    pub fn corrected(&self, other: Duration, driver: Duration, bytes: u64) -> Self {
        let mean = |old: f64, new: f64| if self.wakes == 0 { new } else { f64::midpoint(old, new) };
        Self {
            base_seconds: mean(self.base_seconds, other.as_secs_f64()),
            // Without device memory nothing is learned about its speed.
            seconds_per_gib: per_gib(driver, bytes)
                .map_or(self.seconds_per_gib, |new| mean(self.seconds_per_gib, new)),
            wakes: self.wakes.saturating_add(1),
        }
    }
}

fn per_gib(driver: Duration, bytes: u64) -> Option<f64> {
    (bytes > 0).then(|| driver.as_secs_f64() / gib(bytes))
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1_u32 << 30)
}

/// What is in place of a restored replica's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum Memory {
    /// It is being filled; who touches a part that is missing waits for it.
    Filling,
    /// All of it is in place, and nobody waits any more.
    Present {
        /// Since when.
        since: Timestamp,
    },
}

/// `identity.json` in `/run/rewarm` inside the replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The replica.
    pub name: Name,
    /// Different for every replica, clones included.
    pub uuid: Uuid,
    /// 0 for a cold start, one more for each restore of a restored one.
    pub generation: u64,
    /// When the replica was made.
    pub time: Timestamp,
}

/// How the server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It returned this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
    /// Nobody was there to see it.
    Unknown,
}

impl ExitStatus {
    /// The number that a shell would show: the code, or 128 and the signal.
    #[must_use]
    pub fn code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
            Self::Unknown => 255,
        }
    }
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "code {code}"),
            Self::Signal(signal) => match nix::sys::signal::Signal::try_from(*signal) {
                Ok(known) => write!(f, "signal {known}"),
                Err(_) => write!(f, "signal {signal}"),
            },
            Self::Unknown => f.write_str("an unknown status"),
        }
    }
}

/// Why the server ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "cause", content = "reason")]
pub enum Cause {
    /// By itself.
    Ended,
    /// Somebody asked for it to be stopped.
    Stopped,
    /// Somebody asked for it to be killed, and said why.
    Killed(String),
    /// The kernel killed one of its processes because the memory limit was reached.
    OutOfMemory,
    /// A resident (the pager) died or failed before it was done, so its memory could no longer be trusted.
    Resident(String),
    /// The shim died.
    Crashed,
}

/// `exit.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// How the server ended.
    pub status: ExitStatus,
    /// Why.
    #[serde(flatten)]
    pub cause: Cause,
    /// When.
    pub ended: Timestamp,
}

impl fmt::Display for Exit {
    /// For a sentence: `it ended with code 3, since its memory limit was reached`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it ended with {}", self.status)?;
        match &self.cause {
            Cause::Ended | Cause::Stopped => Ok(()),
            Cause::Killed(reason) => write!(f, ", killed: {reason}"),
            Cause::OutOfMemory => f.write_str(", since its memory limit was reached"),
            Cause::Resident(reason) => {
                write!(f, ", killed because its memory could not be trusted: {reason}")
            }
            Cause::Crashed => f.write_str(", together with its shim"),
        }
    }
}

/// Writes a file so that a reader sees the old content or the new, never a part.
pub(crate) fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let text = serde_json::to_vec_pretty(value).expect("these types have string keys only");
    let temporary = path.with_extension("json.new");
    let written = std::fs::write(&temporary, text).context("write", temporary.display());
    let replaced =
        written.and_then(|()| std::fs::rename(&temporary, path).context("rename", temporary.display()));
    if replaced.is_err() {
        // A disk that is full has no room for half a file. The error that is told is the first one.
        let _ = std::fs::remove_file(&temporary);
    }
    replaced
}

/// Reads such a file; `None` if it does not exist or is not readable as what it should be.
pub(crate) fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Option<T> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn what_cannot_be_replaced_stays_and_nothing_lies_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("replica.json");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("kept"), "").unwrap();
        write_json(&path, &1).unwrap_err();
        let left: Vec<_> =
            std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["replica.json"]);
    }

    #[test]
    fn what_waking_costs_begins_as_a_guess_and_follows_the_measurements() {
        let second = Duration::from_secs(1);
        let guess = WakeCost::guess(second, second * 4, 2 * GIB);
        assert_eq!((guess.estimate(2 * GIB), guess.estimate(0), guess.wakes), (second * 5, second, 0));
        // The first measurement takes the guess's place, each further one counts half.
        let first = guess.corrected(second * 2, second * 2, 2 * GIB);
        assert_eq!((first.estimate(2 * GIB), first.wakes), (second * 4, 1));
        let next = first.corrected(second * 4, second * 6, 2 * GIB);
        assert_eq!((next.estimate(0), next.estimate(2 * GIB), next.wakes), (second * 3, second * 7, 2));
        // Without device memory its speed stays as it was.
        assert!((next.corrected(second, second, 0).seconds_per_gib - next.seconds_per_gib).abs() < 1e-9);
        assert_eq!(WakeCost::guess(second, second, 0).estimate(GIB), second);
    }
}
