//! Devices: what NVML and `/proc` tell, and, where the user wants it, what the CUDA driver says.
//!
//! A machine without a GPU is an ordinary one.

use std::path::{Path, PathBuf};

use rewarm_gpu::nvml::{self, Machine, Silent};
use rewarm_gpu::preflight::{self, Proc, Refusal};
use rewarm_gpu::{Helper, Launch};

use super::{Need, Places};
use crate::render::{bytes, count};

/// Where the driver's kernel module tells its release.
const MODULE: &str = "/proc/driver/nvidia/version";
/// The first release that has the checkpoint calls.
const RELEASE_MIN: u32 = 570;

pub(super) fn needs(places: &Places) -> Vec<Need> {
    let mut needs = seen(nvml::look(&places.libnvml), Path::new(MODULE).exists(), &Proc::here());
    needs.extend(places.ask_driver.as_deref().map(driver));
    needs
}

/// What NVML and `/proc` tell; the second also where the first is silent and the driver's `module` is there.
fn seen(machine: Result<Machine, Silent>, module: bool, proc: &Proc) -> Vec<Need> {
    match machine {
        Ok(machine) => {
            let mut needs = of_machine(&machine);
            needs.extend(unfit(proc.machine().into_iter().chain(preflight::devices(&machine)).collect()));
            needs.extend(proc.serves_mps().map(mps));
            needs
        }
        Err(silent) => {
            let mut needs = vec![without_nvml(&silent, module)];
            if module {
                needs.extend(unfit(proc.machine()));
                needs.extend(proc.serves_mps().map(mps));
            }
            needs
        }
    }
}

fn unfit(refusals: Vec<Refusal>) -> Option<Need> {
    if refusals.is_empty() {
        return None;
    }
    Some(Need::degraded(
        "gpu checkpoint",
        preflight::Unfit(refusals).to_string(),
        "servers that use CUDA can be neither snapshotted nor paused",
        "use whole GPUs of an x86_64 machine whose processes root may trace",
    ))
}

fn mps(pid: i32) -> Need {
    Need::degraded(
        "gpu mps",
        format!("process {pid} serves MPS"),
        "servers that share a GPU by it can be neither snapshotted nor paused",
        "start servers where they do not reach its pipe, or end it: echo quit | nvidia-cuda-mps-control",
    )
}

fn without_nvml(silent: &Silent, module: bool) -> Need {
    if module {
        return Need::degraded(
            "gpu",
            format!("a driver, and {silent}"),
            "free device memory is not known before the driver is called",
            "install the driver's libnvidia-ml.so.1, or name it by REWARM_LIBNVML",
        );
    }
    Need::ok("gpu", "none, so servers that use CUDA have no place here")
}

fn of_machine(machine: &Machine) -> Vec<Need> {
    let describe = |gpu: &nvml::Gpu| {
        format!("{} with {} of {} free", gpu.name, bytes(gpu.free_bytes), bytes(gpu.total_bytes))
    };
    let all: Vec<String> = machine.gpus.iter().map(describe).collect();
    let found =
        format!("driver {}, {}: {}", machine.release, count(machine.gpus.len(), "GPU"), all.join(", "));
    let mut needs = vec![Need::ok("gpu", found)];
    let major = machine.release.split('.').next().and_then(|major| major.parse::<u32>().ok());
    if major.is_some_and(|major| major < RELEASE_MIN) {
        needs.push(Need::degraded(
            "gpu driver",
            format!("{}, at least {RELEASE_MIN} is needed", machine.release),
            "servers that use CUDA can be neither snapshotted nor paused",
            "install a driver of R580 or newer",
        ));
    }
    if machine.gpus.iter().any(|gpu| gpu.persistent == Some(false)) {
        needs.push(Need::degraded(
            "gpu persistence",
            "off",
            "the first use of a GPU that nobody uses takes seconds, in each restore",
            "nvidia-smi -pm 1, or run nvidia-persistenced",
        ));
    }
    needs
}

/// What the driver says to a helper process, as a shim starts one.
fn driver(program: &Path) -> Need {
    const NAME: &str = "cuda driver";
    let launch = Launch { program: PathBuf::from(program), args: vec!["gpu-helper".into()], env: Vec::new() };
    let mut helper = Helper::new(launch);
    let answer = helper.start().and_then(|version| Ok((version, helper.devices()?)));
    match answer {
        Ok((version, devices)) => {
            let all: Vec<String> =
                devices.iter().map(|device| format!("{} ({})", device.uuid, device.name)).collect();
            Need::ok(NAME, format!("CUDA {version}, checkpoint calls are there: {}", all.join(", ")))
        }
        Err(error) => Need::missing(
            NAME,
            error.to_string(),
            "servers that use CUDA can be neither snapshotted nor restored nor paused",
            "install a driver of R580 or newer, or name its library by REWARM_LIBCUDA",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::State;

    fn machine(release: &str, sharing: nvml::Sharing, persistent: bool) -> Machine {
        let gpu = nvml::Gpu {
            uuid: rewarm_gpu::Uuid([1; 16]),
            name: "H100".into(),
            total_bytes: 80 << 30,
            free_bytes: 20 << 30,
            sharing,
            persistent: Some(persistent),
            used_by: Default::default(),
        };
        Machine { release: release.into(), gpus: vec![gpu] }
    }

    fn told(machine: &Machine) -> Vec<(&'static str, State)> {
        let proc = Proc::at(Path::new("/no/such/proc"), preflight::ARCHITECTURE);
        seen(Ok(machine.clone()), true, &proc).iter().map(|need| (need.name, need.state)).collect()
    }

    #[test]
    fn a_machine_without_a_gpu_is_an_ordinary_one() {
        let silent = nvml::look(Path::new("/no/such/libnvidia-ml.so.1")).expect_err("there is none");
        assert_eq!(without_nvml(&silent, false).state, State::Ok);
        let need = without_nvml(&silent, true);
        assert_eq!(need.state, State::Degraded);
        assert!(need.found.contains("/no/such/libnvidia-ml.so.1"), "{}", need.found);
    }

    #[test]
    fn an_old_driver_instances_and_no_persistence_are_told_each() {
        assert_eq!(told(&machine("580.95.05", nvml::Sharing::Whole, true)), [("gpu", State::Ok)]);
        let names: Vec<&str> = told(&machine("565.57", nvml::Sharing::Instances, false))
            .into_iter()
            .filter(|(_, state)| *state == State::Degraded)
            .map(|(name, _)| name)
            .collect();
        assert_eq!(names, ["gpu driver", "gpu persistence", "gpu checkpoint"]);
    }

    #[test]
    fn what_proc_tells_is_told_without_nvml_too() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().expect("below the folder")).expect("a folder");
            std::fs::write(path, text).expect("write");
        };
        write("version", "Linux version 4.4.0 #1 SMP Sun Jan 10 15:06:54 PST 2016");
        write("sys/kernel/yama/ptrace_scope", "3\n");
        write("17/comm", "nvidia-cuda-mps\n");
        let proc = Proc::at(folder.path(), "aarch64");
        let silent = || nvml::look(Path::new("/no/such/libnvidia-ml.so.1")).expect_err("there is none");
        let machine = machine("580.95.05", nvml::Sharing::Whole, true);
        for (seen, first) in
            [(seen(Err(silent()), true, &proc), State::Degraded), (seen(Ok(machine), true, &proc), State::Ok)]
        {
            let names: Vec<_> = seen.iter().map(|need| (need.name, need.state)).collect();
            let degraded = State::Degraded;
            assert_eq!(names, [("gpu", first), ("gpu checkpoint", degraded), ("gpu mps", degraded)]);
            for word in ["aarch64", "gVisor", "ptrace_scope is 3"] {
                assert!(seen[1].found.contains(word), "{word}: {}", seen[1].found);
            }
            assert!(seen[2].found.contains("process 17"), "{}", seen[2].found);
        }
        // Without a driver none of it is anybody's business.
        let names: Vec<_> = seen(Err(silent()), false, &proc).iter().map(|need| need.name).collect();
        assert_eq!(names, ["gpu"]);
    }

    #[test]
    fn a_driver_that_cannot_be_asked_is_missing() {
        let need = driver(Path::new("/no/such/program"));
        assert_eq!(need.state, State::Missing);
        assert!(need.found.contains("/no/such/program cannot be started"), "{}", need.found);
    }
}
