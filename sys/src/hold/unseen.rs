//! Continuing what a signal has stopped, without a signal that anybody sees.
//!
//! Only SIGCONT ends a stop, and it does more than that: a handler of it runs, and the parent is sent SIGCHLD, as it was for
//! the stop already. Both are taken away at their delivery: every thread stands held, one of each process is led on inside the
//! kernel until the signal is handed to it, and goes on without. It never comes back to its program in between.
//!
//! Where nobody handles or blocks either signal, the kernel drops them when they are sent, and nobody is held.
//!
//! A parent that is not yet on its way to stop when its child has stopped runs its handler of SIGCHLD first: nothing waits any more that
//! could be taken away. Whoever makes such a tree blocks the signal in the parent beforehand, and says so here.

use std::collections::BTreeSet;
use std::io;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use crate::process::innermost_id;

use super::{EVENT_STOP, Hold, STEP, about, exists, has_ended, let_go, pass_on, threads};

/// Bytes of the kernel's signal set.
const MASK_BYTES: usize = 8;
/// `PTRACE_PEEKSIGINFO_SHARED`: the queue of the process, not the one of the thread.
const OF_THE_PROCESS: u32 = 1;
/// How often what a tracer is told of one task may stand before that it was continued.
const TOLD_MAX: usize = 8;

/// `struct ptrace_peeksiginfo_args`.
#[repr(C)]
struct PeekArgs {
    first: u64,
    flags: u32,
    count: i32,
}

/// What the kernel tells of a process and its signals.
#[derive(Debug, Default, PartialEq, Eq)]
struct Status {
    parent: i32,
    pending: u64,
    blocked: u64,
    caught: u64,
}

impl Status {
    /// All zero for one that is gone.
    fn of(process: i32) -> Self {
        Self::parse(&std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let field = |name: &str| {
            text.lines().find_map(|line| line.strip_prefix(name)).map_or("", |value| value.trim())
        };
        let set = |name: &str| u64::from_str_radix(field(name), 16).unwrap_or(0);
        Self {
            parent: field("PPid:").parse().unwrap_or(0),
            pending: set("ShdPnd:"),
            blocked: set("SigBlk:"),
            caught: set("SigCgt:"),
        }
    }

    /// Whether the process learns of a signal that is ignored by default. What its first thread blocks is what the kernel asks
    /// when the signal is sent to the process.
    fn notices(&self, signal: Signal) -> bool {
        (self.caught | self.blocked) & bit(signal) != 0
    }
}

impl Hold {
    /// Lets these processes go on, which a signal has stopped, so that neither they nor their parents among them see a signal
    /// of the stop. Threads that are held stay held. `unblock`: threads, by their ids in their innermost pid namespace, in which
    /// SIGCHLD was blocked before the stop, and is not any more when they go on.
    ///
    /// # Errors
    /// As [`Hold::ask`] and [`Hold::settle`]; then some of them may stand still as before.
    pub fn continue_unseen(&mut self, processes: &[i32], unblock: &[u32], limit: Duration) -> io::Result<()> {
        let seen: Vec<Status> = processes.iter().map(|&process| Status::of(process)).collect();
        let parents: BTreeSet<i32> = seen.iter().map(|status| status.parent).collect();
        let notices = processes.iter().zip(&seen).any(|(process, status)| {
            status.notices(Signal::SIGCONT) || parents.contains(process) && status.notices(Signal::SIGCHLD)
        });
        if !notices && unblock.is_empty() {
            send(processes);
            return Ok(());
        }
        let before: BTreeSet<i32> = self.held.union(&self.asked).copied().collect();
        let swallowed = self.swallow_all(processes, &parents, Instant::now() + limit);
        let swallowed = swallowed.and_then(|()| self.unblock(processes, unblock));
        let own: BTreeSet<i32> =
            self.held.union(&self.asked).copied().filter(|own| !before.contains(own)).collect();
        self.release(&own);
        swallowed
    }

    fn swallow_all(
        &mut self,
        processes: &[i32],
        parents: &BTreeSet<i32>,
        deadline: Instant,
    ) -> io::Result<()> {
        let left = || deadline.saturating_duration_since(Instant::now());
        self.all(|| processes.to_vec(), &BTreeSet::new(), left())?;
        // Those that were asked before.
        self.settle(left())?;
        send(processes);
        for &process in processes {
            if Status::of(process).pending & bit(Signal::SIGCONT) != 0 {
                self.swallow(process, Signal::SIGCONT, deadline)?;
            }
            forget_continued(process);
        }
        // By now each has told its parent that it goes on.
        for process in processes.iter().filter(|process| parents.contains(process)) {
            if self.is_told_of_a_stop(*process)? {
                self.swallow(*process, Signal::SIGCHLD, deadline)?;
            }
        }
        Ok(())
    }

    fn unblock(&self, processes: &[i32], unblock: &[u32]) -> io::Result<()> {
        if unblock.is_empty() {
            return Ok(());
        }
        let chosen = |thread: &i32| innermost_id(*thread).is_some_and(|inner| unblock.contains(&inner));
        let all = processes.iter().flat_map(|&process| threads(process));
        for thread in all.filter(|thread| self.held.contains(thread)).filter(chosen) {
            let pid = Pid::from_raw(thread);
            let set = mask_of(pid).and_then(|mask| set_mask(pid, mask & !bit(Signal::SIGCHLD)));
            match set {
                Err(_) if !exists(thread) => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// The thread of a process that is led on: the first one if it lives.
    fn leader(&self, process: i32) -> Option<Pid> {
        let held = |thread: &i32| self.held.contains(thread);
        Some(process).filter(held).or_else(|| threads(process).into_iter().find(held)).map(Pid::from_raw)
    }

    /// Takes a signal away that waits for this process.
    fn swallow(&self, process: i32, signal: Signal, deadline: Instant) -> io::Result<()> {
        let Some(thread) = self.leader(process) else { return Ok(()) };
        // Whatever else waits goes on waiting, and a signal that the program blocks is handed out too.
        let mask = mask_of(thread)?;
        set_mask(thread, !bit(signal))?;
        let delivered = deliver(thread, signal, deadline);
        match set_mask(thread, mask) {
            Err(_) if !exists(thread.as_raw()) => Ok(()),
            set => delivered.and(set),
        }
    }

    /// Whether a SIGCHLD waits for this process that says no more than that a child was stopped or goes on. The kernel keeps one
    /// for all: a child that has ended as well is told of by it.
    fn is_told_of_a_stop(&self, process: i32) -> io::Result<bool> {
        if Status::of(process).pending & bit(Signal::SIGCHLD) == 0 {
            return Ok(false);
        }
        let Some(thread) = self.leader(process) else { return Ok(false) };
        let about_a_stop = |code: i32| matches!(code, libc::CLD_STOPPED | libc::CLD_CONTINUED);
        let stop = queued(thread, Signal::SIGCHLD)?.is_some_and(|info| about_a_stop(info.si_code));
        Ok(stop && !children(process).into_iter().any(|child| has_ended(child, child)))
    }

    /// Lets these threads go on.
    fn release(&mut self, released: &BTreeSet<i32>) {
        let deadline = Instant::now() + super::LET_GO_MAX;
        for thread in released {
            while !let_go(Pid::from_raw(*thread)) && Instant::now() < deadline {
                std::thread::sleep(STEP);
            }
        }
        self.held.retain(|thread| !released.contains(thread));
        self.asked.retain(|thread| !released.contains(thread));
    }
}

/// Leads a held thread on until the signal is handed to it, and leaves it standing there.
fn deliver(thread: Pid, signal: Signal, deadline: Instant) -> io::Result<()> {
    let mut resumed = false;
    loop {
        match ptrace::getsiginfo(thread) {
            // It stands because it was asked to, or to hear that its process goes on.
            Ok(info) if !resumed || info.si_code >> 8 == EVENT_STOP => {
                ptrace::cont(thread, None).map_err(|errno| about(errno, "lead on", thread.as_raw()))?;
                resumed = true;
                continue;
            }
            Ok(info) if info.si_signo == signal as i32 => return Ok(()),
            // Only what nobody can block: somebody else stops or kills it at this moment.
            Ok(info) => pass_on(thread, info.si_signo),
            Err(Errno::ESRCH) if !exists(thread.as_raw()) => return Ok(()),
            // On its way.
            Err(Errno::ESRCH) => {}
            Err(errno) => return Err(about(errno, "look at", thread.as_raw())),
        }
        if Instant::now() > deadline {
            let text = format!("thread {thread} is not handed {signal} in time");
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        std::thread::yield_now();
    }
}

/// A parent that asks `wait` for children that were continued is not told of this one: there is one such note, and whoever
/// traces may take it. What a tracer is told of a task stands before it. The end of a process is left to whoever waits for it.
fn forget_continued(process: i32) {
    let flags = WaitPidFlag::WCONTINUED | WaitPidFlag::WNOHANG | WaitPidFlag::__WALL;
    for _ in 0..TOLD_MAX {
        match waitid(Id::Pid(Pid::from_raw(process)), flags) {
            Ok(WaitStatus::Continued(_) | WaitStatus::StillAlive) => return,
            // A stop by a signal that `nix` has no name for is EINVAL, and taken.
            Ok(_) | Err(Errno::EINVAL | Errno::EINTR) => {}
            Err(_) => return,
        }
    }
}

fn send(processes: &[i32]) {
    for &process in processes {
        // One that has ended meanwhile needs nothing.
        let _ = kill(Pid::from_raw(process), Signal::SIGCONT);
    }
}

fn bit(signal: Signal) -> u64 {
    1 << (signal as i32 - 1)
}

fn children(process: i32) -> Vec<i32> {
    let of = |thread: i32| {
        let text =
            std::fs::read_to_string(format!("/proc/{process}/task/{thread}/children")).unwrap_or_default();
        text.split_whitespace().filter_map(|child| child.parse().ok()).collect::<Vec<i32>>()
    };
    threads(process).into_iter().flat_map(of).collect()
}

fn mask_of(thread: Pid) -> io::Result<u64> {
    let mut mask = 0_u64;
    // SAFETY: the kernel writes eight bytes into `mask`, which is ours until the call returns.
    let result = unsafe { libc::ptrace(libc::PTRACE_GETSIGMASK, thread.as_raw(), MASK_BYTES, &raw mut mask) };
    if result < 0 { Err(about(Errno::last(), "read what is blocked by", thread.as_raw())) } else { Ok(mask) }
}

fn set_mask(thread: Pid, mask: u64) -> io::Result<()> {
    // SAFETY: the kernel reads eight bytes from `mask`, which is ours until the call returns.
    let result =
        unsafe { libc::ptrace(libc::PTRACE_SETSIGMASK, thread.as_raw(), MASK_BYTES, &raw const mask) };
    if result < 0 { Err(about(Errno::last(), "block signals of", thread.as_raw())) } else { Ok(()) }
}

/// A signal that waits for the process of a held thread, with what it says.
fn queued(thread: Pid, signal: Signal) -> io::Result<Option<libc::siginfo_t>> {
    for first in 0.. {
        let args = PeekArgs { first, flags: OF_THE_PROCESS, count: 1 };
        // SAFETY: all-zero is a valid siginfo.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel reads `args` and writes one siginfo, both ours until the call returns.
        let found = unsafe {
            libc::ptrace(libc::PTRACE_PEEKSIGINFO, thread.as_raw(), &raw const args, &raw mut info)
        };
        match found {
            1 if info.si_signo == signal as i32 => return Ok(Some(info)),
            1 => {}
            0 => break,
            _ => return Err(about(Errno::last(), "read what waits for", thread.as_raw())),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

    use super::*;

    /// A parent and a child with threads, which count what they see: SIGCONT and SIGCHLD by handlers, what waits although it is
    /// blocked, and what `wait` tells.
    const PROGRAM: &str = r#"
import os, signal, sys, threading
seen = {"cont": 0, "chld": 0}
def count(name):
    def handler(number, frame):
        seen[name] += 1
    return handler
blocks = "blocks" in sys.argv
signal.signal(signal.SIGCONT, signal.SIG_DFL if blocks else count("cont"))
if blocks:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCONT, signal.SIGCHLD])
asked, ask = os.pipe()
answered, answer = os.pipe()
for _ in range(int(sys.argv[1])):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
def tell():
    waits = [number.name for number in signal.sigpending()]
    return f"cont {seen['cont']} chld {seen['chld']} waits {','.join(sorted(waits))}"
child = os.fork()
if child == 0:
    os.close(ask)
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    while os.read(asked, 1):
        os.write(answer, tell().encode())
    os._exit(0)
signal.signal(signal.SIGCHLD, count("chld"))
print(child, flush=True)
for line in sys.stdin:
    if line == "alone\n":
        print(tell(), flush=True)
        continue
    os.write(ask, b"?")
    of_child = os.read(answered, 99).decode()
    told = os.waitpid(child, os.WNOHANG | os.WCONTINUED)
    print(f"parent {tell()}; child {of_child}; wait {told != (0, 0)}", flush=True)
"#;

    struct Family {
        parent: Child,
        ask: ChildStdin,
        answers: BufReader<ChildStdout>,
        child: i32,
    }

    impl Family {
        fn start(args: &[&str]) -> Self {
            let mut command = Command::new("python3");
            command.args(["-c", PROGRAM]).args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut parent = command.spawn().expect("python3");
            let ask = parent.stdin.take().expect("piped");
            let mut answers = BufReader::new(parent.stdout.take().expect("piped"));
            let mut line = String::new();
            answers.read_line(&mut line).expect("its child");
            Self { parent, ask, answers, child: line.trim().parse().expect("a number") }
        }

        fn pids(&self) -> [i32; 2] {
            [self.parent.id().cast_signed(), self.child]
        }

        fn seen(&mut self, by: &str) -> String {
            writeln!(self.ask, "{by}").expect("it reads");
            let mut line = String::new();
            self.answers.read_line(&mut line).expect("it answers");
            line.trim().to_owned()
        }

        /// Stopped as CRIU leaves a tree: children tell their parents of it.
        fn stop(&self) {
            for pid in self.pids() {
                kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("it lives");
                let deadline = Instant::now() + Duration::from_secs(10);
                while !threads(pid).into_iter().all(|thread| state(pid, thread) == Some('T')) {
                    assert!(Instant::now() < deadline, "{pid} does not stop");
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }

        fn masks(&self) -> Vec<(i32, String)> {
            let all = self
                .pids()
                .into_iter()
                .flat_map(|pid| threads(pid).into_iter().map(move |thread| (pid, thread)));
            let mask = |(pid, thread)| {
                let status =
                    std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/status")).expect("it lives");
                let line = status.lines().find(|line| line.starts_with("SigBlk:")).expect("the kernel tells");
                (thread, line.to_owned())
            };
            all.map(mask).collect()
        }
    }

    impl Drop for Family {
        fn drop(&mut self) {
            for pid in self.pids() {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            let _ = self.parent.wait();
        }
    }

    fn state(process: i32, thread: i32) -> Option<char> {
        let stat = std::fs::read_to_string(format!("/proc/{process}/task/{thread}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.chars().next()
    }

    const LIMIT: Duration = Duration::from_secs(20);
    const NOTHING: &str = "parent cont 0 chld 0 waits ; child cont 0 chld 0 waits ; wait False";

    #[test]
    fn a_stopped_tree_goes_on_and_sees_no_signal() {
        for args in [&["8"][..], &["8", "blocks"]] {
            let mut family = Family::start(args);
            // All threads are there and wait.
            assert_eq!(family.seen("both"), NOTHING, "{args:?}");
            let masks = family.masks();
            for _ in 0..5 {
                family.stop();
                Hold::new(true).continue_unseen(&family.pids(), &[], LIMIT).expect("it goes on");
                assert_eq!(family.seen("both"), NOTHING, "{args:?}");
            }
            assert_eq!(family.masks(), masks);
            // The same without care is seen, and so is a signal that comes afterwards.
            family.stop();
            send(&family.pids());
            let careless = family.seen("both");
            // It is told of the child's stop and of its going on, by one signal if the first still waits then.
            let (what, never) = if args.len() == 1 {
                (["parent cont 1 chld ", "child cont 1"], "parent cont 1 chld 0")
            } else {
                (["waits SIGCHLD,SIGCONT", "True"], "waits ;")
            };
            for what in what {
                assert!(careless.contains(what), "{what:?} is missing in {careless:?}");
            }
            assert!(!careless.contains(never), "{never:?} in {careless:?}");
        }
    }

    /// What was blocked for the stop is not any more, in these threads only, and what the program itself blocks stays.
    #[test]
    fn what_was_blocked_for_the_stop_is_unblocked() {
        let mut family = Family::start(&["2", "blocks"]);
        let [parent, _] = family.pids();
        assert_eq!(family.seen("both"), NOTHING);
        let all = threads(parent);
        let (last, others) = all.split_last().expect("threads");
        let others: Vec<u32> = others.iter().map(|thread| thread.cast_unsigned()).collect();
        family.stop();
        Hold::new(true).continue_unseen(&family.pids(), &others, LIMIT).expect("it goes on");
        assert_eq!(family.seen("both"), NOTHING);
        for (thread, mask) in family.masks() {
            let mask = u64::from_str_radix(mask.trim_start_matches("SigBlk:").trim(), 16).expect("a mask");
            let blocks = |signal| mask & bit(signal) != 0;
            let freed = all.contains(&thread) && thread != *last;
            assert_eq!((blocks(Signal::SIGCHLD), blocks(Signal::SIGCONT)), (!freed, true), "{thread}");
        }
    }

    /// A child that has ended is told of by the same signal.
    #[test]
    fn the_end_of_a_child_is_still_told() {
        let mut family = Family::start(&["2"]);
        let [parent, child] = family.pids();
        family.stop();
        kill(Pid::from_raw(child), Signal::SIGKILL).expect("it lives");
        let deadline = Instant::now() + LIMIT;
        while state(child, child) != Some('Z') {
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
        Hold::new(true).continue_unseen(&[parent], &[], LIMIT).expect("it goes on");
        let deadline = Instant::now() + LIMIT;
        while Status::of(parent).pending & bit(Signal::SIGCHLD) != 0 {
            assert!(Instant::now() < deadline, "it does not go on");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(family.seen("alone"), "cont 0 chld 1 waits");
    }

    #[test]
    fn what_is_held_stays_held() {
        let family = Family::start(&["2"]);
        let [parent, child] = family.pids();
        family.stop();
        let mut hold = Hold::new(true);
        hold.ask(&[parent], &BTreeSet::from([parent])).expect("hold");
        hold.continue_unseen(&family.pids(), &[], LIMIT).expect("it goes on");
        hold.settle(LIMIT).expect("stands");
        assert_eq!(hold.count(), threads(parent).len() - 1);
        for (pid, thread) in
            threads(parent).into_iter().map(|thread| (parent, thread)).chain([(child, child)])
        {
            let stands = thread != parent && thread != child;
            assert_eq!(state(pid, thread) == Some('t'), stands, "{thread} of {pid}");
        }
    }

    #[test]
    fn the_kernels_words_on_a_process_are_read() {
        let text = "Name:\tx\nPPid:\t12\nSigPnd:\t0\nShdPnd:\t0000000000020000\nSigBlk:\t0\nSigCgt:\t0000000000010000\n";
        let status = Status::parse(text);
        assert_eq!((status.parent, status.pending & bit(Signal::SIGCONT)), (12, 1 << 17));
        assert!(!status.notices(Signal::SIGCONT));
        assert!(status.notices(Signal::SIGCHLD));
    }
}
