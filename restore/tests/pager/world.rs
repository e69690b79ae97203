//! The shim's part: starts a subject and a pager, holds the duplicates, kills.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command as Program, ExitStatus, Stdio};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rewarm_criu::lazy_pages::Listener;
use rewarm_restore::pager::{
    self, Command, Config, Heard, Holder, Mode, Report, Summary, Task, Tasks, WorkingSet,
};
use rewarm_sys::guard::Guard;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::layout::{self, Shape};
use crate::source::{Fault, Made, Manner};
use crate::subject::{self, Orders};

/// Names the part that this program plays.
const ROLE: &str = "REWARM_PAGER_TEST_ROLE";

/// How long anything may take before a test gives up on it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Role {
    Subject(Orders),
    /// Fills its memory itself and waits to be dumped: the shape, and the folder for its words.
    Patient(Shape, PathBuf),
    /// Fills what CRIU restores from these images.
    Images(crate::images::Paging),
    Pager(Paging),
}

/// How a pager process works; its standard input is the socket to the shim.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Paging {
    work: PathBuf,
    shape: Shape,
    subject: i32,
    mode: Mode,
    threads: usize,
    record: bool,
    working_set: WorkingSet,
    manner: Manner,
    chunk_within_ms: u64,
}

pub(crate) fn role() -> Option<Role> {
    let text = std::env::var(ROLE).ok()?;
    Some(serde_json::from_str(&text).expect("a role is written by this program"))
}

pub(crate) fn play_role(role: Role) -> i32 {
    match role {
        Role::Subject(orders) => subject::play(&orders),
        Role::Patient(shape, folder) => subject::be_patient(shape, &folder),
        Role::Pager(paging) => status(page(paging)),
        Role::Images(paging) => status(crate::images::page(&paging)),
    }
}

fn status(paged: Result<Summary, pager::Error>) -> i32 {
    match paged {
        Ok(_) => 0,
        Err(error) => {
            eprintln!("pager ends: {error}");
            2
        }
    }
}

fn page(paging: Paging) -> Result<Summary, pager::Error> {
    let areas = layout::areas(paging.shape);
    let pid = paging.subject.unsigned_abs();
    // Without a pid namespace the subject has another number in each run.
    let mut working_set = paging.working_set;
    working_set.extents.iter_mut().for_each(|extent| extent.task = pid);
    let listener = Listener::bind(&paging.work).expect("the work directory is there");
    let control = control();
    let _guard = Guard::start(&[control.as_fd()]).expect("a guard");
    let bytes = layout::stream_pages(&areas) * pager::PAGE;
    let source = Made { seed: paging.shape.seed, bytes, manner: paging.manner, reads: AtomicU64::new(0) };
    let config = Config {
        mode: paging.mode,
        threads: paging.threads,
        record: paging.record,
        working_set,
        devices: Vec::new(),
        shared: Vec::new(),
        tasks: Tasks::Numbers(vec![paging.subject]),
        criu_within: PATIENCE,
        chunk_within: Duration::from_millis(paging.chunk_within_ms),
    };
    let task = Task { pid, plan: Arc::new(layout::plan(&areas)) };
    pager::run(config, vec![task], Arc::new(source), listener, control)
}

/// A pager's socket to the shim: its standard input.
pub(crate) fn control() -> UnixStream {
    let input = std::io::stdin().lock();
    input.as_fd().try_clone_to_owned().expect("a descriptor").into()
}

/// What is tried.
#[derive(Debug, Clone)]
pub(crate) struct Scene {
    pub(crate) shape: Shape,
    pub(crate) threads: u64,
    pub(crate) operations: u64,
    pub(crate) touch_first: u64,
    pub(crate) touch_last: u64,
    pub(crate) protected: u64,
    pub(crate) mode: Mode,
    /// The subject is stopped before its first touch.
    pub(crate) stop: bool,
    pub(crate) record: bool,
    pub(crate) working_set: WorkingSet,
    pub(crate) manner: Manner,
    pub(crate) chunk_within_ms: u64,
}

impl Scene {
    /// A subject with some megabytes and a source that answers at once.
    pub(crate) fn new(seed: u64) -> Scene {
        Scene {
            shape: Shape { seed, areas: 4, pages: 700, dense: false },
            threads: 2,
            operations: 1500,
            touch_first: 0,
            touch_last: 0,
            protected: 0,
            mode: Mode::Lazy,
            stop: false,
            record: false,
            working_set: WorkingSet::default(),
            manner: Manner { chunk: 256 << 10, delay_us: 0, near: false, fault: Fault::None },
            chunk_within_ms: 30_000,
        }
    }
}

/// The processes of a scene, all ended when dropped.
pub(crate) struct World {
    pub(crate) subject: Child,
    pub(crate) pager: Child,
    pub(crate) holder: Option<Holder>,
    input: Option<std::process::ChildStdin>,
    output: BufReader<std::process::ChildStdout>,
    tasks: Tasks,
    _work: TempDir,
}

impl Drop for World {
    fn drop(&mut self) {
        self.tasks.kill();
        drop(self.holder.take());
        let _ = self.subject.wait();
        if wait(&mut self.pager, Duration::from_secs(10)).is_none() {
            let _ = self.pager.kill();
            let _ = self.pager.wait();
        }
    }
}

impl World {
    pub(crate) fn start(scene: &Scene) -> World {
        let work = tempfile::tempdir().expect("a folder");
        let orders = Orders {
            shape: scene.shape,
            socket: work.path().join("lazy-pages.socket"),
            threads: scene.threads,
            operations: scene.operations,
            stop: scene.stop,
            touch_first: scene.touch_first,
            touch_last: scene.touch_last,
            protected: scene.protected,
        };
        let mut program = this_program(&Role::Subject(orders));
        let mut subject = program.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a subject");
        let pid = i32::try_from(subject.id()).expect("pids are int");
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let paging = Paging {
            work: work.path().to_owned(),
            shape: scene.shape,
            subject: pid,
            mode: scene.mode,
            threads: 2,
            record: scene.record,
            working_set: scene.working_set.clone(),
            manner: scene.manner,
            chunk_within_ms: scene.chunk_within_ms,
        };
        let control = Stdio::from(OwnedFd::from(theirs));
        let pager = this_program(&Role::Pager(paging)).stdin(control).spawn().expect("a pager");
        let (input, output) = (subject.stdin.take(), subject.stdout.take().expect("piped"));
        World {
            subject,
            pager,
            holder: Some(Holder::new(ours)),
            input,
            output: BufReader::new(output),
            tasks: Tasks::Numbers(vec![pid]),
            _work: work,
        }
    }

    pub(crate) fn hear(&mut self) -> Heard {
        self.holder.as_mut().expect("still held").hear()
    }

    pub(crate) fn tell(&self, command: Command) {
        self.holder.as_ref().expect("still held").tell(command).expect("the pager listens");
    }

    /// Hears what the pager has to say until it is over, and does what the shim does.
    pub(crate) fn hear_all(&mut self) -> Heard {
        loop {
            match self.hear() {
                Heard::Report(_) => {}
                Heard::Done(summary) => return Heard::Done(summary),
                Heard::Kill { chain } => {
                    assert!(self.tasks.kill().is_empty(), "tasks outlive SIGKILL");
                    drop(self.holder.take());
                    return Heard::Kill { chain };
                }
            }
        }
    }

    /// Hears until a report that `wanted` accepts.
    pub(crate) fn hear_until(&mut self, wanted: impl Fn(&Report) -> bool) -> Report {
        loop {
            match self.hear() {
                Heard::Report(report) if wanted(&report) => return report,
                Heard::Report(_) => {}
                other => panic!("{other:?} is not what was waited for"),
            }
        }
    }

    /// The subject's next line.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("the subject's output");
        line.trim_end().to_owned()
    }

    /// Lets a subject go on that waits before or after its first touches.
    pub(crate) fn go_on(&mut self) {
        let input = self.input.as_mut().expect("piped");
        input.write_all(b"\n").expect("the subject listens");
    }

    pub(crate) fn end_of_subject(&mut self) -> ExitStatus {
        wait(&mut self.subject, PATIENCE).expect("the subject ends in time")
    }

    pub(crate) fn end_of_pager(&mut self) -> ExitStatus {
        wait(&mut self.pager, PATIENCE).expect("the pager ends in time")
    }

    /// Waits until the subject has stopped itself.
    pub(crate) fn wait_stopped(&self) {
        let deadline = Instant::now() + PATIENCE;
        let path = format!("/proc/{}/stat", self.subject.id());
        while !std::fs::read_to_string(&path).expect("the subject lives").contains(") T ") {
            assert!(Instant::now() < deadline, "the subject does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn signal(pid: u32, signal: Signal) {
        let _ = kill(Pid::from_raw(i32::try_from(pid).expect("pids are int")), signal);
    }
}

pub(crate) fn this_program(role: &Role) -> Program {
    let mut program = Program::new(std::env::current_exe().expect("this program has a path"));
    program.env(ROLE, serde_json::to_string(role).expect("roles are plain"));
    program
}

/// Waits for a child with a deadline.
pub(crate) fn wait(child: &mut Child, within: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + within;
    loop {
        if let Some(status) = child.try_wait().expect("a child of ours") {
            return Some(status);
        }
        if Instant::now() > deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A seed for this run: from the environment to repeat one, else new; printed by whoever fails.
#[expect(clippy::disallowed_methods, reason = "a seed that no run had before")]
pub(crate) fn seed() -> u64 {
    static LAST: Mutex<u64> = Mutex::new(0);
    let mut last = LAST.lock().expect("nobody panics here");
    let given = std::env::var("REWARM_SEED").ok().and_then(|text| text.parse().ok());
    let now = || {
        std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(1, |time| time.as_nanos() as u64)
    };
    *last = if *last == 0 { given.unwrap_or_else(now) } else { *last + 1 };
    *last
}
