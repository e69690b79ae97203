//! A machine with simulated devices for one test: the devices, a copy of the driver under its usual name, a cgroup with
//! servers in it, and the file that says what goes wrong. Dropping it takes all of it away.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rewarm_gpu::{Group, Helper, Launch};
use rewarm_gpu_sim::{CONTROL_ENV, DEVICES_ENV, NODES_ENV, VERSION_ENV};
use tempfile::TempDir;

/// How long anything may take here.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// What a lock may wait.
pub(crate) const LOCK: Duration = Duration::from_secs(5);
pub(crate) const MIB: u64 = 1 << 20;

static NUMBER: AtomicU32 = AtomicU32::new(0);

pub(crate) struct World {
    folder: TempDir,
    devices: Vec<PathBuf>,
    pub(crate) group: Freezer,
    servers: Vec<Child>,
}

impl World {
    /// One device of `mib` MiB for each number.
    pub(crate) fn new(devices: &[u64]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let mut world = Self { devices: Vec::new(), group: Freezer::new(), servers: Vec::new(), folder };
        fs::create_dir(world.path("devices")).expect("a folder");
        for (index, mib) in devices.iter().enumerate() {
            world.add_device(index, *mib);
        }
        for name in ["libcuda.so.1", "libnvidia-ml.so.1"] {
            fs::copy(simulated_driver(), world.path(name)).expect("the simulated driver was built");
        }
        world
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn driver(&self) -> PathBuf {
        self.path("libcuda.so.1")
    }

    pub(crate) fn add_device(&mut self, index: usize, mib: u64) {
        let folder = self.path("devices").join(index.to_string());
        fs::create_dir(&folder).expect("a folder");
        rewarm_sys::mount::tmpfs(&folder, mib * MIB, "0755").expect("mount a tmpfs; needs root");
        fs::write(folder.join("uuid"), format!("{:032x}", 0xd0 + index)).expect("write");
        self.devices.push(folder);
    }

    /// Takes a device away, as if its machine had fewer.
    pub(crate) fn remove_device(&mut self, index: usize) {
        let folder = self.path("devices").join(index.to_string());
        fs::remove_file(folder.join("uuid")).expect("a device");
    }

    pub(crate) fn uuid(index: usize) -> rewarm_gpu::Uuid {
        rewarm_gpu::Uuid((0xd0 + index as u128).to_be_bytes())
    }

    /// Bytes that are taken on a device, without the few of its description.
    pub(crate) fn used(&self, index: usize) -> u64 {
        let folder = self.path("devices").join(index.to_string());
        let device = rewarm_gpu_sim::device::Device { folder, uuid: [0; 16], name: String::new() };
        let (total, free) = device.memory().expect("a device");
        (total - free) / MIB * MIB
    }

    /// Says what goes wrong from now on.
    pub(crate) fn control(&self, rules: &str) {
        let _ = fs::remove_file(self.path("control.seen"));
        fs::write(self.path("control"), rules).expect("write");
    }

    /// Does `work`, and takes all rules back as soon as one was followed: who comes later meets none.
    pub(crate) fn once<T>(&self, work: impl FnOnce() -> T) -> T {
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while self.met().is_empty() && !over.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(10));
                }
                self.control("");
            });
            let result = work();
            over.store(true, Ordering::Relaxed);
            result
        })
    }

    /// The rules that were followed since, in their order.
    pub(crate) fn met(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("control.seen")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    pub(crate) fn launch(&self) -> Launch {
        let mut launch = self.launch_with(&self.driver());
        launch.env.push((CONTROL_ENV.into(), self.path("control").into()));
        launch
    }

    pub(crate) fn launch_with(&self, library: &Path) -> Launch {
        Launch {
            program: std::env::current_exe().expect("this program"),
            args: vec!["helper".into(), library.into(), self.path("libnvidia-ml.so.1").into()],
            env: vec![(DEVICES_ENV.into(), self.path("devices").into())],
        }
    }

    pub(crate) fn helper(&self) -> Helper {
        Helper::new(self.launch())
    }

    /// A helper of a driver with that version.
    pub(crate) fn helper_of_version(&self, version: i32) -> Helper {
        let mut launch = self.launch();
        launch.env.push((VERSION_ENV.into(), version.to_string().into()));
        Helper::new(launch)
    }

    /// Starts a server in the group and waits until it answers.
    pub(crate) fn serve(&mut self, flags: &[&str]) -> Server {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.arg("workload").arg("--library").arg(self.driver()).args(flags);
        command.env(DEVICES_ENV, self.path("devices")).env(NODES_ENV, "/dev/loop-control:/dev/fuse");
        command.stdout(Stdio::piped());
        let mut child = command.spawn().expect("this program");
        self.group.join(child.id());
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("its first line");
        let port = line.trim().rsplit(' ').next().and_then(|port| port.parse().ok());
        let pid = child.id().cast_signed();
        self.servers.push(child);
        Server { pid, port: port.unwrap_or_else(|| panic!("the server said {line:?}")) }
    }

    /// Ends one server and waits until it is gone.
    pub(crate) fn kill(&mut self, pid: i32) {
        let at = self.servers.iter().position(|child| child.id().cast_signed() == pid).expect("a server");
        let mut child = self.servers.remove(at);
        child.kill().expect("kill");
        // Frozen, it would not die.
        self.group.thaw().expect("thaw");
        child.wait().expect("reap");
    }

    /// Ends one server of a frozen group. The others do not run an instruction meanwhile: while their device memory is away
    /// that would be their end.
    pub(crate) fn kill_frozen(&mut self, pid: i32) {
        let others: Vec<i32> = self.group.processes().into_iter().filter(|&other| other != pid).collect();
        let tell = |signal| {
            for &other in &others {
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(other), signal).expect("it runs");
            }
        };
        tell(nix::sys::signal::Signal::SIGSTOP);
        self.kill(pid);
        self.group.freeze().expect("freeze");
        tell(nix::sys::signal::Signal::SIGCONT);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.group.thaw();
        for pid in self.group.processes() {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        for child in &mut self.servers {
            let _ = child.wait();
        }
        for device in &self.devices {
            let _ = rewarm_sys::mount::detach(device);
        }
    }
}

/// The library that cargo has built beside this program.
fn simulated_driver() -> PathBuf {
    let program = std::env::current_exe().expect("this program");
    program.with_file_name("librewarm_gpu_sim.so")
}

/// A server that was started.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Server {
    pub(crate) pid: i32,
    port: u16,
}

impl Server {
    pub(crate) fn ask(&self, method: &str, path: &str, body: &str) -> io::Result<String> {
        let mut socket = TcpStream::connect(("127.0.0.1", self.port))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        write!(socket, "{method} {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
        socket.shutdown(std::net::Shutdown::Write)?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
        if head.starts_with("HTTP/1.1 200") {
            Ok(body.to_owned())
        } else {
            Err(io::Error::other(body.to_owned()))
        }
    }

    pub(crate) fn generate(&self) -> String {
        self.ask("POST", "/generate", "a prompt").expect("an answer")
    }

    /// Its device memory is what it was, and so is all other memory that it has looked at.
    #[track_caller]
    pub(crate) fn is_whole(&self) {
        let found: serde_json::Value =
            serde_json::from_str(&self.ask("GET", "/check", "").expect("an answer")).expect("JSON");
        assert_eq!(found["sum"], found["expected"], "{found}");
        assert_eq!((&found["clobbered"], &found["spoiled"]), (&0.into(), &0.into()), "{found}");
        assert_eq!(found["simulated"], true);
    }

    /// Targets of its descriptors that are device nodes.
    pub(crate) fn nodes(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.pid)).expect("it lives");
        let targets = entries.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
        targets
            .filter(|path| path.starts_with("/dev/loop-control") || path.starts_with("/dev/fuse"))
            .collect()
    }
}

/// A cgroup of this test's own.
#[derive(Debug)]
pub(crate) struct Freezer {
    folder: PathBuf,
    v1: bool,
}

impl Freezer {
    fn new() -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("rewarm-gpu-test-{}-{number}", std::process::id());
        let v1 = Path::new("/sys/fs/cgroup/freezer").is_dir();
        let root = Path::new(if v1 { "/sys/fs/cgroup/freezer" } else { "/sys/fs/cgroup" });
        let folder = root.join(name);
        fs::create_dir(&folder).expect("make a cgroup; needs root");
        Self { folder, v1 }
    }

    fn join(&self, pid: u32) {
        fs::write(self.folder.join("cgroup.procs"), pid.to_string()).expect("a cgroup");
    }

    fn write(&self, frozen: bool) -> io::Result<()> {
        let (file, value) = match (self.v1, frozen) {
            (true, true) => ("freezer.state", "FROZEN"),
            (true, false) => ("freezer.state", "THAWED"),
            (false, true) => ("cgroup.freeze", "1"),
            (false, false) => ("cgroup.freeze", "0"),
        };
        fs::write(self.folder.join(file), value)
    }

    pub(crate) fn is_frozen(&self) -> bool {
        let file = if self.v1 { "freezer.state" } else { "cgroup.events" };
        let text = fs::read_to_string(self.folder.join(file)).expect("a cgroup");
        text.trim() == "FROZEN" || text.lines().any(|line| line == "frozen 1")
    }
}

impl Group for Freezer {
    fn processes(&self) -> Vec<i32> {
        let text = fs::read_to_string(self.folder.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    fn freeze(&self) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.is_frozen() {
            self.write(true)?;
            if Instant::now() > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn thaw(&self) -> io::Result<()> {
        self.write(false)
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while fs::remove_dir(&self.folder).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
