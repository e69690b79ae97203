//! What the driver's checkpoint cannot work with, found before any process is locked: each refusal says what was seen and
//! where.
//!
//! Reads `/proc` and what NVML told. What only the driver can see (managed memory, CUDA IPC of before R610) is left to it: a
//! checkpoint that it refuses is undone, and the server goes on.

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::driver::Version;
use crate::nvml::{Machine, Sharing};
use crate::topology::Uuid;

/// The only architecture whose driver carries checkpoints out.
pub const ARCHITECTURE: &str = "x86_64";
/// How gVisor names its kernel, whatever runs below.
const GVISOR: &str = "Linux version 4.4.0 ";
/// Begin of the name of the processes that serve MPS; the kernel keeps 15 letters of it.
const MPS: &str = "nvidia-cuda-mps";
/// Where a client of MPS looks for its server unless its environment names another folder.
const MPS_PIPES: &str = "/tmp/nvidia-mps";
/// Yama's mode in which nobody may attach to a process.
const YAMA_NOBODY: &str = "3";
/// Device files that the driver does not let go of, and what they are for.
const FOREIGN: [(&str, &str); 2] = [("/dev/infiniband/", "RDMA"), ("/dev/gdrdrv", "gdrcopy")];
/// Device files of the driver.
const OWN: &str = "/dev/nvidia";

/// What is going to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The server stays where it is, with all that it holds.
    Pause,
    /// The server is dumped: no device file may be left.
    Snapshot,
}

/// One thing that cannot work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The driver carries checkpoints out on one architecture only.
    #[error("the driver checkpoints on {ARCHITECTURE} only, this machine is {found}")]
    Architecture {
        /// What this machine is.
        found: String,
    },
    /// No process can be dumped there.
    #[error("this machine runs on gVisor, under which neither CRIU nor ptrace works as it has to")]
    Gvisor,
    /// Nobody may look into other processes.
    #[error("kernel.yama.ptrace_scope is 3: nobody may attach to a process until the next boot")]
    Yama,
    /// There is no driver that could be asked.
    #[error("process {pid} has the CUDA driver's library loaded, and {reason}")]
    Driver {
        /// The process.
        pid: i32,
        /// What stands against it: a library that is missing, too old (before R570), or lacks a function.
        reason: String,
    },
    /// A device is cut into instances.
    #[error("{gpu} ({name}) is cut into instances (MIG), which the driver cannot checkpoint")]
    Instances {
        /// The device.
        gpu: Uuid,
        /// What it is.
        name: String,
    },
    /// A device is a part of one.
    #[error("{gpu} ({name}) is a vGPU, which the driver cannot checkpoint")]
    Virtual {
        /// The device.
        gpu: Uuid,
        /// What it is.
        name: String,
    },
    /// A process shares its device by MPS.
    #[error("process {pid} reaches an MPS server through {}, which the driver cannot checkpoint", pipes.display())]
    Mps {
        /// The process.
        pid: i32,
        /// Where it looks for the server.
        pipes: PathBuf,
    },
    /// A device file that the driver does not let go of.
    #[error("process {pid} holds {path} ({what}), which the driver does not let go of")]
    Foreign {
        /// The process.
        pid: i32,
        /// The file.
        path: String,
        /// What it is for.
        what: &'static str,
    },
    /// A device file in a process that the driver does not know.
    #[error(
        "process {pid} holds {path} and does not use CUDA itself: a child that was forked without exec, or one that only asks about devices; start workers by spawn"
    )]
    Child {
        /// The process.
        pid: i32,
        /// The file.
        path: String,
    },
    /// Somebody else holds a thread by ptrace.
    #[error("thread {thread} of process {pid} is traced by process {tracer}; end that debugger first")]
    Traced {
        /// The process.
        pid: i32,
        /// Its thread.
        thread: i32,
        /// The debugger.
        tracer: i32,
    },
    /// The driver has no custom storage.
    #[error(
        "device memory can be moved past the process from CUDA {} (R615) on, the driver has {found}; leave --gpu-direct out",
        crate::custom::VERSION_MIN
    )]
    Direct {
        /// Its version.
        found: Version,
    },
    /// Device memory does not fit into host memory.
    #[error("{needed} bytes of device memory go into host memory, of which {free} are free{}", if *limited { " within the replica's limit" } else { "" })]
    HostMemory {
        /// Bytes of device memory.
        needed: u64,
        /// Bytes that are free.
        free: u64,
        /// Whether it is the replica's own limit that counts.
        limited: bool,
    },
}

/// Refusals as one error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit(pub Vec<Refusal>);

impl std::fmt::Display for Unfit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let all: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&all.join("; "))
    }
}

impl std::error::Error for Unfit {}

/// A `/proc`, and the architecture of the machine that it tells of.
#[derive(Debug, Clone)]
pub struct Proc {
    root: PathBuf,
    architecture: String,
}

impl Proc {
    /// This machine's.
    #[must_use]
    pub fn here() -> Self {
        Self::at(Path::new("/proc"), std::env::consts::ARCH)
    }

    /// Another one: tests write their own.
    #[must_use]
    pub fn at(root: &Path, architecture: &str) -> Self {
        Self { root: root.to_owned(), architecture: architecture.to_owned() }
    }

    /// What the machine itself refuses.
    #[must_use]
    pub fn machine(&self) -> Vec<Refusal> {
        let mut refusals = Vec::new();
        if self.architecture != ARCHITECTURE {
            refusals.push(Refusal::Architecture { found: self.architecture.clone() });
        }
        if self.text("version").starts_with(GVISOR) {
            refusals.push(Refusal::Gvisor);
        }
        if self.text("sys/kernel/yama/ptrace_scope").trim() == YAMA_NOBODY {
            refusals.push(Refusal::Yama);
        }
        refusals
    }

    /// What a server's processes refuse; `cuda` are those of them that the driver knows. `given`: device files that the replica was
    /// given beside the driver's usual ones.
    #[must_use]
    pub fn server(
        &self,
        processes: &[i32],
        cuda: &[i32],
        given: &[PathBuf],
        purpose: Purpose,
    ) -> Vec<Refusal> {
        let mut refusals = Vec::new();
        // All processes of the machine are looked through for it: only where one of these could reach it.
        let serves_mps = OnceCell::new();
        for &pid in processes {
            refusals.extend(self.tracer(pid));
            if cuda.contains(&pid)
                && let Some(client) = self.client_of_mps(pid)
                && *serves_mps.get_or_init(|| self.serves_mps().is_some())
            {
                refusals.push(client);
            }
            if purpose == Purpose::Snapshot {
                refusals.extend(self.devices(pid, cuda.contains(&pid), given));
            }
        }
        refusals
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.root.join(name)).unwrap_or_default()
    }

    /// Numbers that are the names of a folder's entries.
    fn numbers(&self, folder: &str) -> Vec<i32> {
        let entries = fs::read_dir(self.root.join(folder)).into_iter().flatten().flatten();
        let mut numbers: Vec<i32> =
            entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        numbers.sort_unstable();
        numbers
    }

    fn tracer(&self, pid: i32) -> Option<Refusal> {
        self.numbers(&format!("{pid}/task")).into_iter().find_map(|thread| {
            let status = self.text(&format!("{pid}/task/{thread}/status"));
            let line = status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?;
            let tracer = line.trim().parse().ok().filter(|tracer| *tracer != 0)?;
            Some(Refusal::Traced { pid, thread, tracer })
        })
    }

    /// The first process that serves MPS on this machine. Only its clients cannot be checkpointed.
    #[must_use]
    pub fn serves_mps(&self) -> Option<i32> {
        self.numbers("").into_iter().find(|pid| self.text(&format!("{pid}/comm")).starts_with(MPS))
    }

    fn client_of_mps(&self, pid: i32) -> Option<Refusal> {
        let environment = fs::read(self.root.join(format!("{pid}/environ"))).unwrap_or_default();
        let named = environment
            .split(|byte| *byte == 0)
            .find_map(|pair| std::str::from_utf8(pair).ok()?.strip_prefix("CUDA_MPS_PIPE_DIRECTORY="));
        let pipes = PathBuf::from(named.filter(|path| !path.is_empty()).unwrap_or(MPS_PIPES));
        let below = pipes.strip_prefix("/").unwrap_or(&pipes);
        let control = self.root.join(format!("{pid}/root")).join(below).join("control");
        control.exists().then_some(Refusal::Mps { pid, pipes })
    }

    fn devices(&self, pid: i32, cuda: bool, given: &[PathBuf]) -> Vec<Refusal> {
        let own = |path: &str| path.starts_with(OWN) || given.iter().any(|device| *device == Path::new(path));
        let mut refusals = Vec::new();
        for path in self.held(pid) {
            let foreign = FOREIGN.iter().find(|(begin, _)| path.starts_with(begin));
            match foreign {
                Some((_, what)) => refusals.push(Refusal::Foreign { pid, path, what }),
                None if !cuda && own(&path) => refusals.push(Refusal::Child { pid, path }),
                None => {}
            }
        }
        refusals
    }

    /// Device files that a process has open or mapped.
    fn held(&self, pid: i32) -> BTreeSet<String> {
        let maps = self.text(&format!("{pid}/maps"));
        let mapped = maps.lines().filter_map(|line| line.find("/dev/").map(|at| line[at..].to_owned()));
        let fds = fs::read_dir(self.root.join(format!("{pid}/fd"))).into_iter().flatten().flatten();
        let open = fds.filter_map(|fd| fs::read_link(fd.path()).ok()?.into_os_string().into_string().ok());
        mapped.chain(open).filter(|path| path.starts_with("/dev/")).collect()
    }
}

/// What the devices refuse.
#[must_use]
pub fn devices(machine: &Machine) -> Vec<Refusal> {
    let refusal = |gpu: &crate::nvml::Gpu| match gpu.sharing {
        Sharing::Whole => None,
        Sharing::Instances => Some(Refusal::Instances { gpu: gpu.uuid, name: gpu.name.clone() }),
        Sharing::Virtual => Some(Refusal::Virtual { gpu: gpu.uuid, name: gpu.name.clone() }),
    };
    machine.gpus.iter().filter_map(refusal).collect()
}

/// Whether so much device memory finds room in host memory: what is free on the machine, and what the replica's own limit
/// leaves, where it has one.
#[must_use]
pub fn host_memory(needed: u64, free: u64, within_limit: Option<u64>) -> Option<Refusal> {
    let limited = within_limit.is_some_and(|left| left < free);
    let free = within_limit.map_or(free, |left| left.min(free));
    (needed > free).then_some(Refusal::HostMemory { needed, free, limited })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use tempfile::TempDir;

    /// A `/proc` with the process 7, which has the thread 8.
    fn forged() -> (TempDir, Proc) {
        let folder = tempfile::tempdir().expect("a folder");
        let proc = Proc::at(folder.path(), ARCHITECTURE);
        for (name, text) in [
            ("version", "Linux version 6.18.44 (a@b) #1 SMP"),
            ("sys/kernel/yama/ptrace_scope", "1\n"),
            ("7/maps", "7f00-7f01 rw-p 0000 00:00 0\n"),
            ("7/comm", "python3\n"),
            ("7/environ", "A=B\0"),
            ("7/task/7/status", "Name:\tx\nTracerPid:\t0\n"),
            ("7/task/8/status", "Name:\tx\nTracerPid:\t0\n"),
        ] {
            write(&folder, name, text);
        }
        fs::create_dir(folder.path().join("7/fd")).expect("a folder");
        (folder, proc)
    }

    fn write(folder: &TempDir, name: &str, text: &str) {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("below the folder")).expect("a folder");
        fs::write(path, text).expect("write");
    }

    fn texts(refusals: &[Refusal]) -> Vec<String> {
        refusals.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn an_ordinary_server_on_an_ordinary_machine_is_not_refused() {
        let (folder, proc) = forged();
        symlink("/dev/nvidia0", folder.path().join("7/fd/3")).expect("a link");
        assert_eq!(proc.machine(), []);
        assert_eq!(proc.server(&[7], &[7], &[], Purpose::Snapshot), []);
        assert_eq!(Proc::here().server(&[std::process::id().cast_signed()], &[], &[], Purpose::Snapshot), []);
    }

    #[test]
    fn another_architecture_gvisor_and_yama_are_refused() {
        let (folder, _) = forged();
        write(&folder, "version", "Linux version 4.4.0 #1 SMP Sun Jan 10 15:06:54 PST 2016");
        write(&folder, "sys/kernel/yama/ptrace_scope", "3\n");
        let refusals = Proc::at(folder.path(), "aarch64").machine();
        let expected = [Refusal::Architecture { found: "aarch64".into() }, Refusal::Gvisor, Refusal::Yama];
        assert_eq!(refusals, expected);
        assert_eq!(texts(&refusals)[0], "the driver checkpoints on x86_64 only, this machine is aarch64");
    }

    #[test]
    fn a_thread_that_another_debugger_has_is_refused_with_both_numbers() {
        let (folder, proc) = forged();
        write(&folder, "7/task/8/status", "Name:\tx\nTracerPid:\t99\n");
        let refusals = proc.server(&[7], &[7], &[], Purpose::Pause);
        assert_eq!(refusals, [Refusal::Traced { pid: 7, thread: 8, tracer: 99 }]);
    }

    #[test]
    fn a_client_of_mps_is_refused_and_one_that_cannot_reach_the_server_is_not() {
        let (folder, proc) = forged();
        write(&folder, "7/root/tmp/nvidia-mps/control", "");
        assert_eq!(proc.server(&[7], &[7], &[], Purpose::Pause), [], "no server runs");
        write(&folder, "5/comm", "nvidia-cuda-mps\n");
        let refusals = proc.server(&[7], &[7], &[], Purpose::Pause);
        assert_eq!(refusals, [Refusal::Mps { pid: 7, pipes: "/tmp/nvidia-mps".into() }]);
        write(&folder, "7/environ", "A=B\0CUDA_MPS_PIPE_DIRECTORY=/run/mps\0");
        assert_eq!(proc.server(&[7], &[7], &[], Purpose::Pause), []);
        write(&folder, "7/root/run/mps/control", "");
        assert_eq!(
            texts(&proc.server(&[7], &[7], &[], Purpose::Pause)),
            ["process 7 reaches an MPS server through /run/mps, which the driver cannot checkpoint"]
        );
    }

    #[test]
    fn device_files_that_would_stay_are_refused_for_a_snapshot_only() {
        let (folder, proc) = forged();
        symlink("/dev/infiniband/uverbs0", folder.path().join("7/fd/3")).expect("a link");
        write(&folder, "7/maps", "7f00-7f01 rw-s 0000 00:05 4 /dev/gdrdrv\n");
        assert_eq!(proc.server(&[7], &[7], &[], Purpose::Pause), []);
        let texts = texts(&proc.server(&[7], &[7], &[], Purpose::Snapshot));
        assert_eq!(
            texts,
            [
                "process 7 holds /dev/gdrdrv (gdrcopy), which the driver does not let go of",
                "process 7 holds /dev/infiniband/uverbs0 (RDMA), which the driver does not let go of",
            ]
        );
    }

    #[test]
    fn a_child_with_a_device_file_is_refused_with_its_number() {
        let (folder, proc) = forged();
        symlink("/dev/nvidiactl", folder.path().join("7/fd/3")).expect("a link");
        let refusals = proc.server(&[7], &[], &[], Purpose::Snapshot);
        assert_eq!(refusals, [Refusal::Child { pid: 7, path: "/dev/nvidiactl".into() }]);
    }

    #[test]
    fn devices_that_are_cut_or_virtual_are_refused() {
        let gpu = |number: u8, sharing| crate::nvml::Gpu {
            uuid: Uuid([number; 16]),
            name: "x".into(),
            total_bytes: 1,
            free_bytes: 1,
            sharing,
            persistent: Some(true),
            used_by: Default::default(),
        };
        let gpus = vec![gpu(1, Sharing::Whole), gpu(2, Sharing::Instances), gpu(3, Sharing::Virtual)];
        let refusals = devices(&Machine { release: "580".into(), gpus });
        let (cut, part) = (Uuid([2; 16]), Uuid([3; 16]));
        let name = || "x".to_owned();
        assert_eq!(
            refusals,
            [Refusal::Instances { gpu: cut, name: name() }, Refusal::Virtual { gpu: part, name: name() }]
        );
    }

    #[test]
    fn host_memory_is_the_machines_or_what_the_limit_leaves() {
        assert_eq!(host_memory(10, 10, None), None);
        assert_eq!(host_memory(10, 20, Some(10)), None);
        let refusal = host_memory(10, 20, Some(9)).expect("too little");
        assert_eq!(
            refusal.to_string(),
            "10 bytes of device memory go into host memory, of which 9 are free within the replica's limit"
        );
        assert_eq!(
            host_memory(10, 9, Some(20)),
            Some(Refusal::HostMemory { needed: 10, free: 9, limited: false })
        );
    }
}
