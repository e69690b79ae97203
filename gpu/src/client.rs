//! The owner's side of a helper: starts it, asks it, and kills and replaces it when a call passes its deadline.
//!
//! After a call that was lost or late nobody knows what the driver did: the caller reads the state and never repeats blindly.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rewarm_sys::pidfd::PidFd;

use crate::custom::Part;
use crate::driver::{Code, Version};
use crate::helper::SOCKET_FD;
use crate::nvml::Machine;
use crate::states::{State, Step};
use crate::topology::{Device, Pair};
use crate::wire::{self, Answer, Call};

/// How long the helper may take to attach to the driver.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// How long a question may take that moves no memory.
const QUESTION_DEADLINE: Duration = Duration::from_secs(10);
/// What a lock may take beyond its own time, and a step that moves memory beyond that of its bytes.
const STEP_GRACE: Duration = Duration::from_secs(30);
/// The slowest that memory is moved before a call counts as hanging, in bytes a second.
const BYTES_PER_SECOND_MIN: u64 = 250 << 20;

/// How a helper is started.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Environment beside this process's own.
    pub env: Vec<(OsString, OsString)>,
}

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The helper cannot be started.
    #[error("the GPU helper {program} cannot be started", program = program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is no driver that could be asked.
    #[error("{reason}")]
    NoDriver {
        /// What the helper found.
        reason: String,
    },
    /// The driver refused.
    #[error("{call}: the driver says {code}")]
    Refused {
        /// What was asked.
        call: Call,
        /// The driver's result.
        code: Code,
    },
    /// The helper refused.
    #[error("{call}: {reason}")]
    Unable {
        /// What was asked.
        call: Call,
        /// Why.
        reason: String,
    },
    /// The helper died in the call; what the driver did is unknown.
    #[error("{call}: the GPU helper ended during the call")]
    Lost {
        /// What was asked.
        call: Call,
        /// What the socket said.
        source: io::Error,
    },
    /// The call passed its deadline and the helper was killed; what the driver did is unknown.
    #[error("{call}: no answer within {seconds} s, so the GPU helper was killed")]
    Late {
        /// What was asked.
        call: Call,
        /// The deadline.
        seconds: u64,
    },
    /// The program was replaced by one of another version while its owner ran.
    #[error(
        "the GPU helper speaks version {helper} of its protocol, and {} is needed: the program was replaced meanwhile",
        wire::VERSION
    )]
    Version {
        /// The helper's version.
        helper: u32,
    },
    /// The helper is another program than it should be.
    #[error("{call}: the GPU helper answered {seen}")]
    Protocol {
        /// What was asked.
        call: Call,
        /// What came.
        seen: String,
    },
}

impl CallError {
    /// Whether nobody knows what the driver did.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::Lost { .. } | Self::Late { .. } | Self::Protocol { .. })
    }

    /// The driver's result, where it gave one.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }
}

/// Where device memory was kept past the process.
#[derive(Debug, Clone, Copy)]
pub enum Kept<'a> {
    /// In a file, each part at its offset.
    File(BorrowedFd<'a>),
    /// It comes through a socket, one part behind the other.
    Stream {
        /// The socket.
        socket: BorrowedFd<'a>,
        /// How long the other end may take beside the moving.
        patience: Duration,
    },
}

/// A helper, started when it is first needed and again after it was killed.
#[derive(Debug)]
pub struct Helper {
    launch: Launch,
    running: Option<Running>,
    /// What overrides the deadline of each call.
    deadline: Option<Duration>,
    /// Processes whose last restore was refused for lack of device memory. Some drivers never restore such a one again, and the
    /// state that they tell does not show it.
    short: BTreeSet<i32>,
    /// The driver was asked to restore a process, whatever came of it.
    has_restored: bool,
}

#[derive(Debug)]
struct Running {
    socket: UnixStream,
    process: PidFd,
    child: Child,
    driver: Result<Version, String>,
    attached: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Gone already is as good. Whoever reaps orphans in this process may have been faster, too.
        let _ = self.process.signal(Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

impl Helper {
    /// A helper that is not started yet.
    #[must_use]
    pub fn new(launch: Launch) -> Self {
        Self { launch, running: None, deadline: None, short: BTreeSet::new(), has_restored: false }
    }

    /// The same with one deadline for all calls.
    #[must_use]
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline: Some(deadline), ..self }
    }

    /// Starts it if it does not run, and gives the driver's version, without attaching to the driver.
    ///
    /// # Errors
    /// If it cannot be started or finds no driver.
    pub fn version(&mut self) -> Result<Version, CallError> {
        self.running()?.driver.clone().map_err(|reason| CallError::NoDriver { reason })
    }

    /// Starts it if it does not run, attaches to the driver, and gives its version. The first time takes up to seconds.
    ///
    /// # Errors
    /// If it cannot be started, finds no driver, or the driver no device.
    pub fn start(&mut self) -> Result<Version, CallError> {
        let version = self.version()?;
        if !self.running()?.attached {
            match self.exchange(Call::Attach, START_DEADLINE) {
                Ok(Answer::Done { .. }) => self.running()?.attached = true,
                Ok(other) => return self.unexpected(Call::Attach, &other),
                Err(CallError::Unable { reason, .. }) => {
                    // What failed to initialise in a process does so for all of its life; another one may find the driver well.
                    self.running = None;
                    return Err(CallError::NoDriver { reason });
                }
                Err(error) => return Err(error),
            }
        }
        Ok(version)
    }

    fn running(&mut self) -> Result<&mut Running, CallError> {
        if self.running.is_none() {
            self.running = Some(self.spawn()?);
        }
        Ok(self.running.as_mut().expect("just started"))
    }

    /// Its process number, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.running.as_ref().map(|running| running.child.id())
    }

    fn spawn(&self) -> Result<Running, CallError> {
        let program = self.launch.program.clone();
        let failed = |source| CallError::Start { program: program.clone(), source };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let mut command = Command::new(&self.launch.program);
        command.args(&self.launch.args).envs(self.launch.env.iter().cloned());
        command.current_dir("/").stdin(Stdio::null());
        rewarm_sys::process::inherit(&mut command, vec![(theirs.into(), SOCKET_FD)]).map_err(failed)?;
        let child = command.spawn().map_err(failed)?;
        drop(command);
        let process = PidFd::open(child.id()).map_err(failed)?;
        let driver = Err(String::new());
        let mut running = Running { socket: ours, process, child, driver, attached: false };
        let call = Call::Hello { version: wire::VERSION };
        match running.ask(&call, None, START_DEADLINE)? {
            Answer::Hello { version: wire::VERSION, driver } => {
                running.driver = driver;
                Ok(running)
            }
            Answer::Hello { version, .. } => Err(CallError::Version { helper: version }),
            other => Err(CallError::Protocol { call, seen: format!("{other:?}") }),
        }
    }

    fn ask(&mut self, call: Call, deadline: Duration) -> Result<Answer, CallError> {
        self.start()?;
        self.exchange(call, deadline)
    }

    /// A call in which the driver maps the process's device memory into the helper. If it fails the mapping ends with the helper:
    /// nothing else gives that memory back.
    fn past_the_process(
        &mut self,
        call: Call,
        fd: BorrowedFd<'_>,
        deadline: Duration,
    ) -> Result<Answer, CallError> {
        self.start()?;
        self.exchange_with(call, Some(fd), deadline).inspect_err(|_| self.running = None)
    }

    /// One call of a helper that need not be attached.
    fn exchange(&mut self, call: Call, deadline: Duration) -> Result<Answer, CallError> {
        self.exchange_with(call, None, deadline)
    }

    fn exchange_with(
        &mut self,
        call: Call,
        fd: Option<BorrowedFd<'_>>,
        deadline: Duration,
    ) -> Result<Answer, CallError> {
        let deadline = self.deadline.unwrap_or(deadline);
        let result = self.running()?.ask(&call, fd, deadline);
        match result {
            Ok(Answer::Refused(code)) => Err(CallError::Refused { call, code }),
            Ok(Answer::Unable(reason)) => Err(CallError::Unable { call, reason }),
            Ok(answer) => Ok(answer),
            Err(error) => {
                // Kills it: an answer that comes late must not be taken for that of the next call.
                self.running = None;
                Err(error)
            }
        }
    }

    fn unexpected<T>(&mut self, call: Call, seen: &Answer) -> Result<T, CallError> {
        self.running = None;
        Err(CallError::Protocol { call, seen: format!("{seen:?}") })
    }

    /// The devices that the driver shows.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn devices(&mut self) -> Result<Vec<Device>, CallError> {
        match self.ask(Call::Devices, QUESTION_DEADLINE)? {
            Answer::Devices(devices) => Ok(devices),
            other => self.unexpected(Call::Devices, &other),
        }
    }

    /// What NVML tells; none where there is no NVML that could be asked.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn machine(&mut self) -> Result<Option<Machine>, CallError> {
        match self.exchange(Call::Machine, QUESTION_DEADLINE) {
            Ok(Answer::Machine(machine)) => Ok(Some(machine)),
            Ok(other) => self.unexpected(Call::Machine, &other),
            Err(CallError::Unable { reason, .. }) => {
                tracing::info!(reason, "NVML tells nothing");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The state of a process.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn state(&mut self, pid: i32) -> Result<State, CallError> {
        let call = Call::State { pid };
        match self.ask(call.clone(), QUESTION_DEADLINE)? {
            Answer::State(state) => Ok(state),
            other => self.unexpected(call, &other),
        }
    }

    /// The thread of a process that carries out restores; none where the process does not use CUDA.
    ///
    /// # Errors
    /// [`CallError`]; the driver's refusal is not one, since it is how the driver says that there is no CUDA. Lacking
    /// rights are, or a process that uses CUDA could be overlooked.
    pub fn restore_thread(&mut self, pid: i32) -> Result<Option<i32>, CallError> {
        let call = Call::RestoreThread { pid };
        match self.ask(call.clone(), QUESTION_DEADLINE) {
            Ok(Answer::RestoreThread(thread)) => Ok(Some(thread)),
            Ok(other) => self.unexpected(call, &other),
            Err(CallError::Refused { code, .. }) if code != Code::OPERATING_SYSTEM => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits, at most for `timeout`, until what a process has submitted is finished, and blocks its further calls.
    ///
    /// # Errors
    /// [`CallError`]; with `NOT_READY` the process goes on.
    pub fn lock(&mut self, pid: i32, timeout: Duration) -> Result<Duration, CallError> {
        let lock_timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let call = Call::Step { step: Step::Lock, pid, lock_timeout_ms, pairs: Vec::new() };
        self.step(call, timeout + STEP_GRACE)
    }

    /// Moves the device memory of a locked process into its host memory. `bytes`: how much at most, for the deadline.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn checkpoint(&mut self, pid: i32, bytes: u64) -> Result<Duration, CallError> {
        let call = Call::Step { step: Step::Checkpoint, pid, lock_timeout_ms: 0, pairs: Vec::new() };
        // What is checkpointed anew was restored meanwhile, or is another process with that number.
        let took = self.step(call, moving(bytes))?;
        self.short.remove(&pid);
        Ok(took)
    }

    /// Moves it back. `pairs` is empty where every device stays.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn restore(&mut self, pid: i32, bytes: u64, pairs: &[Pair]) -> Result<Duration, CallError> {
        let call = Call::Step { step: Step::Restore, pid, lock_timeout_ms: 0, pairs: pairs.to_vec() };
        self.has_restored = true;
        let result = self.step(call, moving(bytes));
        if result.is_ok() {
            self.short.remove(&pid);
        } else if result.as_ref().is_err_and(|error| error.code() == Some(Code::OUT_OF_MEMORY)) {
            self.short.insert(pid);
        }
        result
    }

    /// Whether the last restore of a process was refused for lack of device memory.
    #[must_use]
    pub fn was_short(&self, pid: i32) -> bool {
        self.short.contains(&pid)
    }

    /// Whether the driver was ever asked to restore a process, by this helper or one in whose place it is.
    #[must_use]
    pub fn has_restored(&self) -> bool {
        self.has_restored
    }

    /// Checkpoints a locked process and writes its device memory to `file` from `offset` on, so that its own memory does not
    /// grow. `bytes`: how much at most, for the deadline.
    ///
    /// # Errors
    /// [`CallError`]; the process may then be in a state from which nothing leads back.
    pub fn store(
        &mut self,
        pid: i32,
        bytes: u64,
        file: BorrowedFd<'_>,
        offset: u64,
    ) -> Result<(Duration, Vec<Part>), CallError> {
        let call = Call::Store { pid, offset };
        match self.past_the_process(call.clone(), file, moving(bytes))? {
            Answer::Stored { micros, parts } => Ok((Duration::from_micros(micros), parts)),
            other => self.unexpected(call, &other),
        }
    }

    /// Restores a process of whose device memory `parts` were kept, in the order of a stream.
    ///
    /// # Errors
    /// [`CallError`]; the process may then be in a state from which nothing leads back.
    pub fn load(
        &mut self,
        pid: i32,
        parts: &[Part],
        from: Kept<'_>,
        pairs: &[Pair],
    ) -> Result<Duration, CallError> {
        let (fd, file, patience) = match from {
            Kept::File(fd) => (fd, true, Duration::ZERO),
            Kept::Stream { socket, patience } => (socket, false, patience),
        };
        let bytes = parts.iter().map(|part| part.bytes).sum();
        let call = Call::Load { pid, parts: parts.to_vec(), file, pairs: pairs.to_vec() };
        self.has_restored = true;
        match self.past_the_process(call.clone(), fd, moving(bytes) + patience)? {
            Answer::Done { micros } => Ok(Duration::from_micros(micros)),
            other => self.unexpected(call, &other),
        }
    }

    /// Lets the calls of a locked process go on.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn unlock(&mut self, pid: i32) -> Result<Duration, CallError> {
        let call = Call::Step { step: Step::Unlock, pid, lock_timeout_ms: 0, pairs: Vec::new() };
        self.step(call, STEP_GRACE)
    }

    fn step(&mut self, call: Call, deadline: Duration) -> Result<Duration, CallError> {
        match self.ask(call.clone(), deadline)? {
            Answer::Done { micros } => Ok(Duration::from_micros(micros)),
            other => self.unexpected(call, &other),
        }
    }
}

fn moving(bytes: u64) -> Duration {
    STEP_GRACE + Duration::from_secs(bytes / BYTES_PER_SECOND_MIN)
}

impl Running {
    fn ask(&mut self, call: &Call, fd: Option<BorrowedFd<'_>>, limit: Duration) -> Result<Answer, CallError> {
        let lost = |source| CallError::Lost { call: call.clone(), source };
        wire::send(&self.socket, call).map_err(lost)?;
        if let Some(fd) = fd {
            wire::send_fd(&self.socket, fd).map_err(lost)?;
        }
        let answer = wire::receive(Until { socket: &self.socket, deadline: Instant::now() + limit });
        match answer {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(lost(io::ErrorKind::UnexpectedEof.into())),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                Err(CallError::Late { call: call.clone(), seconds: limit.as_secs() })
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Err(CallError::Protocol { call: call.clone(), seen: error.to_string() })
            }
            Err(error) => Err(lost(error)),
        }
    }
}

/// Reads from a socket until a moment.
struct Until<'a> {
    socket: &'a UnixStream,
    deadline: Instant,
}

impl Read for Until<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.socket.set_read_timeout(Some(left))?;
        let mut socket = self.socket;
        socket.read(buffer).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => error,
        })
    }
}
