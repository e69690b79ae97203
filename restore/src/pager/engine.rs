//! What the pager's threads share, and the threads that fill.
//!
//! Work is taken in this order: faults, the working set of an earlier restore, the background. Of the threads one waits
//! for content that has not arrived, the others take what is here, and one more takes faults only: a fault does not wait
//! for a slow source that keeps all busy.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::error::Error;
use super::events::Fault;
use super::fault::{Need, insist};
use super::fill::{End, How, Patience, Unregistered, fill};
use super::plan::PAGE;
use super::source::{Source, SourceError};
use super::space::{Claim, Space};
use super::userfault::Userfault;
use super::working_set::{Recorder, WorkingSet};

/// Bytes of the faulting place that are put in first, before the rest of its chunk.
const FIRST: u64 = 64 << 10;

/// How long an idle thread sleeps before it looks around by itself.
const LOOK_AROUND: Duration = Duration::from_millis(5);

/// Chunks that a thread looks at to find one that is here.
const LOOK_AHEAD: usize = 64;

/// Counters, all in bytes or numbers of faults.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) faults_content: AtomicU64,
    pub(super) faults_zero: AtomicU64,
    pub(super) fault_bytes: AtomicU64,
    pub(super) working_set_bytes: AtomicU64,
    pub(super) background_bytes: AtomicU64,
}

/// A part of a chunk list that is filled in one go.
#[derive(Debug)]
pub(super) struct Parts<U> {
    space: Arc<Space<U>>,
    chunk: Range<u64>,
    parts: Vec<Range<u64>>,
}

#[derive(Debug)]
pub(super) enum Job<U> {
    Fault(Arc<Space<U>>, Fault),
    Parts(Parts<U>),
    Background(Parts<U>),
    Stop,
}

/// What a thread takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Duty {
    /// Everything, and waits for content that has not arrived.
    All,
    /// Everything, but of the working set and the background only what is here: so a fault finds a thread that is free.
    Near,
    /// Faults only.
    Faults,
}

#[derive(Debug)]
struct Queue<U> {
    faults: VecDeque<(Arc<Space<U>>, Fault)>,
    first: VecDeque<Parts<U>>,
    background: bool,
    spaces: Vec<Arc<Space<U>>>,
    stop: bool,
}

/// Shared by all threads of one pager.
pub(super) struct Engine<U> {
    source: Arc<dyn Source>,
    queue: Mutex<Queue<U>>,
    work: Condvar,
    failure: Mutex<Option<Error>>,
    failed: AtomicBool,
    /// CRIU has registered everything.
    finished: AtomicBool,
    recorder: Mutex<Option<Recorder>>,
    /// Wakes the thread that waits for events.
    nudge: EventFd,
    pub(super) counters: Counters,
}

impl<U: Userfault> Engine<U> {
    pub(super) fn new(source: Arc<dyn Source>, record: bool) -> io::Result<Self> {
        let (faults, first, spaces) = (VecDeque::new(), VecDeque::new(), Vec::new());
        Ok(Self {
            source,
            queue: Mutex::new(Queue { faults, first, background: false, spaces, stop: false }),
            work: Condvar::new(),
            failure: Mutex::default(),
            failed: AtomicBool::new(false),
            finished: AtomicBool::new(false),
            recorder: Mutex::new(record.then(Recorder::default)),
            nudge: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            counters: Counters::default(),
        })
    }

    /// Starts the threads: `fillers` for everything, one for faults only.
    pub(super) fn start(self: &Arc<Self>, fillers: usize) -> io::Result<Vec<JoinHandle<()>>> {
        (0..=fillers)
            .map(|index| {
                let engine = Arc::clone(self);
                let duty = match index {
                    0 => Duty::All,
                    index if index == fillers => Duty::Faults,
                    _ => Duty::Near,
                };
                std::thread::Builder::new().name(format!("fill-{index}")).spawn(move || {
                    let worked = catch_unwind(AssertUnwindSafe(|| engine.work(duty)));
                    match worked {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => engine.fail(error),
                        Err(panic) => engine.fail(Error::Panicked { message: message(&*panic) }),
                    }
                })
            })
            .collect()
    }

    fn queue(&self) -> MutexGuard<'_, Queue<U>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the first error and wakes everybody.
    pub(super) fn fail(&self, error: Error) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.failed.store(true, Ordering::Release);
        self.stop();
        self.nudge();
    }

    /// The error that ended the work.
    pub(super) fn take_failure(&self) -> Option<Error> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Ends the threads after what they are at.
    pub(super) fn stop(&self) {
        self.queue().stop = true;
        self.work.notify_all();
    }

    pub(super) fn nudge(&self) {
        // The counter can only be full when the reader has been told often enough.
        let _ = self.nudge.write(1);
    }

    pub(super) fn nudged(&self) -> impl AsFd + '_ {
        self.nudge.as_fd()
    }

    pub(super) fn hear_nudge(&self) {
        let _ = self.nudge.read();
    }

    pub(super) fn add(&self, space: Arc<Space<U>>) {
        self.queue().spaces.push(space);
        self.work.notify_all();
    }

    /// Nothing is to be done in this address space any more.
    pub(super) fn remove(&self, space: &Arc<Space<U>>) {
        let mut queue = self.queue();
        queue.spaces.retain(|other| !Arc::ptr_eq(other, space));
        queue.faults.retain(|(other, _)| !Arc::ptr_eq(other, space));
        queue.first.retain(|parts| !Arc::ptr_eq(&parts.space, space));
    }

    /// CRIU has registered everything: from now on a page that is not registered is an error.
    pub(super) fn set_finished(&self) {
        self.finished.store(true, Ordering::Release);
    }

    pub(super) fn start_background(&self) {
        self.queue().background = true;
        self.work.notify_all();
    }

    /// Puts a working set in front of the background; parts of one chunk are done together.
    pub(super) fn fill_first(&self, set: &WorkingSet) {
        let mut queue = self.queue();
        let mut jobs: Vec<Parts<U>> = Vec::new();
        let mut index = std::collections::HashMap::new();
        for extent in &set.extents {
            let Some(space) = queue.spaces.iter().find(|s| s.task == extent.task && !s.forked) else {
                continue;
            };
            let mut at = extent.offset;
            let end = extent.offset.saturating_add(extent.length);
            while let Some(next) = {
                let state = space.state();
                state.pending.next_in_stream(at).filter(|&next| next < end)
            } {
                let chunk = self.source.chunk(space.task, next);
                let part = next..end.min(chunk.end);
                at = chunk.end;
                let job = *index.entry((space.task, chunk.start)).or_insert(jobs.len());
                if job == jobs.len() {
                    jobs.push(Parts { space: Arc::clone(space), chunk, parts: Vec::new() });
                }
                jobs[job].parts.push(part);
            }
        }
        queue.first.extend(jobs);
        drop(queue);
        self.work.notify_all();
    }

    /// Answers a fault here and now if that takes no time, else gives it to a thread. [`Need::Again`]: read events first.
    pub(super) fn take_fault(&self, space: &Arc<Space<U>>, fault: Fault) -> Result<Need, Error> {
        match super::fault::answer(space, fault, true)? {
            Need::Content(offset) if self.source.is_near(space.task, offset) => {
                self.fill_fault(space, fault, offset, Patience::Never)
            }
            Need::Content(offset) => {
                self.source.want(space.task, offset);
                self.queue().faults.push_back((Arc::clone(space), fault));
                self.work.notify_all();
                Ok(Need::Nothing)
            }
            // Whoever is busy with it may have begun before anybody waited, and its content come with a long request.
            Need::Left(offset) => {
                if !self.source.is_near(space.task, offset) {
                    self.source.want(space.task, offset);
                }
                Ok(Need::Nothing)
            }
            need => {
                if need == Need::Nothing {
                    self.counters.faults_zero.fetch_add(1, Ordering::Relaxed);
                }
                Ok(need)
            }
        }
    }

    /// What was recorded; nothing is recorded from then on.
    pub(super) fn stop_recording(&self) -> WorkingSet {
        let mut recorder = self.recorder.lock().unwrap_or_else(PoisonError::into_inner);
        recorder.take().map(Recorder::finish).unwrap_or_default()
    }

    /// Fills all of these parts of the stream, from the chunks around them, without the queue.
    pub(super) fn fill_now(&self, space: &Arc<Space<U>>, part: Range<u64>) -> Result<(), Error> {
        let mut at = part.start;
        loop {
            let next = space.state().pending.next_in_stream(at);
            let Some(next) = next.filter(|&next| next < part.end) else { return Ok(()) };
            let chunk = self.source.chunk(space.task, next);
            let wanted = next..part.end.min(chunk.end);
            at = chunk.end;
            self.fill_parts(space, &chunk, std::slice::from_ref(&wanted), Patience::Always)?;
        }
    }

    fn work(&self, duty: Duty) -> Result<(), Error> {
        loop {
            match self.next(duty) {
                Job::Stop => return Ok(()),
                job => self.carry_out(job)?,
            }
        }
    }

    pub(super) fn carry_out(&self, job: Job<U>) -> Result<(), Error> {
        match job {
            Job::Stop => {}
            Job::Fault(space, fault) => self.serve(&space, fault)?,
            Job::Parts(job) => {
                let done = self.fill_parts(&job.space, &job.chunk, &job.parts, Patience::Always)?;
                self.counters.working_set_bytes.fetch_add(done, Ordering::Relaxed);
            }
            Job::Background(job) => {
                let done = self.fill_parts(&job.space, &job.chunk, &job.parts, Patience::Always)?;
                self.counters.background_bytes.fetch_add(done, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn next(&self, duty: Duty) -> Job<U> {
        let mut queue = self.queue();
        loop {
            if let Some(job) = self.choose(&mut queue, duty) {
                return job;
            }
            let waited = self.work.wait_timeout(queue, LOOK_AROUND);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What there is to do, without waiting for it.
    #[cfg(test)]
    pub(super) fn try_next(&self, duty: Duty) -> Option<Job<U>> {
        self.choose(&mut self.queue(), duty)
    }

    fn choose(&self, queue: &mut Queue<U>, duty: Duty) -> Option<Job<U>> {
        if queue.stop {
            return Some(Job::Stop);
        }
        if let Some((space, fault)) = queue.faults.pop_front() {
            return Some(Job::Fault(space, fault));
        }
        if duty == Duty::Faults {
            return None;
        }
        if let Some(parts) = self.next_of_first(&mut queue.first, duty) {
            return Some(Job::Parts(parts));
        }
        let parts = queue.background.then(|| self.next_in_background(&queue.spaces, duty))?;
        parts.map(Job::Background)
    }

    /// The next part of the working set; for who must not wait, of those that are here the first.
    fn next_of_first(&self, first: &mut VecDeque<Parts<U>>, duty: Duty) -> Option<Parts<U>> {
        if duty == Duty::All {
            return first.pop_front();
        }
        let near = |parts: &Parts<U>| self.source.is_near(parts.space.task, parts.chunk.start);
        let index = first.iter().take(LOOK_AHEAD).position(near)?;
        first.remove(index)
    }

    /// The next chunk in which something is pending and nobody is busy; one that is here, if there is any near. Space after
    /// space, each in the order of its stream, round again for what was left behind by a move or had not arrived.
    fn next_in_background(&self, spaces: &[Arc<Space<U>>], duty: Duty) -> Option<Parts<U>> {
        for space in spaces {
            let mut state = space.state();
            let (mut at, mut turns, mut waiting) = (state.cursor, 0, None);
            let mut chosen = None;
            for _ in 0..LOOK_AHEAD {
                let Some(offset) = state.pending.next_in_stream(at) else {
                    turns += 1;
                    if turns > 1 || at == 0 {
                        break;
                    }
                    at = 0;
                    continue;
                };
                let chunk = self.source.chunk(space.task, offset);
                at = chunk.end;
                if space.is_busy_at(offset) {
                    continue;
                }
                if self.source.is_near(space.task, offset) {
                    chosen = Some(chunk);
                    break;
                }
                waiting.get_or_insert(chunk);
            }
            let chosen = chosen.or(waiting.filter(|_| duty == Duty::All));
            let Some(chunk) = chosen else { continue };
            state.cursor = chunk.end;
            let parts = vec![chunk.clone()];
            return Some(Parts { space: Arc::clone(space), chunk, parts });
        }
        None
    }

    fn serve(&self, space: &Arc<Space<U>>, fault: Fault) -> Result<(), Error> {
        match insist(space, fault)? {
            Need::Content(offset) => self.fill_fault(space, fault, offset, Patience::Always).map(|_| ()),
            Need::Gone => {
                space.set_gone();
                self.nudge();
                Ok(())
            }
            Need::Nothing | Need::Left(_) | Need::Again => Ok(()),
        }
    }

    /// Fetches the chunk at `offset` and puts the faulting place in first, then what comes along.
    fn fill_fault(
        &self,
        space: &Arc<Space<U>>,
        fault: Fault,
        offset: u64,
        patience: Patience,
    ) -> Result<Need, Error> {
        let chunk = self.source.chunk(space.task, offset);
        let along = match self.record(space.task, offset, &chunk) {
            Some(window) => window,
            None => chunk.clone(),
        };
        let first = offset..(offset + FIRST).min(along.end);
        self.counters.faults_content.fetch_add(1, Ordering::Relaxed);
        let done = self.fill_parts(space, &chunk, &[first, along], patience)?;
        self.counters.fault_bytes.fetch_add(done, Ordering::Relaxed);
        let page = fault.address / PAGE * PAGE;
        let pending = space.state().pending.at(page).is_some();
        Ok(if pending && patience == Patience::Never { Need::Again } else { Need::Nothing })
    }

    /// While recording: notes a fault and returns what comes along with it. Otherwise the whole chunk does.
    fn record(&self, task: u32, offset: u64, chunk: &Range<u64>) -> Option<Range<u64>> {
        let mut recorder = self.recorder.lock().unwrap_or_else(PoisonError::into_inner);
        recorder.as_mut().map(|recorder| recorder.fault(task, offset, chunk))
    }

    /// Fetches a chunk once and puts the parts into place, in their order. Returns the bytes that were put in.
    fn fill_parts(
        &self,
        space: &Arc<Space<U>>,
        chunk: &Range<u64>,
        parts: &[Range<u64>],
        patience: Patience,
    ) -> Result<u64, Error> {
        let claims: Vec<Claim<'_, U>> = parts.iter().filter_map(|part| space.claim(part.clone())).collect();
        let unregistered = match (self.finished.load(Ordering::Acquire), space.forked) {
            (_, true) => Unregistered::Forget,
            (false, false) => Unregistered::Skip,
            (true, false) => Unregistered::Refuse,
        };
        let mut calls = 0;
        let mut outcome = Ok(0);
        let read = self.source.read(space.task, chunk.clone(), &mut |bytes| {
            calls += 1;
            outcome = self.place(space, chunk, parts, bytes, How { unregistered, patience });
        });
        match read {
            // Others have put all of it into place since the job was chosen.
            Err(SourceError::Released) if !pending_in(space, parts) => return Ok(0),
            // The address spaces that wanted it are gone.
            Err(_) if self.queue().stop => return Ok(0),
            other => {
                other.map_err(|source| Error::Source { task: space.task, offset: chunk.start, source })?
            }
        }
        if calls == 0 {
            let wanted = chunk.end - chunk.start;
            return Err(Error::Length { task: space.task, offset: chunk.start, got: 0, wanted });
        }
        drop(claims);
        self.requeue_left(space);
        outcome
    }

    fn place(
        &self,
        space: &Arc<Space<U>>,
        chunk: &Range<u64>,
        parts: &[Range<u64>],
        bytes: &[u8],
        how: How,
    ) -> Result<u64, Error> {
        let (got, wanted) = (bytes.len() as u64, chunk.end - chunk.start);
        if got != wanted {
            return Err(Error::Length { task: space.task, offset: chunk.start, got, wanted });
        }
        let mut total = 0;
        for part in parts {
            let (done, end) = fill(space, chunk.clone(), bytes, part, how, &|| self.has_failed())?;
            total += done;
            match end {
                End::All => {}
                End::Stopped => break,
                End::Gone => {
                    space.set_gone();
                    self.nudge();
                    break;
                }
            }
        }
        Ok(total)
    }

    /// Faults that were left to a thread which is done: what is still pending was passed over.
    fn requeue_left(&self, space: &Arc<Space<U>>) {
        for address in space.left() {
            if space.state().pending.at(address).is_some() {
                self.queue().faults.push_back((Arc::clone(space), Fault { address, write: false }));
                self.work.notify_all();
            }
        }
        if space.state().pending.is_empty() {
            self.nudge();
        }
    }
}

/// Whether anything of these parts is pending.
fn pending_in<U: Userfault>(space: &Space<U>, parts: &[Range<u64>]) -> bool {
    let state = space.state();
    parts.iter().any(|part| state.pending.next_in_stream(part.start).is_some_and(|at| at < part.end))
}

/// What a panicking thread said.
pub(super) fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}
