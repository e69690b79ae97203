//! Simulated GPUs for a world: their memory, the library that plays the driver, and the file that says what goes wrong.
//!
//! A replica gets driver and workload in [`INSIDE`] and each GPU in a folder of [`INSIDE_DEVICES`], by a mount of its own: a
//! mount below another would be one that no configuration names. All of it lies outside of the world's folder, in which the
//! world must not find mounts.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rewarm_gpu_sim::device::Device;
use rewarm_gpu_sim::{CONTROL_ENV, DEVICES_ENV, NODES_ENV};
use tempfile::TempDir;

use crate::World;
use crate::command::Rewarm;
use crate::server::{PORT, Question, Server};

/// Where a replica finds driver and workload.
pub const INSIDE: &str = "/srv/gpu";
/// Where it finds the GPUs.
pub const INSIDE_DEVICES: &str = "/srv/gpu-devices";
const MIB: u64 = 1 << 20;

/// GPUs of one world.
#[derive(Debug)]
pub struct Devices {
    folder: TempDir,
    mounts: Vec<PathBuf>,
}

impl Devices {
    /// One GPU of so many MiB for each number; `workload` is the program of the Rust server.
    ///
    /// # Panics
    /// When they cannot be made.
    #[must_use]
    pub fn new(workload: &Path, sizes: &[u64]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for part in ["inside", "inside/lib", "devices"] {
            fs::create_dir(folder.path().join(part)).expect("a folder");
        }
        let program = std::env::current_exe().expect("this program");
        // Cargo builds it beside the test program.
        let built = program.with_file_name("librewarm_gpu_sim.so");
        for name in ["libcuda.so.1", "libnvidia-ml.so.1"] {
            fs::copy(&built, folder.path().join("inside/lib").join(name)).expect("the simulated driver");
        }
        fs::copy(workload, folder.path().join("inside/workload")).expect("the workload");
        let mut devices = Self { folder, mounts: Vec::new() };
        for (index, mib) in sizes.iter().enumerate() {
            devices.add(index, *mib);
        }
        devices
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Folder of the libraries that play the driver's, on the machine.
    #[must_use]
    pub fn libraries(&self) -> PathBuf {
        self.path("inside/lib")
    }

    /// Folder of the GPUs, on the machine.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.path("devices")
    }

    fn add(&mut self, index: usize, mib: u64) {
        let device = self.path("devices").join(index.to_string());
        fs::create_dir(&device).expect("a folder");
        let options = format!("size={mib}m,mode=0755");
        mount(Some("tmpfs"), &device, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
            .expect("mount");
        fs::write(device.join("uuid"), format!("{:032x}", 0xd0 + index)).expect("write");
        self.mounts.push(device);
    }

    /// Says what goes wrong from now on; see `gpu/sim/src/control.rs`.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn control(&self, rules: &str) {
        let _ = fs::remove_file(self.path("control.seen"));
        fs::write(self.path("control"), rules).expect("write");
    }

    /// Whether a rule was followed since [`Devices::control`].
    #[must_use]
    pub fn met_rule(&self) -> bool {
        self.path("control.seen").exists()
    }

    /// The rules that were followed since [`Devices::control`], in their order.
    #[must_use]
    pub fn met(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("control.seen")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Waits until a rule is being followed.
    ///
    /// # Panics
    /// When none is within 20 seconds.
    pub fn await_rule(&self, world: &World) {
        world.await_state("the driver meets its rule", Duration::from_secs(20), || self.met_rule());
    }

    /// Puts another build of the driver's library in the place of the one that servers find.
    ///
    /// # Panics
    /// When it has no build id that could be changed.
    pub fn other_build(&self) {
        let library = self.path("inside/lib/libcuda.so.1");
        let mut bytes = fs::read(&library).expect("the simulated driver");
        // Length of the name, length of the id, the type of the note, the name.
        let note = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0";
        let at = bytes.windows(note.len()).position(|window| window == note).expect("a build id");
        bytes[at + note.len()] ^= 1;
        // Beside it and renamed: running servers keep theirs.
        let new = self.path("inside/lib/new");
        fs::write(&new, bytes).expect("write");
        fs::rename(new, library).expect("rename");
    }

    /// MiB that are taken on a GPU.
    ///
    /// # Panics
    /// When it is gone.
    #[must_use]
    pub fn used_mib(&self, index: usize) -> u64 {
        let device = Device { folder: self.mounts[index].clone(), uuid: [0; 16], name: String::new() };
        let (total, free) = device.memory().expect("a GPU");
        (total - free) / MIB
    }

    /// Takes memory of a GPU for another user, until the file that is named is removed.
    ///
    /// # Panics
    /// When there is not so much.
    #[must_use]
    pub fn neighbour(&self, index: usize, mib: usize) -> PathBuf {
        let file = self.mounts[index].join("neighbour");
        fs::write(&file, vec![1; mib << 20]).expect("room");
        file
    }

    /// Marks a GPU as cut into instances (`mig`) or as a part of one (`vgpu`), or takes the mark away.
    ///
    /// # Panics
    /// When it is gone.
    pub fn mark(&self, index: usize, mark: &str, on: bool) {
        let file = self.mounts[index].join(mark);
        let done = if on { fs::write(&file, "") } else { fs::remove_file(&file) };
        done.expect("a GPU");
    }

    /// Puts another GPU into the place of one, with as much memory. Nothing may use it.
    ///
    /// # Panics
    /// When there is none.
    pub fn replace(&self, index: usize, uuid: u128, name: &str) {
        let device = &self.mounts[index];
        fs::write(device.join("uuid"), format!("{uuid:032x}")).expect("a GPU");
        fs::write(device.join("name"), name).expect("a GPU");
    }

    /// Takes a GPU away, as if the machine had fewer, or brings it back.
    ///
    /// # Panics
    /// When it is not there, or there already.
    pub fn hide(&self, index: usize, hidden: bool) {
        let (shown, away) = (self.mounts[index].join("uuid"), self.mounts[index].join("away"));
        let moved = if hidden { fs::rename(shown, away) } else { fs::rename(away, shown) };
        moved.expect("a GPU");
    }

    /// A call whose replica finds these GPUs.
    #[must_use]
    pub fn seen_by(&self, call: Rewarm) -> Rewarm {
        call.env("REWARM_LIBCUDA", self.path("inside/lib/libcuda.so.1"))
            .env("REWARM_LIBNVML", self.path("inside/lib/libnvidia-ml.so.1"))
            .env(DEVICES_ENV, self.path("devices"))
            .env(CONTROL_ENV, self.path("control"))
    }

    /// A server in Rust with `mib` MiB of weights and threads that map and unmap memory.
    #[must_use]
    pub fn server(&self, mib: u64) -> Server {
        let (port, mib) = (PORT.to_string(), mib.to_string());
        let program = format!("{INSIDE}/workload");
        let library = format!("{INSIDE}/lib/libcuda.so.1");
        let command = [&program, "--library", &library, "--port", &port, "--mib", &mib].map(str::to_owned);
        Server {
            name: "device",
            command: command.into(),
            port: PORT,
            ready: format!("http://127.0.0.1:{PORT}/health"),
            env: self.env(),
            mounts: self.binds(),
            needs: Vec::new(),
            questions: vec![
                Question::post("/generate", &serde_json::json!("a prompt")),
                Question::get("/check").except(&["/churned"]),
            ],
            probe: None,
        }
    }

    /// Three processes with device memory below a shell that has none: one on the first GPU, one on the second, and the one that
    /// is asked in the first place with its weights on the first and its KV cache on the second. Each listens on a port of its
    /// own, see [`Devices::SEVERAL`].
    #[must_use]
    pub fn several(&self) -> Server {
        let mut server = self.server(8);
        server.name = "several";
        let [asked, first, second] = Self::SEVERAL;
        let workload = format!("{INSIDE}/workload --library {INSIDE}/lib/libcuda.so.1 --port");
        let command = format!(
            "{workload} {first} --mib 4 --seed 2 & {workload} {second} --mib 4 --seed 3 --device 1 & \
             {workload} {asked} --mib 8 --kv-device 1 & wait"
        );
        server.command = ["sh", "-c", &command].map(str::to_owned).into();
        server
    }

    /// The ports of the processes of [`Devices::several`].
    pub const SEVERAL: [u16; 3] = [PORT, PORT + 1, PORT + 2];

    /// A server in Python, by ctypes.
    #[must_use]
    pub fn python_server(&self) -> Server {
        let mut server = Server::cuda(&format!("{INSIDE}/lib/libcuda.so.1"));
        server.env = self.env();
        server.mounts.extend(self.binds());
        server
    }

    fn env(&self) -> Vec<(String, String)> {
        // A container has no device nodes of the host's but those that it is given.
        [(DEVICES_ENV, INSIDE_DEVICES.to_owned()), (NODES_ENV, String::new())]
            .map(|(name, value)| (name.to_owned(), value))
            .into()
    }

    fn binds(&self) -> Vec<String> {
        let inside = format!("{}:{INSIDE}:ro", self.path("inside").display());
        let devices = self.mounts.iter().enumerate();
        let devices = devices.map(|(index, device)| format!("{}:{INSIDE_DEVICES}/{index}", device.display()));
        std::iter::once(inside).chain(devices).collect()
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        for device in &self.mounts {
            let _ = umount2(device, MntFlags::MNT_DETACH);
        }
    }
}
