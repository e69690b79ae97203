//! Runs a command inside the replica for as long as the client that asked for it stays.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rewarm_sys::pidfd::PidFd;

use crate::error::{Context, Error};
use crate::shim::children::signal;
use crate::shim::protocol::{self, ExecOutput, ExecRequest, Request};
use crate::shim::replica::{Asker, Replica};
use crate::shim::start::read_pid;

/// How long output is waited for after the command has ended: something that it left running may hold the pipes for ever.
const OUTPUT_GRACE: Duration = Duration::from_millis(200);

static SERIAL: AtomicU64 = AtomicU64::new(0);

/// Counts a command that runs inside, until it is dropped.
struct Inside<'a>(&'a Replica);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.change(|inner| inner.execs -= 1);
    }
}

enum Ending {
    Ended(i32),
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
        let _inside = {
            let mut inner = self.lock();
            self.require_running("exec", &inner)?;
            if let Some(busy) = inner.busy {
                return Err(self.busy_with(busy));
            }
            if inner.frozen_by.is_some() {
                return Err(self.busy_with("it is frozen"));
            }
            inner.execs += 1;
            Inside(self)
        };
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let pid_file = self.paths.dir().join(format!("exec-{serial}.pid"));
        let mut command = parts.runc.exec(request, &pid_file);
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
        let deadline = request.timeout_ms.map(|limit| Instant::now() + Duration::from_millis(limit));
        let ending = watch(&mut child, asker, deadline).context("wait for", "the command");
        let code = match &ending {
            Ok(Ending::Ended(code)) => *code,
            _ => {
                // The command leads a session of its own; runc's death alone would not end it.
                if let Ok(pid) = read_pid(&pid_file) {
                    signal(-pid.cast_signed(), 9);
                }
                let _ = child.kill();
                let _ = child.wait();
                128 + 9
            }
        };
        self.children.release(child.id());
        let _ = std::fs::remove_file(&pid_file);
        let (stdout, stderr) = capture.map(Capture::finish).unwrap_or_default();
        match ending? {
            Ending::Lost => Err(Error::Abandoned { operation: "exec" }),
            ending => Ok(ExecOutput { code, timed_out: matches!(ending, Ending::Late), stdout, stderr }),
        }
    }
}

/// Waits for the command, and passes signals on that the client sends.
fn watch(child: &mut std::process::Child, asker: Asker<'_>, deadline: Option<Instant>) -> io::Result<Ending> {
    use std::os::unix::process::ExitStatusExt;
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
            let status = child.wait()?;
            return Ok(Ending::Ended(status.code().or(status.signal().map(|s| 128 + s)).unwrap_or(255)));
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
