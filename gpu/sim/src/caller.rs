//! The side of the process that checkpoints another: finds the target's page, asks its thread, waits for the answer.

use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::PERSISTENCE_ENV;
use crate::code;
use crate::control::{self, Action, Fault};
use crate::page::{MAGIC, PAGE, PAIRS_MAX, Page, STEPS, Uuid, wake_signal};
use crate::target::custom::Piece;

const STEP: Duration = Duration::from_micros(200);
/// Index of the restore in [`STEPS`].
const RESTORE: usize = 2;

/// Whether this process has called `cuInit`.
pub(crate) static INITIALIZED: AtomicBool = AtomicBool::new(false);

/// A process whose page was found.
struct Target {
    pid: i32,
    page: usize,
    /// The restore thread, in this process's numbers.
    thread: i32,
}

/// The state of a process.
pub(crate) fn state(pid: i32) -> Result<u32, u32> {
    follow("state", pid, |_| {
        let target = find(pid)?;
        target.read_u32(std::mem::offset_of!(Page, state))
    })
}

/// The restore thread of a process.
pub(crate) fn restore_thread(pid: i32) -> Result<u32, u32> {
    follow("thread", pid, |_| find(pid).map(|target| target.thread.unsigned_abs()))
}

/// One step.
/// `custom`: the caller moves the memory itself.
pub(crate) fn step(step: usize, pid: i32, timeout_ms: u32, pairs: &[[Uuid; 2]], custom: bool) -> u32 {
    let result = follow(STEPS[step], pid, |action| {
        let initialized = INITIALIZED.load(Ordering::SeqCst) || std::env::var_os(PERSISTENCE_ENV).is_some();
        if step == RESTORE && !initialized {
            return Err(code::NOT_PERMITTED);
        }
        if pairs.len() > PAIRS_MAX {
            return Err(code::INVALID_VALUE);
        }
        match find(pid)?.ask(step, timeout_ms, pairs, custom, action)? {
            code::SUCCESS => Ok(0),
            code => Err(code),
        }
    });
    result.err().unwrap_or(code::SUCCESS)
}

/// The pieces of device memory that a process has left to the caller.
pub(crate) fn pieces(pid: i32) -> Result<Vec<Piece>, u32> {
    let target = find(pid)?;
    let count = target.read_u32(std::mem::offset_of!(Page, piece_count))? as usize;
    let at = usize::try_from(target.read_u64(std::mem::offset_of!(Page, pieces))?);
    let list = Target { page: at.map_err(|_| code::INVALID_VALUE)?, ..target };
    (0..count)
        .map(|index| {
            let mut bytes = [0; size_of::<Piece>()];
            list.read(index * size_of::<Piece>(), &mut bytes)?;
            // SAFETY: a structure of numbers, as the target wrote it.
            Ok(unsafe { std::mem::transmute::<[u8; size_of::<Piece>()], Piece>(bytes) })
        })
        .collect()
}

/// Does `work` as the control file says.
pub(crate) fn follow(
    call: &str,
    pid: i32,
    work: impl FnOnce(Action) -> Result<u32, u32>,
) -> Result<u32, u32> {
    match control::action(call, pid) {
        Action::Result(code) => Err(code),
        Action::Value(value) => Ok(value),
        Action::Hang => hang(),
        Action::Die => std::process::abort(),
        Action::ThenResult(code) => work(Action::Do).and(Err(code)),
        Action::ThenHang => {
            let _ = work(Action::Do);
            hang()
        }
        Action::ThenDie => {
            let _ = work(Action::Do);
            std::process::abort()
        }
        Action::Wait(ms) => {
            std::thread::sleep(Duration::from_millis(ms));
            work(Action::Do)
        }
        action => work(action),
    }
}

fn hang() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// How far from the library's load address the page lies; the same in every process that has this library.
fn page_offset() -> Option<usize> {
    let page = (&raw const PAGE).addr();
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    // The page may lie in memory that follows the file's mappings, so the last file below it counts.
    let files: Vec<(usize, &str)> = maps.lines().filter_map(file_of).collect();
    let (_, path) = files.iter().rfind(|(start, _)| *start <= page)?;
    let base = files.iter().find(|(_, other)| other == path)?.0;
    Some(page - base)
}

/// Start and file of a line of maps.
fn file_of(line: &str) -> Option<(usize, &str)> {
    let path = line.find('/').map(|at| &line[at..])?;
    Some((usize::from_str_radix(line.split('-').next()?, 16).ok()?, path))
}

fn find(pid: i32) -> Result<Target, u32> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|error| match error.kind() {
        std::io::ErrorKind::PermissionDenied => code::OPERATING_SYSTEM,
        _ => code::INVALID_VALUE,
    })?;
    // The real driver's answer about a process without CUDA has not been seen yet.
    let base = maps
        .lines()
        .filter_map(file_of)
        .find(|(_, path)| path.rsplit('/').next().unwrap_or_default().starts_with("libcuda.so"))
        .ok_or(code::INVALID_VALUE)?
        .0;
    let mut target = Target { pid, page: base + page_offset().ok_or(code::OPERATING_SYSTEM)?, thread: 0 };
    let magic = target.read_u64(std::mem::offset_of!(Page, magic))?;
    let owner = target.read_u32(std::mem::offset_of!(Page, owner))?.cast_signed();
    // A forked child has a copy of the page, but neither the number nor the thread.
    if magic != MAGIC || innermost(&format!("/proc/{pid}/status")) != Some(owner) {
        return Err(code::INVALID_VALUE);
    }
    let thread = target.read_u32(std::mem::offset_of!(Page, thread))?.cast_signed();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).map_err(|_| code::INVALID_VALUE)?;
    let found =
        tasks.flatten().find(|task| innermost(&task.path().join("status").to_string_lossy()) == Some(thread));
    let name = found.and_then(|task| task.file_name().to_str().and_then(|name| name.parse().ok()));
    target.thread = name.ok_or(code::INVALID_VALUE)?;
    Ok(target)
}

/// The number of a task in its own namespace.
fn innermost(status: &str) -> Option<i32> {
    let text = fs::read_to_string(status).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_whitespace().next_back()?.parse().ok()
}

impl Target {
    fn read(&self, offset: usize, out: &mut [u8]) -> Result<(), u32> {
        let local = libc::iovec { iov_base: out.as_mut_ptr().cast(), iov_len: out.len() };
        let remote = self.remote(offset, out.len());
        // SAFETY: the local vector is the borrowed buffer, the remote one names memory of another process.
        let got = unsafe { libc::process_vm_readv(self.pid, &raw const local, 1, &raw const remote, 1, 0) };
        self.whole(got, out.len())
    }

    fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), u32> {
        let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let remote = self.remote(offset, bytes.len());
        // SAFETY: as above; the local bytes are only read.
        let got = unsafe { libc::process_vm_writev(self.pid, &raw const local, 1, &raw const remote, 1, 0) };
        self.whole(got, bytes.len())
    }

    fn remote(&self, offset: usize, length: usize) -> libc::iovec {
        libc::iovec { iov_base: std::ptr::without_provenance_mut(self.page + offset), iov_len: length }
    }

    fn whole(&self, got: isize, wanted: usize) -> Result<(), u32> {
        if got.unsigned_abs() == wanted && got >= 0 {
            return Ok(());
        }
        match std::io::Error::last_os_error().raw_os_error() {
            Some(libc::EPERM) => Err(code::OPERATING_SYSTEM),
            _ => Err(code::INVALID_VALUE),
        }
    }

    fn read_u32(&self, offset: usize) -> Result<u32, u32> {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes).map(|()| u32::from_ne_bytes(bytes))
    }

    fn read_u64(&self, offset: usize) -> Result<u64, u32> {
        let mut bytes = [0; 8];
        self.read(offset, &mut bytes).map(|()| u64::from_ne_bytes(bytes))
    }

    /// One request at a time for each target, also among several callers.
    fn turn(&self) -> Result<UnixListener, u32> {
        let name = format!("rewarm-simulated-driver-{}", self.pid);
        let address = SocketAddr::from_abstract_name(name).map_err(|_| code::OPERATING_SYSTEM)?;
        loop {
            match UnixListener::bind_addr(&address) {
                Ok(turn) => return Ok(turn),
                Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => self.pause()?,
                Err(_) => return Err(code::OPERATING_SYSTEM),
            }
        }
    }

    /// Waits a little, unless the target has died.
    fn pause(&self) -> Result<(), u32> {
        std::thread::sleep(STEP);
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        match stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()) {
            None | Some('Z' | 'X') => Err(code::INVALID_VALUE),
            Some(_) => Ok(()),
        }
    }

    fn ask(
        &self,
        step: usize,
        timeout_ms: u32,
        pairs: &[[Uuid; 2]],
        custom: bool,
        action: Action,
    ) -> Result<u32, u32> {
        let _turn = self.turn()?;
        let (asked, done) = (std::mem::offset_of!(Page, asked), std::mem::offset_of!(Page, done));
        // A request whose caller died is finished first.
        while self.read_u64(asked)? != self.read_u64(done)? {
            self.pause()?;
        }
        let (fault, rate) = match action {
            Action::Inject(fault) => (fault, 0),
            Action::Rate(rate) => (Fault::None, rate),
            _ => (Fault::None, 0),
        };
        let step = u32::try_from(step).expect("one of five");
        let count = u32::try_from(pairs.len()).expect("at most 16");
        self.write(std::mem::offset_of!(Page, step), &step.to_ne_bytes())?;
        self.write(std::mem::offset_of!(Page, fault), &fault.number().to_ne_bytes())?;
        self.write(std::mem::offset_of!(Page, timeout_ms), &timeout_ms.to_ne_bytes())?;
        self.write(std::mem::offset_of!(Page, custom), &u32::from(custom).to_ne_bytes())?;
        self.write(std::mem::offset_of!(Page, rate), &rate.to_ne_bytes())?;
        self.write(std::mem::offset_of!(Page, pair_count), &count.to_ne_bytes())?;
        if !pairs.is_empty() {
            let bytes: Vec<u8> = pairs.iter().flatten().flatten().copied().collect();
            self.write(std::mem::offset_of!(Page, pairs), &bytes)?;
        }
        let number = self.read_u64(asked)? + 1;
        self.write(asked, &number.to_ne_bytes())?;
        // SAFETY: plain numbers. A thread that is gone shows in the wait below.
        unsafe { libc::syscall(libc::SYS_tgkill, self.pid, self.thread, wake_signal()) };
        while self.read_u64(done)? < number {
            self.pause()?;
        }
        self.read_u32(std::mem::offset_of!(Page, result))
    }
}
