//! A process that is dumped and restored, and the folders and sockets that this takes.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use rewarm_criu::config::Config;
use rewarm_criu::image::pstree;
use rewarm_criu::{Binary, log};
use rewarm_sys::process;

/// Longer than anything takes on a busy machine with two cores.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A server (`server.py`) in a session of its own, and a place for its images. Everything ends with it.
pub(crate) struct World {
    pub(crate) criu: Binary,
    folder: tempfile::TempDir,
    pid: i32,
    port: u16,
}

impl World {
    #[expect(
        clippy::zombie_processes,
        reason = "the tree is waited for by its pids, as what CRIU restores is"
    )]
    pub(crate) fn start(criu: Binary) -> Self {
        // The tree's orphans and what CRIU restores become children of the test, which can wait for their end then.
        process::become_subreaper().expect("a subreaper");
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["images", "work"] {
            fs::create_dir(folder.path().join(name)).expect("a folder");
        }
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/criu/server.py");
        let port_file = folder.path().join("port");
        let mut command = Command::new("/usr/bin/python3");
        command.args(["-S", "-E", script]).arg(&port_file);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        process::new_session(&mut command);
        let child = command.spawn().expect("python starts");
        let pid = child.id() as i32;
        let port = wait_for("the server's port", || fs::read_to_string(&port_file).ok()?.parse().ok());
        Self { criu, folder, pid, port }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid as u32
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.folder.path().join("images")
    }

    pub(crate) fn work(&self) -> PathBuf {
        self.folder.path().join("work")
    }

    pub(crate) fn address(&self) -> (&'static str, u16) {
        ("127.0.0.1", self.port)
    }

    /// Runs code in the server and returns its value as Python writes it.
    pub(crate) fn run(&self, code: &str) -> String {
        let mut stream = TcpStream::connect(self.address()).expect("the server listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.write_all(code.as_bytes()).expect("the server reads");
        stream.shutdown(Shutdown::Write).expect("end of the code");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("the server answers");
        assert!(!answer.starts_with("failed"), "{code}: {answer}");
        answer
    }

    pub(crate) fn number(&self, expression: &str) -> f64 {
        self.run(expression).parse().expect("a number")
    }

    /// Starts `criu dump` with one end of a socket pair for the pages; returns the other end.
    pub(crate) fn dump_to_socket(&self, config: &Config) -> (Criu, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        (self.criu("dump", config, Some(theirs.into()), |command| command), ours)
    }

    /// Dumps into the image directory; the server is gone then.
    pub(crate) fn dump(&mut self) {
        self.criu("dump", &Config::dump_to_images(), None, |command| command).succeeds();
        self.gone();
    }

    /// Restores from the image directory.
    pub(crate) fn restore(&self) {
        self.restore_with(|command| command);
    }

    pub(crate) fn restore_with(&self, prepare: impl FnOnce(Command) -> Command) {
        self.criu("restore", &Config::restore(), None, prepare).succeeds();
    }

    /// Starts CRIU; `prepare` may wrap the command into another one.
    pub(crate) fn criu(
        &self,
        verb: &str,
        config: &Config,
        pages: Option<OwnedFd>,
        prepare: impl FnOnce(Command) -> Command,
    ) -> Criu {
        let config_path = self.folder.path().join(format!("{verb}.conf"));
        config.write(&config_path).expect("a configuration file");
        let log = self.work().join(format!("{verb}.log"));
        let mut command = Command::new(&self.criu.path);
        command.arg(verb).args(["-v4", "-o"]).arg(&log).arg("--config").arg(&config_path);
        command.arg("-D").arg(self.images()).arg("-W").arg(self.work());
        match verb {
            "dump" => command.args(["-t", &self.pid.to_string()]),
            _ => command.arg("-d"),
        };
        let mut command = prepare(command);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if let Some(pages) = pages {
            process::inherit(&mut command, vec![(pages, rewarm_criu::config::PAGE_SERVER_FD)])
                .expect("an inherited descriptor");
        }
        Criu { child: command.spawn().expect("criu starts"), log }
    }

    /// Empties the image directory for another dump.
    pub(crate) fn clear_images(&self) {
        fs::remove_dir_all(self.images()).expect("removed");
        fs::create_dir(self.images()).expect("made");
    }

    /// Kills the tree and waits for its end.
    pub(crate) fn kill(&self) {
        // The server leads a process group of its own, to which its children belong.
        let group = Pid::from_raw(-self.pid);
        let _ = kill(group, Signal::SIGKILL);
        while waitpid(group, None).is_ok() {}
    }

    /// CRIU has killed the tree after a dump. Waits for it, so that its pids are free for the restore.
    pub(crate) fn gone(&mut self) {
        for task in pstree::read(&self.images()).expect("the tree") {
            reap(task.pid as i32);
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits for a process that is ending. It is a child of the test, or becomes one when its parent ends.
fn reap(pid: i32) {
    wait_for("the end of a process", || {
        let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
        (!Path::new(&format!("/proc/{pid}")).exists()).then_some(())
    });
}

/// A running CRIU. Killed when dropped.
pub(crate) struct Criu {
    child: Child,
    log: PathBuf,
}

impl Criu {
    pub(crate) fn succeeds(self) {
        let log = self.log.clone();
        assert!(self.ends(), "criu failed: {:?}, {:#?}", log::cause(&log), log::tail(&log));
    }

    pub(crate) fn fails(self) -> Option<String> {
        let log = self.log.clone();
        assert!(!self.ends(), "criu succeeded");
        log::cause(&log).map(|cause| cause.text)
    }

    fn ends(mut self) -> bool {
        let child = &mut self.child;
        wait_for("the end of criu", || child.try_wait().expect("criu can be waited for")).success()
    }
}

impl Drop for Criu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until there is something, and fails the test if that takes too long.
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "{what} did not come");
        sleep(Duration::from_millis(5));
    }
}
