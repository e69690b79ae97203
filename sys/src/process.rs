//! Processes: what a child inherits, who reaps whom, who dies first when memory runs out.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It returned this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

/// The number that a process or thread has in its innermost pid namespace; `None` if it is gone.
#[must_use]
pub fn innermost_id(id: i32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_whitespace().next_back()?.parse().ok()
}

/// Makes this process the one to which orphans among its descendants are given.
///
/// # Errors
/// Those of `prctl(2)`.
pub fn become_subreaper() -> io::Result<()> {
    nix::sys::prctl::set_child_subreaper(true).map_err(io::Error::from)
}

/// Sets how early the kernel kills this process when memory runs out: -1000 never, 1000 first. Children inherit it.
///
/// # Errors
/// `PermissionDenied` for a value below the present one without `CAP_SYS_RESOURCE`.
pub fn set_oom_score_adj(value: i32) -> io::Result<()> {
    std::fs::write("/proc/self/oom_score_adj", value.to_string())
}

/// Sets or clears close-on-exec.
///
/// # Errors
/// Those of `fcntl(2)`.
pub fn set_close_on_exec(fd: impl AsFd, on: bool) -> io::Result<()> {
    let flags = if on { FdFlag::FD_CLOEXEC } else { FdFlag::empty() };
    fcntl(fd, FcntlArg::F_SETFD(flags))?;
    Ok(())
}

/// Takes over a descriptor that the parent left under an agreed number, and makes it close-on-exec.
///
/// Call it once for each number and before anything else opens files: from then on the returned value is its owner.
///
/// # Errors
/// `EBADF` if the parent left nothing there.
pub fn take_inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD touches no memory; whether the number is open is exactly what it tells.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the number is open, and by the agreement with the parent nothing else in this process owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    set_close_on_exec(&fd, true)?;
    Ok(fd)
}

/// Lets the child have each descriptor under the number beside it (3 or above). The descriptors are closed here when
/// `command` is dropped.
///
/// # Errors
/// `InvalidInput` for a number below 3, used twice, or for more than 64 descriptors.
pub fn inherit(command: &mut Command, fds: Vec<(OwnedFd, RawFd)>) -> io::Result<()> {
    const FDS_MAX: usize = 64;
    let distinct: std::collections::BTreeSet<RawFd> = fds.iter().map(|(_, number)| *number).collect();
    if fds.len() > FDS_MAX || distinct.len() != fds.len() || distinct.first().is_some_and(|n| *n < 3) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "descriptors for a child need distinct numbers from 3 up",
        ));
    }
    let Some(highest) = distinct.last().copied() else { return Ok(()) };
    // `Command` reports a failed exec through a pipe that it makes at spawn. A placeholder on each wanted number keeps
    // that pipe from being put where the child's copy goes.
    let mut placeholders = Vec::new();
    for (fd, number) in &fds {
        // SAFETY: F_DUPFD_CLOEXEC makes a new descriptor; the result is checked below.
        let raw = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, *number) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, owned by nobody else.
        let copy = unsafe { OwnedFd::from_raw_fd(raw) };
        if raw == *number {
            placeholders.push(copy);
        }
    }
    let work = move || {
        let _keep = &placeholders;
        let mut moved = [-1; FDS_MAX];
        // Out of the way first, so that no copy lands on a source that is still needed.
        for (slot, (fd, _)) in moved.iter_mut().zip(&fds) {
            // SAFETY: async-signal-safe call on a descriptor that the closure owns.
            *slot = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, highest + 1) };
            if *slot < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        for (slot, (_, number)) in moved.iter().zip(&fds) {
            // SAFETY: async-signal-safe call; dup2 clears close-on-exec on the copy.
            if unsafe { libc::dup2(*slot, *number) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure only makes async-signal-safe calls and allocates nothing.
    unsafe { command.pre_exec(work) };
    Ok(())
}

/// Puts the child into a session of its own: signals for the parent's terminal and process group do not reach it.
pub fn new_session(command: &mut Command) {
    let work = || {
        // SAFETY: async-signal-safe call without arguments.
        if unsafe { libc::setsid() } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: see the closure.
    unsafe { command.pre_exec(work) };
}

/// Starts the child, and all that descend from it, without address space randomisation.
pub fn fixed_addresses(command: &mut Command) {
    let work = || {
        // SAFETY: async-signal-safe call with a plain number.
        let result = unsafe { libc::personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: see the closure.
    unsafe { command.pre_exec(work) };
}

/// Gives the child another real user and group, while it stays root in effect. The kernel asks for the real ones where one
/// process reads another's limits.
pub fn real_ids(command: &mut Command, uid: u32, gid: u32) {
    let work = move || {
        // SAFETY: async-signal-safe call with plain numbers.
        if unsafe { libc::setresgid(gid, 0, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        if unsafe { libc::setresuid(uid, 0, 0) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: see the closure.
    unsafe { command.pre_exec(work) };
}

/// Whether this process may read and raise the limits of any process (CAP_SYS_RESOURCE).
#[must_use]
pub fn may_change_limits() -> bool {
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|bits| bits & (1 << CAP_SYS_RESOURCE) != 0)
}

/// The limits that a process cannot raise for itself, by the kernel's names (`Max open files`); `u64::MAX` for none.
///
/// # Errors
/// If there is no such process.
pub fn hard_limits(pid: i32) -> io::Result<BTreeMap<String, u64>> {
    Ok(parse_limits(&std::fs::read_to_string(format!("/proc/{pid}/limits"))?))
}

/// `Max open files            1024                 20000                files`: columns of fixed width.
fn parse_limits(text: &str) -> BTreeMap<String, u64> {
    const NAME_WIDTH: usize = 26;
    let limit = |line: &str| {
        let (name, rest) = line.split_at_checked(NAME_WIDTH)?;
        let hard = rest.split_whitespace().nth(1)?;
        let limit = if hard == "unlimited" { Some(u64::MAX) } else { hard.parse().ok() };
        Some((name.trim().to_owned(), limit?))
    };
    text.lines().skip(1).filter_map(limit).collect()
}

/// Kills the child when the thread that started it ends.
pub fn die_with_parent(command: &mut Command) {
    let work = || {
        // SAFETY: async-signal-safe call with plain numbers.
        let result = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: see the closure.
    unsafe { command.pre_exec(work) };
}

/// Waits for a child (one that was given to this process as a subreaper included), reaps it and says how it ended.
///
/// Stops of a child that this process holds by ptrace are told here too, with signals that `nix` has no name for, so the
/// kernel's own words are read.
///
/// # Errors
/// `ECHILD` if it is no child of this process.
pub fn wait(pid: u32) -> io::Result<Ended> {
    loop {
        // SAFETY: all-zero is a valid siginfo, which the call fills.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: `info` is ours and lives until the call returns.
        let result = unsafe { libc::waitid(libc::P_PID, pid, &raw mut info, libc::WEXITED) };
        if result < 0 {
            match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return Err(error),
            }
        }
        // SAFETY: waitid filled the part of the union that belongs to SIGCHLD.
        let status = unsafe { info.si_status() };
        match info.si_code {
            libc::CLD_EXITED => return Ok(Ended::Code(status)),
            libc::CLD_KILLED | libc::CLD_DUMPED => return Ok(Ended::Signal(status)),
            _ => {}
        }
    }
}

/// Reaps every ended child that was inherited from a dead descendant and that `owned` does not claim. A container's
/// init cannot end while a process of its namespace waits to be reaped from outside, so this must not be slow.
pub fn reap_orphans(owned: impl Fn(u32) -> bool) {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return };
    for task in tasks.flatten() {
        let Ok(children) = std::fs::read_to_string(task.path().join("children")) else { continue };
        for pid in children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()) {
            if !owned(pid) {
                // Not ended yet, or reaped by another: both are fine.
                let _ = waitid(Id::Pid(to_pid(pid)), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG);
            }
        }
    }
}

/// Blocks SIGCHLD in this thread and those that it starts, so that [`child_ended`] can wait for it. `Command` unblocks
/// all signals in its children.
///
/// # Errors
/// Those of `pthread_sigmask(3)`.
pub fn block_child_signal() -> io::Result<()> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGCHLD);
    set.thread_block().map_err(io::Error::from)
}

/// Waits until some child has ended, or for `timeout`.
pub fn child_ended(timeout: Duration) -> bool {
    // SAFETY: all-zero is a valid signal set; sigemptyset and sigaddset write only into it.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is ours.
    unsafe { libc::sigemptyset(&raw mut set) };
    // SAFETY: `set` is ours and SIGCHLD a valid number.
    unsafe { libc::sigaddset(&raw mut set, libc::SIGCHLD) };
    let timeout = libc::timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    };
    // SAFETY: both structs live until the call returns; a null siginfo is allowed.
    unsafe { libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const timeout) > 0 }
}

fn to_pid(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).expect("the kernel's process numbers end at 4194304"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_have_the_names_of_the_kernel() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max cpu time              unlimited            unlimited            seconds   \n\
                    Max open files            1024                 20000                files     \n\
                    Max nice priority         0                    0                    \n";
        let limits = parse_limits(text);
        assert_eq!(limits["Max cpu time"], u64::MAX);
        assert_eq!(limits["Max open files"], 20_000);
        assert_eq!(limits["Max nice priority"], 0);
        let own = hard_limits(std::process::id().cast_signed()).expect("this process");
        assert!(own["Max open files"] > 0 && own.len() >= 16, "{own:?}");
    }
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_child_finds_its_descriptor_under_the_agreed_number() {
        let (mut ours, theirs) = UnixStream::pair().expect("pair");
        let mut command = Command::new("bash");
        command.args(["-c", "echo hello >&20"]);
        inherit(&mut command, vec![(theirs.into(), 20)]).expect("inherit");
        assert!(command.status().expect("run").success());
        drop(command);
        let mut text = String::new();
        ours.read_to_string(&mut text).expect("ends, because no copy is left");
        assert_eq!(text, "hello\n");
    }

    #[test]
    fn two_descriptors_may_swap_numbers() {
        let (mut a, to_a) = UnixStream::pair().expect("pair");
        let (mut b, to_b) = UnixStream::pair().expect("pair");
        let (x, y) = (to_a.as_raw_fd(), to_b.as_raw_fd());
        let mut command = Command::new("bash");
        command.args(["-c", &format!("echo a >&{y}; echo b >&{x}")]);
        inherit(&mut command, vec![(to_a.into(), y), (to_b.into(), x)]).expect("inherit");
        assert!(command.status().expect("run").success());
        drop(command);
        let mut text = String::new();
        a.read_to_string(&mut text).expect("read");
        b.read_to_string(&mut text).expect("read");
        assert_eq!(text, "a\nb\n");
    }

    #[test]
    fn a_missing_program_is_reported_although_descriptors_are_passed() {
        let (_a, b) = UnixStream::pair().expect("pair");
        let mut command = Command::new("/no/such/program");
        inherit(&mut command, vec![(b.into(), 7)]).expect("inherit");
        assert_eq!(command.spawn().expect_err("missing").kind(), io::ErrorKind::NotFound);
    }

    #[expect(clippy::zombie_processes, reason = "waiting by number is what is tested")]
    #[test]
    fn the_end_of_a_child_is_told_by_code_or_signal() {
        let child = Command::new("sh").args(["-c", "exit 7"]).spawn().expect("sh");
        assert_eq!(wait(child.id()).expect("wait"), Ended::Code(7));
        let child = Command::new("sh").args(["-c", "kill -9 $$"]).spawn().expect("sh");
        assert_eq!(wait(child.id()).expect("wait"), Ended::Signal(9));
    }
}
