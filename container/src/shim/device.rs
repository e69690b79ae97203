//! Takes device memory away from a server for a dump, and gives it back.
//!
//! A suspension is a lease of the connection that asked for it: the server is frozen, its device memory lies in its host
//! memory, until its dump has ended, the command lets it go on, or the command is gone. With a freeze of the same connection
//! it lasts as long as that.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use rewarm_gpu::carried::{self, Carried};
use rewarm_gpu::nvml::Machine;
use rewarm_gpu::place::{DeviceState, InFile, InProcess};
use rewarm_gpu::preflight::{self, Proc, Purpose, Refusal, Unfit};
use rewarm_gpu::topology::{self, Uuid};
use rewarm_gpu::{
    Aftermath, CallError, Cause, Failure, Group, Helper, Launch, Process, Resumed, custom, order, ranges,
};

use crate::cgroup::Cgroup;
use crate::error::{Context, Error};
use crate::record::Status;
use crate::shim::replica::{Asker, ConnectionId, Inner, Parts, Replica};

/// How long work on the devices may take to finish before a dump is given up.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a server that is to be killed may take to leave its devices: what the largest holds (141 GiB), at 5 GB/s.
const LEAVE_DEADLINE: Duration = Duration::from_secs(30);

/// How long device memory that a server has just left may take until it counts as free.
const ROOM_WITHIN: Duration = Duration::from_secs(2);
/// How often it is looked meanwhile.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// How the helper is started: this program, which may have been replaced meanwhile.
pub(super) fn helper(patience: Option<Duration>) -> Helper {
    let (program, verb) = (PathBuf::from("/proc/self/exe"), OsString::from("gpu-helper"));
    let helper = Helper::new(Launch { program, args: vec![verb], env: Vec::new() });
    match patience {
        Some(patience) => helper.with_deadline(patience),
        None => helper,
    }
}

/// The processes of a replica, as the device plane sees them.
pub(super) struct Tasks<'a>(pub(super) &'a Cgroup);

impl Group for Tasks<'_> {
    fn processes(&self) -> Vec<i32> {
        self.0.pids().into_iter().map(u32::cast_signed).collect()
    }

    fn freeze(&self) -> io::Result<()> {
        self.0.freeze().map_err(io::Error::other)
    }

    fn thaw(&self) -> io::Result<()> {
        self.0.thaw().map_err(io::Error::other)
    }
}

/// Processes whose device memory is away from the devices.
#[derive(Debug, Clone, Default)]
pub(super) struct Away {
    pub(super) processes: Vec<Process>,
    /// Bytes that each device must have free for them to come back, as far as is known.
    needed: BTreeMap<Uuid, u64>,
}

impl Away {
    /// `looked`: what was seen before they were suspended.
    pub(super) fn new(processes: Vec<Process>, looked: &Looked) -> Self {
        let only = looked.machine.as_ref().and_then(|machine| match &machine.gpus[..] {
            [only] if looked.used.is_empty() => Some(only.uuid),
            _ => None,
        });
        let bytes: u64 = processes.iter().map(Process::bytes).sum();
        let needed = only.map_or_else(|| looked.used.clone(), |only| [(only, bytes)].into());
        Self { processes, needed }
    }

    /// Bytes of device memory.
    pub(super) fn bytes(&self) -> u64 {
        self.processes.iter().map(Process::bytes).sum()
    }
}

/// The processes that use CUDA, what NVML tells, as far as it tells something, and the bytes of the server on each device.
#[derive(Debug, Default)]
pub(super) struct Looked {
    pub(super) processes: Vec<Process>,
    pub(super) machine: Option<Machine>,
    used: BTreeMap<Uuid, u64>,
}

/// What is suspended, and for whom.
#[derive(Debug, Clone)]
pub(super) struct Suspension {
    /// The connection that asked.
    pub(super) by: ConnectionId,
    away: Away,
}

/// Refuses what would meet too little device memory within the driver: some never restore such a process again. Looks again
/// for `patience`.
pub(super) fn room(
    helper: &mut Helper,
    needed: &BTreeMap<Uuid, u64>,
    patience: Duration,
) -> Result<(), RoomError> {
    let deadline = Instant::now() + patience;
    while let Some(machine) = helper.machine().map_err(RoomError::Call)? {
        match topology::lacking(needed, &machine) {
            None => break,
            Some(lack) if Instant::now() > deadline => return Err(RoomError::Lack(lack)),
            Some(_) => std::thread::sleep(LOOK_AGAIN),
        }
    }
    Ok(())
}

/// Why [`room`] does not let the driver be called.
#[derive(Debug)]
pub(super) enum RoomError {
    Call(CallError),
    Lack(topology::Lack),
}

impl RoomError {
    /// For a server that is suspended, and stays so.
    pub(super) fn still_paused(self) -> Error {
        let aftermath = Aftermath::Suspended;
        match self {
            Self::Call(error) => Failure { cause: Cause::Call(error), aftermath }.into(),
            Self::Lack(lack) => Failure { cause: Cause::Lack(lack), aftermath }.into(),
        }
    }

    /// For a server that is not running yet, and is given up.
    pub(super) fn given_up(self) -> Error {
        Error::Begin(Box::new(match self {
            Self::Call(error) => Cause::Call(error),
            Self::Lack(lack) => Cause::Lack(lack),
        }))
    }
}

/// The device files that a replica was given for its GPUs.
fn given(parts: &Parts) -> &[PathBuf] {
    parts.spec.gpu.as_ref().map_or(&[], |gpu| &gpu.provided.devices)
}

/// Takes the memory for a file now: a checkpoint that runs out of it cannot be undone, and the server still runs.
fn reserve(file: &OwnedFd, bytes: u64) -> io::Result<()> {
    let length = i64::try_from(bytes).map_err(io::Error::other)?;
    match length {
        0 => Ok(()),
        _ => Ok(nix::fcntl::posix_fallocate(file, 0, length)?),
    }
}

/// What the helper said before anything was touched.
pub(super) fn untouched(error: rewarm_gpu::CallError) -> Error {
    Failure { cause: Cause::Call(error), aftermath: Aftermath::Running }.into()
}

impl Replica {
    /// Lets the helper attach to the driver while everything else goes on: it takes up to seconds.
    pub(super) fn attach(self: &Arc<Self>) {
        let replica = self.clone();
        std::thread::spawn(move || {
            let mut helper = replica.helper.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if let Err(error) = helper.start() {
                // Told again, and as a failure, by whoever needs it.
                tracing::info!(%error, "attach to the driver");
            }
        });
    }

    /// Its processes that were seen to use CUDA and still live. None of them may be overlooked later, whatever is answered about it: a
    /// snapshot without its device memory would be another server.
    fn known(&self) -> Vec<Process> {
        let lives = |process: &&Process| {
            Path::new(&format!("/proc/{}/task/{}", process.pid, process.restore_thread)).exists()
        };
        self.lock().cuda.iter().filter(lives).cloned().collect()
    }

    /// Refuses what could not be suspended, with every reason at once, and touches nothing. Gives nothing where no process uses
    /// the driver.
    ///
    /// `direct`: device memory shall go past the processes.
    pub(super) fn examine(&self, parts: &Parts, purpose: Purpose, direct: bool) -> Result<Looked, Error> {
        let tasks = Tasks(&parts.cgroup);
        let processes = tasks.processes();
        let known = self.known();
        let with_driver = processes.iter().find(|pid| ranges::loads_driver(**pid)).copied();
        let Some(pid) = with_driver.or(known.first().map(|process| process.pid)) else {
            return Ok(Looked::default());
        };
        let proc = Proc::here();
        let mut refusals = proc.machine();
        let mut helper = self.helper.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let version = match helper.start() {
            Ok(version) => version,
            // Nothing else can be asked.
            Err(CallError::NoDriver { reason }) => {
                refusals.push(Refusal::Driver { pid, reason });
                return Err(Error::Unfit(Unfit(refusals)));
            }
            Err(error) => return Err(untouched(error)),
        };
        let found = order::find(&mut helper, &tasks, &known).map_err(untouched)?;
        if found.is_empty() {
            tracing::info!(?processes, "none of them uses CUDA");
        }
        self.change(|inner| inner.cuda.clone_from(&found));
        let cuda: Vec<i32> = found.iter().map(|process| process.pid).collect();
        refusals.extend(proc.server(&processes, &cuda, given(parts), purpose));
        if direct && version < custom::VERSION_MIN {
            refusals.push(Refusal::Direct { found: version });
        }
        let machine = helper.machine().map_err(untouched)?;
        let mut used = BTreeMap::new();
        if let Some(machine) = &machine {
            refusals.extend(preflight::devices(machine));
            used = machine.used_by(&cuda);
            let needed = used.values().sum();
            let free = rewarm_sys::machine::free_bytes().context("look at", "free memory")?;
            let limit = if direct { None } else { parts.cgroup.memory_left() };
            refusals.extend(preflight::host_memory(needed, free, limit));
        }
        if refusals.is_empty() {
            Ok(Looked { processes: found, machine, used })
        } else {
            Err(Error::Unfit(Unfit(refusals)))
        }
    }

    /// After a suspend that failed: a server that cannot go on shows as such, whatever becomes of the command that is told.
    pub(super) fn not_suspended(&self, helper: &Helper, failure: Failure) -> Error {
        // On its way back it may have been restored.
        self.change(|inner| inner.restored_by_driver |= helper.has_restored());
        if matches!(failure.aftermath, Aftermath::Stranded(_))
            && let Err(error) = self.set_status(Status::Stranded)
        {
            tracing::error!(%error, "write down that the server is stranded");
        }
        failure.into()
    }

    /// Whether a snapshot of the server's devices can be begun, and the bytes that it has on them.
    pub(super) fn examine_devices(&self, asker: Asker<'_>, direct: bool) -> Result<u64, Error> {
        let (_busy, parts) = self.begin("examine", asker.id)?;
        self.examine(parts, Purpose::Snapshot, direct).map(|looked| looked.used.values().sum())
    }

    /// Works with the device state of this server, wherever it is.
    pub(super) fn with_state<T>(&self, work: impl FnOnce(&mut dyn DeviceState) -> T) -> T {
        match self.change(|inner| inner.kept.take()) {
            Some(mut kept) => {
                let result = work(&mut kept);
                self.change(|inner| inner.kept = Some(kept));
                result
            }
            None => work(&mut InProcess::default()),
        }
    }

    /// Moves device memory into host memory, or into the file `direct`, and leaves the server frozen, for a dump of the same connection; does nothing to
    /// a server that uses no device.
    pub(super) fn suspend_devices(
        &self,
        asker: Asker<'_>,
        direct: Option<OwnedFd>,
    ) -> Result<Option<Carried>, Error> {
        let (_busy, parts) = self.begin("suspend", asker.id)?;
        let result = self.suspend(parts, asker.id, direct);
        if !matches!(result, Ok(Some(_))) {
            self.settle(parts)?;
        }
        result
    }

    fn suspend(
        &self,
        parts: &Parts,
        by: ConnectionId,
        direct: Option<OwnedFd>,
    ) -> Result<Option<Carried>, Error> {
        let tasks = Tasks(&parts.cgroup);
        if self.known().is_empty() && !tasks.processes().iter().any(|pid| ranges::loads_driver(*pid)) {
            return Ok(None);
        }
        // The driver's own threads have to run; what the lease froze is frozen again when all is done.
        parts.cgroup.thaw()?;
        let mut looked = self.examine(parts, Purpose::Snapshot, direct.is_some())?;
        if let Some(file) = direct {
            let bytes = looked.used.values().sum();
            reserve(&file, bytes).context("reserve memory for", "device memory")?;
            self.change(|inner| inner.kept = Some(InFile::new(file)));
        }
        let mut helper = self.helper.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let found = std::mem::take(&mut looked.processes);
        let suspended =
            self.with_state(|state| order::suspend_found(&mut helper, &tasks, found, LOCK_TIMEOUT, state));
        if !suspended.as_ref().is_ok_and(|suspended| !suspended.processes.is_empty()) {
            self.change(|inner| inner.kept = None);
        }
        let suspended = suspended.map_err(|failure| self.not_suspended(&helper, failure))?;
        if suspended.processes.is_empty() {
            parts.cgroup.thaw()?;
            return Ok(None);
        }
        self.change(|inner| {
            let away = Away::new(suspended.processes.clone(), &looked);
            inner.suspended = Some(Suspension { by, away });
        });
        for process in &suspended.processes {
            tracing::info!(pid = process.pid, copies = ?process.copies, "its device memory is in host memory");
        }
        carried::none_left(&tasks.processes(), given(parts))?;
        Ok(Some(Carried::of(&mut helper, &suspended, looked.machine.as_ref())?))
    }

    /// After a dump, or when it was given up before: the server is as frozen as the lease says and not more.
    pub(super) fn settle(&self, parts: &Parts) -> Result<(), Error> {
        let frozen = self.lock().frozen_by.is_some();
        if !parts.cgroup.exists() {
            return Ok(());
        }
        if !frozen {
            match self.change(|inner| inner.suspended.take()) {
                Some(suspension) => self.resume(parts, suspension.away)?,
                None => parts.cgroup.thaw()?,
            }
        } else if !parts.cgroup.is_frozen()? {
            parts.cgroup.freeze()?;
        }
        Ok(())
    }

    /// Takes a server that the driver has restored off its devices, as a pause does, since it is about to be killed: drivers were
    /// reported to hang, and the machine with them, at the end of a process that they had restored, as a clone or in place.
    /// What stands against it is told in the log and does not keep the server alive; neither does a call that hangs, which
    /// ends when the server is dead.
    pub(super) fn let_devices_go(self: &Arc<Self>, connection: ConnectionId) {
        let is_restored = |inner: &Inner| {
            inner.restored_by_driver && inner.init.is_some() && inner.exit.is_none() && inner.paused.is_none()
        };
        self.await_restored();
        if !is_restored(&self.lock()) {
            return;
        }
        let (done, wait) = mpsc::channel();
        let replica = self.clone();
        std::thread::spawn(move || {
            let left = replica.leave_devices(connection);
            // Nobody waits any more where it took too long.
            let _ = done.send(left);
        });
        match wait.recv_timeout(LEAVE_DEADLINE) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the server is killed as it is"),
            Err(_) => {
                tracing::warn!(seconds = LEAVE_DEADLINE.as_secs(), "the driver does not answer in time")
            }
        }
    }

    /// Waits for a restore in the driver, of a clone or by a wake: what is killed within it would be killed on its devices.
    pub(super) fn await_restored(&self) {
        let is_over = |inner: &Inner| {
            let restores = matches!(inner.busy, Some("restore" | "wake")) && inner.restored_by_driver;
            !restores || inner.doomed || inner.exit.is_some()
        };
        if !self.wait_until(Some(LEAVE_DEADLINE), is_over) {
            tracing::warn!(seconds = LEAVE_DEADLINE.as_secs(), "the driver does not restore in time");
        }
    }

    fn leave_devices(&self, connection: ConnectionId) -> Result<(), Error> {
        let (_busy, parts) = self.begin("end", connection)?;
        let tasks = Tasks(&parts.cgroup);
        if !tasks.processes().iter().any(|pid| ranges::loads_driver(*pid)) {
            return Ok(());
        }
        let found = self.examine(parts, Purpose::Pause, false)?.processes;
        let mut helper = self.helper.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let state = &mut InProcess::default();
        order::suspend_found(&mut helper, &tasks, found, order::LEAVE_LOCK_TIMEOUT, state)?;
        Ok(())
    }

    /// Gives the devices what they had before, and lets the server go on. If that fails, it is paused.
    fn resume(&self, parts: &Parts, away: Away) -> Result<(), Error> {
        let mut helper = self.helper.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match self.bring_back(&mut helper, parts, &away, ROOM_WITHIN) {
            Ok(_) => {
                self.change(|inner| inner.kept = None);
                Ok(())
            }
            Err(error) => {
                self.change(|inner| inner.paused = Some(away));
                self.set_status(Status::Paused)?;
                Err(error)
            }
        }
    }

    /// Lets a suspended server go on if the devices have room, for which is waited so long.
    pub(super) fn bring_back(
        &self,
        helper: &mut Helper,
        parts: &Parts,
        away: &Away,
        patience: Duration,
    ) -> Result<Resumed, Error> {
        room(helper, &away.needed, patience).map_err(RoomError::still_paused)?;
        if !away.processes.is_empty() {
            // A fresh helper that cannot attach could not read the states either, and all would count as left stopped.
            helper.start().map_err(|error| RoomError::Call(error).still_paused())?;
        }
        self.change(|inner| inner.restored_by_driver |= !away.processes.is_empty());
        let tasks = Tasks(&parts.cgroup);
        Ok(self.with_state(|state| order::resume(helper, &tasks, &away.processes, &[], state))?)
    }
}
