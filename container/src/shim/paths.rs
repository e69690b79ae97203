//! Where the parts of a replica lie.

use std::path::{Path, PathBuf};

/// The files and directories of one replica, below `STATE/replicas/NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    dir: PathBuf,
}

impl Paths {
    /// File name of the shim's socket.
    pub const SOCKET: &str = "shim.sock";

    pub(crate) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The same directory as the process `pid` sees it: mounts of its own namespace are visible there.
    #[must_use]
    pub fn seen_through(&self, pid: u32) -> Self {
        let root = PathBuf::from(format!("/proc/{pid}/root"));
        Self { dir: root.join(self.dir.strip_prefix("/").unwrap_or(&self.dir)) }
    }

    /// The replica's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Locked as long as the command that makes the replica, or its shim, lives.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.dir.join("lock")
    }

    /// [`crate::Record`] as JSON.
    #[must_use]
    pub fn record(&self) -> PathBuf {
        self.dir.join("replica.json")
    }

    /// [`crate::Exit`] as JSON, once the server has ended.
    #[must_use]
    pub fn exit(&self) -> PathBuf {
        self.dir.join("exit.json")
    }

    /// Where the shim listens.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join(Self::SOCKET)
    }

    /// What the shim itself has to say.
    #[must_use]
    pub fn shim_log(&self) -> PathBuf {
        self.dir.join("shim.log")
    }

    /// The directory of the server's output.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }

    /// The server's standard output; the older part, if any, has the suffix `.1`.
    #[must_use]
    pub fn stdout(&self) -> PathBuf {
        self.logs().join("stdout.log")
    }

    /// The server's standard error; the older part, if any, has the suffix `.1`.
    #[must_use]
    pub fn stderr(&self) -> PathBuf {
        self.logs().join("stderr.log")
    }

    /// The OCI bundle; its `config.json` is what runc reads.
    #[must_use]
    pub fn bundle(&self) -> PathBuf {
        self.dir.join("bundle")
    }

    /// The directory that the replica sees as `/run/rewarm`.
    #[must_use]
    pub fn identity(&self) -> PathBuf {
        self.dir.join("identity")
    }

    /// CRIU's configuration file, named by the bundle's annotation and written anew before each dump and restore.
    #[must_use]
    pub fn criu_config(&self) -> PathBuf {
        self.dir.join("criu.conf")
    }

    /// What lies below the upper layer and its work directory; a mount of the shim where the file system cannot hold them.
    #[must_use]
    pub fn layer(&self) -> PathBuf {
        self.dir.join("layer")
    }

    /// The root file system's delta.
    #[must_use]
    pub fn upper(&self) -> PathBuf {
        self.layer().join("upper")
    }

    /// The overlay's own.
    #[must_use]
    pub fn overlay_work(&self) -> PathBuf {
        self.layer().join("work")
    }

    /// The root file system; a mount of the shim.
    #[must_use]
    pub fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// The server's `/dev/shm`; a mount of the shim.
    #[must_use]
    pub fn shm(&self) -> PathBuf {
        self.dir.join("shm")
    }

    /// The images to restore from; a mount of the shim.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.dir.join("images")
    }

    /// CRIU's work directory on restore: `restore.log` and `lazy-pages.socket`.
    #[must_use]
    pub fn work(&self) -> PathBuf {
        self.dir.join("work")
    }

    /// The tmpfs of the last dump; a mount of the shim.
    #[must_use]
    pub fn dump(&self) -> PathBuf {
        self.dir.join("dump")
    }

    /// CRIU's images of the last dump.
    #[must_use]
    pub fn dump_images(&self) -> PathBuf {
        self.dump().join("images")
    }

    /// CRIU's work directory of the last dump: `dump.log` and `stats-dump`.
    #[must_use]
    pub fn dump_work(&self) -> PathBuf {
        self.dump().join("work")
    }

    /// runc's log of the last call.
    #[must_use]
    pub fn runc_log(&self) -> PathBuf {
        self.dir.join("runc.log")
    }
}
