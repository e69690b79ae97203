//! How fast memory is filled: the pager, lazily, eagerly and as device memory, against a bare loop of UFFDIO_COPY with as many threads.
//! Beside them what no restore from a folder does without: reading, verifying, making memory. From these follow the floors of
//! `docs/benchmarks.md`.
//!
//! `cargo bench -p rewarm-restore --bench fill -- [MIB [THREADS [ROUNDS]]]`. The arms alternate; those of the pager and the bare loop
//! fill the memory of a fresh process, from the same bytes in memory.

#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::fs::File;
use std::hint::black_box;
use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rewarm_criu::lazy_pages::{Listener, Message};
use rewarm_restore::pager::{
    self, AtFork, Command, Config, Device, Heard, Holder, Mapping, Mode, PAGE, Plan, Report, Run, Source,
    SourceError, Summary, Task, Tasks, WorkingSet,
};
use rewarm_store::Digest;
use rewarm_sys::fdpass;
use rewarm_sys::procmem;
use rewarm_sys::trial::Area;
use rewarm_sys::uffd::Uffd;

const ROLE: &str = "REWARM_FILL_SUBJECT";
const START: u64 = 0x1000_0000_0000;
const WARM: u64 = 0x2000_0000_0000;
const MADV_HUGEPAGE: i32 = 14;
const MADV_NOHUGEPAGE: i32 = 15;
/// Bytes of one read, and of one digest.
const CHUNK: usize = 1 << 20;
const HUGE: usize = 2 << 20;
const FINISHED: i32 = 0x5253_5446;
const LONG: Duration = Duration::from_secs(120);

fn main() {
    if let Ok(orders) = std::env::var(ROLE) {
        return subject(&orders);
    }
    let numbers: Vec<u64> = std::env::args().filter_map(|word| word.parse().ok()).collect();
    let mib = numbers.first().copied().unwrap_or(1024);
    let threads = numbers.get(1).map_or(2, |threads| *threads as usize);
    let rounds = numbers.get(2).copied().unwrap_or(5);
    let content: Arc<Vec<u8>> = Arc::new((0..mib << 20).map(|at| (at / 8 % 251) as u8 + 1).collect());
    let file = stored(&content);
    let arms: [(&str, &dyn Fn() -> Duration); 13] = [
        ("read from the page cache", &|| read(&file, content.len(), threads, |_| ())),
        ("verify (BLAKE3)", &|| verify(&content, threads)),
        ("read and verify, chunk by chunk", &|| read(&file, content.len(), threads, hash)),
        ("make memory, small pages", &|| make(content.len(), threads, MADV_NOHUGEPAGE)),
        ("make memory, huge pages", &|| make(content.len(), threads, MADV_HUGEPAGE)),
        ("bare UFFDIO_COPY, 1 MiB steps", &|| bare(&content, threads, 1 << 20)),
        ("pager lazily, chunks of 1 MiB", &|| paged(&content, threads, Mode::Lazy, 1 << 20, false)),
        ("pager lazily, chunks of 256 KiB", &|| paged(&content, threads, Mode::Lazy, 256 << 10, false)),
        ("write into huge pages, nothing else", &|| written(&content, threads)),
        ("pager, device memory, chunks of 1 MiB", &|| device(&content, threads, 1 << 20)),
        ("pager, device memory, chunks of 512 KiB", &|| device(&content, threads, 512 << 10)),
        ("pager eagerly, huge pages", &|| paged(&content, threads, Mode::Eager, 1 << 20, true)),
        ("pager eagerly, small pages", &|| paged(&content, threads, Mode::Eager, 1 << 20, false)),
    ];
    let mut times: Vec<Vec<Duration>> = arms.iter().map(|_| Vec::new()).collect();
    for _ in 0..rounds {
        for ((_, arm), times) in arms.iter().zip(&mut times) {
            warm(content.len());
            times.push(arm());
        }
    }
    println!("{mib} MiB, {threads} threads, {rounds} rounds");
    for ((name, _), times) in arms.iter().zip(&mut times) {
        times.sort();
        let (median, best) = (times[times.len() / 2], times[0]);
        let rate = |time: Duration| (mib << 20) as f64 / time.as_secs_f64() / 1e9;
        println!(
            "{name:40} median {median:>9.1?} {:5.2} GB/s   best {best:>9.1?} {:5.2} GB/s",
            rate(median),
            rate(best)
        );
    }
}

/// Takes memory in huge pages and gives it back: what the host of a virtual machine took meanwhile is there again, and no arm
/// is judged by what the one before it left.
fn warm(bytes: usize) {
    let area = Area::map(WARM as usize, bytes.next_multiple_of(2 << 20) / PAGE as usize).expect("memory");
    area.advise(MADV_HUGEPAGE).expect("huge pages");
    (0..area.pages()).for_each(|page| area.store(page, 0, 1));
    area.unmap().expect("mapped");
}

/// The content in a file that the page cache holds.
fn stored(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(content).expect("room");
    file
}

/// Each thread reads its share of the file into one chunk of memory, again and again, and hands it on.
fn read(file: &File, bytes: usize, threads: usize, seen: impl Fn(&[u8]) + Sync) -> Duration {
    let (begin, share) = (Instant::now(), bytes.div_ceil(threads).next_multiple_of(CHUNK));
    std::thread::scope(|scope| {
        for start in (0..bytes).step_by(share) {
            let seen = &seen;
            scope.spawn(move || {
                let mut chunk = vec![0; CHUNK];
                for at in (start..bytes.min(start + share)).step_by(CHUNK) {
                    let part = &mut chunk[..CHUNK.min(bytes - at)];
                    file.read_exact_at(part, at as u64).expect("all of it was written");
                    seen(part);
                }
            });
        }
    });
    begin.elapsed()
}

fn hash(chunk: &[u8]) {
    black_box(Digest::of(chunk));
}

fn verify(content: &[u8], threads: usize) -> Duration {
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for share in content.chunks(content.len().div_ceil(threads)) {
            scope.spawn(move || share.chunks(CHUNK).for_each(hash));
        }
    });
    begin.elapsed()
}

/// Touches each page of fresh memory once.
fn make(bytes: usize, threads: usize, advice: i32) -> Duration {
    let area = Area::map(WARM as usize, bytes.next_multiple_of(2 << 20) / PAGE as usize).expect("memory");
    area.advise(advice).expect("the kernel has huge pages");
    let (begin, share) = (Instant::now(), area.pages().div_ceil(threads));
    std::thread::scope(|scope| {
        for start in (0..area.pages()).step_by(share) {
            let area = &area;
            scope.spawn(move || {
                (start..area.pages().min(start + share)).for_each(|page| area.store(page, 0, 1))
            });
        }
    });
    let time = begin.elapsed();
    area.unmap().expect("mapped");
    time
}

/// A process with empty memory that plays CRIU's task and then waits for a word on its standard input.
fn subject(orders: &str) {
    let words: Vec<&str> = orders.splitn(3, ' ').collect();
    let (pages, huge, socket) = (words[0].parse().expect("pages"), words[1] == "huge", words[2]);
    let uffd = Uffd::create().expect("a userfaultfd");
    let area = Area::map(START as usize, pages).expect("memory");
    if huge {
        area.advise(MADV_HUGEPAGE).expect("huge pages");
    }
    let mut criu = UnixStream::connect(socket).expect("the pager listens");
    let pid = i32::try_from(std::process::id()).expect("pids are int");
    criu.write_all(&pid.to_le_bytes()).expect("said");
    fdpass::send(&criu, &[0], &[uffd.as_fd()]).expect("sent");
    area.register(&uffd).expect("registered");
    drop(uffd);
    criu.write_all(&FINISHED.to_le_bytes()).expect("said");
    std::io::stdin().read_line(&mut String::new()).expect("a word");
    for page in (0..pages).step_by(97) {
        let at = page as u64 * PAGE + 8;
        assert_eq!(area.load(page, 1).to_le_bytes(), [(at / 8 % 251) as u8 + 1; 8], "page {page}");
    }
    println!("right");
}

fn start(content: &[u8], huge: bool, work: &Path) -> Child {
    let socket = work.join("lazy-pages.socket");
    let pages = content.len() as u64 / PAGE;
    let orders = format!("{pages} {} {}", if huge { "huge" } else { "small" }, socket.display());
    let mut program = Program::new(std::env::current_exe().expect("a path"));
    program.env(ROLE, orders).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a subject")
}

fn check(mut subject: Child) {
    subject.stdin.take().expect("piped").write_all(b"\n").expect("said");
    let mut line = String::new();
    BufReader::new(subject.stdout.take().expect("piped")).read_line(&mut line).expect("an answer");
    assert_eq!(line, "right\n");
    subject.wait().expect("the end");
}

fn bare(content: &[u8], threads: usize, step: usize) -> Duration {
    let work = tempfile::tempdir().expect("a folder");
    let listener = Listener::bind(work.path()).expect("bound");
    let subject = start(content, false, work.path());
    let mut connection = listener.accept().expect("connected");
    let Message::Task { uffd, .. } = connection.message().expect("a task") else { panic!("no task") };
    let Message::Finished = connection.message().expect("the end") else { panic!("not finished") };
    let uffd = Uffd::from(uffd);
    let begin = Instant::now();
    let share = content.len().div_ceil(threads).next_multiple_of(step);
    std::thread::scope(|scope| {
        for (index, part) in content.chunks(share).enumerate() {
            let uffd = &uffd;
            scope.spawn(move || {
                for (number, bytes) in part.chunks(step).enumerate() {
                    let target = START + (index * share + number * step) as u64;
                    let mut done = 0;
                    while done < bytes.len() {
                        let progress = uffd.copy(target + done as u64, &bytes[done..]);
                        done += progress.bytes as usize;
                        assert!(matches!(progress.stopped, None | Some(Errno::EAGAIN)), "{progress:?}");
                    }
                }
            });
        }
    });
    let time = begin.elapsed();
    drop(uffd);
    check(subject);
    time
}

/// process_vm_writev into the untouched huge pages of another process, each thread its own half: what no fill of a stopped task
/// does without.
fn written(content: &[u8], threads: usize) -> Duration {
    let work = tempfile::tempdir().expect("a folder");
    let listener = Listener::bind(work.path()).expect("bound");
    let subject = start(content, true, work.path());
    let pid = i32::try_from(subject.id()).expect("pids are int");
    let mut connection = listener.accept().expect("connected");
    let Message::Task { uffd, .. } = connection.message().expect("a task") else { panic!("no task") };
    let Message::Finished = connection.message().expect("the end") else { panic!("not finished") };
    Uffd::from(uffd).unregister(START, content.len() as u64).expect("given back");
    let (begin, share) = (Instant::now(), content.len().div_ceil(threads).next_multiple_of(HUGE));
    std::thread::scope(|scope| {
        for (index, part) in content.chunks(share).enumerate() {
            scope.spawn(move || {
                for (number, bytes) in part.chunks(HUGE).enumerate() {
                    let target = START + (index * share + number * HUGE) as u64;
                    let written = procmem::write(pid, &[procmem::Piece { target, bytes }]).expect("written");
                    assert_eq!(written, bytes.len() as u64, "at {target:#x}");
                }
            });
        }
    });
    let time = begin.elapsed();
    check(subject);
    time
}

struct Memory {
    content: Arc<Vec<u8>>,
    chunk: u64,
}

impl Source for Memory {
    fn chunk(&self, _task: u32, offset: u64) -> Range<u64> {
        let start = offset / self.chunk * self.chunk;
        start..(start + self.chunk).min(self.content.len() as u64)
    }

    fn read(&self, _task: u32, chunk: Range<u64>, out: &mut dyn FnMut(&[u8])) -> Result<(), SourceError> {
        out(&self.content[chunk.start as usize..chunk.end as usize]);
        Ok(())
    }

    fn is_near(&self, _task: u32, _offset: u64) -> bool {
        true
    }
}

fn paged(content: &Arc<Vec<u8>>, threads: usize, mode: Mode, chunk: u64, huge: bool) -> Duration {
    let summary = filled(content, threads, mode, chunk, huge, false);
    Duration::from_micros(if mode == Mode::Eager { summary.eager_us } else { summary.present_us })
}

/// The driver's copies of device memory: taken out of the userfaultfd, then written while the tasks are stopped.
fn device(content: &Arc<Vec<u8>>, threads: usize, chunk: u64) -> Duration {
    Duration::from_micros(filled(content, threads, Mode::Lazy, chunk, true, true).device_us)
}

fn filled(
    content: &Arc<Vec<u8>>,
    threads: usize,
    mode: Mode,
    chunk: u64,
    huge: bool,
    device: bool,
) -> Summary {
    let work = tempfile::tempdir().expect("a folder");
    let listener = Listener::bind(work.path()).expect("bound");
    let subject = start(content, huge, work.path());
    let pid = i32::try_from(subject.id()).expect("pids are int");
    let bytes = content.len() as u64;
    let mapping = Mapping { start: START, end: START + bytes, writable: true, at_fork: AtFork::Copied };
    let run = [Run { vaddr: START, bytes, offset: 0 }];
    let whole = Arc::new(Plan::new(vec![mapping], &run, bytes).expect("a plan"));
    let nothing = Arc::new(Plan::new(vec![mapping], &[], 0).expect("a plan"));
    let pid_inside = subject.id();
    let (plan, devices) = match device {
        true => {
            let plan = whole;
            (nothing, vec![Device { pid: pid_inside, stream: pid_inside | 1 << 31, plan, zeros: Vec::new() }])
        }
        false => (whole, Vec::new()),
    };
    let config = Config {
        mode,
        threads,
        record: false,
        working_set: WorkingSet::default(),
        devices,
        shared: Vec::new(),
        tasks: Tasks::Numbers(vec![pid]),
        criu_within: LONG,
        chunk_within: LONG,
    };
    let source = Arc::new(Memory { content: Arc::clone(content), chunk });
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let task = Task { pid: pid_inside, plan };
    let pager = std::thread::spawn(move || pager::run(config, vec![task], source, listener, theirs));
    let mut holder = Holder::new(ours);
    let summary = loop {
        match holder.hear() {
            Heard::Report(Report::Finished) if mode == Mode::Eager => {
                kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("stopped");
                holder.tell(Command::Fill).expect("told");
            }
            Heard::Report(Report::Finished) if device => {
                kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("stopped");
                holder.tell(Command::Stopped).expect("told");
            }
            Heard::Report(_) => {}
            Heard::Done(summary) => break summary,
            Heard::Kill { chain } => panic!("{chain:?}, {:?}", PathBuf::from(work.path())),
        }
    };
    pager.join().expect("no panic").expect("filled");
    let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
    check(subject);
    summary
}
