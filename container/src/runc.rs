//! The runc program: one command line for each verb, and the line of its log that says why it failed.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use crate::bundle::user::Resolved;
use crate::error::Error;
use crate::shim::Paths;
use crate::shim::protocol::{DumpRequest, ExecRequest, RestoreRequest};
use crate::spec::Name;

/// How much of a log is looked at for its cause, from the end.
const LOG_BYTES_MAX: usize = 64 << 10;
/// How many lines of output an error carries.
const OUTPUT_LINES_MAX: usize = 50;

/// How runc is called for one replica.
#[derive(Debug, Clone)]
pub struct Runc {
    root: PathBuf,
    id: String,
    log: PathBuf,
}

impl Runc {
    /// `root` is where runc keeps its own state, shared by all replicas of a state directory.
    #[must_use]
    pub fn new(root: PathBuf, name: &Name, paths: &Paths) -> Self {
        Self { root, id: name.as_str().into(), log: paths.runc_log() }
    }

    /// The directory of runc's own state of this container.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.root.join(&self.id)
    }

    fn command(&self) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(&self.root);
        command.current_dir("/");
        command
    }

    fn logged(&self, criu: Option<&Path>) -> Command {
        // Each call has a log of its own: what is in it belongs to the failure.
        let _ = std::fs::remove_file(&self.log);
        let mut command = self.command();
        command.arg("--log").arg(&self.log).args(["--log-format", "json"]);
        if let Some(criu) = criu {
            // runc up to 1.1 takes `--criu`, later ones look it up in PATH and accept the option without using it.
            command.arg("--criu").arg(criu);
            command.env("PATH", path_with(criu.parent()));
            // A server stands still, or a request waits, for as long as runc takes: its garbage collector would take its part
            // of cores that CRIU needs.
            command.env("GOGC", "off");
        }
        command
    }

    /// `runc create`: everything is made, and init waits to be started.
    #[must_use]
    pub fn create(&self, bundle: &Path, pid_file: &Path) -> Command {
        let mut command = self.logged(None);
        command.arg("create").arg("--bundle").arg(bundle).arg("--pid-file").arg(pid_file).arg(&self.id);
        command
    }

    /// `runc start`: init executes the server's command.
    #[must_use]
    pub fn start(&self) -> Command {
        let mut command = self.logged(None);
        command.arg("start").arg(&self.id);
        command
    }

    /// `runc checkpoint`; the server goes on afterwards.
    #[must_use]
    pub fn checkpoint(&self, request: &DumpRequest, paths: &Paths) -> Command {
        let mut command = self.logged(Some(&request.criu));
        command.arg("checkpoint").arg("--leave-running");
        command.arg("--image-path").arg(paths.dump_images()).arg("--work-path").arg(paths.dump_work());
        flag(&mut command, request.tcp_established, "--tcp-established");
        flag(&mut command, request.file_locks, "--file-locks");
        command.arg(&self.id);
        command
    }

    /// `runc restore`; it returns when the server runs.
    #[must_use]
    pub fn restore(&self, request: &RestoreRequest, paths: &Paths, pid_file: &Path) -> Command {
        let mut command = self.logged(Some(&request.criu));
        command.args(["restore", "--detach"]);
        command.arg("--bundle").arg(paths.bundle()).arg("--pid-file").arg(pid_file);
        command.arg("--image-path").arg(paths.images()).arg("--work-path").arg(paths.work());
        flag(&mut command, request.tcp_established, "--tcp-established");
        flag(&mut command, request.file_locks, "--file-locks");
        flag(&mut command, request.lazy_pages, "--lazy-pages");
        command.arg(&self.id);
        command
    }

    /// `runc exec`; its errors go to its standard error and into `log`, which it appends to.
    #[must_use]
    pub(crate) fn exec(
        &self,
        request: &ExecRequest,
        user: Option<&Resolved>,
        pid_file: &Path,
        log: &Path,
    ) -> Command {
        let mut command = self.command();
        command.arg("--log").arg(log).args(["--log-format", "json"]);
        command.arg("exec").arg("--pid-file").arg(pid_file);
        if let Some(workdir) = &request.workdir {
            command.arg("--cwd").arg(workdir);
        }
        if let Some(user) = user {
            command.args(["--user", &format!("{}:{}", user.uid, user.gid)]);
            for group in &user.groups {
                command.args(["--additional-gids", &group.to_string()]);
            }
        }
        for pair in &request.env {
            command.args(["--env", pair]);
        }
        command.arg(&self.id).args(&request.args);
        command
    }

    /// The error of a call that ended badly.
    #[must_use]
    pub fn failure(&self, verb: &str, status: ExitStatus, log: Option<PathBuf>) -> Error {
        Self::failure_of(verb, status, log, &self.log)
    }

    /// [`Runc::failure`] of a call that had a log of its own.
    pub(crate) fn failure_of(verb: &str, status: ExitStatus, log: Option<PathBuf>, own_log: &Path) -> Error {
        let text = tail(own_log);
        let lines: Vec<String> = text.lines().filter(|line| !line.trim().is_empty()).map(message).collect();
        let cause = lines.last().cloned().unwrap_or_else(|| "it left no log".into());
        let output = lines[lines.len().saturating_sub(OUTPUT_LINES_MAX)..].to_vec();
        Error::Program { program: format!("runc {verb}"), status: status.to_string(), cause, output, log }
    }
}

fn flag(command: &mut Command, on: bool, name: &str) {
    if on {
        command.arg(name);
    }
}

fn path_with(first: Option<&Path>) -> OsString {
    let old = std::env::var_os("PATH").unwrap_or_default();
    let mut all: Vec<PathBuf> = first.map(Into::into).into_iter().collect();
    all.extend(std::env::split_paths(&old));
    std::env::join_paths(all).unwrap_or(old)
}

fn tail(path: &Path) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(LOG_BYTES_MAX)..]).into_owned()
}

/// runc writes `{"level":"error","msg":"...","time":"..."}`.
fn message(line: &str) -> String {
    serde_json::from_str::<serde_json::Value>(line)
        .ok()
        .and_then(|value| value["msg"].as_str().map(Into::into))
        .unwrap_or_else(|| line.into())
}
