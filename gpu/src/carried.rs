//! What a snapshot keeps of a server's devices, and how its processes are found again after a restore.
//!
//! The copies themselves are memory of the processes and travel as such. Numbers of processes and threads are those of the
//! server's own namespace, the only ones that a restore keeps.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use object::Object;
use object::read::ReadCache;
use serde::{Deserialize, Serialize};

use crate::client::{CallError, Helper};
use crate::driver::Version;
use crate::nvml::Machine;
use crate::order::{Group, Process, Suspended};
use crate::ranges;
use crate::topology::{Device, Uuid};

/// How the paths of device files begin that no dump can carry.
const DEVICE_FILES: [&str; 3] = ["/dev/nvidia", "/dev/gdrdrv", "/dev/infiniband/"];

/// Device state of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carried {
    /// The newest CUDA that the driver supports.
    pub driver: Version,
    /// The driver's own release, such as `580.95.05`; absent where NVML did not tell it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<String>,
    /// The driver's library in the memory of the first process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub library: Option<Library>,
    /// Bytes that the server had on each device, as far as NVML told it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub used: BTreeMap<Uuid, u64>,
    /// The same of each process, by its number in `processes`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub used_by: BTreeMap<i32, BTreeMap<Uuid, u64>>,
    /// All devices that the driver saw.
    pub devices: Vec<Device>,
    /// The processes that use them.
    pub processes: Vec<Process>,
}

/// The driver's library of a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Library {
    /// Its path, as the server sees it.
    pub path: String,
    /// Its ELF build id in hexadecimal digits; absent where it has none.
    pub build_id: Option<String>,
}

impl Carried {
    /// Writes down what was suspended. `machine` is what NVML told before.
    ///
    /// # Errors
    /// [`CallError`], or the kernel's where a process is gone.
    pub fn of(
        helper: &mut Helper,
        suspended: &Suspended,
        machine: Option<&Machine>,
    ) -> Result<Self, CarryError> {
        let inner = |process: &Process| {
            Ok::<_, io::Error>(Process {
                pid: innermost(&format!("/proc/{}/status", process.pid))?,
                restore_thread: innermost(&format!(
                    "/proc/{}/task/{}/status",
                    process.pid, process.restore_thread
                ))?,
                copies: process.copies.clone(),
                direct: process.direct.clone(),
            })
        };
        let processes = suspended.processes.iter().map(inner).collect::<io::Result<Vec<_>>>();
        let processes = processes.map_err(CarryError::Numbers)?;
        let pids: Vec<i32> = suspended.processes.iter().map(|process| process.pid).collect();
        let used = |pids: &[i32]| machine.map(|machine| machine.used_by(pids)).unwrap_or_default();
        let used_by = pids.iter().zip(&processes).map(|(pid, inner)| (inner.pid, used(&[*pid])));
        Ok(Self {
            driver: helper.start()?,
            release: machine.map(|machine| machine.release.clone()),
            library: pids.first().and_then(|pid| library(*pid)),
            used: used(&pids),
            used_by: used_by.filter(|(_, used)| !used.is_empty()).collect(),
            devices: helper.devices()?,
            processes,
        })
    }

    /// Bytes that a restore needs on each of the devices of the snapshot. Where it was not written down, all of it is wanted
    /// on the only device, and of several nobody knows.
    #[must_use]
    pub fn needed(&self) -> BTreeMap<Uuid, u64> {
        match &self.devices[..] {
            [only] if self.used.is_empty() => [(only.uuid, self.bytes())].into(),
            _ => self.used.clone(),
        }
    }

    /// The device to which all copies of a process belong: the only one that the driver saw, or the only one that the process
    /// used. `None` for a process that used several, and where it is not known which.
    #[must_use]
    pub fn gpu_of(&self, pid: i32) -> Option<Uuid> {
        let only = |used: &BTreeMap<Uuid, u64>| match used.len() {
            1 => used.keys().next().copied(),
            _ => None,
        };
        match &self.devices[..] {
            [device] => Some(device.uuid),
            _ if self.used_by.is_empty() => only(&self.used),
            _ => self.used_by.get(&pid).and_then(only),
        }
    }

    /// Whether device memory is not in the processes' own memory but has to come from elsewhere at the restore.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.processes.iter().any(|process| !process.direct.is_empty())
    }

    /// Bytes of device memory.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.processes.iter().map(Process::bytes).sum()
    }

    /// The same processes in a restored group, with the numbers that the helper sees.
    ///
    /// # Errors
    /// [`CarryError::Missing`] for one that is not there.
    pub fn find(&self, group: &dyn Group) -> Result<Vec<Process>, CarryError> {
        let here = group.processes();
        let find = |process: &Process| {
            let pid = here
                .iter()
                .copied()
                .find(|pid| innermost(&format!("/proc/{pid}/status")).ok() == Some(process.pid))?;
            let restore_thread = rewarm_sys::hold::threads(pid).into_iter().find(|thread| {
                innermost(&format!("/proc/{pid}/task/{thread}/status")).ok() == Some(process.restore_thread)
            })?;
            Some(Process { pid, restore_thread, ..process.clone() })
        };
        let missing =
            |process: &Process| CarryError::Missing { pid: process.pid, thread: process.restore_thread };
        self.processes.iter().map(|process| find(process).ok_or_else(|| missing(process))).collect()
    }
}

/// Why device state cannot be carried.
#[derive(Debug, thiserror::Error)]
pub enum CarryError {
    /// The driver.
    #[error(transparent)]
    Call(#[from] CallError),
    /// A process is gone.
    #[error("read the numbers of the server's processes")]
    Numbers(#[source] io::Error),
    /// A process that the snapshot names was not restored.
    #[error("no process {pid} with a thread {thread} is in the restored server, in its own numbers")]
    Missing {
        /// Its number in the server's namespace.
        pid: i32,
        /// The number of the driver's thread in it.
        thread: i32,
    },
    /// A device file is still open or mapped, by a process that the driver does not know.
    #[error(
        "process {pid} holds {path} although the driver has let its devices go: a child that was forked without exec, or a device that the driver does not manage"
    )]
    Leftover {
        /// The process.
        pid: i32,
        /// The file.
        path: String,
    },
}

/// Refuses processes that hold device files after all devices were let go. `given`: those that the replica was given beside the
/// driver's usual ones.
///
/// # Errors
/// [`CarryError::Leftover`] with the first.
pub fn none_left(processes: &[i32], given: &[PathBuf]) -> Result<(), CarryError> {
    for pid in processes {
        if let Some(path) = held(*pid, given) {
            return Err(CarryError::Leftover { pid: *pid, path });
        }
    }
    Ok(())
}

/// The driver's library that a process has in its memory.
fn library(pid: i32) -> Option<Library> {
    let maps = rewarm_sys::procmem::maps(pid).ok()?;
    let map = maps.into_iter().find(|map| ranges::is_driver(&map.path))?;
    // As the process sees it, whatever its root is.
    let file = format!("/proc/{pid}/root{}", map.path);
    Some(Library { build_id: build_id(Path::new(&file)), path: map.path })
}

/// The GNU build id of an ELF file in hexadecimal digits.
#[must_use]
pub fn build_id(path: &Path) -> Option<String> {
    let cache = ReadCache::new(std::fs::File::open(path).ok()?);
    let file = object::File::parse(&cache).ok()?;
    Some(file.build_id().ok()??.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn held(pid: i32, given: &[PathBuf]) -> Option<String> {
    let is_device = |path: &str| {
        DEVICE_FILES.iter().any(|begin| path.starts_with(begin))
            || given.iter().any(|device| *device == Path::new(path))
    };
    let mapped = rewarm_sys::procmem::maps(pid).unwrap_or_default().into_iter().map(|map| map.path);
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let open = entries
        .filter_map(|entry| std::fs::read_link(entry.path()).ok()?.into_os_string().into_string().ok());
    mapped.chain(open).find(|path| is_device(path))
}

/// The number of a task in its own namespace.
fn innermost(status: &str) -> io::Result<i32> {
    let text = std::fs::read_to_string(status)?;
    let numbers = text.lines().find_map(|line| line.strip_prefix("NSpid:"));
    let last = numbers.and_then(|line| line.split_whitespace().next_back()?.parse().ok());
    last.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{status} has no NSpid")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_first_program_wrote_down_is_read_and_needs_all_of_it_on_the_only_device() {
        let uuid = "GPU-00000000-0000-0000-0000-0000000000d0";
        let text = format!(
            r#"{{"driver":13000,"devices":[{{"uuid":"{uuid}","name":"x","total_bytes":8}}],
               "processes":[{{"pid":1,"restore_thread":2,"copies":[{{"start":0,"end":5}}]}}]}}"#
        );
        let carried: Carried = serde_json::from_str(&text).expect("readable");
        assert_eq!(carried.needed(), [(uuid.parse().expect("a GPU"), 5)].into());
        assert_eq!((carried.release, carried.library), (None, None));
    }

    #[test]
    fn the_device_of_copies_is_the_only_one_or_the_only_one_that_the_process_used() {
        let uuid = |number: u8| Uuid([number; 16]);
        let device = |number| Device { uuid: uuid(number), name: String::new(), total_bytes: 8 };
        let bytes = |used: &[u8]| used.iter().map(|number| (uuid(*number), 8)).collect();
        let gpu = |seen: &[u8], used: &[u8], used_by: &[(i32, &[u8])]| {
            let carried = Carried {
                driver: Version(13_000),
                release: None,
                library: None,
                used: bytes(used),
                used_by: used_by.iter().map(|(pid, used)| (*pid, bytes(used))).collect(),
                devices: seen.iter().copied().map(device).collect(),
                processes: Vec::new(),
            };
            carried.gpu_of(7)
        };
        let second = Some(uuid(2));
        assert_eq!(gpu(&[2], &[], &[]), second);
        assert_eq!(gpu(&[1, 2], &[2], &[]), second, "as the first program wrote it down");
        assert_eq!(gpu(&[1, 2], &[1, 2], &[]), None);
        assert_eq!(gpu(&[1, 2], &[], &[]), None);
        assert_eq!(gpu(&[1, 2], &[1, 2], &[(7, &[2]), (8, &[1, 2])]), second);
        assert_eq!(gpu(&[1, 2], &[1, 2], &[(7, &[1, 2]), (8, &[2])]), None);
        assert_eq!(gpu(&[1, 2], &[2], &[(8, &[2])]), None, "of this one nothing was told");
    }

    #[test]
    fn a_process_without_device_files_is_none_left() {
        let own = std::process::id().cast_signed();
        none_left(&[own, 4_194_303], &[]).expect("no device");
        let device = std::fs::File::open("/dev/null").expect("it is always there");
        let error = none_left(&[own], &["/dev/null".into()]).expect_err("it is open");
        assert!(error.to_string().contains("holds /dev/null although"), "{error}");
        drop(device);
        assert_eq!(innermost("/proc/self/status").expect("a number"), own);
        assert!(innermost("/proc/uptime").is_err());
    }
}
