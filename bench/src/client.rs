//! Asks the question, and compares the answer with the running server's.

use std::io;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rewarm_probe::{Dial, ExecOutput, Recorded, replay};
use tokio::net::TcpStream;

use crate::error::{Error, Result};
use crate::subject::Subject;

/// How long a server may take to listen.
const LISTEN_WITHIN: Duration = Duration::from_secs(120);
/// Between two attempts to connect: short against every figure.
const RETRY: Duration = Duration::from_micros(500);

/// Reaches a server by a port of this machine, whatever port it has inside.
struct OnHost(u16);

#[async_trait]
impl Dial for OnHost {
    async fn dial(&self, _: u16) -> io::Result<TcpStream> {
        let deadline = Instant::now() + LISTEN_WITHIN;
        loop {
            match TcpStream::connect(("127.0.0.1", self.0)).await {
                Err(error)
                    if error.kind() == io::ErrorKind::ConnectionRefused && Instant::now() < deadline =>
                {
                    tokio::time::sleep(RETRY).await;
                }
                result => return result,
            }
        }
    }

    async fn exec(&self, _: &str, _: Duration) -> io::Result<ExecOutput> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "a question is no command"))
    }
}

/// The answer of the running server, with which all others are compared.
pub(crate) struct Expected(Recorded);

impl Expected {
    /// Asks the server that listens on this port of the machine.
    pub(crate) async fn of(subject: &Subject, host_port: u16) -> Result<Self> {
        let recorded = subject.question.record(&OnHost(host_port), Some(subject.port)).await;
        recorded.map(Self).map_err(|source| Error::Answer { case: "running".to_owned(), source })
    }

    /// Asks again, as soon as somebody listens. Milliseconds from `since` to the last byte of an equal answer.
    pub(crate) async fn ask(&self, host_port: u16, since: Instant, case: &str) -> Result<f64> {
        let asked = replay(&self.0, &OnHost(host_port)).await;
        asked.map_err(|source| Error::Answer { case: case.to_owned(), source })?;
        Ok(since.elapsed().as_secs_f64() * 1000.0)
    }
}
