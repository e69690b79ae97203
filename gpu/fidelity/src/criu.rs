//! Plain CRIU, without a runtime, for the claims that need it: its plugins are off, and what it writes lies in a folder that goes with this.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::bench::{Bench, Server};

/// Names the program; else it is looked for where Rewarm looks.
const PROGRAM_ENV: &str = "REWARM_CRIU";
/// How long the daemon may take until it listens.
const DAEMON_MAX: Duration = Duration::from_secs(10);
/// Where the daemon listens, in its working folder.
const SOCKET: &str = "lazy-pages.socket";

/// A CRIU program and a folder of its own.
pub(crate) struct Criu {
    program: PathBuf,
    folder: TempDir,
    /// `criu lazy-pages`, while it runs.
    daemon: Option<Child>,
    restored: Option<i32>,
}

impl Criu {
    /// Nothing where there is no such program.
    pub(crate) fn find() -> Result<Option<Self>, String> {
        let Some(program) = program() else { return Ok(None) };
        let folder = tempfile::tempdir().map_err(text)?;
        for part in ["images", "plugins", "daemon"] {
            fs::create_dir(folder.path().join(part)).map_err(text)?;
        }
        // What it restores has to be ended and waited for by somebody.
        nix::sys::prctl::set_child_subreaper(true).map_err(text)?;
        Ok(Some(Self { program, folder, daemon: None, restored: None }))
    }

    /// Version as it says it.
    pub(crate) fn version(&self) -> Result<String, String> {
        let output = Command::new(&self.program).arg("--version").output().map_err(text)?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = said.lines().find_map(|line| line.strip_prefix("Version:"));
        Ok(format!("CRIU {}", version.unwrap_or_default().trim()))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A file that a server may have open.
    pub(crate) fn output(&self) -> PathBuf {
        self.path("output")
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg(verb)
            .arg("--images-dir")
            .arg(self.path("images"))
            .arg("--libdir")
            .arg(self.path("plugins"));
        command.arg("--log-file").arg(self.path("images").join(verb)).arg("--verbosity=2");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Runs it, and tells how long that took. An error has the last line of its log that is one.
    fn run(&self, verb: &str, arguments: &[&str]) -> Result<Duration, String> {
        let began = Instant::now();
        let mut command = self.command(verb);
        // Connections are not the subject, and neither are the groups of this machine.
        command.args(["--tcp-close", "--network-lock=skip", "--manage-cgroups=ignore"]).args(arguments);
        let status = command.status().map_err(|error| format!("{}: {error}", self.program.display()))?;
        if status.success() {
            return Ok(began.elapsed());
        }
        let log = fs::read_to_string(self.path("images").join(verb)).unwrap_or_default();
        let why = log.lines().rev().find(|line| line.contains("Error")).unwrap_or("nothing in its log");
        Err(format!("criu {verb}: {status}: {why}"))
    }

    /// Dumps a server, which ends.
    pub(crate) fn dump(&self, bench: &mut Bench, server: Server) -> Result<Duration, String> {
        let took = self.run("dump", &["--tree", &server.pid.to_string()])?;
        // Its number has to be free.
        bench.kill(server);
        Ok(took)
    }

    /// Bytes of its images.
    pub(crate) fn bytes(&self) -> u64 {
        let entries = fs::read_dir(self.path("images")).into_iter().flatten().flatten();
        entries.filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
    }

    /// Brings it back stopped, with all of its memory.
    pub(crate) fn restore(&mut self, server: Server) -> Result<Duration, String> {
        let took = self.run("restore", &["--restore-detached", "--leave-stopped"])?;
        self.restored = Some(server.pid);
        Ok(took)
    }

    /// Brings it back stopped, while its memory comes from `criu lazy-pages`.
    pub(crate) fn restore_lazily(&mut self, server: Server) -> Result<Duration, String> {
        let work = self.path("daemon");
        let mut daemon = self.command("lazy-pages");
        self.daemon = Some(daemon.arg("--work-dir").arg(&work).spawn().map_err(text)?);
        let deadline = Instant::now() + DAEMON_MAX;
        while !work.join(SOCKET).exists() {
            if Instant::now() > deadline {
                return Err("criu lazy-pages does not listen".to_owned());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let work = work.to_str().ok_or("a folder that is no text")?;
        let flags = ["--restore-detached", "--leave-stopped", "--lazy-pages", "--work-dir", work];
        let took = self.run("restore", &flags)?;
        self.restored = Some(server.pid);
        Ok(took)
    }
}

impl Drop for Criu {
    fn drop(&mut self) {
        if let Some(pid) = self.restored.take().map(Pid::from_raw) {
            let _ = kill(pid, Signal::SIGKILL);
            let _ = waitpid(pid, None);
        }
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

/// As Rewarm finds it: named, else in the cache folder, else in `PATH` and the folders of system programs; here also beside this program.
fn program() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(named) = set(PROGRAM_ENV) {
        return named.is_file().then_some(named);
    }
    let own = std::env::current_exe().ok().and_then(|program| Some(program.parent()?.join("criu")));
    let home = || set("HOME").map(|home| home.join(".cache"));
    let cache = set("REWARM_CACHE").or_else(|| Some(set("XDG_CACHE_HOME").or_else(home)?.join("rewarm")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let folders = std::env::split_paths(&path).chain(system).map(|folder| folder.join("criu"));
    own.into_iter()
        .chain(cache.map(|cache| cache.join("criu/sbin/criu")))
        .chain(folders)
        .find(|found: &PathBuf| Path::is_file(found))
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
