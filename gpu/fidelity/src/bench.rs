//! What a claim is carried out with: a helper, servers that use a device, and a look at the device's memory. Dropping it ends all of it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rewarm_gpu::{Helper, Launch, nvml};
use rewarm_gpu_sim::{DEVICES_ENV, NODES_ENV, VERSION_ENV};
use tempfile::TempDir;

/// How long anything may take here.
const PATIENCE: Duration = Duration::from_secs(60);
/// Memory of a simulated device.
const SIMULATED_BYTES: u64 = 64 << 20;
/// What simulated devices hold open.
const SIMULATED_NODES: [&str; 2] = ["/dev/loop-control", "/dev/fuse"];
/// The first version that has all that claims are about.
const SIMULATED_VERSION: i32 = rewarm_gpu::custom::VERSION_MIN.0;

/// A driver and what uses it.
pub(crate) struct Bench {
    library: PathBuf,
    nvml: PathBuf,
    /// Where the simulated devices lie.
    simulated: Option<TempDir>,
    servers: Vec<Child>,
    /// What was seen besides, and nothing is expected of.
    pub(crate) notes: Vec<String>,
}

/// A server that keeps its weights on a device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Server {
    pub(crate) pid: i32,
    port: u16,
}

impl Bench {
    /// The machine's driver, or the library that plays it.
    pub(crate) fn new(simulated: Option<&Path>) -> Result<Self, String> {
        let (library, nvml) = (rewarm_gpu::driver::LIBRARY.into(), nvml::LIBRARY.into());
        let mut bench = Self { library, nvml, simulated: None, servers: Vec::new(), notes: Vec::new() };
        if let Some(built) = simulated {
            let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
            let device = folder.path().join("devices/0");
            let made = std::fs::create_dir_all(&device)
                .and_then(|()| rewarm_sys::mount::tmpfs(&device, SIMULATED_BYTES, "0755"))
                .and_then(|()| std::fs::write(device.join("uuid"), format!("{:032x}", 0xd0)));
            (bench.library, bench.nvml) =
                (folder.path().join("libcuda.so.1"), folder.path().join("libnvidia-ml.so.1"));
            bench.simulated = Some(folder);
            made.map_err(|error| format!("make a simulated device: {error}"))?;
            for copy in [&bench.library, &bench.nvml] {
                std::fs::copy(built, copy).map_err(|error| format!("{}: {error}", built.display()))?;
            }
        }
        Ok(bench)
    }

    fn env(&self) -> Vec<(String, String)> {
        let Some(folder) = &self.simulated else { return Vec::new() };
        let devices = folder.path().join("devices").display().to_string();
        let (nodes, version) = (SIMULATED_NODES.join(":"), SIMULATED_VERSION.to_string());
        let all = [(DEVICES_ENV, devices), (NODES_ENV, nodes), (VERSION_ENV, version)];
        all.map(|(name, value)| (name.to_owned(), value)).into()
    }

    /// A helper that is not started yet.
    pub(crate) fn helper(&self) -> Helper {
        let env = self.env().into_iter().map(|(name, value)| (name.into(), value.into()));
        Helper::new(Launch {
            program: "/proc/self/exe".into(),
            args: vec!["helper".into(), self.library.clone().into(), self.nvml.clone().into()],
            env: env.collect(),
        })
    }

    /// What a caller that has not initialised the driver is told, one line for each of the words of [`mod@crate::bare`].
    pub(crate) fn bare(&self, pid: i32, words: &[&str]) -> Result<Vec<String>, String> {
        let output = self.bare_command(pid, words).output().map_err(|error| error.to_string())?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
        Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
    }

    /// The same, begun and not waited for.
    pub(crate) fn bare_call(&self, pid: i32, words: &[&str]) -> Result<Child, String> {
        self.bare_command(pid, words).stdout(Stdio::null()).spawn().map_err(|error| error.to_string())
    }

    fn bare_command(&self, pid: i32, words: &[&str]) -> Command {
        let mut command = Command::new("/proc/self/exe");
        command.arg("bare").arg(&self.library).arg(pid.to_string()).args(words).envs(self.env());
        command
    }

    /// The driver's release, as NVML tells it.
    pub(crate) fn driver(&self) -> String {
        if self.simulated.is_some() {
            return "simulated".to_owned();
        }
        nvml::look(&self.nvml).map_or_else(|silent| silent.to_string(), |machine| machine.release)
    }

    /// Starts a server and waits until it answers.
    pub(crate) fn serve(&mut self, flags: &[&str]) -> Result<Server, String> {
        let mut command = Command::new("/proc/self/exe");
        command.arg("workload").arg("--library").arg(&self.library).args(flags).envs(self.env());
        command.stdout(Stdio::piped());
        let mut child = command.spawn().map_err(|error| error.to_string())?;
        let (pid, output) = (child.id().cast_signed(), child.stdout.take());
        self.servers.push(child);
        let mut line = String::new();
        BufReader::new(output.expect("piped")).read_line(&mut line).map_err(|error| error.to_string())?;
        port(&line).map(|port| Server { pid, port })
    }

    /// As [`Bench::serve`], of a server that CRIU can dump: with a session of its own, and nothing open that leads here but
    /// `output`, a file.
    pub(crate) fn serve_apart(&mut self, flags: &[&str], output: &Path) -> Result<Server, String> {
        let file = std::fs::File::create(output).map_err(|error| error.to_string())?;
        let mut command = Command::new("/proc/self/exe");
        command.arg("workload-apart").arg("--library").arg(&self.library).args(flags).envs(self.env());
        command.stdin(Stdio::null()).stdout(file).stderr(Stdio::null());
        let child = command.spawn().map_err(|error| error.to_string())?;
        let pid = child.id().cast_signed();
        self.servers.push(child);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = std::fs::read_to_string(output).unwrap_or_default();
            if let Some((line, _)) = said.split_once('\n') {
                return port(line).map(|port| Server { pid, port });
            }
            if Instant::now() > deadline || self.servers.last_mut().is_some_and(has_ended) {
                return Err("the server says nothing".to_owned());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Kills a server and waits until it is gone.
    pub(crate) fn kill(&mut self, server: Server) {
        self.servers.retain_mut(|child| {
            let other = child.id().cast_signed() != server.pid;
            if !other {
                end(child);
            }
            other
        });
    }

    /// MiB of all devices that somebody has, once that stands still.
    pub(crate) fn used_mib(&mut self) -> Result<u64, String> {
        let mut helper = self.helper();
        let look = |helper: &mut Helper| {
            let machine = helper.machine().map_err(|error| error.to_string())?.ok_or("no NVML")?;
            Ok::<u64, String>(machine.gpus.iter().map(|gpu| (gpu.total_bytes - gpu.free_bytes) >> 20).sum())
        };
        let mut before = look(&mut helper)?;
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            std::thread::sleep(Duration::from_millis(200));
            let now = look(&mut helper)?;
            if now == before || Instant::now() > deadline {
                return Ok(now);
            }
            before = now;
        }
    }

    /// Whether a path is that of a device file.
    pub(crate) fn is_device(&self, path: &str) -> bool {
        match self.simulated {
            Some(_) => SIMULATED_NODES.contains(&path),
            None => path.starts_with("/dev/nvidia"),
        }
    }
}

/// The port that a server's first line ends with.
fn port(line: &str) -> Result<u16, String> {
    let port = line.trim().rsplit(' ').next().and_then(|port| port.parse().ok());
    port.ok_or_else(|| format!("the server said {line:?}"))
}

fn has_ended(child: &mut Child) -> bool {
    !matches!(child.try_wait(), Ok(None))
}

/// A connection for several requests.
pub(crate) struct Session {
    reader: BufReader<TcpStream>,
}

impl Session {
    pub(crate) fn ask(&mut self, method: &str, path: &str) -> Result<String, String> {
        let (status, body) = self.exchange(method, path).map_err(|error| error.to_string())?;
        if status.starts_with("HTTP/1.1 200") { Ok(body) } else { Err(body) }
    }

    fn exchange(&mut self, method: &str, path: &str) -> std::io::Result<(String, String)> {
        write!(self.reader.get_mut(), "{method} {path} HTTP/1.1\r\n\r\n")?;
        let (mut status, mut length) = (String::new(), 0);
        self.reader.read_line(&mut status)?;
        loop {
            let mut header = String::new();
            if self.reader.read_line(&mut header)? == 0 || header.trim().is_empty() {
                break;
            }
            if let Some(value) = header.strip_prefix("Content-Length:") {
                length = value.trim().parse().map_err(std::io::Error::other)?;
            }
        }
        let mut body = vec![0; length];
        self.reader.read_exact(&mut body)?;
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }
}

fn end(child: &mut Child) {
    // Stopped, it dies all the same.
    let _ = child.kill();
    let _ = child.wait();
}

/// What a process has open and mapped.
pub(crate) fn files_of(pid: i32) -> Vec<String> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let open = entries
        .filter_map(|entry| std::fs::read_link(entry.path()).ok()?.into_os_string().into_string().ok());
    let maps = rewarm_sys::procmem::maps(pid).unwrap_or_default();
    open.chain(maps.into_iter().map(|map| map.path)).collect()
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.servers.iter_mut().for_each(end);
        if let Some(folder) = &self.simulated {
            let _ = rewarm_sys::mount::detach(&folder.path().join("devices/0"));
        }
    }
}

impl Server {
    pub(crate) fn ask(&self, method: &str, path: &str, body: &str) -> Result<String, String> {
        let exchange = || {
            let mut socket = TcpStream::connect(("127.0.0.1", self.port))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            write!(socket, "{method} {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
            socket.shutdown(std::net::Shutdown::Write)?;
            let mut answer = String::new();
            socket.read_to_string(&mut answer)?;
            Ok::<_, std::io::Error>(answer)
        };
        let answer = exchange().map_err(|error| error.to_string())?;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or("no answer")?;
        if head.starts_with("HTTP/1.1 200") { Ok(body.to_owned()) } else { Err(body.to_owned()) }
    }

    /// A connection that stays, and with it a thread of the server's. One that began while the process is checkpointed would get
    /// its stack where the device's ranges were, and lose it to the restore.
    pub(crate) fn session(&self) -> Result<Session, String> {
        let socket = TcpStream::connect(("127.0.0.1", self.port)).map_err(|error| error.to_string())?;
        socket.set_read_timeout(Some(PATIENCE)).map_err(|error| error.to_string())?;
        let mut session = Session { reader: BufReader::new(socket) };
        session.ask("GET", "/health")?;
        Ok(session)
    }

    /// Whether its device memory is what it was.
    pub(crate) fn is_whole(&self) -> Result<bool, String> {
        let found: serde_json::Value =
            serde_json::from_str(&self.ask("GET", "/check", "")?).map_err(|error| error.to_string())?;
        Ok(found["sum"] == found["expected"] && found["clobbered"] == 0 && found["spoiled"] == 0)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let _ = kill(Pid::from_raw(self.pid), signal);
    }

    /// What the kernel tells of the mapping at an address: sizes in KiB and flags, those that are not 0.
    pub(crate) fn mapping(&self, address: u64) -> Result<String, String> {
        let path = format!("/proc/{}/smaps", self.pid);
        let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
        let range = |line: &str| {
            let (start, end) = line.split_whitespace().next()?.split_once('-')?;
            let number = |digits| u64::from_str_radix(digits, 16).ok();
            Some(number(start)?..number(end)?)
        };
        let lines =
            text.lines().skip_while(|line| !range(line).is_some_and(|range| range.contains(&address)));
        let of_it = lines.enumerate().take_while(|(index, line)| *index == 0 || range(line).is_none());
        let words = of_it.filter(|(_, line)| !line.ends_with(" 0 kB"));
        Ok(words
            .map(|(_, line)| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect::<Vec<_>>()
            .join("; "))
    }

    /// The process that it forked, once it has.
    pub(crate) fn child(&self) -> Option<i32> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid)).into_iter().flatten().flatten();
            let children = tasks
                .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
                .find_map(|list| list.split_whitespace().next()?.parse().ok());
            if children.is_some() {
                return children;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        None
    }
}
