//! How probes, hooks and ready checks reach a replica: through its shim.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use rewarm_probe::{Dial, ExecOutput};

use crate::Error;
use crate::shim::{Client, ExecRequest};

/// How long a connection to the server's own loopback interface may take.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// Reaches the server that a client's shim owns.
#[derive(Debug, Clone)]
pub struct Inside(Arc<Client>);

impl Inside {
    /// Over this client. Each connection and command has one of its own; the client's lease is not touched.
    #[must_use]
    pub fn new(client: Arc<Client>) -> Self {
        Self(client)
    }
}

#[async_trait::async_trait]
impl Dial for Inside {
    async fn dial(&self, port: u16) -> io::Result<tokio::net::TcpStream> {
        let client = self.0.clone();
        let stream = blocking(move || client.dial(port, DIAL_TIMEOUT)).await?;
        stream.set_nonblocking(true)?;
        tokio::net::TcpStream::from_std(stream)
    }

    async fn exec(&self, command: &str, timeout: Duration) -> io::Result<ExecOutput> {
        let request = ExecRequest {
            args: ["/bin/sh", "-c", command].map(str::to_owned).to_vec(),
            timeout_ms: Some(u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)),
            ..ExecRequest::default()
        };
        let client = self.0.clone();
        let done = blocking(move || client.exec(request, None)).await?;
        // A shell shows a signal as 128 + number; the kernel keeps codes in the second byte.
        let status = (!done.timed_out).then(|| match done.code {
            code @ 129..=192 => ExitStatus::from_raw(code - 128),
            code => ExitStatus::from_raw(code << 8),
        });
        Ok(ExecOutput { status, output: [done.stdout, done.stderr].concat().into_bytes() })
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> io::Result<T> {
    let result = tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?;
    result.map_err(io::Error::other)
}
