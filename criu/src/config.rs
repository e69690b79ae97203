//! The configuration file that tells CRIU what to do beside what runc tells it.
//!
//! runc drives CRIU by RPC and knows few of its options. The annotation `org.criu.config` in a bundle names a file with
//! the others; it is read at each dump and restore, and what it says wins over what runc sends. So it is written anew
//! before each: an option of a dump, such as `page-server`, must not be met by a restore.

use std::fmt::{self, Display, Write as _};
use std::fs;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use crate::Error;

/// The descriptor on which CRIU finds its end of the page-server socket pair. runc hands on what it inherits.
pub const PAGE_SERVER_FD: RawFd = 20;
/// Deleted files that are still open travel inside the images up to this size, in bytes.
pub const GHOST_BYTES_MAX: u64 = 1 << 30;

/// Lines of a configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    lines: Vec<(&'static str, Option<String>)>,
}

impl Config {
    /// For a dump whose pages go to the socket at [`PAGE_SERVER_FD`]. Connections between processes inside survive.
    #[must_use]
    pub fn dump() -> Self {
        Self::shared().flag("page-server").value("ps-socket", PAGE_SERVER_FD).ghost_limit(GHOST_BYTES_MAX)
    }

    /// For a dump whose pages CRIU writes into the image directory.
    #[must_use]
    pub fn dump_to_images() -> Self {
        Self::shared().ghost_limit(GHOST_BYTES_MAX)
    }

    /// For a restore. Pages leave their images as CRIU takes them (`auto-dedup`): the images lie in memory, and shared memory
    /// would be held twice, and made anew while what held it is still there.
    #[must_use]
    pub fn restore() -> Self {
        Self::shared().flag("auto-dedup")
    }

    /// What both sides need: `network-lock skip` because connections are not locked by a firewall (nothing outside can
    /// reach a replica's own network namespace, and iptables may not be there); `manage-cgroups=ignore` because runc has
    /// put CRIU into the new cgroups already; `tcp-established` because CRIU refuses connections without it.
    fn shared() -> Self {
        Self { lines: Vec::new() }
            .value("network-lock", "skip")
            // With a blank instead of `=` CRIU reads the option without its value, which may be left out, and takes the
            // cgroups of the whole machine into the images: a restore would make them anew, and on cgroup v2 put the
            // clone into the cgroup of its source.
            .flag("manage-cgroups=ignore")
            .flag("tcp-established")
            .flag("file-locks")
    }

    /// Tasks come back stopped (state T) and wait for SIGCONT.
    #[must_use]
    pub fn leave_stopped(self) -> Self {
        self.flag("leave-stopped")
    }

    /// Tasks are not killed after a dump.
    #[must_use]
    pub fn leave_running(self) -> Self {
        self.flag("leave-running")
    }

    /// Connections that a listener has not accepted yet are left out of the images instead of failing the dump.
    #[must_use]
    pub fn skip_in_flight(self) -> Self {
        self.flag("skip-in-flight")
    }

    /// Every TCP connection comes back closed, those inside a replica too. [`crate::patch::close_connections`] closes
    /// chosen ones.
    #[must_use]
    pub fn tcp_close(self) -> Self {
        self.flag("tcp-close")
    }

    /// Plugins are looked for in this folder only: an empty one turns them off. Must be absolute and exist.
    #[must_use]
    pub fn plugins(self, folder: &Path) -> Self {
        self.value("libdir", folder.display())
    }

    /// The most bytes that a deleted file may have to be kept in the images. Replaces the limit given before.
    #[must_use]
    pub fn ghost_limit(mut self, bytes: u64) -> Self {
        self.lines.retain(|&(key, _)| key != "ghost-limit");
        self.value("ghost-limit", bytes)
    }

    /// How long CRIU may take to stop all tasks, in seconds. Its default is 10.
    #[must_use]
    pub fn freeze_seconds_max(self, seconds: u32) -> Self {
        self.value("timeout", seconds)
    }

    /// An option without value by its long name, without dashes. CRIU refuses names that it does not know.
    #[must_use]
    pub fn flag(mut self, name: &'static str) -> Self {
        if !self.lines.iter().any(|&(key, _)| key == name) {
            self.lines.push((name, None));
        }
        self
    }

    /// An option with a value by its long name, without dashes.
    ///
    /// # Panics
    /// If the value has a line break or both kinds of quotes, which the format cannot carry.
    #[must_use]
    pub fn value(mut self, name: &'static str, value: impl Display) -> Self {
        let value = value.to_string();
        assert!(!value.contains('\n'), "{name} has a line break: {value:?}");
        assert!(!(value.contains('"') && value.contains('\'')), "{name} has both kinds of quotes: {value:?}");
        self.lines.push((name, Some(value)));
        self
    }

    /// Writes the file in the place of any older one.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn write(&self, path: &Path) -> crate::Result<()> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".new");
        let new: PathBuf = path.with_file_name(name);
        fs::write(&new, self.to_string()).map_err(Error::io("write", &new))?;
        fs::rename(&new, path).map_err(Error::io("replace", path))
    }
}

impl Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in &self.lines {
            f.write_str(name)?;
            match value {
                None => {}
                // CRIU splits a line at blanks and takes `#` for a comment, but not inside quotes.
                Some(value) if value.contains(|c: char| c.is_whitespace() || c == '#' || c == '\'') => {
                    write!(f, " \"{value}\"")?;
                }
                Some(value) if value.contains('"') => write!(f, " '{value}'")?,
                Some(value) => write!(f, " {value}")?,
            }
            f.write_char('\n')?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dump_sends_its_pages_and_a_restore_does_not() {
        let dump = Config::dump().plugins(Path::new("/run/x y")).to_string();
        assert_eq!(
            dump,
            "network-lock skip\nmanage-cgroups=ignore\ntcp-established\nfile-locks\npage-server\nps-socket 20\n\
             ghost-limit 1073741824\nlibdir \"/run/x y\"\n"
        );
        let restore = Config::restore().leave_stopped().to_string();
        assert_eq!(
            restore,
            "network-lock skip\nmanage-cgroups=ignore\ntcp-established\nfile-locks\nauto-dedup\nleave-stopped\n"
        );
    }

    #[test]
    fn the_last_ghost_limit_counts() {
        let text = Config::dump().ghost_limit(4096).to_string();
        assert_eq!(text.matches("ghost-limit").count(), 1);
        assert!(text.ends_with("ghost-limit 4096\n"));
    }
}
