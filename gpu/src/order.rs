//! The order of the driver's steps over all processes of a server, and what is true when one fails.
//!
//! Suspend: lock all, hold every thread but the driver's own, checkpoint all, freeze, let go. Resume: hold while all is
//! frozen, thaw, restore all, unlock all, let go. The threads are held because a checkpoint takes the device's ranges out
//! of the address space and a restore puts them back at the same place: memory that a program maps in between would be
//! overwritten. The driver's own thread has to run, so a freezer or a stop signal is no way.
//!
//! No step counts as done because a call said so: the state of every process is read afterwards. After a call whose
//! outcome is unknown it is read too, and nothing is repeated blindly. A suspend that fails restores and unlocks
//! everything; a resume that fails goes back to where it began.

use std::collections::BTreeSet;
use std::io;
use std::time::{Duration, Instant};

use rewarm_report::{Class, Classify};
use rewarm_sys::hold::Hold;
use serde::{Deserialize, Serialize};

use crate::client::{CallError, Helper};
use crate::custom::Part;
use crate::driver::Code;
use crate::place::{DeviceState, DeviceStateSink, DeviceStateSource};
use crate::ranges::{self, Range};
use crate::states::{State, Step};
use crate::topology::{Lack, Pair};
use crate::wire::Call;

/// How long the threads of a server may take to stand still.
const HOLD_DEADLINE: Duration = Duration::from_secs(10);
/// How long the driver may go on with a call whose caller was killed, before the state is believed.
const UNKNOWN_GRACE: Duration = Duration::from_secs(2);
/// How often a suspend begins anew because a process began to use CUDA meanwhile.
const ATTEMPTS_MAX: usize = 3;
/// How long work on the devices may take to finish where the server is killed afterwards anyway.
pub const LEAVE_LOCK_TIMEOUT: Duration = Duration::from_secs(2);
const STEP: Duration = Duration::from_millis(5);

/// The processes of one server, and the freezer that all of them are in.
pub trait Group {
    /// Process numbers, as the helper sees them.
    fn processes(&self) -> Vec<i32>;
    /// Freezes all of them and waits until they stand.
    ///
    /// # Errors
    /// The kernel's, or a task that does not stand in time.
    fn freeze(&self) -> io::Result<()>;
    /// Lets them go on.
    ///
    /// # Errors
    /// The kernel's.
    fn thaw(&self) -> io::Result<()>;
    /// The same while some of their threads are held, or asked to stand, which they stay.
    ///
    /// # Errors
    /// The kernel's.
    fn thaw_held(&self, _hold: &mut Hold) -> io::Result<()> {
        self.thaw()
    }
}

/// A process that uses CUDA.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number, as the helper sees it.
    pub pid: i32,
    /// The driver's own thread in it.
    pub restore_thread: i32,
    /// Where the driver's copy of the device memory lies, while it is checkpointed.
    pub copies: Vec<Range>,
    /// Where its device memory is in the file that took it past the process; then there are no copies.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub direct: Vec<Part>,
}

impl Process {
    /// Size of its device memory.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let direct: u64 = self.direct.iter().map(|part| part.bytes).sum();
        direct + self.copies.iter().map(Range::bytes).sum::<u64>()
    }
}

/// A server whose device memory is away from the devices, and which is frozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspended {
    /// Those of its processes that use CUDA.
    pub processes: Vec<Process>,
    /// Time within the driver.
    pub driver: Duration,
    /// Time of the whole.
    pub total: Duration,
}

impl Suspended {
    /// Bytes of device memory.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.processes.iter().map(Process::bytes).sum()
    }
}

/// What a resume took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resumed {
    /// Time within the driver's restore calls, which grows with the bytes.
    pub restore: Duration,
    /// Time within the driver's unlock calls.
    pub unlock: Duration,
    /// Time of the whole.
    pub total: Duration,
}

/// What failed.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// A call.
    #[error(transparent)]
    Call(#[from] CallError),
    /// A call that was said to be done, and was not.
    #[error("after {step} process {pid} is {seen}, expected {expected}", expected = step.target())]
    State {
        /// The step.
        step: Step,
        /// The process.
        pid: i32,
        /// Its state.
        seen: State,
    },
    /// A process was not where a step begins.
    #[error("process {pid} is {seen} before {step}")]
    Before {
        /// The step.
        step: Step,
        /// The process.
        pid: i32,
        /// Its state.
        seen: State,
    },
    /// A process ended in the middle.
    #[error("process {pid} ended before {step} was done")]
    Gone {
        /// The step.
        step: Step,
        /// The process.
        pid: i32,
    },
    /// A process began to use CUDA meanwhile.
    #[error("process {pid} began to use CUDA meanwhile, {attempts} times in a row")]
    Began {
        /// The process.
        pid: i32,
        /// How often it was tried.
        attempts: usize,
    },
    /// A device has too little memory free; the driver was not called.
    #[error("{0}; the driver was not called")]
    Lack(Lack),
    /// The kernel.
    #[error("{action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Cause {
    /// What a result means as a rule, where that cannot be seen before the call.
    fn advice(&self) -> &'static str {
        match self {
            Self::Call(CallError::Refused { call: Call::Step { step: Step::Checkpoint, .. }, code })
                if *code == Code::NOT_SUPPORTED =>
            {
                "; managed memory and CUDA IPC are what drivers refuse so (docs/gpu.md)"
            }
            _ => "",
        }
    }
}

/// What is true after a failure, read from the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Aftermath {
    /// Every process runs as before.
    Running,
    /// Every process is checkpointed and frozen, as before.
    Suspended,
    /// These processes are in no state from which they could go on, with what was seen of each.
    Stranded(Vec<(i32, String)>),
}

impl std::fmt::Display for Aftermath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Running => f.write_str("the server runs on"),
            Self::Suspended => f.write_str("the server stays paused and can be woken again"),
            Self::Stranded(left) => {
                for (index, (pid, seen)) in left.iter().enumerate() {
                    write!(f, "{}process {pid} is left {seen}", if index == 0 { "" } else { ", " })?;
                }
                f.write_str("; only stopping the replica is left")
            }
        }
    }
}

/// A suspend or a resume that failed.
#[derive(Debug, thiserror::Error)]
#[error("{cause}; {aftermath}{}", cause.advice())]
pub struct Failure {
    /// Why.
    #[source]
    pub cause: Cause,
    /// What is true now.
    pub aftermath: Aftermath,
}

impl Classify for Failure {
    fn class(&self) -> Class {
        match self.aftermath {
            Aftermath::Stranded(_) => Class::Stranded,
            Aftermath::Running | Aftermath::Suspended => Class::Failed,
        }
    }
}

/// The processes of `group` that use CUDA, with the driver's thread in each. Those of `known` are not asked again: a process that
/// uses CUDA does so to its end, by the same thread.
///
/// # Errors
/// [`CallError`].
pub fn find(helper: &mut Helper, group: &dyn Group, known: &[Process]) -> Result<Vec<Process>, CallError> {
    let mut found = Vec::new();
    for pid in group.processes() {
        if let Some(process) = known.iter().find(|process| process.pid == pid) {
            found.push(process.clone());
            continue;
        }
        if !ranges::loads_driver(pid) {
            continue;
        }
        if let Some(restore_thread) = helper.restore_thread(pid)? {
            found.push(Process { pid, restore_thread, copies: Vec::new(), direct: Vec::new() });
        }
    }
    Ok(found)
}

/// Brings the device memory of all processes to `state` and freezes the group. What uses no CUDA is only frozen.
///
/// # Errors
/// [`Failure`]; everything that was locked or checkpointed is restored and unlocked by then.
pub fn suspend(
    helper: &mut Helper,
    group: &dyn Group,
    lock_timeout: Duration,
    state: &mut dyn DeviceState,
) -> Result<Suspended, Failure> {
    suspend_found(helper, group, Vec::new(), lock_timeout, state)
}

/// The same for a group in which [`find`] has just found these processes.
///
/// # Errors
/// As of [`suspend`].
pub fn suspend_found(
    helper: &mut Helper,
    group: &dyn Group,
    mut found: Vec<Process>,
    lock_timeout: Duration,
    state: &mut dyn DeviceState,
) -> Result<Suspended, Failure> {
    let mut attempts = 1;
    loop {
        let processes = std::mem::take(&mut found);
        let mut work = Work { helper, group, hold: Hold::new(false), processes };
        match work.suspend(lock_timeout, state) {
            Ok(suspended) => return Ok(suspended),
            Err(cause) => {
                let aftermath = work.back_to_running(state);
                match cause {
                    Cause::Began { .. } if aftermath == Aftermath::Running && attempts < ATTEMPTS_MAX => {
                        attempts += 1
                    }
                    Cause::Began { pid, .. } => {
                        return Err(Failure { cause: Cause::Began { pid, attempts }, aftermath });
                    }
                    cause => return Err(Failure { cause, aftermath }),
                }
            }
        }
    }
}

/// Thaws a suspended group with its device memory back on the devices.
///
/// # Errors
/// [`Failure`]; everything is checkpointed and frozen again by then, or it is said which process is not.
pub fn resume(
    helper: &mut Helper,
    group: &dyn Group,
    processes: &[Process],
    pairs: &[Pair],
    state: &mut dyn DeviceState,
) -> Result<Resumed, Failure> {
    let processes = processes.iter().filter(|process| ranges::exists(process.pid)).cloned().collect();
    let mut work = Work { helper, group, hold: Hold::new(false), processes };
    work.resume(pairs, state).map_err(|cause| {
        let aftermath = work.back_to_suspended(pairs, state);
        Failure { cause, aftermath }
    })
}

/// Lets a restored group go whose tasks stand stopped and whose device memory lies in its host memory; `thaw` of the group
/// has to continue them. Should this process die meanwhile, all of them die with it.
///
/// # Errors
/// [`Cause`]; the group must then be killed. What of it the driver had restored is off its devices again and frozen by then, as
/// far as the driver does that.
pub fn begin(
    helper: &mut Helper,
    group: &dyn Group,
    processes: Vec<Process>,
    pairs: &[Pair],
    source: &mut dyn DeviceStateSource,
) -> Result<Resumed, Cause> {
    let mut work = Work { helper, group, hold: Hold::new(true), processes };
    let begun = work.resume(pairs, source);
    if begun.is_err() {
        work.leave();
    }
    begun
}

/// One suspend or resume.
struct Work<'a> {
    helper: &'a mut Helper,
    group: &'a dyn Group,
    hold: Hold,
    processes: Vec<Process>,
}

impl Work<'_> {
    fn suspend(
        &mut self,
        lock_timeout: Duration,
        sink: &mut dyn DeviceStateSink,
    ) -> Result<Suspended, Cause> {
        let began = Instant::now();
        self.processes = find(self.helper, self.group, &self.processes)?;
        self.before(Step::Lock, State::RUNNING)?;
        let bytes_max = self.bytes_max()?;
        let mut driver = self.phase(Step::Lock, |helper, process| helper.lock(process.pid, lock_timeout))?;
        self.hold_all()?;
        let now = find(self.helper, self.group, &self.processes)?;
        let known = |pid| self.processes.iter().any(|process| process.pid == pid);
        if let Some(new) = now.iter().find(|process| !known(process.pid)) {
            return Err(Cause::Began { pid: new.pid, attempts: 1 });
        }
        for process in &self.processes {
            sink.begin(process.pid).map_err(about("prepare the checkpoint"))?;
        }
        driver +=
            self.phase(Step::Checkpoint, |helper, process| sink.checkpoint(helper, process, bytes_max))?;
        for process in &mut self.processes {
            sink.end(process).map_err(about("find what was checkpointed"))?;
        }
        self.group.freeze().map_err(about("freeze the server"))?;
        self.let_go();
        Ok(Suspended { processes: self.processes.clone(), driver, total: began.elapsed() })
    }

    fn resume(&mut self, pairs: &[Pair], source: &mut dyn DeviceStateSource) -> Result<Resumed, Cause> {
        let began = Instant::now();
        self.before(Step::Restore, State::CHECKPOINTED)?;
        self.hold_frozen()?;
        let restore = self.phase(Step::Restore, |helper, process| source.restore(helper, process, pairs))?;
        let unlock = self.phase(Step::Unlock, |helper, process| helper.unlock(process.pid))?;
        self.let_go();
        Ok(Resumed { restore, unlock, total: began.elapsed() })
    }

    /// Carries one step out for all processes, and only then looks at what came of it: with older drivers a question about
    /// a process hangs while its peer is locked.
    fn phase(
        &mut self,
        step: Step,
        mut call: impl FnMut(&mut Helper, &Process) -> Result<Duration, CallError>,
    ) -> Result<Duration, Cause> {
        let mut spent = Duration::ZERO;
        let mut unsure = Vec::new();
        for process in &self.processes {
            match call(self.helper, process) {
                Ok(time) => spent += time,
                // An unlock may err although it was done, and nobody knows what a lost call did.
                Err(error) if step == Step::Unlock || error.is_unknown() => {
                    tracing::warn!(%error, "the state decides");
                    unsure.push((process.pid, error));
                }
                Err(_) if !ranges::exists(process.pid) => return Err(Cause::Gone { step, pid: process.pid }),
                Err(error) => return Err(error.into()),
            }
        }
        for (pid, error) in unsure {
            if self.settled(pid, step)? != step.target() {
                return Err(error.into());
            }
        }
        for process in &self.processes {
            let pid = process.pid;
            let seen = self.helper.state(pid);
            match seen {
                Ok(seen) if seen == step.target() => {}
                Ok(seen) => return Err(Cause::State { step, pid, seen }),
                Err(_) if !ranges::exists(pid) => return Err(Cause::Gone { step, pid }),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(spent)
    }

    /// The state after a call with an unknown outcome: the driver finishes what it has begun although the caller is dead.
    fn settled(&mut self, pid: i32, step: Step) -> Result<State, Cause> {
        let deadline = Instant::now() + UNKNOWN_GRACE;
        loop {
            let seen = match self.helper.state(pid) {
                Ok(seen) => seen,
                Err(_) if !ranges::exists(pid) => return Err(Cause::Gone { step, pid }),
                Err(error) => return Err(error.into()),
            };
            if seen == step.target() || seen == State::FAILED || Instant::now() > deadline {
                return Ok(seen);
            }
            std::thread::sleep(STEP);
        }
    }

    /// Refuses to begin with a process that somebody else has in work.
    fn before(&mut self, step: Step, expected: State) -> Result<(), Cause> {
        for process in &self.processes {
            let (pid, seen) = (process.pid, self.helper.state(process.pid)?);
            if seen != expected {
                return Err(Cause::Before { step, pid, seen });
            }
        }
        Ok(())
    }

    /// The most that a checkpoint can have to move.
    fn bytes_max(&mut self) -> Result<u64, Cause> {
        if self.processes.is_empty() {
            return Ok(0);
        }
        Ok(self.helper.devices()?.iter().map(|device| device.total_bytes).sum())
    }

    fn restore_threads(&self) -> BTreeSet<i32> {
        self.processes.iter().map(|process| process.restore_thread).collect()
    }

    fn hold_all(&mut self) -> Result<(), Cause> {
        if self.processes.is_empty() {
            return Ok(());
        }
        let (group, except) = (self.group, self.restore_threads());
        self.hold
            .all(|| group.processes(), &except, HOLD_DEADLINE)
            .map_err(about("hold the server's threads"))
    }

    /// Holds what is frozen, so that after the thaw only the driver's threads run.
    fn hold_frozen(&mut self) -> Result<(), Cause> {
        if !self.processes.is_empty() {
            let (group, except) = (self.group, self.restore_threads());
            self.hold.ask(&group.processes(), &except).map_err(about("hold the server's threads"))?;
        }
        self.group.thaw_held(&mut self.hold).map_err(about("thaw the server"))?;
        self.hold.settle(HOLD_DEADLINE).map_err(about("hold the server's threads"))
    }

    fn let_go(&mut self) {
        self.hold = Hold::new(false);
    }

    /// Restores and unlocks whatever is not running, and reads what came of it.
    fn back_to_running(&mut self, source: &mut dyn DeviceStateSource) -> Aftermath {
        // Frozen, nothing of it would be answered.
        if let Err(error) = self.group.thaw() {
            tracing::warn!(%error, "thaw");
        }
        self.bring_back(Step::Restore, |helper, process| source.restore(helper, process, &[]));
        self.bring_back(Step::Unlock, |helper, process| helper.unlock(process.pid));
        self.let_go();
        let left = self.not_in(State::RUNNING);
        if left.is_empty() { Aftermath::Running } else { Aftermath::Stranded(left) }
    }

    /// Checkpoints whatever was restored and freezes the group again: what is not whole must not answer.
    fn back_to_suspended(&mut self, pairs: &[Pair], state: &mut dyn DeviceState) -> Aftermath {
        let broken = self.broken(pairs, state);
        // A process that runs already was unlocked.
        self.bring_back(Step::Lock, |helper, process| helper.lock(process.pid, HOLD_DEADLINE));
        self.bring_back(Step::Checkpoint, |helper, process| {
            state.checkpoint(helper, process, process.bytes())
        });
        let mut left = self.not_in(State::CHECKPOINTED);
        left.extend(broken.into_iter().filter(|(pid, _)| ranges::exists(*pid)));
        let frozen = self.group.freeze();
        self.let_go();
        match frozen {
            Ok(()) if left.is_empty() => Aftermath::Suspended,
            Ok(()) => Aftermath::Stranded(left),
            Err(error) => {
                let unfrozen = (0, format!("unfrozen: {error}"));
                Aftermath::Stranded(left.into_iter().chain([unfrozen]).collect())
            }
        }
    }

    /// Takes what was restored off its devices before it is killed, since drivers were reported to hang at the end of a process
    /// that they had restored. A driver that does not answer is asked no more.
    fn leave(&mut self) {
        for step in [Step::Lock, Step::Checkpoint] {
            for process in &self.processes {
                let helper = &mut *self.helper;
                let left = helper.state(process.pid).and_then(|state| match step {
                    _ if step.from(state).is_none() => Ok(Duration::ZERO),
                    Step::Lock => helper.lock(process.pid, LEAVE_LOCK_TIMEOUT),
                    _ => helper.checkpoint(process.pid, process.bytes()),
                });
                match left {
                    Ok(_) => {}
                    Err(error) if error.is_unknown() => {
                        return tracing::warn!(%error, "the server is killed as it is");
                    }
                    Err(error) => tracing::warn!(%error, "the process is killed as it is"),
                }
            }
        }
        // Nothing of it must run without its devices until it is killed.
        if let Err(error) = self.group.freeze() {
            tracing::warn!(%error, "freeze");
        }
        self.let_go();
    }

    /// The processes that are checkpointed and will not be restored again. Drivers were reported to refuse every further restore after
    /// one that met too little device memory, while they tell the same state as before: only asking once more shows it. That
    /// restore may have been one of an earlier resume.
    fn broken(&mut self, pairs: &[Pair], source: &mut dyn DeviceStateSource) -> Vec<(i32, String)> {
        let mut broken = Vec::new();
        for process in &self.processes.clone() {
            let pid = process.pid;
            let is_away = |state| state == State::CHECKPOINTED;
            if !self.helper.was_short(pid) || !self.helper.state(pid).is_ok_and(is_away) {
                continue;
            }
            // Room that there is by now makes it succeed; it is checkpointed again then.
            if let Err(error) = source.restore(self.helper, process, pairs)
                && let Some(code) = error.code().filter(|code| *code != Code::OUT_OF_MEMORY)
            {
                broken.push((pid, format!("checkpointed, and the driver will not restore it: {code}")));
            }
        }
        broken
    }

    /// Takes `step` with every process that it leads on.
    fn bring_back(
        &mut self,
        step: Step,
        mut call: impl FnMut(&mut Helper, &Process) -> Result<Duration, CallError>,
    ) {
        for process in &self.processes.clone() {
            let pid = process.pid;
            let leads_on = |state: State| step.from(state).is_some();
            if !ranges::exists(pid) || !self.helper.state(pid).is_ok_and(leads_on) {
                continue;
            }
            if let Err(error) = call(self.helper, process) {
                tracing::warn!(%error, "on the way back");
                // Whatever it did shows in the state that is read next.
                let _ = self.settled(pid, step);
            }
        }
    }

    /// The living processes that are not in `state`.
    fn not_in(&mut self, state: State) -> Vec<(i32, String)> {
        let mut left = Vec::new();
        for pid in self.processes.iter().map(|process| process.pid).collect::<Vec<_>>() {
            match self.helper.state(pid) {
                Ok(seen) if seen == state => {}
                _ if !ranges::exists(pid) => {}
                Ok(seen) => left.push((pid, seen.to_string())),
                Err(error) => left.push((pid, format!("in an unknown state ({error})"))),
            }
        }
        left
    }
}

fn about(action: &'static str) -> impl Fn(io::Error) -> Cause {
    move |source| Cause::System { action, source }
}
