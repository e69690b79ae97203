//! The helper process: the only one of ours that loads the driver.
//!
//! It lives long, because each new process that attaches to the driver pays for it (seconds on large machines), and it is
//! a process, because a call may hang or crash. It initialises the driver once, when it is first needed, makes no context and so
//! holds no device memory. It does one thing after another; who wants a call that hangs to end kills it.
//!
//! It ends when its socket is closed, also while a call hangs.

use std::cell::OnceCell;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::custom::{Custom, Part};
use crate::driver::{Code, Driver, DriverError};
use crate::nvml;
use crate::wire::{self, Answer, Call, PAIRS_MAX};

/// The number under which the helper finds its socket.
pub const SOCKET_FD: i32 = 3;

/// Serves until the socket is closed and gives the exit code. Call it first thing in the process; `library` is the driver's
/// library, `nvml` that of NVML.
#[must_use]
pub fn main(library: &Path, nvml: &Path) -> u8 {
    let socket = match rewarm_sys::process::take_inherited(SOCKET_FD) {
        Ok(socket) => UnixStream::from(socket),
        Err(error) => {
            tracing::error!(%error, "no socket under descriptor {SOCKET_FD}; a shim starts this program");
            return 2;
        }
    };
    match end_with(&socket).and_then(|()| serve(&socket, library, nvml)) {
        Ok(()) => 0,
        Err(error) => {
            tracing::error!(%error, "the helper failed");
            1
        }
    }
}

/// Ends this process when the other end of the socket is closed, whatever the driver is doing.
fn end_with(socket: &UnixStream) -> io::Result<()> {
    let socket = socket.try_clone()?;
    let watch = move || {
        loop {
            // A hang-up is always told.
            let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => end_now(),
                Err(nix::errno::Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    };
    std::thread::Builder::new().name("lease".into()).spawn(watch).map(drop)
}

/// Without running the driver's handlers for a process's end: they would wait for the call that hangs.
fn end_now() {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
}

fn serve(socket: &UnixStream, library: &Path, nvml: &Path) -> io::Result<()> {
    let driver = Driver::load(library);
    if let Err(error) = &driver {
        tracing::info!(%error, "no driver");
    }
    let (attached, mut opened) = (OnceCell::new(), None);
    while let Some(call) = wire::receive::<Call>(socket)? {
        let fd = match call {
            Call::Store { .. } | Call::Load { .. } => Some(File::from(wire::receive_fd(socket)?)),
            _ => None,
        };
        let answer = match call {
            Call::Machine => machine(&mut opened, nvml),
            _ => answer(&driver, &attached, &call, fd.as_ref()),
        };
        wire::send(socket, &answer)?;
    }
    Ok(())
}

/// What NVML tells. One that refused is opened anew the next time.
fn machine(opened: &mut Option<nvml::Open>, library: &Path) -> Answer {
    let open = match opened.take() {
        Some(open) => Ok(open),
        None => nvml::Open::new(library),
    };
    match open.and_then(|open| Ok((open.look()?, open))) {
        Ok((machine, open)) => {
            *opened = Some(open);
            Answer::Machine(machine)
        }
        Err(silent) => Answer::Unable(silent.to_string()),
    }
}

/// `attached` keeps what the first attempt to attach said.
fn answer(
    driver: &Result<Driver, DriverError>,
    attached: &OnceCell<Result<(), String>>,
    call: &Call,
    fd: Option<&File>,
) -> Answer {
    if matches!(call, Call::Hello { .. }) {
        let driver = driver.as_ref().map(Driver::version).map_err(ToString::to_string);
        return Answer::Hello { version: wire::VERSION, driver };
    }
    let driver = match driver {
        Ok(driver) => driver,
        Err(error) => return Answer::Unable(error.to_string()),
    };
    match attached.get_or_init(|| driver.init().map_err(|error| error.to_string())) {
        Ok(()) => match fd {
            Some(fd) => past_the_process(driver, call, fd),
            None => with_driver(driver, call),
        },
        Err(error) => Answer::Unable(error.clone()),
    }
}

/// A checkpoint or a restore in which device memory goes to or comes from a descriptor.
fn past_the_process(driver: &Driver, call: &Call, fd: &File) -> Answer {
    let began = Instant::now();
    let micros = || u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
    let devices = match driver.devices() {
        Ok(devices) => devices,
        Err(error) => return Answer::Unable(error.to_string()),
    };
    let result = Custom::of(driver).and_then(|custom| match call {
        Call::Store { pid, offset } => {
            let parts = custom.store(&devices, *pid, fd, *offset)?;
            Ok(Answer::Stored { micros: micros(), parts })
        }
        Call::Load { pairs, .. } if pairs.len() > PAIRS_MAX => {
            Ok(Answer::Unable(format!("a map of {} GPUs, at most {PAIRS_MAX}", pairs.len())))
        }
        Call::Load { pid, parts, file: true, pairs } => {
            let from = Parts { file: fd, parts: parts.clone() };
            custom.load(&devices, *pid, from, parts, pairs)?;
            Ok(Answer::Done { micros: micros() })
        }
        Call::Load { pid, parts, file: false, pairs } => {
            custom.load(&devices, *pid, fd, parts, pairs)?;
            Ok(Answer::Done { micros: micros() })
        }
        _ => unreachable!("only these come with a descriptor"),
    });
    result.unwrap_or_else(|error| Answer::Unable(error.to_string()))
}

/// Parts of a file, read one behind the other.
struct Parts<'a> {
    file: &'a File,
    parts: Vec<Part>,
}

impl Read for Parts<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.parts.retain(|part| part.bytes > 0);
        let Some(part) = self.parts.first_mut() else { return Ok(0) };
        let wanted = usize::try_from(part.bytes).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.file.read_at(&mut buffer[..wanted], part.offset)?;
        part.offset += count as u64;
        part.bytes -= count as u64;
        Ok(count)
    }
}

fn with_driver(driver: &Driver, call: &Call) -> Answer {
    match call {
        Call::Hello { .. } | Call::Machine | Call::Store { .. } | Call::Load { .. } => {
            unreachable!("answered by the caller")
        }
        Call::Attach => Answer::Done { micros: 0 },
        Call::Devices => match driver.devices() {
            Ok(devices) => Answer::Devices(devices),
            Err(error) => Answer::Unable(error.to_string()),
        },
        Call::State { pid } => driver.state(*pid).map_or_else(Answer::Refused, Answer::State),
        Call::RestoreThread { pid } => {
            driver.restore_thread(*pid).map_or_else(Answer::Refused, Answer::RestoreThread)
        }
        Call::Step { pairs, .. } if pairs.len() > PAIRS_MAX => {
            Answer::Unable(format!("a map of {} GPUs, at most {PAIRS_MAX}", pairs.len()))
        }
        Call::Step { pairs, .. } if !pairs.is_empty() && driver.version() < crate::driver::VERSION_MAP => {
            let (found, needed) = (driver.version(), crate::driver::VERSION_MAP);
            Answer::Unable(format!(
                "a restore onto other GPUs needs CUDA {needed} (R580), the driver has {found}"
            ))
        }
        Call::Step { step, pid, lock_timeout_ms, pairs } => {
            let began = Instant::now();
            match driver.step(*step, *pid, Duration::from_millis(*lock_timeout_ms), pairs) {
                Ok(()) => {
                    Answer::Done { micros: u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX) }
                }
                Err(code @ Code::SUCCESS) => Answer::Unable(format!("the driver failed with {code}")),
                Err(code) => Answer::Refused(code),
            }
        }
    }
}
