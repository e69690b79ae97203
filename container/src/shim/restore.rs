//! Restores the server through runc.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rewarm_gpu::place::{DeviceStateSource, InProcess, Stream};
use rewarm_gpu::{Group, order, topology};
use rewarm_sys::hold::Hold;
use rewarm_sys::mount;

use crate::error::{Context, Error};
use crate::record::{Cause, Memory, Status, WakeCost};
use crate::rootfs;
use crate::shim::children::{Outcome, descendants, hung_up};
use crate::shim::device::{RoomError, Tasks, room};
use crate::shim::logs::Pump;
use crate::shim::protocol::{DeviceRequest, ResidentRequest, RestoreRequest};
use crate::shim::replica::{Asker, Inner, Parts, Replica};
use crate::shim::start::read_pid;
use crate::shim::supervise::Resident;

/// How often it is looked whether the command is still there while memory is filled.
const STEP: Duration = Duration::from_millis(100);

/// How long threads of a stopped server may take to stand for a tracer: none of them runs.
const HELD_WITHIN: Duration = Duration::from_secs(10);

/// Processes that CRIU has left stopped: a signal lets them go on, which none of them sees.
struct Stopped<'a> {
    tasks: Tasks<'a>,
    /// Threads, by their ids in the replica, in which SIGCHLD is blocked until then.
    unblock: &'a [u32],
}

impl Group for Stopped<'_> {
    fn processes(&self) -> Vec<i32> {
        self.tasks.processes()
    }

    fn freeze(&self) -> io::Result<()> {
        self.tasks.freeze()
    }

    fn thaw(&self) -> io::Result<()> {
        self.thaw_held(&mut Hold::new(true))
    }

    fn thaw_held(&self, hold: &mut Hold) -> io::Result<()> {
        hold.continue_unseen(&self.processes(), self.unblock, HELD_WITHIN)
    }
}

impl Replica {
    /// Restores from the images that lie in the images directory.
    pub(super) fn restore(
        self: &Arc<Self>,
        asker: Asker<'_>,
        request: &RestoreRequest,
        fds: Vec<OwnedFd>,
    ) -> Result<u32, Error> {
        let (_busy, parts) = self.begin_start("restore")?;
        let result = self.try_restore(asker, request, fds, parts);
        if result.is_err() {
            self.kill_processes();
            for resident in self.change(|inner| std::mem::take(&mut inner.residents)) {
                resident.kill();
            }
        }
        result
    }

    fn try_restore(
        self: &Arc<Self>,
        asker: Asker<'_>,
        request: &RestoreRequest,
        fds: Vec<OwnedFd>,
        parts: &Parts,
    ) -> Result<u32, Error> {
        let timeout = Duration::from_millis(request.timeout_ms);
        let deadline = Instant::now() + timeout;
        let mut fds = fds.into_iter();
        if request.images_attached {
            let images = self.paths.images();
            let root = fds.next().ok_or_else(|| missing(0))?;
            mount::attach(root, &images).context("attach the images at", images.display())?;
        }
        let config = self.paths.criu_config();
        std::fs::write(&config, &request.config).context("write", config.display())?;
        rootfs::mount_over(&parts.spec.rootfs, &self.paths)?;
        if request.lazy_pages {
            self.set_memory(Memory::Filling)?;
        }
        for wanted in &request.residents {
            let own: Vec<OwnedFd> = fds.by_ref().take(wanted.fds).collect();
            if own.len() < wanted.fds {
                return Err(missing(wanted.fds - own.len()));
            }
            let resident = Resident::start(self, wanted, own)?;
            self.change(|inner| inner.residents.push(resident));
        }
        let pid_file = self.paths.dir().join("init.pid");
        let mut command = parts.runc.restore(request, &self.paths, &pid_file);
        let pump = Pump::attach(&mut command, &self.paths, parts.spec.log_bytes)?;
        self.change(|inner| inner.pump = Some(pump));
        // A restored init that ends at once must be found by number when runc has returned.
        let pause = self.children.pause();
        let mut child = self.children.spawn(&mut command).context("start", "runc")?;
        drop(command);
        // They start while runc and CRIU do, which is 30 ms before CRIU speaks to one, through a socket that exists.
        if let Err(error) = self.wait_residents(&request.residents) {
            self.kill_all(&mut child)?;
            return Err(error);
        }
        let outcome = self
            .children
            .wait(&mut child, asker.socket, deadline, || self.lock().doomed)
            .context("wait for", "runc")?;
        let log = self.paths.seen_through(std::process::id()).work().join("restore.log");
        let error = match outcome {
            Outcome::Ended(status) if status.success() => None,
            Outcome::Ended(status) => Some(parts.runc.failure("restore", status, Some(log))),
            Outcome::Late => Some(Error::Deadline { operation: "restore", seconds: timeout.as_secs() }),
            Outcome::Lost => Some(Error::Abandoned { operation: "restore" }),
            Outcome::Doomed => Some(self.doomed_error(log)),
        };
        if let Some(error) = error {
            if !matches!(error, Error::Program { .. }) {
                self.kill_all(&mut child)?;
            }
            return Err(error);
        }
        let pid = read_pid(&pid_file)?;
        self.adopt_init(pid);
        drop(pause);
        self.set_status(Status::Starting)?;
        if !request.lazy_pages {
            self.set_memory(Memory::Present { since: Timestamp::now() })?;
        }
        let residents = self.lock().residents.clone();
        for resident in residents {
            resident.restored(pid)?;
        }
        if request.waits || request.device.is_some() {
            self.wait_until_it_may_run(asker, deadline, timeout.as_secs())?;
        }
        if let Some(device) = &request.device {
            let socket =
                if device.carried.is_direct() { Some(fds.next().ok_or_else(|| missing(1))?) } else { None };
            let left = deadline.saturating_duration_since(Instant::now());
            let stopped = Stopped { tasks: Tasks(&parts.cgroup), unblock: &request.unblock };
            self.begin_devices(&stopped, device, socket.map(|socket| Stream::new(socket, left)))?;
        }
        Ok(pid)
    }

    fn wait_residents(&self, wanted: &[ResidentRequest]) -> Result<(), Error> {
        let residents = self.lock().residents.clone();
        residents.iter().zip(wanted).try_for_each(|(resident, wanted)| {
            resident.wait_ready(Duration::from_millis(wanted.ready_timeout_ms), || self.doomed())
        })
    }

    /// Shared memory must be there before anything of the server runs. The driver pins its copies of device memory: all of them
    /// must be there before the first call; where they are not told apart from other memory, all memory must.
    fn wait_until_it_may_run(&self, asker: Asker<'_>, deadline: Instant, seconds: u64) -> Result<(), Error> {
        let filling = |inner: &Inner| {
            let record = inner.record.as_ref();
            !inner.may_run && record.is_some_and(|record| record.memory == Some(Memory::Filling))
        };
        while !self.wait_until(Some(STEP), |inner| inner.doomed || inner.exit.is_some() || !filling(inner)) {
            if Instant::now() > deadline {
                return Err(Error::Deadline { operation: "restore", seconds });
            }
            if hung_up(asker.socket).context("look at", "the connection of the command")? {
                return Err(Error::Abandoned { operation: "restore" });
            }
        }
        if self.doomed() {
            let log = self.paths.seen_through(std::process::id()).work().join("restore.log");
            return Err(self.doomed_error(log));
        }
        Ok(())
    }

    /// Lets a restored server go that CRIU left stopped, with its device memory back on the devices.
    fn begin_devices(
        &self,
        stopped: &Stopped<'_>,
        device: &DeviceRequest,
        stream: Option<Stream>,
    ) -> Result<(), Error> {
        let processes = device.carried.find(stopped)?;
        let mut helper = self.helper.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (mut stream, mut inside) = (stream, InProcess::default());
        let source: &mut dyn DeviceStateSource = match &mut stream {
            Some(stream) => stream,
            None => &mut inside,
        };
        // Others may have taken it since the verdict.
        let needed = topology::placed(&device.carried.needed(), &device.pairs);
        room(&mut helper, &needed, Duration::ZERO).map_err(RoomError::given_up)?;
        self.change(|inner| inner.restored_by_driver = true);
        let resumed = order::begin(&mut helper, stopped, processes, &device.pairs, source)
            .map_err(|cause| Error::Begin(Box::new(cause)))?;
        let bytes = device.carried.bytes();
        let other = resumed.total.saturating_sub(resumed.restore);
        self.device(|device| {
            device.bytes = bytes;
            device.wake.get_or_insert(WakeCost::guess(other, resumed.restore, bytes));
            device.restored_in = Some(resumed.restore + resumed.unlock);
        });
        Ok(())
    }

    /// runc and CRIU wait for ever for a pager that is gone, and each leaves the other behind when it is killed alone.
    fn kill_all(&self, child: &mut Child) -> Result<(), Error> {
        let below = descendants(child.id());
        for process in &below {
            // Ended meanwhile: what was wanted.
            let _ = process.signal(nix::sys::signal::Signal::SIGKILL);
        }
        self.children.end(child, Duration::ZERO).context("end", "runc")?;
        self.kill_processes();
        Ok(())
    }

    /// A resident that fails may do so because CRIU did: then CRIU's log knows better.
    fn doomed_error(&self, log: PathBuf) -> Error {
        match self.lock().cause.clone() {
            Some(Cause::Resident(reason)) => Error::Resident { operation: "restore", reason, log },
            _ => Error::Abandoned { operation: "restore" },
        }
    }
}

fn missing(count: usize) -> Error {
    Error::Malformed {
        what: "restore",
        value: format!("{count} descriptors are missing"),
        expected: "the images' mount, if attached, and all that the residents get",
    }
}
