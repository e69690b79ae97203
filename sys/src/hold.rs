//! Holding tasks by ptrace: every thread of some processes stands still but for those that are named.
//!
//! The device plane needs exactly this: the driver's own thread in a process has to run while nothing else in that
//! process may. A cgroup's freezer and a stop signal would stop both.
//!
//! ptrace belongs to a thread, not to a process, so a [`Hold`] cannot leave the thread that made it, and all that is
//! held goes on when that thread ends. Stops are asked for with `PTRACE_GETSIGINFO` and not waited for: `wait` in another
//! thread of the holder (one that waits for a child which is held) would take them away.

mod unseen;

use std::collections::BTreeSet;
use std::io;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// `PTRACE_EVENT_STOP`, which the siginfo of a task shows that stands still because it was asked to.
const EVENT_STOP: i32 = 128;
const STEP: Duration = Duration::from_micros(100);
/// How long a task that is about to die may take to do so.
const LET_GO_MAX: Duration = Duration::from_secs(5);

/// Threads that stand still until the value is dropped.
#[derive(Debug)]
pub struct Hold {
    held: BTreeSet<i32>,
    /// Asked to stop, not yet seen to stand.
    asked: BTreeSet<i32>,
    options: Options,
    /// Only the thread that attached may detach.
    thread: PhantomData<*const ()>,
}

impl Hold {
    /// Holds nothing yet. With `kill_with_holder` what is held dies when this thread does.
    #[must_use]
    pub fn new(kill_with_holder: bool) -> Self {
        let options = if kill_with_holder { Options::PTRACE_O_EXITKILL } else { Options::empty() };
        Self { held: BTreeSet::new(), asked: BTreeSet::new(), options, thread: PhantomData }
    }

    /// Asks every thread of these processes to stop, but for `except`, and tells how many were new. What stands frozen
    /// in its cgroup stops as soon as it is thawed.
    ///
    /// # Errors
    /// `EPERM` when another debugger has one of them or rights are missing; the object is named by the error.
    pub fn ask(&mut self, processes: &[i32], except: &BTreeSet<i32>) -> io::Result<usize> {
        let mut new = 0;
        for process in processes {
            for thread in threads(*process) {
                if except.contains(&thread) || self.held.contains(&thread) || self.asked.contains(&thread) {
                    continue;
                }
                let pid = Pid::from_raw(thread);
                match ptrace::seize(pid, self.options) {
                    Ok(()) => {}
                    Err(Errno::ESRCH) => continue,
                    // A thread that has ended but whose number still shows cannot be seized either.
                    Err(Errno::EPERM) if has_ended(*process, thread) => continue,
                    Err(errno) => return Err(about(errno, "hold", thread)),
                }
                self.asked.insert(thread);
                new += 1;
                match ptrace::interrupt(pid) {
                    Ok(()) | Err(Errno::ESRCH) => {}
                    Err(errno) => return Err(about(errno, "stop", thread)),
                }
            }
        }
        Ok(new)
    }

    /// Waits until all that were asked stand still.
    ///
    /// # Errors
    /// `TimedOut` with the thread that does not (a long wait in the kernel); everything goes on being held.
    pub fn settle(&mut self, limit: Duration) -> io::Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            for thread in self.asked.clone() {
                match look(thread)? {
                    Seen::Runs => {}
                    Seen::Stands => {
                        self.asked.remove(&thread);
                        self.held.insert(thread);
                    }
                    Seen::Gone => {
                        self.asked.remove(&thread);
                    }
                }
            }
            let Some(thread) = self.asked.first() else { return Ok(()) };
            if Instant::now() > deadline {
                let text = format!("thread {thread} does not stop within {} s", limit.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            // A namespace's init that was killed ends after all others in it, and those once their holder has heard of their end.
            self.held.retain(|held| !has_left(*held));
            std::thread::sleep(STEP);
        }
    }

    /// Holds all threads of the processes that `list` gives, but for `except`, until a look finds nothing new.
    ///
    /// # Errors
    /// As [`Hold::ask`] and [`Hold::settle`].
    pub fn all(
        &mut self,
        mut list: impl FnMut() -> Vec<i32>,
        except: &BTreeSet<i32>,
        limit: Duration,
    ) -> io::Result<()> {
        let deadline = Instant::now() + limit;
        while self.ask(&list(), except)? > 0 {
            self.settle(deadline.saturating_duration_since(Instant::now()))?;
        }
        Ok(())
    }

    /// How many threads stand still.
    #[must_use]
    pub fn count(&self) -> usize {
        self.held.len()
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let deadline = Instant::now() + LET_GO_MAX;
        for thread in self.held.iter().chain(&self.asked) {
            let pid = Pid::from_raw(*thread);
            while !let_go(pid) && Instant::now() < deadline {
                std::thread::sleep(STEP);
            }
        }
    }
}

/// What a look at a task that was asked to stand found.
enum Seen {
    Runs,
    Stands,
    Gone,
}

fn look(thread: i32) -> io::Result<Seen> {
    let pid = Pid::from_raw(thread);
    match ptrace::getsiginfo(pid) {
        Ok(info) if info.si_code >> 8 == EVENT_STOP => Ok(Seen::Stands),
        // On the way to a handler: it gets its signal and stops again, since it is still asked to.
        Ok(info) => {
            pass_on(pid, info.si_signo);
            let _ = ptrace::interrupt(pid);
            Ok(Seen::Runs)
        }
        Err(Errno::ESRCH) if !exists(thread) => {
            reap(pid);
            Ok(Seen::Gone)
        }
        Err(Errno::ESRCH) => Ok(Seen::Runs),
        Err(errno) => Err(about(errno, "look at", thread)),
    }
}

/// Whether a task that stood has died; it is reaped then.
fn has_left(thread: i32) -> bool {
    let pid = Pid::from_raw(thread);
    let left = matches!(ptrace::getsiginfo(pid), Err(Errno::ESRCH)) && !exists(thread);
    if left {
        reap(pid);
    }
    left
}

/// Lets one task go, and tells whether it is gone or free. One that is about to die can be neither detached nor reaped for a
/// moment; left alone it would stay a zombie as long as its holder lives, and its process with it.
fn let_go(pid: Pid) -> bool {
    if ptrace::detach(pid, None).is_ok() {
        return true;
    }
    match waitpid(pid, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)) {
        Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) | Err(Errno::ECHILD) => true,
        _ => {
            // It runs: it has to stand before it can be let go.
            let _ = ptrace::interrupt(pid);
            false
        }
    }
}

/// Lets a task that stands on its way to a handler go on with its signal; real-time signals too, which `nix` cannot name.
fn pass_on(pid: Pid, signal: libc::c_int) {
    let none = std::ptr::null_mut::<libc::c_void>();
    let data: *mut libc::c_void = std::ptr::without_provenance_mut(signal.unsigned_abs() as usize);
    // SAFETY: PTRACE_CONT takes numbers only and touches no memory of this process; a task that is gone is ESRCH.
    let _ = unsafe { libc::ptrace(libc::PTRACE_CONT, pid.as_raw(), none, data) };
}

/// The threads of a process; none if it is gone.
#[must_use]
pub fn threads(process: i32) -> Vec<i32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{process}/task")) else { return Vec::new() };
    tasks.flatten().filter_map(|task| task.file_name().to_str()?.parse().ok()).collect()
}

fn exists(thread: i32) -> bool {
    !has_ended(thread, thread)
}

/// Whether a thread is gone or only its exit status is left of it.
fn has_ended(process: i32, thread: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{process}/task/{thread}/stat"));
    let Ok(status) = status else { return true };
    // The name stands in brackets and may hold anything.
    let state = status.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    matches!(state, Some('Z' | 'X') | None)
}

/// The end of a task that is held is told to its holder first.
fn reap(pid: Pid) {
    let _ = waitpid(pid, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL));
}

fn about(errno: Errno, action: &str, thread: i32) -> io::Error {
    let error = io::Error::from(errno);
    io::Error::new(error.kind(), format!("{action} thread {thread}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    fn busy() -> Child {
        Command::new("sh").args(["-c", "while :; do :; done"]).spawn().expect("sh")
    }

    fn ticks(pid: i32) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
        let rest = stat.rsplit_once(") ").expect("a name").1;
        rest.split(' ').nth(11).expect("utime").parse().expect("a number")
    }

    #[test]
    fn what_is_held_stands_and_goes_on_afterwards() {
        let mut child = busy();
        let pid = child.id().cast_signed();
        std::thread::sleep(Duration::from_millis(50));
        let mut hold = Hold::new(false);
        hold.all(|| vec![pid], &BTreeSet::new(), Duration::from_secs(5)).expect("hold");
        assert_eq!(hold.count(), 1);
        let before = ticks(pid);
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(ticks(pid), before);
        drop(hold);
        let deadline = Instant::now() + Duration::from_secs(10);
        while ticks(pid) == before {
            assert!(Instant::now() < deadline, "it does not go on");
            std::thread::sleep(Duration::from_millis(10));
        }
        child.kill().expect("kill");
        child.wait().expect("reap");
    }

    #[test]
    fn what_is_excepted_runs_and_what_is_gone_is_no_error() {
        let mut child = busy();
        let pid = child.id().cast_signed();
        let mut hold = Hold::new(false);
        hold.all(|| vec![pid, 4_194_303], &BTreeSet::from([pid]), Duration::from_secs(5)).expect("hold");
        assert_eq!(hold.count(), 0);
        child.kill().expect("kill");
        child.wait().expect("reap");
    }

    /// It does not end before the others of its namespace have been reaped, by their holder.
    #[test]
    fn an_init_that_is_killed_while_it_is_asked_to_stand_is_gone_with_its_namespace() {
        let script = "sleep 1000 & echo; while :; do :; done";
        let mut unshare = Command::new("unshare")
            .args(["--user", "--map-root-user", "--pid", "--fork", "--kill-child", "sh", "-c", script])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("unshare");
        let mut line = [0];
        let mut stdout = unshare.stdout.take().expect("a pipe");
        std::io::Read::read_exact(&mut stdout, &mut line).expect("it has started its child");
        let children = |pid: i32| -> Vec<i32> {
            let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("children");
            list.split_whitespace().map(|pid| pid.parse().expect("a number")).collect()
        };
        let init = children(unshare.id().cast_signed())[0];
        let child = children(init)[0];
        let mut hold = Hold::new(false);
        hold.all(|| vec![child], &BTreeSet::new(), Duration::from_secs(5)).expect("hold");
        assert_eq!(hold.ask(&[init], &BTreeSet::new()).expect("ask"), 1);
        nix::sys::signal::kill(Pid::from_raw(init), nix::sys::signal::Signal::SIGKILL).expect("kill");
        hold.settle(Duration::from_secs(20)).expect("nobody is waited for in vain");
        assert_eq!(hold.count(), 0);
        drop(hold);
        unshare.wait().expect("it ends with its child");
    }

    #[expect(clippy::zombie_processes, reason = "who reaps it, the test or the hold, is left open")]
    #[test]
    fn what_dies_while_it_is_held_is_gone_when_it_is_let_go() {
        let mut child = busy();
        let pid = child.id().cast_signed();
        let mut hold = Hold::new(false);
        hold.all(|| vec![pid], &BTreeSet::new(), Duration::from_secs(5)).expect("hold");
        child.kill().expect("kill");
        drop(hold);
        let deadline = Instant::now() + Duration::from_secs(10);
        while exists(pid) {
            // Whoever reaps it, it must not stay.
            let _ = child.try_wait();
            assert!(Instant::now() < deadline, "it stays");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn what_is_held_dies_with_its_holder_if_that_is_wanted() {
        let mut child = busy();
        let pid = child.id().cast_signed();
        std::thread::spawn(move || {
            let mut hold = Hold::new(true);
            hold.all(|| vec![pid], &BTreeSet::new(), Duration::from_secs(5)).expect("hold");
            // The thread ends without letting go, as a crash would.
            std::mem::forget(hold);
        })
        .join()
        .expect("no panic");
        let status = child.wait().expect("reap");
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
    }
}
