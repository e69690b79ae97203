//! The pager as a process: a resident of the shim, started before CRIU, gone when all memory is in place.
//!
//! ```text
//! fetcher --memory--> pager::run <--duplicates, reports--> relay (this file) --> shim
//! ```
//!
//! The relay passes duplicates of every userfaultfd on to the shim, so that they outlive this process: a pager that dies
//! leaves its server stopped, never reading zeros, until the shim has killed it. If the shim dies, the pager kills the
//! server itself.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rewarm_container::shim::resident::{Control, FromShim, ToShim};
use rewarm_criu::lazy_pages::Listener;
use rewarm_fetcher::Lease;
use rewarm_report::{Class, Classify};
use rewarm_sys::fdpass;
use rewarm_sys::guard::Guard;
use rewarm_sys::shared::{Missing, Reader};

use crate::fetch::BLOCK_WITHIN;
use crate::lazy::{DEVICE_STREAM, Orders, TaskOrders, When};
use crate::pager::{
    self, Command, Config, Extent, Heard, Holder, Mode, Report, Source, SourceError, Task, Tasks, WorkingSet,
};
use crate::recording::REPORT_BYTES_MAX;
use crate::shared::SHARED_STREAM;

/// How long CRIU may take to connect, and again between two of its messages.
const CRIU_WITHIN: Duration = Duration::from_secs(120);
/// How long the command may take to read what was recorded.
const COMMAND_WITHIN: Duration = Duration::from_secs(10);
/// More threads than this do not fill faster: they meet in the kernel's lock of one address space.
const THREADS_MAX: usize = 8;

/// Runs the pager; what it is told comes in descriptors. `work` is CRIU's work directory, `cgroup` a folder with the
/// server's `cgroup.procs`; `held`: a server that came back stopped stays so when its memory is complete, since somebody
/// else lets it go on. Gives the exit code.
#[must_use]
pub fn main(work: &Path, cgroup: PathBuf, held: bool) -> u8 {
    let Ok(control) = Control::inherited() else { return 1 };
    // Shares this process's descriptors and outlives it: until the shim has killed the server, a killed pager leaves it
    // waiting, a child that it has just forked included.
    let _guard = match Guard::start(&[control.as_fd()]) {
        Ok(guard) => guard,
        Err(error) => {
            let _ = control.tell(&ToShim::Failed(format!("start the pager's guard: {error}")), &[]);
            return 1;
        }
    };
    match start(&control, work, cgroup, held) {
        Ok(pager) => relay(&control, pager),
        Err(error) => {
            let _ = control.tell(&ToShim::Failed(format!("start the pager: {error}")), &[]);
            1
        }
    }
}

/// The pager that runs in a thread of this process.
struct Started {
    holder: Holder,
    /// The line to the command, which wants to know what was touched.
    command: UnixStream,
    tasks: Tasks,
    resumes: Resumes,
    /// Threads in which SIGCHLD is blocked until then.
    unblock: Vec<u32>,
}

/// When the pager lets a server go on that came back stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Resumes {
    /// Its memory is complete.
    Done,
    /// What must be there before anything runs is in place.
    MayRun,
    /// It runs already, or somebody else does it.
    Never,
}

/// Starts the pager in a thread of its own and tells the shim that CRIU may begin.
fn start(control: &Control, work: &Path, cgroup: PathBuf, held: bool) -> io::Result<Started> {
    let orders: Orders = serde_json::from_slice(&whole(&File::from(Control::given(0)?))?)?;
    let stream = Reader::open(Control::given(1)?, Control::given(2)?)?;
    let lease = Lease::over(Control::given(3)?);
    let command = UnixStream::from(Control::given(4)?);
    command.set_write_timeout(Some(COMMAND_WITHIN))?;
    let plan = |task: &TaskOrders| {
        let plan = task.plan().map_err(io::Error::other)?;
        Ok(Task { pid: task.pid, plan: Arc::new(plan) })
    };
    let tasks = orders.tasks.iter().map(plan).collect::<io::Result<Vec<_>>>()?;
    let device = |device: &TaskOrders| {
        let plan = device.plan().map_err(io::Error::other)?;
        let zeros = device.zeros.iter().map(|&(vaddr, bytes)| vaddr..vaddr.saturating_add(bytes)).collect();
        let stream = device.pid | DEVICE_STREAM;
        Ok(pager::Device { pid: device.pid, stream, plan: Arc::new(plan), zeros })
    };
    let devices = orders.devices.iter().map(device).collect::<io::Result<Vec<_>>>()?;
    let segment = |(stream, segment): (u32, &TaskOrders)| {
        let plan = segment.plan().map_err(io::Error::other)?;
        Ok(pager::Segment { pid: segment.pid, stream, plan: Arc::new(plan) })
    };
    let shared = (SHARED_STREAM..).zip(&orders.shared).map(segment).collect::<io::Result<Vec<_>>>()?;
    let first = orders.first.iter().map(|&(task, offset, length)| Extent { task, offset, length });
    let cgroup = Tasks::Cgroup(cgroup);
    let eager = orders.when == When::Stopped;
    let config = Config {
        mode: match orders.when {
            // Told when the tree is restored.
            When::Stopped => Mode::Eager,
            When::AtOnce => Mode::Lazy,
            // The background waits until the command has seen what is touched, or is gone.
            When::Recorded => Mode::LazyWhenTold,
        },
        threads: std::thread::available_parallelism().map_or(2, usize::from).min(THREADS_MAX),
        record: orders.record,
        working_set: WorkingSet { extents: first.collect() },
        devices,
        shared,
        tasks: cgroup.clone(),
        criu_within: CRIU_WITHIN,
        chunk_within: BLOCK_WITHIN,
    };
    let listener = Listener::given(Control::given(5)?, work);
    let (shim_end, pager_end) = UnixStream::pair()?;
    let (devices, shared) = (!orders.devices.is_empty(), !orders.shared.is_empty());
    let named = |device: TaskOrders| TaskOrders { pid: device.pid | DEVICE_STREAM, ..device };
    let segments = (SHARED_STREAM..).zip(orders.shared).map(|(pid, segment)| TaskOrders { pid, ..segment });
    let streams = orders.tasks.into_iter().chain(orders.devices.into_iter().map(named)).chain(segments);
    let (streams, ceased) = (streams.collect(), AtomicBool::new(false));
    let source = Arc::new(Stream { stream, lease, tasks: streams, passing: orders.passing, ceased });
    std::thread::spawn(move || pager::run(config, tasks, source, listener, pager_end));
    let holder = Holder::new(shim_end);
    // Device memory that goes past the tasks is none that this process fills.
    let elsewhere = held && !devices && !shared && !eager;
    watch(control, &holder, eager, devices || shared, elsewhere)?;
    if !eager {
        obey(&command, &holder)?;
    }
    control.tell(&ToShim::Ready, &[])?;
    let resumes = match (held, eager) {
        (true, _) => Resumes::Never,
        (false, true) => Resumes::Done,
        (false, false) if shared => Resumes::MayRun,
        (false, false) => Resumes::Never,
    };
    Ok(Started { holder, command, tasks: cgroup, resumes, unblock: orders.unblock })
}

/// The content of a file. Read by offset: all clones of a restore share the one position of the descriptor.
fn whole(file: &File) -> io::Result<Vec<u8>> {
    let bytes = file.metadata()?.len();
    let mut text = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
    file.read_exact_at(&mut text, 0)?;
    Ok(text)
}

/// If the shim dies, the pager hears what it would hear from a dead shim, and kills the server. What must be there before anything
/// runs (`before`: shared and device memory), and an eager fill of all memory, begin when the shim says that the tree is restored,
/// which is stopped then.
/// `elsewhere`: device memory is there as far as it depends on this process.
fn watch(control: &Control, holder: &Holder, eager: bool, before: bool, elsewhere: bool) -> io::Result<()> {
    let listening = control.duplicate()?;
    let socket = holder.control().try_clone()?;
    std::thread::spawn(move || {
        while let Ok(Some((FromShim::Restored { .. }, _))) = listening.next() {
            if before {
                let _ = tell(&socket, Command::Stopped);
            }
            if elsewhere {
                let _ = listening.tell(&ToShim::MayRun, &[]);
            }
            if eager {
                // A pager that is gone has been heard of already.
                let _ = tell(&socket, Command::Fill);
            }
        }
        let _ = socket.shutdown(std::net::Shutdown::Both);
    });
    Ok(())
}

/// When the command says so, or ends, recording ends and all the rest is filled.
fn obey(command: &UnixStream, holder: &Holder) -> io::Result<()> {
    let (mut hear, socket) = (command.try_clone()?, holder.control().try_clone()?);
    std::thread::spawn(move || {
        let mut word = [0];
        // One word or none: both mean the same.
        let _ = hear.read(&mut word);
        let _ = tell(&socket, Command::StopRecording);
        let _ = tell(&socket, Command::Fill);
    });
    Ok(())
}

fn tell(pager: &UnixStream, command: Command) -> io::Result<()> {
    fdpass::send(pager, &[command.byte()], &[])
}

fn relay(control: &Control, mut pager: Started) -> u8 {
    loop {
        match pager.holder.hear() {
            Heard::Report(Report::Held { id, .. }) => {
                let held = pager.holder.duplicate(id).map(AsFd::as_fd);
                if control.tell(&ToShim::Hold, held.as_slice()).is_err() {
                    // The shim is gone; `watch` has told the pager. Wait for it to have killed the server.
                    continue;
                }
            }
            Heard::Report(Report::Recorded { set }) => {
                let report = serde_json::to_vec(&set).unwrap_or_default();
                // A command that has ended does not want it any more.
                let _ = fdpass::send_frame(&pager.command, &report, REPORT_BYTES_MAX, &[]);
            }
            Heard::Report(Report::MayRun) => {
                if pager.resumes == Resumes::MayRun
                    && let Err(error) = pager.tasks.resume(&pager.unblock)
                {
                    return give_up(control, pager.holder, format!("let the server go on: {error}"));
                }
                if control.tell(&ToShim::MayRun, &[]).is_err() {
                    continue;
                }
            }
            Heard::Report(_) => {}
            Heard::Done(_) => {
                if pager.resumes == Resumes::Done
                    && let Err(error) = pager.tasks.resume(&pager.unblock)
                {
                    return give_up(control, pager.holder, format!("let the server go on: {error}"));
                }
                let _ = control.tell(&ToShim::Done, &[]);
                return 0;
            }
            Heard::Kill { chain } => {
                let reason = if chain.is_empty() { "the pager ended".to_owned() } else { chain.join(": ") };
                return give_up(control, pager.holder, reason);
            }
        }
    }
}

/// Tells the shim, and ends after the server.
fn give_up(control: &Control, holder: Holder, reason: String) -> u8 {
    let told = control.tell(&ToShim::Failed(reason), &[]);
    // The duplicates stay open until the shim has killed the server and then us.
    while told.is_ok() && matches!(control.next(), Ok(Some(_))) {}
    drop(holder);
    // Time for the pager's own kill, where the shim died first.
    std::thread::sleep(Duration::from_secs(5));
    1
}

/// Content of all tasks in the fetcher's stream.
struct Stream {
    stream: Reader,
    lease: Lease,
    tasks: Vec<TaskOrders>,
    /// What is done with is given back.
    passing: bool,
    /// Nothing of it is wanted any more.
    ceased: AtomicBool,
}

impl Stream {
    fn task(&self, pid: u32) -> &TaskOrders {
        self.tasks.iter().find(|task| task.pid == pid).expect("only these tasks are asked for")
    }

    fn block(&self, task: &TaskOrders, offset: u64) -> u64 {
        (task.base + offset) / self.stream.block_bytes()
    }
}

impl Source for Stream {
    fn chunk(&self, task: u32, offset: u64) -> Range<u64> {
        let bytes = self.task(task).bytes;
        let block = self.stream.block_bytes();
        let start = offset / block * block;
        start..(start + block).min(bytes)
    }

    fn read(&self, task: u32, chunk: Range<u64>, out: &mut dyn FnMut(&[u8])) -> Result<(), SourceError> {
        let task = self.task(task);
        let block = self.block(task, chunk.start);
        let wanted = || !self.ceased.load(Ordering::Acquire);
        let waited = self.lease.wait_while(&self.stream, block, BLOCK_WITHIN, &wanted);
        let bytes = waited.map_err(|error| match error {
            rewarm_fetcher::Error::Missing(Missing::Released { .. }) => SourceError::Released,
            error if error.class() == Class::Integrity => SourceError::Damaged(Box::new(error)),
            error => SourceError::Gone(Box::new(error)),
        })?;
        let length = usize::try_from(chunk.end - chunk.start).expect("a chunk is a block at most");
        out(&bytes[..length]);
        Ok(())
    }

    fn is_near(&self, task: u32, offset: u64) -> bool {
        self.stream.has(self.block(self.task(task), offset))
    }

    fn release(&self, task: u32, part: Range<u64>) {
        if !self.passing {
            return;
        }
        let (task, block) = (self.task(task), self.stream.block_bytes());
        let blocks = (task.base + part.start) / block..(task.base + part.end).div_ceil(block);
        self.lease.release(blocks);
    }

    fn cease(&self) {
        self.ceased.store(true, Ordering::Release);
    }

    fn want(&self, task: u32, offset: u64) {
        self.lease.want(self.block(self.task(task), offset));
    }
}
