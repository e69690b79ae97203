//! Custom storage, which drivers have from CUDA 13.4 on. With an older one each of these ends with an error that names its version.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rewarm_gpu::custom::Part;
use rewarm_gpu::{CallError, Helper, Kept, State, Step, ranges};

use super::{LOCK, code, take, text, whole};
use crate::bench::{Bench, Server};

/// Device memory of the servers here.
const BYTES: u64 = 16 << 20;

/// A server whose device memory was moved past it.
struct Moved {
    helper: Helper,
    server: Server,
    file: OwnedFd,
    parts: Vec<Part>,
    /// By how much its own memory has grown.
    grown: u64,
}

fn private_bytes(pid: i32) -> Result<u64, String> {
    Ok(ranges::private_memory(pid).map_err(text)?.iter().map(ranges::Range::bytes).sum())
}

fn moved(bench: &mut Bench) -> Result<Moved, String> {
    let server = bench.serve(&["--mib", "16", "--threads", "0"])?;
    let mut helper = bench.helper();
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    let file = nix::sys::memfd::memfd_create(c"device-state", flags).map_err(text)?;
    helper.lock(server.pid, LOCK).map_err(text)?;
    let before = private_bytes(server.pid)?;
    let (_, parts) = helper.store(server.pid, BYTES, file.as_fd(), 0).map_err(text)?;
    let grown = private_bytes(server.pid)?.saturating_sub(before);
    bench.notes.push(format!("{} parts, the process has grown by {grown} bytes", parts.len()));
    Ok(Moved { helper, server, file, parts, grown })
}

impl Moved {
    /// Puts it back from the file and lets the server go on.
    fn back(&mut self) -> Result<&'static str, String> {
        let pid = self.server.pid;
        let kept = Kept::File(self.file.as_fd());
        self.helper.load(pid, &self.parts, kept, &[]).map_err(text)?;
        self.helper.unlock(pid).map_err(text)?;
        whole(self.server)
    }
}

pub(super) fn past_the_process(bench: &mut Bench) -> Result<String, String> {
    let mut moved = moved(bench)?;
    let state = moved.helper.state(moved.server.pid).map_err(text)?;
    let bytes: u64 = moved.parts.iter().map(|part| part.bytes).sum();
    let copied = if moved.grown < BYTES && bytes >= BYTES { "without a copy" } else { "with a copy" };
    Ok(format!("{state} {copied}, then {}", moved.back()?))
}

pub(super) fn fewer_bytes(bench: &mut Bench) -> Result<String, String> {
    let mut moved = moved(bench)?;
    let wanted = moved.parts.first().ok_or("nothing was moved")?.bytes;
    moved.parts[0].bytes -= 1 << 20;
    let kept = Kept::File(moved.file.as_fd());
    match moved.helper.load(moved.server.pid, &moved.parts, kept, &[]) {
        // The helper has asked the driver, and compares.
        Err(CallError::Unable { reason, .. }) if reason.contains(&format!("wants {wanted} bytes")) => {
            Ok("as many are wanted".to_owned())
        }
        other => Ok(code(other)),
    }
}

pub(super) fn not_completed(bench: &mut Bench) -> Result<String, String> {
    let empty = bench.used_mib()?;
    let Moved { mut helper, server, parts, .. } = moved(bench)?;
    let (ours, theirs) = UnixStream::pair().map_err(text)?;
    // A stream that ends at once: the caller never says that it is done.
    drop(ours);
    let kept = Kept::Stream { socket: theirs.as_fd(), patience: Duration::ZERO };
    helper.load(server.pid, &parts, kept, &[]).err().ok_or("a restore from nothing was done")?;
    // Dropped, it is killed.
    drop(helper);
    let mut helper = bench.helper();
    let state = helper.state(server.pid).map_err(text)?;
    let mut taken = Vec::new();
    for step in Step::ALL {
        let result = code(take(&mut helper, server, step));
        bench.notes.push(format!("{step}: {result}"));
        if result == "0" || helper.state(server.pid).map_err(text)? != state {
            taken.push(step.to_string());
        }
    }
    bench.kill(server);
    let left = bench.used_mib()?.saturating_sub(empty);
    bench.notes.push(format!("{left} MiB left behind"));
    let refused = if taken.is_empty() { "all steps refused".to_owned() } else { taken.join(", ") };
    Ok(format!("{state}, {refused}, {}", if left <= 1 { "gone with it" } else { "left behind" }))
}

pub(super) fn from_host_memory(bench: &mut Bench) -> Result<String, String> {
    let mut moved = moved(bench)?;
    let result = code(take(&mut moved.helper, moved.server, Step::Restore));
    bench.notes.push(format!("restore: {result}"));
    let state = moved.helper.state(moved.server.pid).map_err(text)?;
    if state != State::CHECKPOINTED {
        return Ok(format!("{result} and {state}"));
    }
    let refused = if result == "0" { "done" } else { "refused" };
    Ok(format!("{refused} and {state}, then {}", moved.back()?))
}
