//! A program whose memory is filled by a pager, and which does everything to it that a server may.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use rewarm_sys::fdpass;
use rewarm_sys::trial::{Area, PAGE, fork};
use rewarm_sys::uffd::Uffd;
use serde::{Deserialize, Serialize};

use crate::layout::{self, Random, Shape, word};

/// Exit status when a page is wrong.
pub(crate) const WRONG: i32 = 1;

/// CRIU's last word.
const FINISHED: i32 = 0x5253_5446;
const WORDS: u64 = PAGE as u64 / 8;
const MADV_DONTNEED: i32 = 4;
const MADV_FREE: i32 = 8;

/// What a subject does.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Orders {
    pub(crate) shape: Shape,
    pub(crate) socket: PathBuf,
    /// Threads, each with areas of its own.
    pub(crate) threads: u64,
    /// What each thread does before it checks everything.
    pub(crate) operations: u64,
    /// Stop before anything, as CRIU's `leave-stopped` does.
    pub(crate) stop: bool,
    /// Pages of the first area that may not be written by then, whatever the plan says.
    pub(crate) protected: u64,
    /// Wait for a line on standard input, touch so many pages of the first area, say so, wait for another line.
    pub(crate) touch_first: u64,
    /// The same with so many pages at the end of the last area.
    pub(crate) touch_last: u64,
}

/// What a page must hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Stored(u64),
    Zero,
    Full(u64),
}

#[derive(Debug, Clone, Copy)]
struct Page {
    content: Content,
    /// The first word, if it was written by itself.
    first: Option<u64>,
}

/// An area and what it must hold.
struct Held {
    area: Area,
    pages: Vec<Page>,
}

impl Held {
    fn check(&self, seed: u64, page: usize) -> Result<(), String> {
        let expected = self.pages[page];
        for index in 0..WORDS {
            let wanted = match expected.content {
                _ if index == 0 && expected.first.is_some() => expected.first.unwrap_or_default(),
                Content::Stored(stream) => word(seed, stream, index),
                Content::Zero => 0,
                Content::Full(value) => value,
            };
            let seen = self.area.load(page, index as usize);
            if seen != wanted {
                let address = self.area.start() + page * PAGE;
                return Err(format!(
                    "page {page} at {address:#x}, {expected:?}: word {index} is {seen:#x}, {wanted:#x} expected"
                ));
            }
        }
        Ok(())
    }

    fn check_all(&self, seed: u64) -> Result<(), String> {
        (0..self.pages.len()).try_for_each(|page| self.check(seed, page))
    }
}

/// Plays CRIU's task, then the server. Returns the exit status.
pub(crate) fn play(orders: &Orders) -> i32 {
    match try_play(orders) {
        Ok(()) => 0,
        Err(text) => {
            eprintln!("subject, seed {}: {text}", orders.shape.seed);
            WRONG
        }
    }
}

/// A program that is dumped and restored by a real CRIU: fills its memory, says `ready` by a file, and when there is
/// another one, checks all and says what it found.
pub(crate) fn be_patient(shape: Shape, folder: &Path) -> i32 {
    let found = patient(shape, folder).err().unwrap_or_else(|| "right".to_owned());
    let _ = std::fs::write(folder.join("found.new"), found);
    let _ = std::fs::rename(folder.join("found.new"), folder.join("found"));
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn patient(shape: Shape, folder: &Path) -> Result<(), String> {
    let held = map(shape)?;
    for held in &held {
        for (page, expected) in held.pages.iter().enumerate() {
            let Content::Stored(stream) = expected.content else { continue };
            (0..WORDS)
                .for_each(|index| held.area.store(page, index as usize, word(shape.seed, stream, index)));
        }
    }
    std::fs::write(folder.join("ready"), "").map_err(|error| error.to_string())?;
    while !folder.join("check").exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
    // The first page tells when the first answer could have been given.
    held[0].check(shape.seed, 0)?;
    std::fs::write(folder.join("first"), "").map_err(|error| error.to_string())?;
    held.iter().try_for_each(|held| held.check_all(shape.seed))
}

/// Maps what the shape says; nothing is touched.
fn map(shape: Shape) -> Result<Vec<Held>, String> {
    let mut held = Vec::new();
    for laid in layout::areas(shape) {
        let area = Area::map(laid.start as usize, laid.stored.len());
        let area = area.map_err(|error| format!("map {:#x}: {error}", laid.start))?;
        let content = |stored: &Option<u64>| stored.map_or(Content::Zero, Content::Stored);
        let pages = laid.stored.iter().map(|stored| Page { content: content(stored), first: None }).collect();
        held.push(Held { area, pages });
    }
    Ok(held)
}

fn try_play(orders: &Orders) -> Result<(), String> {
    let seed = orders.shape.seed;
    let uffd = Uffd::create().map_err(|error| format!("make a userfaultfd: {error}"))?;
    let held = map(orders.shape)?;
    let mut criu = connect(orders)?;
    let pid = i32::try_from(std::process::id()).expect("pids are int");
    criu.write_all(&pid.to_le_bytes()).map_err(|error| error.to_string())?;
    fdpass::send(&criu, &[0], &[uffd.as_fd()]).map_err(|error| error.to_string())?;
    for held in &held {
        held.area.register(&uffd).map_err(|error| format!("register: {error}"))?;
    }
    // CRIU's restorer touches pages before it says that it has finished.
    for held in &held {
        held.check(seed, held.pages.len() / 2)?;
    }
    drop(uffd);
    criu.write_all(&FINISHED.to_le_bytes()).map_err(|error| error.to_string())?;
    drop(criu);
    let protected = held[0].area.part(0..orders.protected as usize);
    protected.protect(false).map_err(|error| format!("protect: {error}"))?;
    if orders.stop {
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGSTOP).map_err(|error| error.to_string())?;
        let resident: usize = held.iter().map(|held| held.area.resident().unwrap_or(0)).sum();
        let stored = layout::stream_pages(&layout::areas(orders.shape)) as usize;
        if resident < stored {
            return Err(format!(
                "{resident} pages are resident, {stored} expected before the first instruction"
            ));
        }
    }
    protected.protect(true).map_err(|error| format!("unprotect: {error}"))?;
    if orders.touch_first + orders.touch_last > 0 {
        wait_for_a_line()?;
        (0..orders.touch_first as usize).try_for_each(|page| held[0].check(seed, page))?;
        let last = &held[held.len() - 1];
        let end = last.pages.len();
        (end - orders.touch_last as usize..end).try_for_each(|page| last.check(seed, page))?;
        println!("touched");
        wait_for_a_line()?;
    }
    serve(orders, held)
}

fn wait_for_a_line() -> Result<(), String> {
    std::io::stdin().read_line(&mut String::new()).map(|_| ()).map_err(|error| error.to_string())
}

fn connect(orders: &Orders) -> Result<UnixStream, String> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match UnixStream::connect(&orders.socket) {
            Ok(stream) => return Ok(stream),
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
            Err(error) => return Err(format!("connect: {error}")),
        }
    }
}

fn serve(orders: &Orders, mut held: Vec<Held>) -> Result<(), String> {
    let mut shares: Vec<Vec<Held>> = (0..orders.threads).map(|_| Vec::new()).collect();
    for (index, held) in held.drain(..).enumerate() {
        shares[index % orders.threads as usize].push(held);
    }
    std::thread::scope(|scope| {
        let workers: Vec<_> = shares
            .into_iter()
            .enumerate()
            .map(|(index, share)| {
                scope.spawn(move || Worker::new(orders, index as u64, share).work(orders.operations))
            })
            .collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| "a panic".to_owned())?)
    })
}

/// A thread of the server.
struct Worker {
    seed: u64,
    random: Random,
    held: Vec<Held>,
    /// Where areas can move to: vacated places and their lengths, or further up.
    vacated: Vec<(usize, usize)>,
    fresh: usize,
    forks: u32,
}

impl Worker {
    fn new(orders: &Orders, index: u64, held: Vec<Held>) -> Worker {
        Worker {
            seed: orders.shape.seed,
            random: Random::new(orders.shape.seed ^ (index + 1)),
            held,
            vacated: Vec::new(),
            fresh: 0x2000_0000_0000 + index as usize * 0x100_0000_0000,
            forks: 0,
        }
    }

    fn work(mut self, operations: u64) -> Result<(), String> {
        for _ in 0..operations {
            self.operate()?;
        }
        self.held.iter().try_for_each(|held| held.check_all(self.seed))
    }

    fn operate(&mut self) -> Result<(), String> {
        let index = self.random.below(self.held.len() as u64) as usize;
        let pages = self.held[index].pages.len() as u64;
        let page = self.random.below(pages) as usize;
        let end = (page as u64 + 1 + self.random.below(32)).min(pages) as usize;
        let system = |error: std::io::Error| format!("a call failed: {error}");
        match self.random.below(1000) {
            0..400 => self.held[index].check(self.seed, page),
            400..600 => {
                let value = self.random.next();
                let held = &mut self.held[index];
                held.area.store(page, 0, value);
                held.pages[page].first = Some(value);
                Ok(())
            }
            600..700 => {
                self.overwrite(index, page);
                Ok(())
            }
            700..850 => self.give_up(index, page, end).map_err(system),
            850..900 => {
                // The kernel may take a freed page back as long as nobody writes to it.
                self.held[index].area.part(page..end).advise(MADV_FREE).map_err(system)?;
                (page..end).for_each(|page| self.overwrite(index, page));
                Ok(())
            }
            900..930 => self.relocate(index).map_err(system),
            930..945 => self.split(index, page).map_err(system),
            945..955 => self.cut(index, page).map_err(system),
            955..965 => {
                self.grow(index);
                // What grew and is moved untouched is taken for a contradiction, see `events.rs`.
                (pages as usize..self.held[index].pages.len())
                    .try_for_each(|page| self.held[index].check(self.seed, page))
            }
            965..985 => {
                let part = self.held[index].area.part(page..end);
                part.protect(false).map_err(system)?;
                self.held[index].check(self.seed, page)?;
                part.protect(true).map_err(system)
            }
            _ => self.fork(),
        }
    }

    fn overwrite(&mut self, index: usize, page: usize) {
        let value = self.random.next();
        let held = &mut self.held[index];
        (0..WORDS as usize).for_each(|word| held.area.store(page, word, value));
        held.pages[page] = Page { content: Content::Full(value), first: None };
    }

    fn give_up(&mut self, index: usize, page: usize, end: usize) -> std::io::Result<()> {
        let held = &mut self.held[index];
        held.area.part(page..end).advise(MADV_DONTNEED)?;
        held.pages[page..end].fill(Page { content: Content::Zero, first: None });
        Ok(())
    }

    /// A place for so many pages: vacated before, or never used.
    fn place(&mut self, pages: usize) -> usize {
        let reuse = self.random.below(2) == 0;
        let found = self.vacated.iter().position(|&(_, room)| room >= pages).filter(|_| reuse);
        if let Some(found) = found {
            return self.vacated.swap_remove(found).0;
        }
        self.fresh += 0x1000_0000;
        self.fresh
    }

    fn relocate(&mut self, index: usize) -> std::io::Result<()> {
        let area = self.held[index].area;
        let to = self.place(area.pages());
        self.held[index].area = area.relocate(to)?;
        self.vacated.push((area.start(), area.pages()));
        Ok(())
    }

    /// Moves the part behind `page` away: two areas.
    fn split(&mut self, index: usize, page: usize) -> std::io::Result<()> {
        let (area, all) = (self.held[index].area, self.held[index].area.pages());
        if page == 0 || self.held.len() > 12 {
            return Ok(());
        }
        let tail = area.part(page..all);
        let to = self.place(tail.pages());
        let moved = tail.relocate(to)?;
        self.vacated.push((tail.start(), tail.pages()));
        let pages = self.held[index].pages.split_off(page);
        self.held[index].area = area.part(0..page);
        self.held.push(Held { area: moved, pages });
        Ok(())
    }

    /// Unmaps the last quarter at most.
    fn cut(&mut self, index: usize, page: usize) -> std::io::Result<()> {
        let area = self.held[index].area;
        let keep = page.max(area.pages() - area.pages() / 4).max(1);
        if keep < area.pages() {
            let tail = area.part(keep..area.pages());
            tail.unmap()?;
            self.vacated.push((tail.start(), tail.pages()));
            self.held[index].pages.truncate(keep);
            self.held[index].area = area.part(0..keep);
        }
        Ok(())
    }

    /// Longer by some pages, if nothing is in the way.
    fn grow(&mut self, index: usize) {
        let more = 1 + self.random.below(8) as usize;
        let held = &mut self.held[index];
        if let Ok(longer) = held.area.grow(more) {
            held.area = longer;
            held.pages.extend((0..more).map(|_| Page { content: Content::Zero, first: None }));
            let (start, end) = (longer.start(), longer.start() + longer.pages() * PAGE);
            self.vacated.retain(|&(place, pages)| place + pages * PAGE <= start || end <= place);
        }
    }

    /// The child checks what this thread knows of, changes some of it and ends.
    fn fork(&mut self) -> Result<(), String> {
        if self.forks == 4 {
            return Ok(());
        }
        self.forks += 1;
        let before = self.forks;
        let child = fork(|| {
            self.forks = 4;
            let checked = self.held.iter().try_for_each(|held| held.check_all(self.seed));
            let checked = checked.and_then(|()| self.give_up(0, 0, 1).map_err(|error| error.to_string()));
            match checked.and_then(|()| self.held[0].check(self.seed, 0)) {
                Ok(()) => 0,
                Err(text) => {
                    eprintln!("forked child, seed {}: {text}", self.seed);
                    WRONG
                }
            }
        });
        self.forks = before;
        let child = child.map_err(|error| format!("fork: {error}"))?;
        match waitpid(Pid::from_raw(child), None) {
            Ok(WaitStatus::Exited(_, 0)) => Ok(()),
            other => Err(format!("forked child ended with {other:?}")),
        }
    }
}
