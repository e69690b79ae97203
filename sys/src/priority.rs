//! Which threads of this process run while others want the processor.
//!
//! The kernel's idle class is meant, not a nice value: a thread of it is put off the processor at once when any other
//! thread wakes up, where a nice one would first use up its slice.

use std::io;

/// How a thread is scheduled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// As every thread is by default.
    Normal,
    /// Only where nobody else wants the processor. New threads of such a thread are like it.
    Idle,
}

impl Priority {
    fn policy(self) -> libc::c_int {
        match self {
            Self::Normal => libc::SCHED_OTHER,
            Self::Idle => libc::SCHED_IDLE,
        }
    }
}

/// Sets the priority of the calling thread.
///
/// # Errors
/// `EPERM` where the limits of this process forbid it.
pub fn set_this_thread(priority: Priority) -> io::Result<()> {
    set(0, priority)
}

/// Makes the calling thread, and those that it will start, this nice (1 to 19): beside a thread that is not nice it
/// gets less of a processor, and all of one that nobody else wants. It cannot take that back. One that is nicer already, because
/// the program was started so, stays as it is: to become less nice is a right of its own.
///
/// # Errors
/// What the kernel says.
pub fn be_nicer(nice: libc::c_int) -> io::Result<()> {
    if own_nice() >= nice { Ok(()) } else { set_nice(nice) }
}

/// Lets the calling thread, and those that it will start, go before others (-20 to -1): what it wakes up for does not wait until
/// they have used up their turn. Where somebody has set a nice value for this program, that one holds.
///
/// # Errors
/// `EACCES` without CAP_SYS_NICE and a limit (RLIMIT_NICE) that allows it.
pub fn go_before(nice: libc::c_int) -> io::Result<()> {
    if own_nice() != 0 { Ok(()) } else { set_nice(nice) }
}

fn own_nice() -> libc::c_int {
    // SAFETY: plain call that only reads. For the calling thread, which 0 means, it cannot fail.
    unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
}

fn set_nice(nice: libc::c_int) -> io::Result<()> {
    // SAFETY: plain call. In Linux the nice value belongs to the thread; 0 means the calling one.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets the priority of every thread of this process, those included that begin meanwhile.
///
/// # Errors
/// `EPERM` where the limits of this process forbid it; some threads may be changed then.
pub fn set_all_threads(priority: Priority) -> io::Result<()> {
    loop {
        let mut changed = false;
        for entry in std::fs::read_dir("/proc/self/task")? {
            let name = entry?.file_name();
            let Some(thread) = name.to_str().and_then(|name| name.parse::<libc::pid_t>().ok()) else {
                continue;
            };
            // SAFETY: plain call that only reads; the result is compared.
            let policy = unsafe { libc::sched_getscheduler(thread) };
            // A thread that has ended meanwhile (-1) needs nothing.
            if policy == -1 || policy == priority.policy() {
                continue;
            }
            match set(thread, priority) {
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                other => other?,
            }
            changed = true;
        }
        // A thread that was begun by one that was not changed yet is found by the next pass.
        if !changed {
            return Ok(());
        }
    }
}

fn set(thread: libc::pid_t, priority: Priority) -> io::Result<()> {
    let parameter = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameter lives across the call; both classes want priority 0.
    let result = unsafe { libc::sched_setscheduler(thread, priority.policy(), &raw const parameter) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> libc::c_int {
        // SAFETY: plain call that only reads.
        unsafe { libc::sched_getscheduler(0) }
    }

    #[test]
    fn a_nice_thread_has_nice_children_and_leaves_the_others_alone() {
        let before = own_nice();
        let seen = std::thread::spawn(move || {
            be_nicer(17).expect("a thread may always be nicer");
            be_nicer(7).expect("it is already");
            std::thread::spawn(own_nice).join().expect("no panic")
        });
        assert_eq!((seen.join().expect("no panic"), own_nice()), (17, before));
    }

    #[test]
    fn a_thread_goes_before_others_where_it_may_and_nobody_said_otherwise() {
        let before = own_nice();
        let seen = std::thread::spawn(move || {
            let went = go_before(-1).map_err(|error| error.raw_os_error());
            (went, own_nice())
        });
        let expected = match (before, seen.join().expect("no panic")) {
            (0, (Err(error), nice)) => ((error, nice), (Some(libc::EACCES), 0)),
            (0, (Ok(()), nice)) => ((None, nice), (None, -1)),
            (set, (went, nice)) => ((went.err().flatten(), nice), (None, set)),
        };
        assert_eq!(expected.0, expected.1);
        let nicer = std::thread::spawn(|| {
            be_nicer(7).expect("a thread may always be nicer");
            go_before(-1).expect("it stays");
            own_nice()
        });
        assert_eq!((nicer.join().expect("no panic"), own_nice()), (before.max(7), before));
    }

    #[test]
    fn a_thread_and_its_children_yield_until_all_are_set_back() {
        set_this_thread(Priority::Idle).expect("a thread may always yield");
        assert_eq!(own(), libc::SCHED_IDLE);
        let (ready, is_ready) = std::sync::mpsc::channel();
        let (go, may_go) = std::sync::mpsc::channel();
        let child = std::thread::spawn(move || {
            ready.send(own()).expect("the test waits");
            may_go.recv().expect("the test sends");
            own()
        });
        assert_eq!(is_ready.recv().expect("the child says it"), libc::SCHED_IDLE);
        match set_all_threads(Priority::Normal) {
            Ok(()) => {
                go.send(()).expect("the child waits");
                assert_eq!((child.join().expect("no panic"), own()), (libc::SCHED_OTHER, libc::SCHED_OTHER));
            }
            // Without the right to be nice to oneself again there is nothing to see.
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EPERM));
                go.send(()).expect("the child waits");
                child.join().expect("no panic");
            }
        }
    }
}
