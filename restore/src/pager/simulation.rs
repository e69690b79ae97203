//! Random memory, stored and filled again by the pager's threads against a simulated kernel, compared page by page.
//!
//! Everything that could be otherwise in another run is drawn from a seed: what tasks do, which thread goes on, when a
//! chunk arrives, where the kernel stops. A failure names the seed; `REWARM_SEED` repeats it. `REWARM_ROUNDS` sets how many runs
//! there are. `tests/pager` does the same with real processes, where a run cannot be repeated.
//!
//! What is filled is made up, or was stored by a dump and read from its store (`simulation/dumped.rs`).
//!
//! The pager's main thread is played here ([`Case::serve`]), since the real one waits for descriptors; faults, events, the gate and
//! filling are those that serve real tasks.

mod dumped;
mod machine;
mod schedule;

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use machine::{Machine, Virtual, token};
use nix::errno::Errno;
use rewarm_sys::procmem;
use rewarm_sys::uffd::Event;
use schedule::{GivenUp, Random, Schedule, mix};

use super::behind::Behind;
use super::eager::take_out;
use super::engine::{Duty, Engine, Job};
use super::error::Error;
use super::events::{self, Fault};
use super::fault::Need;
use super::pending::Piece;
use super::plan::{AtFork, Mapping, PAGE, Plan, Run};
use super::ranges::Ranges;
use super::source::{Source, SourceError};
use super::space::{Space, State};
use super::stopped::Stopped;
use super::userfault::Userfault;
use super::working_set::{Extent, WorkingSet};

/// The simulated task.
const TASK: u32 = 1;
/// Pages of a chunk.
const CHUNK: u64 = 24;
/// Turns for tasks to come to their end when all is filled.
const REST_MAX: u32 = 1_000_000;

/// What is wrong with the pager, on purpose: each must be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mistake {
    None,
    /// Events are read before the gate is closed, and applied behind it.
    Ungated,
    /// What a task gave up is filled all the same.
    ForgetsRemoves,
    /// A fault gets zeros before anybody looks whether content belongs there.
    ZerosFirst,
    /// One chunk in eight has a wrong byte.
    WrongChunk,
    /// A child that was forked is not filled.
    ForgetsChildren,
    /// Content is given back that another address space still lacks.
    GivesBackEarly,
}

/// The content stream, of which chunks arrive late.
struct Stored {
    content: Arc<Vec<u8>>,
    seed: u64,
    mistake: Mistake,
    random: Mutex<Random>,
    arrived: Mutex<BTreeSet<u64>>,
    released: Mutex<BTreeSet<u64>>,
}

impl Source for Stored {
    fn chunk(&self, _task: u32, offset: u64) -> Range<u64> {
        let start = offset / (CHUNK * PAGE) * CHUNK * PAGE;
        start..(start + CHUNK * PAGE).min(self.content.len() as u64)
    }

    fn read(&self, _task: u32, chunk: Range<u64>, out: &mut dyn FnMut(&[u8])) -> Result<(), SourceError> {
        let late = self.random.lock().unwrap_or_else(PoisonError::into_inner).below(40);
        for _ in 0..late {
            Virtual::turn();
        }
        if self.released.lock().unwrap_or_else(PoisonError::into_inner).contains(&chunk.start) {
            return Err(SourceError::Released);
        }
        let mut bytes = self.content[chunk.start as usize..chunk.end as usize].to_vec();
        if self.mistake == Mistake::WrongChunk && mix(chunk.start ^ self.seed).is_multiple_of(8) {
            // The last byte of a page somewhere in it.
            let page = mix(chunk.start) as usize % (bytes.len() / PAGE as usize);
            bytes[(page + 1) * PAGE as usize - 1] ^= 1;
        }
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner).insert(chunk.start);
        out(&bytes);
        Ok(())
    }

    fn is_near(&self, task: u32, offset: u64) -> bool {
        let start = self.chunk(task, offset).start;
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner).contains(&start)
            && !self.released.lock().unwrap_or_else(PoisonError::into_inner).contains(&start)
    }

    fn release(&self, _task: u32, part: Range<u64>) {
        let chunks = part.step_by((CHUNK * PAGE) as usize);
        self.released.lock().unwrap_or_else(PoisonError::into_inner).extend(chunks);
    }
}

/// An area by its first page: for each page its place in the content stream, or nothing.
type Laid = (u64, Vec<Option<u64>>);

/// The areas of a task, and the length of its stream in pages.
fn areas(random: &mut Random) -> (Vec<Laid>, u64) {
    let mut stream = 0;
    let mut areas = Vec::new();
    for index in 1..=2 + random.below(3) {
        let (pages, mut stored) = (20 + random.below(80), Vec::new());
        while (stored.len() as u64) < pages {
            let (run, hole) = (1 + random.below(30), random.below(3) * random.below(12));
            for _ in 0..run.min(pages - stored.len() as u64) {
                stored.push(Some(stream));
                stream += 1;
            }
            stored.extend((0..hole.min(pages - stored.len() as u64)).map(|_| None));
        }
        areas.push((index << 20, stored));
    }
    (areas, stream)
}

fn plan(areas: &[Laid], stream: u64) -> Plan {
    let mapping = |(start, pages): &Laid| Mapping {
        start: start * PAGE,
        end: (start + pages.len() as u64) * PAGE,
        writable: true,
        at_fork: AtFork::Copied,
    };
    let mut runs: Vec<Run> = Vec::new();
    for (number, page) in areas.iter().flat_map(|(start, pages)| (*start..).zip(pages)) {
        let Some(offset) = page else { continue };
        match runs.last_mut() {
            Some(last) if last.vaddr + last.bytes == number * PAGE => last.bytes += PAGE,
            _ => runs.push(Run { vaddr: number * PAGE, bytes: PAGE, offset: offset * PAGE }),
        }
    }
    Plan::new(areas.iter().map(mapping).collect(), &runs, stream * PAGE).expect("areas make a plan")
}

/// What a task has, where, and what the pager knows of it.
struct Memory {
    /// The first page of each area, and what should be in its pages.
    areas: Vec<(u64, Vec<u64>)>,
    plan: Plan,
    content: Arc<Vec<u8>>,
}

impl Memory {
    /// Of pages that differ.
    fn made_up(seed: u64, random: &mut Random) -> Self {
        let (areas, stream) = areas(random);
        Self::of(seed, &areas, stream)
    }

    fn of(seed: u64, areas: &[Laid], stream: u64) -> Self {
        let word = |page: u64| (mix(seed ^ page.wrapping_mul(0x1_0001)) | 1).to_le_bytes();
        let content: Vec<u8> = (0..stream).flat_map(|page| word(page).repeat(PAGE as usize / 8)).collect();
        let tokens: Vec<u64> = content.chunks(PAGE as usize).map(token).collect();
        let right = |page: &Option<u64>| page.map_or(0, |page| tokens[page as usize]);
        let held = areas.iter().map(|(start, pages)| (*start, pages.iter().map(right).collect())).collect();
        Self { areas: held, plan: plan(areas, stream), content: Arc::new(content) }
    }

    fn source(&self, seed: u64, mistake: Mistake) -> Stored {
        Stored {
            content: self.content.clone(),
            seed,
            mistake,
            random: Mutex::new(Random::new(mix(seed))),
            arrived: Mutex::default(),
            released: Mutex::default(),
        }
    }
}

/// The pager's main thread and what it knows.
struct Case {
    mistake: Mistake,
    machine: Arc<Machine>,
    engine: Arc<Engine<Virtual>>,
    source: Arc<Stored>,
    behind: Behind,
    watched: Vec<Arc<Space<Virtual>>>,
    again: VecDeque<(Arc<Space<Virtual>>, Fault)>,
    spaces: u32,
}

impl Case {
    fn watch(&mut self, uffd: Virtual, forked: bool, state: State) {
        let space = Arc::new(Space::new(self.spaces, TASK, forked, Arc::new(uffd), state));
        self.spaces += 1;
        self.engine.add(space.clone());
        self.watched.push(space);
    }

    /// What `serve.rs` does, until nothing is left to be filled.
    fn serve(&mut self) -> Result<(), Error> {
        while !self.watched.is_empty() && self.machine.wrong().is_none() {
            Virtual::turn();
            self.machine.go_on();
            if let Some(error) = self.engine.take_failure() {
                return Err(error);
            }
            for space in self.watched.clone() {
                let mut faults = Vec::new();
                self.apply_events(&space, &mut faults)?;
                faults.into_iter().try_for_each(|fault| self.answer(&space, fault))?;
            }
            for (space, fault) in std::mem::take(&mut self.again) {
                self.answer(&space, fault)?;
            }
            let early = usize::from(self.mistake == Mistake::GivesBackEarly);
            let known = &self.watched[..self.watched.len().saturating_sub(early)];
            self.behind.give_back(known, &*self.source);
            self.close_filled()?;
        }
        self.engine.stop();
        Ok(())
    }

    fn apply_events(&mut self, space: &Arc<Space<Virtual>>, faults: &mut Vec<Fault>) -> Result<usize, Error> {
        let mut children = Vec::new();
        let mut forked = |uffd: Virtual, state: &State| {
            children.push((uffd, state.forked()));
            Ok(())
        };
        let count = match self.mistake {
            Mistake::Ungated | Mistake::ForgetsRemoves => {
                let Some(uffd) = space.enter().clone() else { return Ok(0) };
                let mut messages = Vec::new();
                let count = uffd.read(&mut messages).map_err(Error::Wait)?;
                if self.mistake == Mistake::ForgetsRemoves {
                    messages.retain(|message| !matches!(message, Event::Remove { .. }));
                }
                let _gate = space.enter_alone();
                events::apply(space, &uffd, messages, faults, &mut forked)?;
                count
            }
            _ => events::read(space, faults, &mut forked)?,
        };
        for (uffd, state) in children {
            let empty = State::new(&Plan::default());
            self.watch(uffd, true, if self.mistake == Mistake::ForgetsChildren { empty } else { state });
        }
        Ok(count)
    }

    fn answer(&mut self, space: &Arc<Space<Virtual>>, fault: Fault) -> Result<(), Error> {
        if self.mistake == Mistake::ZerosFirst
            && let Some(uffd) = space.enter().as_ref()
        {
            let _ = uffd.zero(fault.address / PAGE * PAGE, PAGE);
        }
        match self.engine.take_fault(space, fault)? {
            Need::Again => self.again.push_back((space.clone(), fault)),
            Need::Gone => space.set_gone(),
            Need::Nothing | Need::Left(_) | Need::Content(_) => {}
        }
        Ok(())
    }

    fn close_filled(&mut self) -> Result<(), Error> {
        for space in self.watched.clone() {
            let filled = space.state().pending.is_empty();
            if (filled && self.close(&space)?) || space.is_gone() {
                let closed = space.enter_alone().take();
                self.engine.remove(&space);
                self.watched.retain(|other| !Arc::ptr_eq(other, &space));
                self.again.retain(|(other, _)| !Arc::ptr_eq(other, &space));
                drop(closed);
            }
        }
        Ok(())
    }

    fn close(&mut self, space: &Arc<Space<Virtual>>) -> Result<bool, Error> {
        let mut faults = Vec::new();
        while self.apply_events(space, &mut faults)? > 0 {}
        let gate = space.enter_alone();
        let state = space.state();
        if state.pending.is_empty() {
            if let Some(uffd) = gate.as_ref() {
                for range in state.registered.iter() {
                    uffd.unregister(range.start, range.end - range.start).expect("the kernel gives it back");
                }
            }
            return Ok(true);
        }
        drop((state, gate));
        faults.into_iter().try_for_each(|fault| self.answer(space, fault))?;
        Ok(false)
    }
}

/// One of the threads that fill.
fn fill(engine: &Engine<Virtual>, duty: Duty) -> Result<(), Error> {
    loop {
        Virtual::turn();
        match engine.try_next(duty) {
            Some(Job::Stop) => return Ok(()),
            Some(job) => engine.carry_out(job)?,
            None => {}
        }
    }
}

/// Runs a thread of a simulation; gives what went wrong in it.
fn thread(schedule: &Arc<Schedule>, me: usize, work: impl FnOnce() -> Result<(), Error>) -> Option<String> {
    let done = catch_unwind(AssertUnwindSafe(|| {
        schedule.join(me);
        work()
    }));
    if !matches!(done, Ok(Ok(()))) {
        schedule.give_up();
    }
    schedule.leave(me);
    match done {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(format!("the pager gave up: {error:?}")),
        Err(panic) if panic.is::<GivenUp>() => None,
        Err(panic) => Some(format!("a panic: {}", super::engine::message(&*panic))),
    }
}

/// One run with memory that is made up. What went wrong, if anything did.
fn run(seed: u64, mistake: Mistake) -> Result<(), String> {
    let mut random = Random::new(seed);
    let memory = Memory::made_up(seed, &mut random);
    run_with(seed, mistake, &memory, random)
}

/// One run. What went wrong, if anything did.
fn run_with(seed: u64, mistake: Mistake, memory: &Memory, mut random: Random) -> Result<(), String> {
    let stream = memory.content.len() as u64 / PAGE;
    let threads = 1 + random.below(2) as usize;
    let machine = Machine::new(seed, &memory.areas, threads);
    let source = Arc::new(memory.source(seed, mistake));
    let engine = Arc::new(Engine::new(source.clone(), random.below(2) == 0).expect("an eventfd"));
    let mut case = Case {
        mistake,
        machine: machine.clone(),
        engine: engine.clone(),
        behind: Behind::new(TASK, stream * PAGE, &*source),
        source,
        watched: Vec::new(),
        again: VecDeque::new(),
        spaces: 0,
    };
    case.watch(machine.task(), false, State::new(&memory.plan));
    engine.set_finished();
    let extents = (0..random.below(6)).map(|_| {
        let offset = random.below(stream) * PAGE;
        Extent { task: TASK, offset, length: random.below(30) * PAGE }
    });
    engine.fill_first(&WorkingSet { extents: extents.collect() });
    engine.start_background();

    let duties = [Duty::All, Duty::Near, Duty::Faults];
    let schedule = Schedule::new(seed, duties.len() + 1);
    let failures: Vec<String> = std::thread::scope(|scope| {
        let fillers = duties.into_iter().enumerate().map(|(index, duty)| {
            let (schedule, engine) = (&schedule, &engine);
            scope.spawn(move || thread(schedule, index + 1, || fill(engine, duty)))
        });
        let fillers: Vec<_> = fillers.collect();
        let served = thread(&schedule, 0, || case.serve());
        let filled = fillers.into_iter().filter_map(|filler| filler.join().expect("panics are caught"));
        filled.chain(served).collect()
    });
    if let Some(wrong) = machine.wrong() {
        return Err(wrong);
    }
    if let Some(failure) = failures.into_iter().next() {
        return Err(failure);
    }
    if schedule.was_given_up() {
        return Err("nothing moves any more".to_owned());
    }
    drop(case);
    for _ in 0..REST_MAX {
        if machine.is_over() || machine.wrong().is_some() {
            break;
        }
        machine.go_on();
    }
    match machine.wrong() {
        None if machine.is_over() => Ok(()),
        None => Err("a task waits for a page that nobody will bring".to_owned()),
        Some(wrong) => Err(wrong),
    }
}

fn rounds() -> u64 {
    std::env::var("REWARM_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(150)
}

/// The seed that was asked for, or so many new ones.
#[expect(clippy::disallowed_methods, reason = "a seed that no run had before")]
fn seeds(rounds: u64) -> Range<u64> {
    let given = std::env::var("REWARM_SEED").ok().and_then(|text| text.parse::<u64>().ok());
    given.map_or_else(
        || {
            let new = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            let new = mix(new.map_or(1, |time| time.as_nanos() as u64));
            new..new.saturating_add(rounds)
        },
        |seed| seed..seed + 1,
    )
}

#[test]
fn every_page_is_right_whatever_happens_in_whatever_order() {
    for seed in seeds(rounds()) {
        if let Err(wrong) = run(seed, Mistake::None) {
            panic!("seed {seed} (repeat with REWARM_SEED): {wrong}");
        }
    }
}

/// The same runs must find each of these.
#[test]
fn pagers_with_a_mistake_are_found_out() {
    for mistake in [
        Mistake::Ungated,
        Mistake::ForgetsRemoves,
        Mistake::ZerosFirst,
        Mistake::WrongChunk,
        Mistake::ForgetsChildren,
        Mistake::GivesBackEarly,
    ] {
        let found = (1..=500).find(|&seed| run(seed, mistake).is_err());
        assert!(found.is_some(), "{mistake:?} was not found in 500 runs");
    }
}

#[test]
fn a_seed_gives_the_same_run_again() {
    let outcome = |seed| run(seed, Mistake::Ungated).err();
    let found = (1..=500).find(|&seed| outcome(seed).is_some()).expect("a run that fails");
    let first = outcome(found);
    assert!((0..3).all(|_| outcome(found) == first), "{first:?}");
}

/// Before the first instruction: what can be written from outside is left to that, all else is in place.
#[test]
fn what_cannot_be_written_from_outside_is_copied_before() {
    let areas: Vec<Laid> =
        (0..3).map(|n| ((n + 1) << 20, (n * 10..(n + 1) * 10).map(Some).collect())).collect();
    let memory = Memory::of(5, &areas, 30);
    let machine = Machine::new(5, &memory.areas, 1);
    let engine = Engine::new(Arc::new(memory.source(5, Mistake::None)), false).expect("an eventfd");
    let state = State::new(&memory.plan);
    let space = Arc::new(Space::new(0, TASK, false, Arc::new(machine.task()), state));
    engine.set_finished();
    // Of the first area five pages are read-only, the second stays registered.
    let mut writable = Ranges::default();
    writable.insert(((1 << 20) + 5) * PAGE..(4 << 20) * PAGE);
    machine.be_stubborn_about(2 << 20..(2 << 20) + 10);
    let left = take_out(&engine, &space, &writable).expect("all can be had");
    let places: Vec<_> = left.iter().map(|piece| (piece.offset / PAGE, piece.length / PAGE)).collect();
    assert_eq!(places, [(5, 5), (10, 10), (20, 10)]);
    let expected = |pages: Range<usize>| {
        memory.content.chunks(PAGE as usize).map(|page| Some(token(page))).collect::<Vec<_>>()[pages].to_vec()
    };
    let area = |number: u64, pages: Range<u64>| {
        machine.seen((number << 20) + pages.start..(number << 20) + pages.end)
    };
    assert_eq!(area(1, 0..5), expected(0..5));
    assert_eq!([area(1, 5..10), area(2, 0..10), area(3, 0..10)].concat(), [None; 25]);
    // Of what is opened, the kernel keeps the second; the third is another's.
    let mut own = Ranges::default();
    own.insert(0..(3 << 20) * PAGE);
    let (pieces, space) = (left.clone(), Some(space));
    let stopped = Stopped { pid: -1, task: TASK, pieces, zeros: Vec::new(), space, own };
    stopped.open(left.iter().map(Piece::addresses));
    let registered = |page: u64| {
        stopped.space.as_ref().is_some_and(|space| space.state().registered.contains(page * PAGE))
    };
    assert_eq!([(1 << 20) + 5, 2 << 20, 3 << 20].map(registered), [false, true, true]);
    for piece in &left[1..] {
        let bytes = &memory.content[piece.offset as usize..][..piece.length as usize];
        stopped.put(&[procmem::Piece { target: piece.vaddr, bytes }], None).expect("copied");
    }
    assert_eq!([area(2, 0..10), area(3, 0..10)].concat(), expected(10..30));
    // What is not registered any more is written, for which there would have to be a process.
    let bytes = &memory.content[left[0].offset as usize..][..left[0].length as usize];
    let put = stopped.put(&[procmem::Piece { target: left[0].vaddr, bytes }], None);
    assert!(matches!(put, Err(Error::Write { errno: Errno::ESRCH, .. })), "{put:?}");
}
