//! The command's side of a shim.
//!
//! All calls block; an async caller wraps them in `spawn_blocking`. Calls that belong to the lease (prepare, start,
//! restore, commit, dump, freeze, thaw, stop, kill) use the client's own connection one after another; dial, exec, wait, status and
//! the giving up of a dump open a connection of their own and may be made at any time, also while a dump runs.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use rewarm_gpu::carried::Carried;
use rewarm_probe::Resume;

use crate::error::{Context, Error};
use crate::record::{Exit, Record};
use crate::shim::protocol::{
    self, DumpRequest, ExecOutput, ExecRequest, Paused, Prepare, Prepared, Reply, Request, RestoreRequest,
    Woken,
};
use crate::shim::{LEASE_FD, LOCK_FD, Paths};
use crate::spec::Name;
use crate::state::{Claim, State};

/// A connection to the shim of one replica. Dropping it gives up its lease.
#[derive(Debug)]
pub struct Client {
    name: Name,
    paths: Paths,
    pid: u32,
    connection: Mutex<UnixStream>,
}

impl Client {
    /// Starts the shim of a claimed name: `PROGRAM shim --state DIR --name NAME`. This client holds the lease: until
    /// [`Client::commit`] its end is the end of the replica.
    ///
    /// # Errors
    /// If the program cannot be started or does not speak this protocol.
    pub fn spawn(claim: Claim, program: &Path) -> Result<Self, Error> {
        let paths = claim.paths().clone();
        let name = claim.name().clone();
        let (ours, theirs) = UnixStream::pair().context("make", "a socket pair for the shim")?;
        let log_path = paths.shim_log();
        let log = std::fs::File::create(&log_path).context("create", log_path.display())?;
        let second = log.try_clone().context("duplicate", log_path.display())?;
        let mut command = Command::new(program);
        command.arg("shim").arg("--state").arg(claim.state_dir()).args(["--name", name.as_str()]);
        command.current_dir("/").stdin(Stdio::null()).stdout(log).stderr(second);
        let lock = claim.lock_fd().try_clone_to_owned().context("duplicate", "the lock file")?;
        rewarm_sys::process::inherit(&mut command, vec![(lock, LOCK_FD), (theirs.into(), LEASE_FD)])
            .context("prepare", "the shim's descriptors")?;
        rewarm_sys::process::new_session(&mut command);
        let mut child = command.spawn().context("start", program.display())?;
        drop(command);
        // The shim outlives us as a rule. Where it does not, it must not stay a zombie.
        std::thread::spawn(move || child.wait());
        claim.hand_over();
        Self::over(ours, name, paths)
    }

    /// Connects to the shim of a replica that exists.
    ///
    /// # Errors
    /// `UnknownName`, or `NotRunning` if its server has ended.
    pub fn connect(state: &State, name: &Name) -> Result<Self, Error> {
        let paths = state.paths(name);
        match open(&paths) {
            Ok(connection) => Self::over(connection, name.clone(), paths),
            Err(error) => match state.entry(name)? {
                None => Err(Error::UnknownName { name: name.clone() }),
                Some(entry) if entry.exit.is_some() => {
                    Err(Error::NotRunning { name: name.clone(), status: entry.status })
                }
                Some(_) => Err(error),
            },
        }
    }

    /// Connects the shim to itself, to reach its own server as commands do.
    pub(super) fn to_itself(name: &Name, paths: &Paths) -> Result<Self, Error> {
        Self::over(open(paths)?, name.clone(), paths.clone())
    }

    fn over(connection: UnixStream, name: Name, paths: Paths) -> Result<Self, Error> {
        let mut client = Self { name, paths, pid: 0, connection: Mutex::new(connection) };
        let pid = client.hello(&client.lease())?;
        client.pid = pid;
        Ok(client)
    }

    fn hello(&self, connection: &UnixStream) -> Result<u32, Error> {
        let request = Request::Hello { version: protocol::VERSION };
        match self.ask(connection, "hello", &request, &[])?.0 {
            Reply::Hello { version: protocol::VERSION, pid } => Ok(pid),
            Reply::Hello { version, .. } => Err(self.protocol(format!(
                "it speaks version {version} of the protocol, this program {}",
                protocol::VERSION
            ))),
            other => Err(self.unexpected("hello", &other)),
        }
    }

    /// The replica's name.
    #[must_use]
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// The shim's process number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The paths of the replica's directory as this process sees them: logs, record, `shim.log`.
    #[must_use]
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// The same paths seen through the shim's mount namespace: upper layer, `/dev/shm`, images, work directory, dump.
    #[must_use]
    pub fn inside(&self) -> Paths {
        self.paths.seen_through(self.pid)
    }

    /// Lays everything out (directories, mounts, network namespace, ports, identity, bundle) and starts nothing.
    ///
    /// # Errors
    /// A `Shim` error: class `Incompatible` for what this machine cannot give, `Failed` for a port in use.
    pub fn prepare(&self, prepare: Prepare) -> Result<Prepared, Error> {
        match self.call("prepare", &Request::Prepare(Box::new(prepare)), &[])? {
            Reply::Prepared(prepared) => Ok(*prepared),
            other => Err(self.unexpected("prepare", &other)),
        }
    }

    /// Starts the server's command; gives its process number as the host sees it.
    ///
    /// # Errors
    /// If runc refuses or the command does not exist.
    pub fn start(&self, timeout: Duration) -> Result<u32, Error> {
        self.started("start", &Request::Start { timeout_ms: millis(timeout) }, &[])
    }

    /// Restores from images that lie in [`Paths::images`] (or in the mount that `fds` begins with) and gives the process
    /// number of the restored init. `fds`: the images' mount if `images_attached`, then those of each resident in order.
    ///
    /// # Errors
    /// If a resident does not become ready or CRIU fails; its log lies in [`Paths::work`] until this client is dropped.
    pub fn restore(&self, request: RestoreRequest, fds: &[BorrowedFd<'_>]) -> Result<u32, Error> {
        self.started("restore", &Request::Restore(request), fds)
    }

    fn started(&self, what: &'static str, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<u32, Error> {
        match self.call(what, request, fds)? {
            Reply::Started { pid } => Ok(pid),
            other => Err(self.unexpected(what, &other)),
        }
    }

    /// Declares the replica ready: published ports open, and from here on it lives without any command.
    ///
    /// # Errors
    /// If its server has ended meanwhile.
    pub fn commit(&self) -> Result<(), Error> {
        self.done("commit", &Request::Commit, &[])
    }

    /// Dumps the server. CRIU's images lie in [`Paths::dump_images`] afterwards, its log in [`Paths::dump_work`], until
    /// [`Client::release_dump`], the next dump, or the end of this client. `socket` becomes CRIU's descriptor 20. A server that
    /// uses CUDA is suspended first ([`Client::suspend_devices`]) and resumed by this.
    ///
    /// # Errors
    /// If CRIU fails, the deadline passes or the server ends. Unless the server ended it goes on.
    pub fn dump(&self, request: DumpRequest, socket: impl AsFd) -> Result<(), Error> {
        self.done("dump", &Request::Dump(request), &[socket.as_fd()])
    }

    /// Ends the dump that goes on, if there is one, as the end of this client would: its call fails soon, also where CRIU waits for
    /// something that never comes. May be called from another thread while [`Client::dump`] waits.
    ///
    /// # Errors
    /// If the shim is gone.
    pub fn give_up_dump(&self) -> Result<(), Error> {
        match self.ask(&self.another()?, "give up the dump", &Request::GiveUpDump, &[])?.0 {
            Reply::Done => Ok(()),
            other => Err(self.unexpected("give up the dump", &other)),
        }
    }

    /// Whether the devices of a server could be suspended; touches nothing. Gives the bytes that it has on them, as far as
    /// they are told.
    ///
    /// # Errors
    /// A `Shim` error of class `Incompatible` with every reason at once.
    pub fn examine_devices(&self, direct: bool) -> Result<u64, Error> {
        match self.call("examine the devices", &Request::ExamineDevices { direct }, &[])? {
            Reply::Examined { device_bytes } => Ok(device_bytes),
            other => Err(self.unexpected("examine the devices", &other)),
        }
    }

    /// Moves the device memory of a server that uses CUDA into its host memory, or into the file `direct`, and freezes it, until
    /// [`Client::dump`] or [`Client::thaw`] or the end of this client. Gives its device state; none where nothing was suspended.
    ///
    /// # Errors
    /// Of class `Incompatible` where the driver cannot do it; the server runs on. Of class `Stranded` where a process was left
    /// in a state from which it cannot go on.
    pub fn suspend_devices(&self, direct: Option<BorrowedFd<'_>>) -> Result<Option<Carried>, Error> {
        match self.call("suspend the devices", &Request::SuspendDevices, direct.as_slice())? {
            Reply::Suspended(carried) => Ok(carried.map(|carried| *carried)),
            other => Err(self.unexpected("suspend the devices", &other)),
        }
    }

    /// Lets go of the memory that the images of the last dump take.
    ///
    /// # Errors
    /// If the shim is gone.
    pub fn release_dump(&self) -> Result<(), Error> {
        self.done("release the dump", &Request::ReleaseDump, &[])
    }

    /// Freezes the server until [`Client::thaw`] or the end of this client.
    ///
    /// # Errors
    /// `Busy` while another command has it frozen or dumps it.
    pub fn freeze(&self) -> Result<(), Error> {
        self.done("freeze", &Request::Freeze, &[])
    }

    /// Lets the server go on.
    ///
    /// # Errors
    /// If another command froze it.
    pub fn thaw(&self) -> Result<(), Error> {
        self.done("thaw", &Request::Thaw, &[])
    }

    /// Says that the server is about to be drained, and what it goes on by. The caller does that and then calls
    /// [`Client::resumed`]. Where the client ends before, the shim does it, unless the server is paused: then it is due after
    /// [`Client::wake`], in which the client that wakes takes it over. The record has it until it is done.
    ///
    /// # Errors
    /// `Busy` while another command has it drained.
    pub fn drain(&self, resume: Resume) -> Result<(), Error> {
        self.done("drain", &Request::Drain(resume), &[])
    }

    /// Says that what the server goes on by was done; not `whole` where a part of it failed, so that it stays in the record for
    /// the next wake.
    ///
    /// # Errors
    /// If the shim is gone.
    pub fn resumed(&self, whole: bool) -> Result<(), Error> {
        self.done("resumed", &Request::Resumed { whole }, &[])
    }

    /// Moves the server's device memory to the host and freezes it, until [`Client::wake`]; the end of this client changes
    /// nothing. What is submitted to the device may take `lock_timeout` to finish.
    ///
    /// # Errors
    /// A `Shim` error, of class `Stranded` where a process was left in a state from which it cannot go on. Otherwise the
    /// server runs on.
    pub fn pause(&self, lock_timeout: Duration) -> Result<Paused, Error> {
        match self.call("pause", &Request::Pause { lock_timeout_ms: millis(lock_timeout) }, &[])? {
            Reply::Paused(paused) => Ok(paused),
            other => Err(self.unexpected("pause", &other)),
        }
    }

    /// Moves the device memory of a paused server back and lets it go on. One that is awake and still drained, because what it
    /// goes on by failed, is left as it is, and the caller may try again. In both cases [`Record::drained`] is the caller's now.
    ///
    /// # Errors
    /// As [`Client::pause`]; the server stays paused.
    pub fn wake(&self) -> Result<Woken, Error> {
        match self.call("wake", &Request::Wake, &[])? {
            Reply::Woken(woken) => Ok(woken),
            other => Err(self.unexpected("wake", &other)),
        }
    }

    /// A connection to a port of the server's own loopback interface.
    ///
    /// # Errors
    /// With the kernel's own error as the last source, for example connection refused.
    pub fn dial(&self, port: u16, timeout: Duration) -> Result<std::net::TcpStream, Error> {
        let connection = self.another()?;
        let request = Request::Dial { port, timeout_ms: millis(timeout) };
        match self.ask(&connection, "dial", &request, &[])? {
            (Reply::Done, mut fds) if fds.len() == 1 => Ok(fds.remove(0).into()),
            (other, _) => Err(self.unexpected("dial", &other)),
        }
    }

    /// Runs a command inside the replica and waits for it. With `stdio` it gets these three descriptors.
    ///
    /// # Errors
    /// If it could not be started; its own failure is in [`ExecOutput::code`].
    pub fn exec(
        &self,
        mut request: ExecRequest,
        stdio: Option<[BorrowedFd<'_>; 3]>,
    ) -> Result<ExecOutput, Error> {
        request.stdio = stdio.is_some();
        self.exec_start(request, stdio)?.wait()
    }

    /// Starts a command inside the replica; signals can be sent to it while it runs. Dropping the value kills it.
    ///
    /// # Errors
    /// If the shim is gone.
    pub fn exec_start(
        &self,
        mut request: ExecRequest,
        stdio: Option<[BorrowedFd<'_>; 3]>,
    ) -> Result<RunningExec<'_>, Error> {
        request.stdio = stdio.is_some();
        let connection = self.another()?;
        let fds = stdio.map_or_else(Vec::new, Vec::from);
        protocol::send(&connection, &Request::Exec(request), &fds).map_err(|error| self.lost(&error))?;
        Ok(RunningExec { client: self, connection })
    }

    /// Asks the server to end (SIGTERM), kills what is left after `timeout`, and waits until everything is gone.
    ///
    /// # Errors
    /// If the shim vanishes.
    pub fn stop(&self, timeout: Duration) -> Result<Exit, Error> {
        self.exit("stop", &self.lease(), &Request::Stop { timeout_ms: millis(timeout) })
    }

    /// Kills the server at once, frozen or not, writes `reason` down, and waits until everything is gone. Does not wait for
    /// another call of this client: what that is doing ends with the server.
    ///
    /// # Errors
    /// If the shim vanishes.
    pub fn kill(&self, reason: &str) -> Result<Exit, Error> {
        self.exit("kill", &self.another()?, &Request::Kill { reason: reason.into() })
    }

    /// Waits until the server has ended and everything is gone.
    ///
    /// # Errors
    /// If the shim vanishes.
    pub fn wait(&self) -> Result<Exit, Error> {
        self.exit("wait", &self.another()?, &Request::Wait)
    }

    /// A connection for [`Client::wait_over`].
    ///
    /// # Errors
    /// If the shim is gone.
    pub fn waiting(&self) -> Result<UnixStream, Error> {
        self.another()
    }

    /// As [`Client::wait`], over a connection of [`Client::waiting`]: whoever shuts it down ends the wait.
    ///
    /// # Errors
    /// If the shim vanishes, or the wait was ended.
    pub fn wait_over(&self, connection: &UnixStream) -> Result<Exit, Error> {
        self.exit("wait", connection, &Request::Wait)
    }

    fn exit(&self, what: &'static str, connection: &UnixStream, request: &Request) -> Result<Exit, Error> {
        match self.ask(connection, what, request, &[])?.0 {
            Reply::Exit(exit) => Ok(exit),
            other => Err(self.unexpected(what, &other)),
        }
    }

    /// The replica as it is at the moment.
    ///
    /// # Errors
    /// If the shim is gone, or nothing was prepared yet.
    pub fn status(&self) -> Result<Record, Error> {
        match self.ask(&self.another()?, "status", &Request::Status, &[])?.0 {
            Reply::Status(record) => Ok(*record),
            other => Err(self.unexpected("status", &other)),
        }
    }

    fn another(&self) -> Result<UnixStream, Error> {
        let connection = open(&self.paths)?;
        self.hello(&connection)?;
        Ok(connection)
    }

    fn lease(&self) -> std::sync::MutexGuard<'_, UnixStream> {
        self.connection.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn done(&self, what: &'static str, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        match self.call(what, request, fds)? {
            Reply::Done => Ok(()),
            other => Err(self.unexpected(what, &other)),
        }
    }

    fn call(&self, what: &'static str, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Reply, Error> {
        Ok(self.ask(&self.lease(), what, request, fds)?.0)
    }

    fn ask(
        &self,
        connection: &UnixStream,
        what: &'static str,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), Error> {
        protocol::send(connection, request, fds).map_err(|error| self.lost(&error))?;
        self.answer(connection, what)
    }

    fn answer(&self, connection: &UnixStream, what: &'static str) -> Result<(Reply, Vec<OwnedFd>), Error> {
        match protocol::receive(connection).map_err(|error| self.lost(&error))? {
            Some((Reply::Failed { class, error }, _)) => {
                Err(Error::Shim { request: what, name: self.name.clone(), class, source: error })
            }
            Some(answer) => Ok(answer),
            None => Err(self.protocol(format!("it ended before it answered {what}"))),
        }
    }

    fn lost(&self, error: &io::Error) -> Error {
        self.protocol(format!("the connection broke: {error}"))
    }

    fn unexpected(&self, what: &str, reply: &Reply) -> Error {
        self.protocol(format!("it answered {what} with {reply:?}"))
    }

    fn protocol(&self, reason: String) -> Error {
        Error::Protocol { name: self.name.clone(), reason }
    }
}

/// A command that runs inside a replica. Dropping it kills the command.
#[derive(Debug)]
pub struct RunningExec<'a> {
    client: &'a Client,
    connection: UnixStream,
}

impl RunningExec<'_> {
    /// Sends a signal to the command. Has no effect once it has ended.
    ///
    /// # Errors
    /// If the shim is gone.
    pub fn signal(&self, signal: i32) -> Result<(), Error> {
        protocol::send(&self.connection, &Request::Signal { signal }, &[])
            .map_err(|error| self.client.lost(&error))
    }

    /// Waits until the command has ended.
    ///
    /// # Errors
    /// If it could not be started, or the shim is gone.
    pub fn wait(&self) -> Result<ExecOutput, Error> {
        match self.client.answer(&self.connection, "exec")?.0 {
            Reply::Exec(output) => Ok(output),
            other => Err(self.client.unexpected("exec", &other)),
        }
    }
}

/// Connects to `shim.sock` by way of its directory's descriptor, because the address of a Unix socket holds 107 bytes only.
fn open(paths: &Paths) -> Result<UnixStream, Error> {
    let directory = std::fs::File::open(paths.dir()).context("open", paths.dir().display())?;
    let short = PathBuf::from(format!("/proc/self/fd/{}/{}", directory.as_raw_fd(), Paths::SOCKET));
    UnixStream::connect(short).context("connect to", paths.socket().display())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
