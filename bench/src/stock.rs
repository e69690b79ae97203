//! The strongest form of what everybody has: plain `criu` on a process without container, no runc around it.
//!
//! The server runs on the machine itself, in a session of its own and with `/dev/null` as its stdio, which is what CRIU
//! likes best: no mounts, namespaces or cgroups to make. Restored processes are children of this one (`--restore-sibling`),
//! so that they can be ended and waited for.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use tokio::process::{Child, Command};

use crate::client::Expected;
use crate::error::{Error, Result};
use crate::files;
use crate::machine;
use crate::outcome::Sample;
use crate::subject::Subject;

const COMMON: [&str; 7] = [
    "--network-lock",
    "skip",
    "--tcp-established",
    "--file-locks",
    "--ghost-limit",
    "1G",
    "--manage-cgroups=ignore",
];

/// How long CRIU's daemon may take to bind its socket.
const DAEMON_WITHIN: Duration = Duration::from_secs(10);

/// The images of the server, made by `criu dump`.
pub(crate) struct Stock {
    criu: PathBuf,
    folder: PathBuf,
    port: u16,
    running: Option<Pid>,
}

impl Drop for Stock {
    fn drop(&mut self) {
        self.end();
    }
}

impl Stock {
    /// Starts the server cold, waits for its first answer, and dumps it into `folder`.
    pub(crate) async fn make(
        criu: &Path,
        folder: &Path,
        subject: &Subject,
        expected: &Expected,
    ) -> Result<Self> {
        TcpListener::bind(("127.0.0.1", subject.port)).map_err(|_| Error::Port { port: subject.port })?;
        for part in ["images", "work"] {
            fs::create_dir_all(folder.join(part)).map_err(Error::io(format!("make {}", folder.display())))?;
        }
        let mut stock =
            Self { criu: criu.to_owned(), folder: folder.to_owned(), port: subject.port, running: None };
        let mut command = Command::new("setsid");
        command.args(&subject.command).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(Error::io(format!("start {}", subject.command.join(" "))))?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).expect("it has not been waited for");
        stock.running = Some(Pid::from_raw(pid));
        expected.ask(subject.port, Instant::now(), "criu's server").await?;
        stock
            .criu("dump", &["-t".to_owned(), pid.to_string(), "-o".to_owned(), "dump.log".to_owned()])
            .await?;
        stock.running = None;
        child.wait().await.map_err(Error::io("wait for the dumped server"))?;
        Ok(stock)
    }

    /// Where the images lie.
    pub(crate) fn images(&self) -> PathBuf {
        self.folder.join("images")
    }

    fn work(&self) -> PathBuf {
        self.folder.join("work")
    }

    /// One restore, its first answer, and the end of the restored server.
    pub(crate) async fn round(&mut self, lazy: bool, expected: &Expected, case: &str) -> Result<Sample> {
        let (began, busy) = (Instant::now(), machine::busy_ms()?);
        let elapsed = || began.elapsed().as_secs_f64() * 1000.0;
        let mut daemon = if lazy { Some(self.daemon().await?) } else { None };
        let flags = ["-d", "-S", "-o", "restore.log", "--pidfile", "pid"].map(str::to_owned).into_iter();
        let flags: Vec<String> = flags.chain(lazy.then(|| "--lazy-pages".to_owned())).collect();
        let _ = fs::remove_file(self.work().join("pid"));
        let restored = self.criu("restore", &flags).await;
        self.running = self.pid();
        restored?;
        let resume = elapsed();
        let first_answer = expected.ask(self.port, began, case).await?;
        let present = match &mut daemon {
            None => resume,
            Some(daemon) => {
                daemon.wait().await.map_err(Error::io("wait for criu lazy-pages"))?;
                elapsed()
            }
        };
        let sample = Sample {
            resume_ms: Some(resume),
            first_answer_ms: Some(first_answer),
            present_ms: Some(present),
            bytes_read: Some(files::bytes(&self.images()).map_err(Error::io("measure the images"))?),
            cpu_ms: Some(machine::busy_ms()? - busy),
        };
        self.end();
        Ok(sample)
    }

    /// CRIU's own daemon, when it listens.
    async fn daemon(&self) -> Result<Child> {
        let socket = self.work().join("lazy-pages.socket");
        let _ = fs::remove_file(&socket);
        let mut command = Command::new(&self.criu);
        command.arg("lazy-pages").arg("-D").arg(self.images()).arg("-W").arg(self.work());
        command.args(["-o", "lazy.log"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.kill_on_drop(true);
        let daemon = command.spawn().map_err(Error::io("start criu lazy-pages"))?;
        let deadline = Instant::now() + DAEMON_WITHIN;
        while !socket.exists() {
            if Instant::now() > deadline {
                let what = format!("{} by criu lazy-pages", socket.display());
                return Err(Error::Late { what, seconds: DAEMON_WITHIN.as_secs() });
            }
            tokio::time::sleep(Duration::from_micros(500)).await;
        }
        Ok(daemon)
    }

    async fn criu(&self, verb: &str, flags: &[String]) -> Result<()> {
        let mut command = Command::new(&self.criu);
        command.arg(verb).arg("-D").arg(self.images()).arg("-W").arg(self.work()).args(COMMON).args(flags);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let status = command.status().await.map_err(Error::io(format!("start {}", self.criu.display())))?;
        if status.success() {
            return Ok(());
        }
        let log = fs::read_to_string(self.work().join(format!("{verb}.log"))).unwrap_or_default();
        let errors: Vec<&str> = log.lines().filter(|line| line.contains("Error")).collect();
        let last = errors[errors.len().saturating_sub(3)..].join("; ");
        Err(Error::Program { program: format!("criu {verb}"), status: status.to_string(), last })
    }

    fn pid(&self) -> Option<Pid> {
        let text = fs::read_to_string(self.work().join("pid")).ok()?;
        text.trim().parse().ok().map(Pid::from_raw)
    }

    /// Kills the server, if there is one, and waits until its pid is free for the next restore.
    pub(crate) fn end(&mut self) {
        if let Some(pid) = self.running.take() {
            // Already gone is as good.
            let _ = kill(pid, Signal::SIGKILL);
            let _ = waitpid(pid, None);
        }
    }
}
