//! Finding the fetcher of a state folder, or starting it.
//!
//! Its socket lies in the state folder, which only root can enter. Whoever finds nobody at the other end takes a lock,
//! looks again, and starts one; the socket is bound before, so that others find it at once.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::statvfs::statvfs;
use rewarm_sys::{machine, process, shared};

use crate::USER;
use crate::disk;
use crate::error::{Error, Result};

/// The number under which the keeper finds its listening socket.
pub(crate) const SOCKET_FD: i32 = 3;
/// The number under which it finds the folder for the content of streams.
pub(crate) const FOLDER_FD: i32 = 4;
/// The number under which it finds the folder for packs on disk.
pub(crate) const DISK_FD: i32 = 5;

/// The socket bears the version of the protocol: beside a command of a newer program, a fetcher of the older one serves its own
/// until nobody needs it.
const SOCKET: &str = "fetcher.5.sock";
const LOCK: &str = "fetcher.lock";
const LOG: &str = "fetcher.log";

/// Size of the file system for content: a number that is never reached, since the limit is kept otherwise.
const FOLDER_BYTES: u64 = 1 << 46;

/// Part of the free memory that decoded streams may take unless told otherwise.
const LIMIT_PART: u64 = 4;

/// Part of the free disk that packs may take unless told otherwise.
const DISK_PART: u64 = 10;

/// How a fetcher is started where none runs.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The state folder.
    pub state: PathBuf,
    /// The program whose hidden verb `fetcher` it is.
    pub program: PathBuf,
    /// Bytes that decoded streams may take while nobody holds them; without it a quarter of the free memory.
    pub limit_bytes: Option<u64>,
    /// Bytes that decoded streams may take altogether, whether somebody holds them or not and whoever has started the fetcher. What does
    /// not fit is fetched for each restore on its own, and dropped as it is put into place.
    pub bound_bytes: Option<u64>,
    /// Where what was fetched over a network is kept; nowhere if nothing is said.
    pub disk: Option<DiskSettings>,
    /// How long it stays when nobody needs it.
    pub idle: Duration,
}

/// What is kept on disk.
#[derive(Debug, Clone)]
pub struct DiskSettings {
    /// The folder. It is made, and belongs to the fetcher's user.
    pub folder: PathBuf,
    /// Bytes that packs may take there; without it a tenth of what is free.
    pub limit_bytes: Option<u64>,
}

/// Connects to the fetcher of a state folder if one runs.
pub(crate) fn connect(state: &Path) -> io::Result<UnixStream> {
    let directory = File::open(state)?;
    UnixStream::connect(short(&directory, SOCKET))
}

/// Connects to the fetcher of a state folder; starts one if none runs.
pub(crate) fn connect_or_start(settings: &Settings) -> Result<UnixStream> {
    if let Ok(socket) = connect(&settings.state) {
        return Ok(socket);
    }
    let state =
        File::open(&settings.state).map_err(Error::start(format!("open {}", settings.state.display())))?;
    let path = settings.state.join(LOCK);
    let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let lock = lock.map_err(Error::start(format!("open {}", path.display())))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, errno)| Error::start(format!("lock {}", path.display()))(errno.into()))?;
    // Somebody else may have been faster.
    if let Ok(socket) = connect(&settings.state) {
        return Ok(socket);
    }
    start(settings, &state)?;
    connect(&settings.state).map_err(Error::start("connect to it"))
}

/// The address of a Unix socket holds 107 bytes only.
fn short(directory: &File, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()))
}

fn start(settings: &Settings, state: &File) -> Result<()> {
    let free = machine::free_bytes().map_err(Error::start("read /proc/meminfo"))?;
    let limit = settings.bound_bytes.or(settings.limit_bytes).unwrap_or(free / LIMIT_PART);
    let path = short(state, SOCKET);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(Error::start("remove the socket of one that is gone")(error));
        }
        _ => {}
    }
    let listener = UnixListener::bind(&path).map_err(Error::start("listen in the state folder"))?;
    let log_path = settings.state.join(LOG);
    let log = OpenOptions::new().append(true).create(true).mode(0o600).open(&log_path);
    let log = log.map_err(Error::start(format!("open {}", log_path.display())))?;
    let second = log.try_clone().map_err(Error::start("duplicate its log"))?;
    let mut command = Command::new(&settings.program);
    command.arg("--state").arg(&settings.state).arg("fetcher");
    command.arg("--limit").arg(limit.to_string());
    command.arg("--idle").arg(format!("{}ms", settings.idle.as_millis()));
    command.current_dir("/").stdin(Stdio::null()).stdout(log).stderr(second);
    let mut fds = vec![(listener.into(), SOCKET_FD)];
    // Without it the content lies in memory files, which get no huge pages.
    if let Ok(folder) = shared::huge_folder(FOLDER_BYTES, USER, USER) {
        fds.push((folder, FOLDER_FD));
    }
    if let Some((folder, limit)) = settings.disk.as_ref().and_then(open_disk) {
        fds.push((folder, DISK_FD));
        command.arg("--disk").arg(limit.to_string());
    }
    process::inherit(&mut command, fds).map_err(Error::start("prepare its descriptors"))?;
    process::new_session(&mut command);
    let mut child = command.spawn().map_err(Error::start(format!("run {}", settings.program.display())))?;
    drop(command);
    // It outlives this process as a rule. Where it does not, it must not stay a zombie.
    std::thread::spawn(move || child.wait());
    Ok(())
}

/// The folder for packs and how much may lie in it. Without one nothing is kept: that costs time only.
fn open_disk(settings: &DiskSettings) -> Option<(OwnedFd, u64)> {
    let opened = disk::prepare(&settings.folder).and_then(|folder| {
        let free = statvfs(&settings.folder)?;
        let free = free.blocks_available().saturating_mul(free.fragment_size());
        Ok((folder, settings.limit_bytes.unwrap_or(free / DISK_PART)))
    });
    let folder = settings.folder.display();
    let opened = opened.inspect_err(|error| tracing::warn!(%folder, %error, "nothing is kept on disk"));
    opened.ok().filter(|(_, limit)| *limit > 0)
}

#[cfg(test)]
mod tests {
    use super::SOCKET;
    use crate::protocol::VERSION;

    #[test]
    fn the_socket_bears_the_version_of_the_protocol() {
        assert_eq!(SOCKET, format!("fetcher.{VERSION}.sock"));
    }
}
