//! What NVML tells of the devices: memory, modes, and who uses them. It needs no context, so asking takes no device memory.
//!
//! NVML may be missing where the driver's other library is there, and the other way round. Then nothing is known, and
//! nothing is refused for it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::GpuVirtualizationMode;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use serde::{Deserialize, Serialize};

use crate::topology::{Device, Uuid};

/// Where the library is looked for when nothing else is said.
pub const LIBRARY: &str = "libnvidia-ml.so.1";

/// How a device is shared with others, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sharing {
    /// It belongs to this machine as a whole, be it a virtual one.
    Whole,
    /// It is cut into instances (MIG).
    Instances,
    /// It is a part that a hypervisor gave (vGPU), or one that gives parts.
    Virtual,
}

/// A device as NVML shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// Its identity.
    pub uuid: Uuid,
    /// What it is.
    pub name: String,
    /// Its memory in bytes.
    pub total_bytes: u64,
    /// Bytes of it that nobody has.
    pub free_bytes: u64,
    /// How it is shared.
    pub sharing: Sharing,
    /// Whether the driver stays attached to it while nobody uses it; `None` where it does not tell.
    pub persistent: Option<bool>,
    /// Bytes of each process that computes on it, as far as they are told; numbers of this process's namespace.
    pub used_by: BTreeMap<i32, u64>,
}

/// All that NVML tells.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The driver's release, such as `580.95.05`.
    pub release: String,
    /// The devices.
    pub gpus: Vec<Gpu>,
}

impl Machine {
    /// Bytes that these processes have on each device that they use; empty where it is not told.
    #[must_use]
    pub fn used_by(&self, pids: &[i32]) -> BTreeMap<Uuid, u64> {
        let of = |gpu: &Gpu| pids.iter().filter_map(|pid| gpu.used_by.get(pid)).sum::<u64>();
        self.gpus.iter().map(|gpu| (gpu.uuid, of(gpu))).filter(|(_, bytes)| *bytes > 0).collect()
    }

    /// The devices as the driver would show them, but for the part of their memory that it keeps for itself.
    #[must_use]
    pub fn devices(&self) -> Vec<Device> {
        let device =
            |gpu: &Gpu| Device { uuid: gpu.uuid, name: gpu.name.clone(), total_bytes: gpu.total_bytes };
        self.gpus.iter().map(device).collect()
    }

    /// Free bytes of each device.
    #[must_use]
    pub fn free(&self) -> BTreeMap<Uuid, u64> {
        self.gpus.iter().map(|gpu| (gpu.uuid, gpu.free_bytes)).collect()
    }
}

/// Why NVML tells nothing.
#[derive(Debug, thiserror::Error)]
#[error("{library}: {source}", library = library.display())]
pub struct Silent {
    /// The library.
    library: PathBuf,
    /// What it, or the loader, said.
    source: NvmlError,
}

/// NVML, held open: opening it takes longer than asking it.
#[derive(Debug)]
pub struct Open {
    library: PathBuf,
    nvml: Nvml,
}

impl Open {
    /// Opens it.
    ///
    /// # Errors
    /// [`Silent`]: there is no such library, or no driver.
    pub fn new(library: &Path) -> Result<Self, Silent> {
        let opened = Nvml::builder().lib_path(library.as_os_str()).init();
        let nvml = opened.map_err(|source| Silent { library: library.to_owned(), source })?;
        Ok(Self { library: library.to_owned(), nvml })
    }

    /// What it tells now.
    ///
    /// # Errors
    /// [`Silent`]: a call is refused that every driver knows.
    pub fn look(&self) -> Result<Machine, Silent> {
        let silent = |source| Silent { library: self.library.clone(), source };
        let release = self.nvml.sys_driver_version().map_err(silent)?;
        let count = self.nvml.device_count().map_err(silent)?;
        let gpus = (0..count).map(|index| gpu(&self.nvml, index)).collect::<Result<_, _>>();
        Ok(Machine { release, gpus: gpus.map_err(silent)? })
    }
}

/// Asks NVML once.
///
/// # Errors
/// As [`Open::new`] and [`Open::look`].
pub fn look(library: &Path) -> Result<Machine, Silent> {
    Open::new(library)?.look()
}

fn gpu(nvml: &Nvml, index: u32) -> Result<Gpu, NvmlError> {
    let device = nvml.device_by_index(index)?;
    let memory = device.memory_info()?;
    let uuid = device.uuid()?;
    let cut = device.mig_mode().is_ok_and(|mode| mode.current != 0);
    // What a driver does not answer here is an ordinary device.
    let sharing = match device.virtualization_mode() {
        _ if cut => Sharing::Instances,
        Ok(
            GpuVirtualizationMode::Vgpu | GpuVirtualizationMode::HostVgpu | GpuVirtualizationMode::HostVsga,
        ) => Sharing::Virtual,
        _ => Sharing::Whole,
    };
    let mut used_by = BTreeMap::new();
    for process in device.running_compute_processes().unwrap_or_default() {
        if let UsedGpuMemory::Used(bytes) = process.used_gpu_memory {
            *used_by.entry(process.pid.cast_signed()).or_default() += bytes;
        }
    }
    Ok(Gpu {
        uuid: uuid.parse().map_err(|_| NvmlError::UnexpectedVariant(index))?,
        name: device.name()?,
        total_bytes: memory.total,
        free_bytes: memory.free,
        sharing,
        persistent: device.is_in_persistent_mode().ok(),
        used_by,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_nvml_is_an_ordinary_error() {
        let error = look(Path::new("/no/such/libnvidia-ml.so.1")).expect_err("missing");
        assert!(error.to_string().starts_with("/no/such/libnvidia-ml.so.1: "), "{error}");
    }

    #[test]
    fn what_processes_have_is_told_for_each_device_that_they_use() {
        let gpu = |number: u8, used: &[(i32, u64)]| Gpu {
            uuid: Uuid([number; 16]),
            name: String::new(),
            total_bytes: 100,
            free_bytes: 60,
            sharing: Sharing::Whole,
            persistent: None,
            used_by: used.iter().copied().collect(),
        };
        let gpus = vec![gpu(1, &[(7, 10), (8, 20), (9, 5)]), gpu(2, &[(9, 40)])];
        let machine = Machine { release: String::new(), gpus };
        assert_eq!(machine.used_by(&[7, 8]), [(Uuid([1; 16]), 30)].into());
        assert_eq!(machine.used_by(&[6]), BTreeMap::new());
        assert_eq!(machine.free()[&Uuid([2; 16])], 60);
    }
}
