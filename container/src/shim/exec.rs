//! Runs a command inside the replica for as long as the client that asked for it stays.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use rewarm_sys::pidfd::PidFd;

use crate::bundle::user;
use crate::error::{Context, Error};
use crate::runc::Runc;
use crate::shim::children::{descendants, signal};
use crate::shim::executable::is_foreign;
use crate::shim::protocol::{self, ExecOutput, ExecRequest, Request};
use crate::shim::replica::{Asker, Replica};
use crate::shim::start::read_pid;

/// How long output is waited for after the command has ended: something that it left running may hold the pipes for ever.
const OUTPUT_GRACE: Duration = Duration::from_millis(200);

/// How long the processes of a command that was given up are looked for.
const END_GRACE: Duration = Duration::from_secs(2);

static SERIAL: AtomicU64 = AtomicU64::new(0);

/// Counts a command that runs inside, until it is dropped.
struct Inside<'a>(&'a Replica);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.change(|inner| inner.execs -= 1);
    }
}

/// What a shell says of a program that is not there, or cannot be run.
const NOT_FOUND: i32 = 127;
const NOT_EXECUTABLE: i32 = 126;
/// With this runc ends where the kernel did not run the file.
const EXECUTE_FAILED: i32 = 1;
/// With this runc ends when it could not run the program; a program may end with it as well.
const RUNC_FAILED: i32 = 255;

enum Ending {
    Ended(ExitStatus),
    Late,
    Lost,
}

impl Replica {
    /// Runs a command inside.
    pub(super) fn exec(
        &self,
        asker: Asker<'_>,
        request: &ExecRequest,
        stdio: Vec<OwnedFd>,
    ) -> Result<ExecOutput, Error> {
        if request.args.is_empty() {
            return Err(Error::Malformed { what: "command", value: String::new(), expected: "a program" });
        }
        let parts = self.parts("exec")?;
        self.await_given_back(asker.id, false);
        let (init, _inside) = {
            let mut inner = self.lock();
            let init = self.require_running("exec", &inner)?;
            if let Some(busy) = inner.busy {
                return Err(self.busy_with(busy));
            }
            if inner.frozen_by.is_some() {
                return Err(self.busy_with("it is frozen"));
            }
            if inner.paused.is_some() {
                return Err(self.not_so("exec", &inner, false));
            }
            inner.execs += 1;
            (init, Inside(self))
        };
        // Who `www` is, the replica's own files say, as the server sees them.
        let root = PathBuf::from(format!("/proc/{init}/root"));
        let user = request.user.as_ref().map(|user| user::resolve(Some(user), &root)).transpose()?;
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let files = Files::make(self.paths.dir().join(format!("exec-{serial}")))?;
        let (pid_file, log) = (files.0.join("pid"), files.0.join("log"));
        // Something is in it from the start: a full disk shows here, and not as a riddle of runc's.
        std::fs::write(&log, "\n").context("write", log.display())?;
        let mut command = parts.runc.exec(request, user.as_ref(), &pid_file, &log);
        let capture = match (request.stdio, <[OwnedFd; 3]>::try_from(stdio)) {
            (true, Ok([stdin, stdout, stderr])) => {
                command.stdin(stdin).stdout(stdout).stderr(stderr);
                None
            }
            (false, _) => Some(Capture::attach(&mut command)?),
            (true, Err(_)) => {
                let value = "stdio without three descriptors".into();
                return Err(Error::Malformed { what: "exec", value, expected: "stdin, stdout and stderr" });
            }
        };
        let mut child = self.children.spawn(&mut command).context("start", "runc")?;
        drop(command);
        let foreign = || is_foreign(&root, request.workdir.as_deref(), &request.env, &request.args[0]);
        let deadline = request.timeout_ms.map(|limit| Instant::now() + Duration::from_millis(limit));
        let ending = watch(&mut child, asker, deadline).context("wait for", "the command");
        let code = match &ending {
            // runc has left its place to the program by then, and ends as a program that fails.
            Ok(Ending::Ended(status)) if status.code() == Some(EXECUTE_FAILED) && foreign() => {
                Ok(NOT_EXECUTABLE)
            }
            Ok(Ending::Ended(status)) => self.exec_code(*status, &pid_file, &log),
            _ => {
                end(&mut child, &pid_file);
                Ok(128 + 9)
            }
        };
        self.children.release(child.id());
        drop(files);
        let (stdout, stderr) = capture.map(Capture::finish).unwrap_or_default();
        match ending? {
            Ending::Lost => Err(Error::Abandoned { operation: "exec" }),
            ending => {
                Ok(ExecOutput { code: code?, timed_out: matches!(ending, Ending::Late), stdout, stderr })
            }
        }
    }

    /// The code that a shell would give. runc ends with 255 whatever kept it from running the program; it writes the pid
    /// file only when the program runs.
    fn exec_code(&self, status: ExitStatus, pid_file: &Path, log: &Path) -> Result<i32, Error> {
        use std::os::unix::process::ExitStatusExt;
        let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(RUNC_FAILED);
        if code != RUNC_FAILED || pid_file.exists() {
            return Ok(code);
        }
        let failure = Runc::failure_of("exec", status, None, log);
        let Error::Program { cause, .. } = &failure else { return Err(failure) };
        let says = |words: &[&str]| words.iter().any(|word| cause.contains(word));
        // Only where the program itself is meant: `--workdir` may be missing as well.
        if !says(&["exec: "]) || says(&["chdir", "cwd"]) {
            Err(failure)
        } else if says(&["executable file not found", "no such file or directory"]) {
            Ok(NOT_FOUND)
        } else if says(&["permission denied", "exec format error", "is a directory"]) {
            Ok(NOT_EXECUTABLE)
        } else {
            Err(failure)
        }
    }
}

/// A folder for what runc writes of one command, until it is dropped: a runc that is killed may leave a file under a name of its
/// own, in which it was writing the pid.
struct Files(PathBuf);

impl Files {
    fn make(folder: PathBuf) -> Result<Self, Error> {
        std::fs::create_dir(&folder).context("make", folder.display())?;
        Ok(Self(folder))
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Ends a command that runs, or is about to. It leads a session of its own, so runc's death alone would not end it; and runc
/// writes the pid file some time after the command has begun, so that file alone would not name it.
fn end(child: &mut std::process::Child, pid_file: &Path) {
    // What stands starts nothing more, and reaps nothing, so that no number below is given to another process.
    signal(child.id().cast_signed(), Signal::SIGSTOP as i32);
    if let Ok(pid) = read_pid(pid_file) {
        signal(-pid.cast_signed(), Signal::SIGKILL as i32);
    }
    let deadline = Instant::now() + END_GRACE;
    loop {
        let lives = |process: &PidFd| !process.ended_within(Duration::ZERO).unwrap_or(true);
        let alive: Vec<PidFd> = descendants(child.id()).into_iter().filter(lives).collect();
        if alive.is_empty() || Instant::now() >= deadline {
            break;
        }
        // runc's own helpers start each other: those that were started meanwhile are found by the next look.
        for process in &alive {
            let _ = process.signal(Signal::SIGKILL);
            let _ = process.ended_within(Duration::from_millis(100));
        }
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// Waits for the command, and passes signals on that the client sends.
fn watch(child: &mut std::process::Child, asker: Asker<'_>, deadline: Option<Instant>) -> io::Result<Ending> {
    let pidfd = PidFd::open(child.id())?;
    loop {
        let timeout = deadline.map_or(PollTimeout::NONE, |deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        let mut fds = [
            PollFd::new(pidfd.as_fd(), PollFlags::POLLIN),
            PollFd::new(asker.socket.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let told = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        if told(&fds[0]) {
            return child.wait().map(Ending::Ended);
        }
        if told(&fds[1]) {
            match protocol::receive(asker.socket) {
                // runc passes it on to the command.
                Ok(Some((Request::Signal { signal: number }, _))) => signal(child.id().cast_signed(), number),
                _ => return Ok(Ending::Lost),
            }
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Ok(Ending::Late);
        }
    }
}

type Kept = Arc<Mutex<Vec<u8>>>;

/// The first part of what a command writes.
struct Capture {
    stdout: Kept,
    stderr: Kept,
    ended: mpsc::Receiver<()>,
}

impl Capture {
    fn attach(command: &mut std::process::Command) -> Result<Self, Error> {
        let (sender, ended) = mpsc::channel();
        let open = || -> Result<(Stdio, Kept), Error> {
            let (mut reader, writer) = io::pipe().context("make", "a pipe for the command's output")?;
            let kept = Kept::default();
            let (into, sender) = (kept.clone(), sender.clone());
            std::thread::spawn(move || {
                let mut buf = vec![0; 16 << 10];
                // Read to the end even when no more is kept: the command must not block.
                while let Ok(count @ 1..) = reader.read(&mut buf) {
                    let mut kept = into.lock().unwrap_or_else(PoisonError::into_inner);
                    let room = ExecOutput::BYTES_MAX - kept.len();
                    kept.extend_from_slice(&buf[..count.min(room)]);
                }
                let _ = sender.send(());
            });
            Ok((writer.into(), kept))
        };
        let (out, stdout) = open()?;
        let (err, stderr) = open()?;
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        Ok(Self { stdout, stderr, ended })
    }

    fn finish(self) -> (String, String) {
        let deadline = Instant::now() + OUTPUT_GRACE;
        for _ in 0..2 {
            let _ = self.ended.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        }
        let text = |kept: &Kept| {
            let kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            String::from_utf8_lossy(&kept).into_owned()
        };
        (text(&self.stdout), text(&self.stderr))
    }
}
