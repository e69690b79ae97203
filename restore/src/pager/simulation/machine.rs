//! The kernel and the tasks of a simulation: address spaces whose pages are tokens, and threads that use them. A token stands for
//! all bytes of a page: it is made of them where the pager puts them in, and of what was stored.
//!
//! Each page is there twice: as the tasks see it, and as it would be if all memory had been there from the start. A load
//! compares the two. The order of the kernel's steps is that of Linux 6: memory counts as changing (`EAGAIN`) from before
//! a change until the thread that made it goes on after its event was read; DONTNEED takes pages away after that, all
//! others before their event is there to be read. Whenever the pager calls, tasks may have gone on before.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use rewarm_sys::uffd::{Event, Progress};

use super::super::plan::PAGE;
use super::super::userfault::Userfault;
use super::schedule::{self, Random, mix};

/// Pages between the places of areas, so that they can grow.
const ROOM: u64 = 10_000;
/// Children that a run may have.
const FORKS_MAX: usize = 3;
/// Operations of a thread before it looks at all it has.
const OPERATIONS: u32 = 60;

#[derive(Debug, Clone, Copy)]
struct Page {
    /// What is there; `None` if nothing is.
    seen: Option<u64>,
    /// What should be.
    right: u64,
    registered: bool,
}

/// Pages that one thread uses, by their numbers.
#[derive(Debug, Clone, Copy)]
struct Area {
    start: u64,
    pages: u64,
}

impl Area {
    fn numbers(self) -> Range<u64> {
        self.start..self.start + self.pages
    }
}

/// An event as the kernel keeps it until it is read. In pages.
#[derive(Debug, Clone, Copy)]
enum Told {
    Fork { child: usize },
    Remap { from: u64, to: u64, pages: u64 },
    Remove { start: u64, end: u64 },
    Unmap { start: u64, end: u64 },
}

/// What a thread does next.
#[derive(Debug, Clone, Copy)]
enum Step {
    Load(u64),
    Store(u64, u64),
    /// A load of a page that has just been added.
    Touch(u64),
    /// Tells and waits until it is read.
    Tell(Told),
    /// Memory does not change any more, as far as this thread goes.
    Settle,
    TakeAway {
        start: u64,
        end: u64,
    },
    Exit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blocked {
    Fault { page: u64, write: bool, read: bool },
    Event,
}

#[derive(Debug, Clone, Default)]
struct Thread {
    areas: Vec<Area>,
    steps: VecDeque<Step>,
    blocked: Option<Blocked>,
    operations: u32,
    checked: bool,
    is_child: bool,
}

impl Thread {
    fn is_over(&self) -> bool {
        self.operations == 0 && self.checked && self.steps.is_empty()
    }

    /// In the middle of a change of memory.
    fn is_changing(&self) -> bool {
        self.steps.iter().any(|step| !matches!(step, Step::Load(_) | Step::Store(..)))
            || self.blocked == Some(Blocked::Event)
    }
}

#[derive(Debug, Clone, Default)]
struct AddressSpace {
    pages: BTreeMap<u64, Page>,
    /// Where a mapping begins.
    borders: BTreeSet<u64>,
    changing: u32,
    events: VecDeque<(usize, Told)>,
    threads: Vec<Thread>,
    gone: bool,
    released: bool,
    /// Pages that the kernel does not give back.
    stubborn: Option<Range<u64>>,
}

#[derive(Debug)]
struct Inner {
    random: Random,
    spaces: Vec<AddressSpace>,
    fresh: u64,
    forks: usize,
    wrong: Option<String>,
}

/// A machine with one restored task.
#[derive(Debug)]
pub(super) struct Machine(Mutex<Inner>);

/// The userfaultfd of one of its address spaces.
#[derive(Debug)]
pub(super) struct Virtual {
    machine: Arc<Machine>,
    space: usize,
}

/// What a page with these bytes is: 0 if all of them are.
pub(super) fn token(page: &[u8]) -> u64 {
    assert_eq!(page.len() as u64, PAGE, "pages are filled whole");
    let words = page.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
    if page.iter().all(|byte| *byte == 0) { 0 } else { words.fold(PAGE, |sum, word| mix(sum ^ word)) | 1 }
}

impl Machine {
    /// A task with these areas: the first page of each, and what should be in its pages. Each of `threads` uses its own.
    pub(super) fn new(seed: u64, areas: &[(u64, Vec<u64>)], threads: usize) -> Arc<Self> {
        let mut space = AddressSpace { threads: vec![Thread::default(); threads], ..AddressSpace::default() };
        for (index, (start, pages)) in areas.iter().enumerate() {
            for (number, &right) in (*start..).zip(pages) {
                space.pages.insert(number, Page { seen: None, right, registered: true });
            }
            space.borders.insert(*start);
            let area = Area { start: *start, pages: pages.len() as u64 };
            space.threads[index % threads].areas.push(area);
        }
        space.threads.iter_mut().for_each(|thread| thread.operations = OPERATIONS);
        let random = Random::new(!seed);
        Arc::new(Self(Mutex::new(Inner {
            random,
            spaces: vec![space],
            fresh: 1 << 30,
            forks: 0,
            wrong: None,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The userfaultfd of its task.
    pub(super) fn task(self: &Arc<Self>) -> Virtual {
        Virtual { machine: self.clone(), space: 0 }
    }

    /// The kernel will not unregister these pages.
    pub(super) fn be_stubborn_about(&self, pages: Range<u64>) {
        self.lock().spaces[0].stubborn = Some(pages);
    }

    /// What is in these pages by now.
    pub(super) fn seen(&self, pages: Range<u64>) -> Vec<Option<u64>> {
        self.lock().spaces[0].pages.range(pages).map(|(_, page)| page.seen).collect()
    }

    /// What a task found that should not be.
    pub(super) fn wrong(&self) -> Option<String> {
        self.lock().wrong.clone()
    }

    /// Whether every task has done all it wants.
    pub(super) fn is_over(&self) -> bool {
        self.lock().spaces.iter().all(|space| space.gone || space.threads.iter().all(Thread::is_over))
    }

    /// Lets tasks go on a little.
    pub(super) fn go_on(&self) {
        let mut inner = self.lock();
        for _ in 0..inner.random.below(4) {
            inner.advance();
        }
    }
}

impl Inner {
    fn advance(&mut self) {
        let space = self.random.below(self.spaces.len() as u64) as usize;
        let threads = self.spaces[space].threads.len() as u64;
        if self.spaces[space].gone || threads == 0 || self.wrong.is_some() {
            return;
        }
        let thread = self.random.below(threads) as usize;
        let this = &mut self.spaces[space].threads[thread];
        if this.blocked.is_some() {
            return;
        }
        match this.steps.pop_front() {
            Some(step) => self.step(space, thread, step),
            None if this.operations > 0 => {
                this.operations -= 1;
                self.operate(space, thread);
            }
            None if !this.checked => {
                this.checked = true;
                let all = this.areas.iter().flat_map(|area| area.numbers()).map(Step::Load);
                this.steps.extend(all.collect::<Vec<_>>());
                if this.is_child {
                    this.steps.push_back(Step::Exit);
                }
            }
            None => {}
        }
    }

    fn step(&mut self, number: usize, thread: usize, step: Step) {
        let space = &mut self.spaces[number];
        match step {
            Step::Load(page) | Step::Touch(page) | Step::Store(page, _) => {
                let Some(place) = space.pages.get_mut(&page) else {
                    self.wrong =
                        Some(format!("space {number}: page {page:#x} is not mapped: a mistake of the test"));
                    return;
                };
                if place.seen.is_none() && place.registered {
                    let write = matches!(step, Step::Store(..));
                    space.threads[thread].blocked = Some(Blocked::Fault { page, write, read: false });
                    space.threads[thread].steps.push_front(step);
                    return;
                }
                let seen = place.seen.get_or_insert(0);
                match step {
                    Step::Store(_, value) => {
                        *seen = mix(*seen ^ value);
                        place.right = mix(place.right ^ value);
                    }
                    _ if *seen != place.right => {
                        let (seen, right) = (*seen, place.right);
                        self.wrong = Some(format!(
                            "space {number}: page {page:#x} holds {seen:#x}, {right:#x} expected"
                        ));
                    }
                    _ => {}
                }
            }
            Step::Tell(told) => {
                if space.released {
                    return;
                }
                space.events.push_back((thread, told));
                space.threads[thread].blocked = Some(Blocked::Event);
            }
            Step::Settle => space.changing -= 1,
            Step::TakeAway { start, end } => {
                for (_, page) in space.pages.range_mut(start..end) {
                    (page.seen, page.right) = (None, 0);
                }
            }
            Step::Exit => space.gone = true,
        }
    }

    fn operate(&mut self, number: usize, thread: usize) {
        let random = &mut self.random;
        let this = &self.spaces[number].threads[thread];
        if this.areas.is_empty() {
            return;
        }
        let index = random.below(this.areas.len() as u64) as usize;
        let area = this.areas[index];
        let page = area.start + random.below(area.pages);
        let end = (page + 1 + random.below(20)).min(area.start + area.pages);
        let value = random.next();
        match random.below(100) {
            0..40 => self.then(number, thread, [Step::Load(page)]),
            40..60 => self.then(number, thread, [Step::Store(page, value), Step::Load(page)]),
            60..75 => {
                self.spaces[number].changing += 1;
                let told = Told::Remove { start: page, end };
                let steps = [Step::Tell(told), Step::Settle, Step::TakeAway { start: page, end }];
                self.then(number, thread, steps);
            }
            75..83 => self.relocate(number, thread, index, area.start),
            83..88 if page > area.start => self.relocate(number, thread, index, page),
            88..91 if page > area.start => {
                let (start, end) = (page, area.start + area.pages);
                self.spaces[number].threads[thread].areas[index].pages = page - area.start;
                self.spaces[number].pages.retain(|number, _| !(start..end).contains(number));
                self.spaces[number].changing += 1;
                self.then(number, thread, [Step::Tell(Told::Unmap { start, end }), Step::Settle]);
            }
            91..93 => drop(self.spaces[number].borders.insert(page)),
            93..96 => {
                let more = area.start + area.pages..area.start + area.pages + 1 + value % 5;
                let registered = self.spaces[number].pages[&(area.start + area.pages - 1)].registered;
                let empty = Page { seen: None, right: 0, registered };
                self.spaces[number].pages.extend(more.clone().map(|number| (number, empty)));
                self.spaces[number].threads[thread].areas[index].pages += more.end - more.start;
                // What grew and is moved untouched is taken for a contradiction, see `events.rs`.
                self.then(number, thread, more.map(Step::Touch));
            }
            96..100 => self.fork(number, thread),
            _ => {}
        }
    }

    fn then(&mut self, space: usize, thread: usize, steps: impl IntoIterator<Item = Step>) {
        self.spaces[space].threads[thread].steps.extend(steps);
    }

    /// Moves what an area has from `from` on to a place of its own.
    fn relocate(&mut self, number: usize, thread: usize, index: usize, from: u64) {
        self.fresh += ROOM;
        let to = self.fresh;
        let space = &mut self.spaces[number];
        let area = space.threads[thread].areas[index];
        let pages = area.start + area.pages - from;
        for page in 0..pages {
            let moved = space.pages.remove(&(from + page)).expect("areas are mapped");
            space.pages.insert(to + page, moved);
        }
        // Borders inside go along.
        let inside: Vec<u64> = space.borders.range(from..from + pages).copied().collect();
        space.borders.extend(inside.iter().map(|border| border - from + to));
        space.borders.insert(to);
        let moved = Area { start: to, pages };
        if from == area.start {
            space.threads[thread].areas[index] = moved;
        } else {
            space.threads[thread].areas[index].pages -= pages;
            space.threads[thread].areas.push(moved);
        }
        space.changing += 2;
        let (remap, end) = (Told::Remap { from, to, pages }, from + pages);
        let unmap = Told::Unmap { start: from, end };
        self.then(number, thread, [Step::Tell(remap), Step::Settle, Step::Tell(unmap), Step::Settle]);
    }

    /// Not while another thread changes memory: `events.rs` says what cannot be told apart then.
    fn fork(&mut self, number: usize, thread: usize) {
        let space = &self.spaces[number];
        let quiet = space.threads.iter().all(|thread| !thread.is_changing());
        if !quiet || self.forks == FORKS_MAX || space.threads[thread].is_child {
            return;
        }
        self.forks += 1;
        let areas = space.threads.iter().flat_map(|thread| thread.areas.clone()).collect();
        let only = Thread { areas, operations: OPERATIONS / 4, is_child: true, ..Thread::default() };
        let (pages, borders) = (space.pages.clone(), space.borders.clone());
        // It runs from the moment on in which the event is read.
        let blocked = Thread { blocked: Some(Blocked::Event), ..only };
        let child = AddressSpace {
            pages,
            borders,
            threads: vec![blocked],
            released: space.released,
            ..AddressSpace::default()
        };
        let told = Told::Fork { child: self.spaces.len() };
        self.spaces.push(child);
        if self.spaces[number].released {
            return self.wake_child(told);
        }
        // Told at once: what happens between a fork and its telling cannot be told apart either.
        self.spaces[number].changing += 1;
        self.spaces[number].events.push_back((thread, told));
        self.spaces[number].threads[thread].blocked = Some(Blocked::Event);
        self.then(number, thread, [Step::Settle]);
    }

    fn wake_child(&mut self, told: Told) {
        if let Told::Fork { child } = told {
            self.spaces[child].threads[0].blocked = None;
        }
    }

    /// How far missing pages from `start` on can be filled in one go, by what is mapped there.
    fn fillable(&self, space: usize, start: u64, pages: u64) -> Result<(), Errno> {
        let space = &self.spaces[space];
        if space.gone {
            return Err(Errno::ESRCH);
        }
        if space.changing > 0 {
            return Err(Errno::EAGAIN);
        }
        let registered = |number| space.pages.get(&number).is_some_and(|page: &Page| page.registered);
        let whole = (start..start + pages).all(registered)
            && space.borders.range(start + 1..start + pages).next().is_none();
        if whole { Ok(()) } else { Err(Errno::ENOENT) }
    }

    /// Puts tokens into missing pages and wakes who waits for them.
    fn put(&mut self, number: usize, start: u64, tokens: &[u64]) -> Progress {
        let nothing = |errno| Progress { bytes: 0, stopped: Some(errno) };
        if let Err(errno) = self.fillable(number, start, tokens.len() as u64) {
            return nothing(errno);
        }
        // The kernel may stop between two pages.
        let whole = tokens.len() as u64;
        let limit = if self.random.below(8) == 0 { 1 + self.random.below(whole) } else { whole };
        let space = &mut self.spaces[number];
        let mut done = 0;
        for (page, token) in (start..).zip(tokens).take(limit as usize) {
            let place = space.pages.get_mut(&page).expect("looked up before");
            if place.seen.is_some() {
                break;
            }
            place.seen = Some(*token);
            done += 1;
        }
        self.wake(number, start, start + done);
        match (done, limit) {
            (0, _) => nothing(Errno::EEXIST),
            (done, _) if done == whole => Progress { bytes: done * PAGE, stopped: None },
            (done, _) => Progress { bytes: done * PAGE, stopped: Some(Errno::EAGAIN) },
        }
    }

    fn wake(&mut self, number: usize, start: u64, end: u64) {
        for thread in &mut self.spaces[number].threads {
            if let Some(Blocked::Fault { page, .. }) = thread.blocked
                && (start..end).contains(&page)
            {
                thread.blocked = None;
            }
        }
    }

    /// The next message, faults before events.
    fn message(&mut self, number: usize, machine: &Arc<Machine>) -> Option<Event<Virtual>> {
        let space = &mut self.spaces[number];
        for thread in &mut space.threads {
            if let Some(Blocked::Fault { page, write, read: false }) = thread.blocked {
                thread.blocked = Some(Blocked::Fault { page, write, read: true });
                return Some(Event::Fault { address: page * PAGE + 8 * (page % 512), write });
            }
        }
        let (thread, told) = space.events.pop_front()?;
        space.threads[thread].blocked = None;
        self.wake_child(told);
        Some(match told {
            Told::Fork { child } => Event::Fork { uffd: Virtual { machine: machine.clone(), space: child } },
            Told::Remap { from, to, pages } => {
                Event::Remap { from: from * PAGE, to: to * PAGE, length: pages * PAGE }
            }
            Told::Remove { start, end } => Event::Remove { start: start * PAGE, end: end * PAGE },
            Told::Unmap { start, end } => Event::Unmap { start: start * PAGE, end: end * PAGE },
        })
    }

    /// The last descriptor is closed: what is missing reads as zeros, and nobody waits any more.
    fn release(&mut self, number: usize) {
        let space = &mut self.spaces[number];
        space.released = true;
        space.pages.values_mut().for_each(|page| page.registered = false);
        space.threads.iter_mut().for_each(|thread| thread.blocked = None);
        for (_, told) in std::mem::take(&mut space.events) {
            if let Told::Fork { child } = told {
                self.release(child);
            }
        }
    }
}

impl Drop for Virtual {
    fn drop(&mut self) {
        self.machine.lock().release(self.space);
    }
}

impl Userfault for Virtual {
    fn read(&self, out: &mut Vec<Event<Self>>) -> io::Result<usize> {
        self.machine.go_on();
        let mut inner = self.machine.lock();
        let before = out.len();
        while out.len() - before < 32
            && let Some(message) = inner.message(self.space, &self.machine)
        {
            out.push(message);
        }
        Ok(out.len() - before)
    }

    fn copy(&self, target: u64, source: &[u8]) -> Progress {
        self.machine.go_on();
        let tokens: Vec<u64> = source.chunks(PAGE as usize).map(token).collect();
        self.machine.lock().put(self.space, target / PAGE, &tokens)
    }

    fn zero(&self, start: u64, length: u64) -> Progress {
        self.machine.go_on();
        self.machine.lock().put(self.space, start / PAGE, &vec![0; (length / PAGE) as usize])
    }

    fn wake(&self, start: u64, length: u64) -> Result<(), Errno> {
        self.machine.go_on();
        self.machine.lock().wake(self.space, start / PAGE, (start + length) / PAGE);
        Ok(())
    }

    fn unregister(&self, start: u64, length: u64) -> Result<(), Errno> {
        let mut inner = self.machine.lock();
        let (start, end) = (start / PAGE, (start + length) / PAGE);
        let space = &mut inner.spaces[self.space];
        if space.stubborn.as_ref().is_some_and(|stubborn| stubborn.start < end && start < stubborn.end) {
            return Err(Errno::EINVAL);
        }
        for (_, page) in space.pages.range_mut(start..end) {
            page.registered = false;
        }
        inner.wake(self.space, start, end);
        Ok(())
    }

    fn turn() -> bool {
        schedule::turn()
    }
}
