//! The pager's main thread: takes what CRIU sends, reads events and faults of every address space, talks to the shim.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rewarm_criu::lazy_pages::{Listener, Message};
use rewarm_sys::procmem;
use rewarm_sys::uffd::Uffd;

use super::behind::Behind;
use super::control::{self, Command, Report};
use super::device;
use super::eager::{Written, fill_stopped, take_out};
use super::engine::{Engine, message};
use super::error::Error;
use super::events::{self, Fault};
use super::fault::Need;
use super::plan::{PAGE, Plan};
use super::ranges::Ranges;
use super::source::Source;
use super::space::{Space, State};
use super::stopped::Stopped;
use super::{Config, Mode, Segment, Summary, Task};

/// How often overdue chunks and finished address spaces are looked for when nothing happens.
const LOOK_AROUND_MS: u16 = 50;

/// How often content is given back: at the rate of a fast fill, what lies behind it meanwhile is a few dozen MiB.
const LOOK_BEHIND_MS: u64 = 20;

/// How often it is looked whether address spaces still exist.
const LOOK_FOR_GONE_MS: u64 = 200;

/// A page in which no program has anything that is filled: the lowest one that a process may map.
const NOWHERE: u64 = 64 << 10;

/// How soon a fault is tried again that the kernel put off; its event is usually there at once.
const AGAIN_MS: u16 = 1;

/// Fills the tasks of one restore and returns when all is in place and every userfaultfd closed.
///
/// `listener` is bound already, `control` leads to the shim's [`super::Holder`]. CRIU must have been told to restore
/// lazily, and in eager mode to leave the tree stopped. Before this, the process starts a [`rewarm_sys::guard::Guard`]
/// that hangs up its socket to the shim: see the head of the module.
///
/// # Errors
/// After an error every task has been killed, by the shim or by this function: it does not return before.
pub fn run(
    config: Config,
    tasks: Vec<Task>,
    source: Arc<dyn Source>,
    listener: Listener,
    control: UnixStream,
) -> Result<Summary, Error> {
    let killable = config.tasks.clone();
    let spare = control.try_clone().map_err(Error::Control)?;
    let mut pager = None;
    let served = catch_unwind(AssertUnwindSafe(|| {
        let pager = pager.insert(Pager::start(config, tasks, source, listener, control)?);
        pager.serve()
    }));
    let error = match served {
        Ok(Ok(summary)) => return Ok(summary),
        Ok(Err(error)) => error,
        Err(panic) => Error::Panicked { message: message(&*panic) },
    };
    if let Some(pager) = &pager {
        pager.engine.stop();
    }
    // The userfaultfds live in `pager`, which is dropped below, after the tasks.
    let _ = control::send(&spare, &Report::Failed { chain: chain(&error) }, None);
    wait_for_the_end(&spare);
    killable.kill();
    drop(pager);
    Err(error)
}

/// Until the shim closes its end; it has killed the tasks by then, or is dead.
fn wait_for_the_end(control: &UnixStream) {
    let mut byte = [0];
    let _ = control.set_nonblocking(false);
    while let Ok((1.., _)) = rewarm_sys::fdpass::recv(control, &mut byte, 0) {}
}

fn chain(error: &dyn std::error::Error) -> Vec<String> {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect()
}

/// What the thread that listens to CRIU says.
enum Arrival {
    Connected,
    Task { pid: u32, uffd: Uffd },
    Finished,
    Failed(Error),
}

/// An address space and the descriptor to wait at.
struct Watched {
    space: Arc<Space<Uffd>>,
    uffd: Arc<Uffd>,
}

struct Pager {
    config: Config,
    plans: BTreeMap<u32, Arc<Plan>>,
    source: Arc<dyn Source>,
    engine: Arc<Engine<Uffd>>,
    threads: Vec<JoinHandle<()>>,
    control: UnixStream,
    arrivals: Receiver<Arrival>,
    watched: Vec<Watched>,
    again: VecDeque<(Arc<Space<Uffd>>, Fault)>,
    behind: Vec<Behind>,
    looked_behind: Instant,
    looked_for_gone: Instant,
    spaces: u32,
    connected: Instant,
    finished: Option<Instant>,
    filling: bool,
    eager: Written,
    /// The tree is restored and stopped.
    stopped: bool,
    /// What must be there before anything runs, shared and device memory, is not.
    may_not_run: bool,
    shared: Written,
    device: Written,
}

impl Pager {
    fn start(
        config: Config,
        tasks: Vec<Task>,
        source: Arc<dyn Source>,
        listener: Listener,
        control: UnixStream,
    ) -> Result<Pager, Error> {
        let engine = Arc::new(Engine::new(Arc::clone(&source), config.record).map_err(Error::Wait)?);
        source.expect(&config.working_set.extents);
        let threads = engine.start(config.threads.max(1)).map_err(Error::Wait)?;
        let (sender, arrivals) = channel();
        let (within, nudge) = (config.criu_within, Arc::clone(&engine));
        std::thread::Builder::new()
            .name("criu".to_owned())
            .spawn(move || listen(&listener, within, &sender, &nudge))
            .map_err(Error::Wait)?;
        let may_not_run = !config.devices.is_empty() || !config.shared.is_empty();
        let lazily = tasks.iter().filter(|_| config.mode != Mode::Eager);
        let behind = lazily.map(|task| Behind::new(task.pid, task.plan.bytes(), &*source)).collect();
        Ok(Pager {
            plans: tasks.into_iter().map(|task| (task.pid, task.plan)).collect(),
            config,
            source,
            engine,
            threads,
            control,
            arrivals,
            watched: Vec::new(),
            again: VecDeque::new(),
            behind,
            looked_behind: Instant::now(),
            looked_for_gone: Instant::now(),
            spaces: 0,
            connected: Instant::now(),
            finished: None,
            filling: false,
            eager: Written::default(),
            stopped: false,
            may_not_run,
            shared: Written::default(),
            device: Written::default(),
        })
    }

    fn serve(&mut self) -> Result<Summary, Error> {
        loop {
            let (told, ready) = self.wait()?;
            if let Some(error) = self.engine.take_failure() {
                return Err(error);
            }
            if told {
                self.hear()?;
            }
            self.take_arrivals()?;
            for index in ready {
                self.read_events(index)?;
            }
            self.try_again()?;
            self.look_behind();
            self.look_for_gone();
            self.close_filled()?;
            if self.finished.is_some() && self.watched.is_empty() && !self.may_not_run {
                return self.end();
            }
            for watched in &self.watched {
                if let Some(offset) = watched.space.overdue(self.config.chunk_within) {
                    let deadline = self.config.chunk_within;
                    return Err(Error::Deadline { task: watched.space.task, offset, deadline });
                }
            }
        }
    }

    /// Waits until something happens. Whether the shim has something to say, and which address spaces have.
    fn wait(&self) -> Result<(bool, Vec<usize>), Error> {
        let nudged = self.engine.nudged();
        let mut fds = vec![
            PollFd::new(self.control.as_fd(), PollFlags::POLLIN),
            PollFd::new(nudged.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(self.watched.iter().map(|watched| PollFd::new(watched.uffd.as_fd(), PollFlags::POLLIN)));
        let timeout = match (self.again.is_empty(), self.finished) {
            (false, _) => AGAIN_MS,
            (true, Some(_)) => LOOK_BEHIND_MS as u16,
            (true, None) => LOOK_AROUND_MS,
        };
        match poll(&mut fds, PollTimeout::from(timeout)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::Wait(errno.into())),
        }
        let happened = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        if happened(&fds[1]) {
            self.engine.hear_nudge();
        }
        let ready = fds[2..].iter().enumerate().filter(|(_, fd)| happened(fd)).map(|(index, _)| index);
        Ok((happened(&fds[0]), ready.collect()))
    }

    /// A command, or the end of the shim.
    fn hear(&mut self) -> Result<(), Error> {
        let mut byte = [0];
        let (got, _) = rewarm_sys::fdpass::recv(&self.control, &mut byte, 0).map_err(Error::Control)?;
        if got == 0 {
            return Err(Error::ShimLeft);
        }
        match Command::of(byte[0]) {
            Some(Command::Fill) => {
                self.filling = true;
                self.fill()
            }
            Some(Command::Stopped) => {
                self.stopped = true;
                self.fill_before()?;
                self.fill()
            }
            Some(Command::StopRecording) => {
                let set = self.engine.stop_recording();
                self.report(&Report::Recorded { set }, None)
            }
            None => Err(Error::Control(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{:#x} is no command", byte[0]),
            ))),
        }
    }

    fn report(&self, report: &Report, fd: Option<&dyn AsFd>) -> Result<(), Error> {
        control::send(&self.control, report, fd).map_err(Error::Control)
    }

    fn take_arrivals(&mut self) -> Result<(), Error> {
        loop {
            match self.arrivals.try_recv() {
                Ok(Arrival::Connected) => self.connected = Instant::now(),
                Ok(Arrival::Task { pid, uffd }) => {
                    let plan = self.plans.get(&pid).ok_or(Error::UnknownTask { task: pid })?;
                    let state = State::new(plan);
                    // The duplicate goes to the shim before anything is served.
                    self.report(&Report::Held { id: self.spaces, task: pid }, Some(&uffd))?;
                    self.watch(uffd, pid, false, state);
                }
                Ok(Arrival::Finished) => self.finish()?,
                Ok(Arrival::Failed(error)) => return Err(error),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return Ok(()),
            }
        }
    }

    fn finish(&mut self) -> Result<(), Error> {
        self.finished = Some(Instant::now());
        self.engine.set_finished();
        self.report(&Report::Finished, None)?;
        if self.config.mode != Mode::Eager {
            self.engine.fill_first(&self.config.working_set);
        }
        self.filling |= self.config.mode == Mode::Lazy;
        self.fill_before()?;
        self.fill()
    }

    /// Fills what must be there before anything runs, if it is time. The tree is stopped.
    fn fill_before(&mut self) -> Result<(), Error> {
        if !self.stopped || !self.may_not_run || self.finished.is_none() {
            return Ok(());
        }
        let through = |segment: &Segment| {
            let (task, pieces) = (segment.pid, segment.plan.pieces().to_vec());
            let pid = self.config.tasks.host_pid(task).ok_or(Error::NoProcess { task })?;
            let (task, zeros, own) = (segment.stream, Vec::new(), Ranges::default());
            Ok(Stopped::<Uffd> { pid, task, pieces, zeros, space: None, own })
        };
        let segments = self.config.shared.iter().map(through).collect::<Result<Vec<_>, Error>>()?;
        self.shared = fill_stopped(&segments, &*self.source, self.config.threads)?;
        let mut devices = Vec::new();
        for wanted in &self.config.devices {
            let task = wanted.pid;
            let pid = self.config.tasks.host_pid(task).ok_or(Error::NoProcess { task })?;
            let watched = self.watched.iter().find(|watched| watched.space.task == task);
            devices.push(device::stopped(wanted, pid, watched.map(|watched| watched.space.clone())));
        }
        self.device = fill_stopped(&devices, &*self.source, self.config.threads)?;
        for (wanted, device) in self.config.devices.iter().zip(&devices) {
            if let Some(space) = &device.space {
                device::unregister(space, wanted)?;
            }
        }
        self.may_not_run = false;
        // Where all memory is filled before anything runs, everybody has to wait for all of it.
        if self.config.mode == Mode::Eager { Ok(()) } else { self.report(&Report::MayRun, None) }
    }

    /// Fills everything, if it is time.
    fn fill(&mut self) -> Result<(), Error> {
        match (self.filling && self.finished.is_some(), self.config.mode) {
            (false, _) => Ok(()),
            // The server waits for that first.
            (true, _) if self.may_not_run => Ok(()),
            (true, Mode::Lazy | Mode::LazyWhenTold) => {
                self.engine.start_background();
                Ok(())
            }
            (true, Mode::Eager) => self.fill_eagerly(),
        }
    }

    fn read_events(&mut self, index: usize) -> Result<(), Error> {
        let space = Arc::clone(&self.watched[index].space);
        let mut faults = Vec::new();
        self.apply_events(&space, &mut faults)?;
        for fault in faults {
            self.answer(&space, fault)?;
        }
        Ok(())
    }

    fn answer(&mut self, space: &Arc<Space<Uffd>>, fault: Fault) -> Result<(), Error> {
        match self.engine.take_fault(space, fault)? {
            Need::Again => self.again.push_back((Arc::clone(space), fault)),
            Need::Gone => space.set_gone(),
            Need::Nothing | Need::Left(_) | Need::Content(_) => {}
        }
        Ok(())
    }

    /// Gives content back that is wanted no more. Before CRIU has ended, tasks that want it may still come.
    fn look_behind(&mut self) {
        let pause = Duration::from_millis(LOOK_BEHIND_MS);
        if self.finished.is_none() || self.looked_behind.elapsed() < pause {
            return;
        }
        self.looked_behind = Instant::now();
        let spaces: Vec<_> = self.watched.iter().map(|watched| watched.space.clone()).collect();
        for behind in &mut self.behind {
            behind.give_back(&spaces, &*self.source);
        }
    }

    /// No event tells that a program ended or became another one (`execve`). Whoever fills notices, but what he waits for may
    /// be long on its way, or never come.
    fn look_for_gone(&mut self) {
        let pause = Duration::from_millis(LOOK_FOR_GONE_MS);
        if self.finished.is_none() || self.looked_for_gone.elapsed() < pause {
            return;
        }
        self.looked_for_gone = Instant::now();
        for Watched { space, uffd } in &self.watched {
            let nowhere = NOWHERE..NOWHERE + PAGE;
            // Not registered, so nothing is put there; but the kernel says first whether there is an address space.
            if !space.state().registered.touches(&nowhere)
                && matches!(uffd.zero(NOWHERE, PAGE).stopped, Some(Errno::ESRCH | Errno::ENOSPC))
            {
                space.set_gone();
            }
        }
    }

    fn try_again(&mut self) -> Result<(), Error> {
        for (space, fault) in std::mem::take(&mut self.again) {
            self.answer(&space, fault)?;
        }
        Ok(())
    }

    /// Lets go of address spaces in which nothing is pending, and of those that are gone.
    fn close_filled(&mut self) -> Result<(), Error> {
        if self.finished.is_none() {
            return Ok(());
        }
        let mut index = 0;
        while index < self.watched.len() {
            let space = Arc::clone(&self.watched[index].space);
            let filled = space.state().pending.is_empty();
            if (filled && self.close(&space)?) || space.is_gone() {
                *space.enter_alone() = None;
                self.engine.remove(&space);
                let watched = self.watched.swap_remove(index);
                self.again.retain(|(other, _)| !Arc::ptr_eq(other, &space));
                let id = space.id;
                drop((watched, space));
                self.report(&Report::Released { id }, None)?;
            } else {
                index += 1;
            }
        }
        Ok(())
    }
}

impl Pager {
    /// Unregisters everything, unless events show up that make something pending. True: it can be let go.
    fn close(&mut self, space: &Arc<Space<Uffd>>) -> Result<bool, Error> {
        let mut faults = Vec::new();
        while self.apply_events(space, &mut faults)? > 0 {}
        let gate = space.enter_alone();
        let state = space.state();
        if !state.pending.is_empty() {
            drop((state, gate));
            for fault in faults {
                self.answer(space, fault)?;
            }
            return Ok(false);
        }
        if let Some(uffd) = gate.as_ref() {
            for range in self.to_unregister(space, &state).iter() {
                // A mapping that vanished meanwhile is refused; what stays registered ends with the last duplicate.
                let _ = uffd.unregister(range.start, range.end - range.start);
            }
        }
        Ok(true)
    }

    /// What is known to be registered, and the mappings around it as they are by now: a stack that grew, or memory
    /// that mremap made longer in place, is registered without an event that says so. A thread that touches what stays
    /// registered waits until the shim closes its duplicate.
    fn to_unregister(&self, space: &Space<Uffd>, state: &State) -> Ranges {
        let mut ranges = state.registered.clone();
        // The pid of a child that was forked after the restore is not known.
        let pid = self.config.tasks.host_pid(space.task).filter(|_| !space.forked);
        let maps = pid.and_then(|pid| procmem::maps(pid).ok()).unwrap_or_default();
        for mapping in maps.iter().filter(|mapping| mapping.inode == 0 && !mapping.shared) {
            if state.registered.touches(&(mapping.start..mapping.end)) {
                ranges.insert(mapping.start..mapping.end);
            }
        }
        ranges
    }

    /// Reads and applies once, and takes in the children that were forked.
    fn apply_events(&mut self, space: &Arc<Space<Uffd>>, faults: &mut Vec<Fault>) -> Result<usize, Error> {
        let mut children = Vec::new();
        let (control, first) = (&self.control, self.spaces);
        let count = events::read(space, faults, &mut |uffd, state| {
            let id = first + u32::try_from(children.len()).expect("one read has 32 messages at most");
            let report = Report::Held { id, task: space.task };
            control::send(control, &report, Some(&uffd)).map_err(Error::Control)?;
            children.push((uffd, state.forked()));
            Ok(())
        })?;
        for (uffd, state) in children {
            self.watch(uffd, space.task, true, state);
        }
        Ok(count)
    }

    fn watch(&mut self, uffd: Uffd, task: u32, forked: bool, state: State) {
        let uffd = Arc::new(uffd);
        let space = Arc::new(Space::new(self.spaces, task, forked, Arc::clone(&uffd), state));
        self.spaces += 1;
        self.engine.add(Arc::clone(&space));
        self.watched.push(Watched { space, uffd });
    }

    /// The tree is stopped: nobody faults, nobody sees a page that is not written yet.
    fn fill_eagerly(&mut self) -> Result<(), Error> {
        let mut stopped = Vec::new();
        for Watched { space, .. } in &self.watched {
            let task = space.task;
            let pid = self.config.tasks.host_pid(task).ok_or(Error::NoProcess { task })?;
            let maps = procmem::maps(pid).map_err(|source| Error::Look { task, source })?;
            let mut writable = Ranges::default();
            for mapping in maps.iter().filter(|mapping| mapping.write && !mapping.shared) {
                writable.insert(mapping.start..mapping.end);
            }
            let pieces = take_out(&self.engine, space, &writable)?;
            // Where nothing is marked for huge pages a copy is quicker: it clears nothing before.
            let (space, mut own) = (Some(space.clone()), Ranges::default());
            self.plans[&task].huge().into_iter().for_each(|range| own.insert(range));
            stopped.push(Stopped { pid, task, pieces, zeros: Vec::new(), space, own });
        }
        self.eager = fill_stopped(&stopped, &*self.source, self.config.threads)?;
        Ok(())
    }

    fn end(&mut self) -> Result<Summary, Error> {
        self.engine.stop();
        self.source.cease();
        for thread in std::mem::take(&mut self.threads) {
            thread.join().map_err(|panic| Error::Panicked { message: message(&*panic) })?;
        }
        if let Some(error) = self.engine.take_failure() {
            return Err(error);
        }
        // All may be in place before anybody asked for what was touched.
        let set = self.engine.stop_recording();
        if !set.extents.is_empty() {
            self.report(&Report::Recorded { set }, None)?;
        }
        let counters = &self.engine.counters;
        let finished = self.finished.unwrap_or(self.connected);
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let summary = Summary {
            spaces: self.spaces,
            faults: counters.faults_content.load(Ordering::Relaxed),
            zero_faults: counters.faults_zero.load(Ordering::Relaxed),
            fault_bytes: counters.fault_bytes.load(Ordering::Relaxed),
            working_set_bytes: counters.working_set_bytes.load(Ordering::Relaxed),
            background_bytes: counters.background_bytes.load(Ordering::Relaxed),
            eager_bytes: self.eager.bytes,
            criu_us: micros(finished.duration_since(self.connected)),
            present_us: micros(finished.elapsed()),
            eager_us: micros(self.eager.time),
            device_bytes: self.device.bytes,
            device_us: micros(self.device.time),
            shared_bytes: self.shared.bytes,
            shared_us: micros(self.shared.time),
        };
        // All is in place and no userfaultfd is open here: a shim that is gone by now changes nothing any more.
        let _ = self.report(&Report::Done { summary: summary.clone() }, None);
        Ok(summary)
    }
}

/// Takes CRIU's connection and passes on what comes.
fn listen(listener: &Listener, within: Duration, sender: &Sender<Arrival>, engine: &Engine<Uffd>) {
    let tell = |arrival| {
        let _ = sender.send(arrival);
        engine.nudge();
    };
    let heard = catch_unwind(AssertUnwindSafe(|| hear_criu(listener, within, &tell)));
    match heard {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tell(Arrival::Failed(error)),
        Err(panic) => tell(Arrival::Failed(Error::Panicked { message: message(&*panic) })),
    }
}

fn hear_criu(listener: &Listener, within: Duration, tell: &dyn Fn(Arrival)) -> Result<(), Error> {
    let intake = |error: rewarm_criu::Error| Error::Intake(error.into());
    let timeout = PollTimeout::try_from(within).unwrap_or(PollTimeout::MAX);
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    if poll(&mut fds, timeout).map_err(|errno| Error::Wait(errno.into()))? == 0 {
        return Err(Error::Intake(format!("CRIU did not connect within {within:?}").into()));
    }
    let mut connection = listener.accept().map_err(intake)?;
    connection.set_timeout(Some(within)).map_err(intake)?;
    tell(Arrival::Connected);
    loop {
        match connection.message().map_err(intake)? {
            Message::Task { pid, uffd } => tell(Arrival::Task { pid, uffd: Uffd::from(uffd) }),
            Message::Zombie { .. } => {}
            Message::Finished => {
                tell(Arrival::Finished);
                return Ok(());
            }
        }
    }
}
