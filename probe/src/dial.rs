//! The way into a replica: the one thing that this crate asks of its caller.

use std::io;
use std::process::ExitStatus;
use std::time::Duration;

use async_trait::async_trait;
use tokio::net::TcpStream;

/// Reaches into a replica. Implemented over the shim's client, and by plain sockets in tests.
#[async_trait]
pub trait Dial: Send + Sync {
    /// Connects to `127.0.0.1:port` inside the replica's network namespace.
    ///
    /// # Errors
    /// What the connect says: refused while nothing listens.
    async fn dial(&self, port: u16) -> io::Result<TcpStream>;

    /// Runs `sh -c command` inside the replica, with empty stdin, and kills it after `timeout`.
    ///
    /// # Errors
    /// When the command could not be started; how it ended is in the answer.
    async fn exec(&self, command: &str, timeout: Duration) -> io::Result<ExecOutput>;
}

/// How a command inside the replica ended.
#[derive(Debug, Clone)]
pub struct ExecOutput {
    /// Its status; absent when it was killed because its time was up.
    pub status: Option<ExitStatus>,
    /// What it wrote to stdout and stderr; the end of it, when that is long.
    pub output: Vec<u8>,
}

impl ExecOutput {
    /// The last lines of the output as text, bounded by [`crate::limits`].
    #[must_use]
    pub fn tail(&self) -> String {
        tail(&self.output)
    }
}

/// The last lines of `output`, at most as much as [`crate::limits`] keeps.
pub(crate) fn tail(output: &[u8]) -> String {
    let start = output.len().saturating_sub(crate::limits::OUTPUT_BYTES_MAX);
    let text = String::from_utf8_lossy(&output[start..]);
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(crate::limits::OUTPUT_LINES_MAX)..].join("\n")
}
