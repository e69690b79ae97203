//! Ready checks: when a server may be said to serve.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::dial::Dial;
use crate::error::{Error, RequestError, Result};
use crate::http::{Call, call};
use crate::json::cut;
use crate::limits::{READY_ATTEMPT_TIMEOUT, READY_COMMAND_PAUSE_MAX, READY_PAUSE_MAX, READY_PAUSE_MIN};
use crate::target::Target;

/// `http://...` answers below 400, `tcp:PORT` takes a connection, `cmd:CMD` ends with status 0; each inside the replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ready {
    text: String,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Http(Target),
    Tcp(u16),
    Command(String),
}

impl Ready {
    /// The check for a replica that says nothing but its port: the port takes a connection.
    #[must_use]
    pub fn tcp(port: u16) -> Self {
        Self { text: format!("tcp:{port}"), kind: Kind::Tcp(port) }
    }

    /// One attempt within `timeout`; the error says what was seen.
    async fn attempt(&self, dial: &dyn Dial, port: Option<u16>, timeout: Duration) -> Result<(), String> {
        match &self.kind {
            Kind::Http(target) => http(dial, target, port, timeout).await,
            Kind::Tcp(port) => match tokio::time::timeout(timeout, dial.dial(*port)).await {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(error)) => Err(format!("connect to port {port}: {}", chain(&error))),
                Err(_) => Err(format!("connect to port {port}: no answer")),
            },
            Kind::Command(command) => match dial.exec(command, timeout).await {
                Err(error) => Err(format!("start the command: {}", chain(&error))),
                Ok(ended) => match ended.status {
                    Some(status) if status.success() => Ok(()),
                    Some(status) => Err(format!("command ended with {status}{}", said(&ended.tail()))),
                    None => Err(format!("command did not end{}", said(&ended.tail()))),
                },
            },
        }
    }

    fn pause_max(&self) -> Duration {
        match self.kind {
            Kind::Command(_) => READY_COMMAND_PAUSE_MAX,
            Kind::Http(_) | Kind::Tcp(_) => READY_PAUSE_MAX,
        }
    }
}

async fn http(dial: &dyn Dial, target: &Target, port: Option<u16>, timeout: Duration) -> Result<(), String> {
    let request = Call {
        port: target.port(port),
        method: "GET",
        path: &target.path,
        headers: &[],
        body: Bytes::new(),
        timeout,
    };
    match call(dial, &request).await {
        Ok(reply) if reply.status.as_u16() < 400 => Ok(()),
        Ok(reply) => Err(format!(
            "answered {}{}",
            reply.status.as_u16(),
            said(String::from_utf8_lossy(&reply.body).trim())
        )),
        // The limit of an attempt is what was left of the whole time: a number of no interest.
        Err(RequestError::TimedOut { port, .. }) => Err(format!("port {port} gave no whole answer")),
        Err(error) => Err(chain(&error)),
    }
}

/// A message and those of its sources: what the last attempt saw is told as one text.
fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(error.source(), |error| error.source());
    sources.fold(error.to_string(), |text, source| format!("{text}: {source}"))
}

fn said(output: &str) -> String {
    if output.is_empty() { String::new() } else { format!(" and said {:?}", cut(output)) }
}

/// Waits until `ready` passes and gives the time that it took.
///
/// `port` is the first that the replica declares, for a URL without one. `ended` completes when the server ends, with the
/// words for how; give [`std::future::pending`] where nobody can know. The first pause between attempts is 1 ms.
///
/// # Errors
/// [`Error::NotReady`] with what the last attempt said, [`Error::ServerEnded`].
pub async fn wait_ready(
    ready: &Ready,
    dial: &dyn Dial,
    port: Option<u16>,
    timeout: Duration,
    ended: impl Future<Output = String>,
) -> Result<Duration> {
    let start = Instant::now();
    tokio::select! {
        // The check first: a server that answered and then ended is the caller's next finding, not this one's.
        biased;
        outcome = attempts(ready, dial, port, start, timeout) => match outcome {
            Ok(()) => Ok(start.elapsed()),
            Err(last) => Err(Error::NotReady { check: ready.to_string(), waited: timeout, last }),
        },
        status = ended => Err(Error::ServerEnded { check: ready.to_string(), status }),
    }
}

async fn attempts(
    ready: &Ready,
    dial: &dyn Dial,
    port: Option<u16>,
    start: Instant,
    timeout: Duration,
) -> Result<(), String> {
    let mut pause = READY_PAUSE_MIN;
    let mut last = None;
    loop {
        let left = timeout.saturating_sub(start.elapsed());
        match ready.attempt(dial, port, left.min(READY_ATTEMPT_TIMEOUT)).await {
            Ok(()) => return Ok(()),
            // The end of the whole time cuts the last attempt short: what the one before saw says more.
            Err(seen) if start.elapsed() >= timeout => return Err(last.unwrap_or(seen)),
            Err(seen) => last = Some(seen),
        }
        tokio::time::sleep(pause.min(timeout.saturating_sub(start.elapsed()))).await;
        pause = (pause * 2).min(ready.pause_max());
    }
}

impl FromStr for Ready {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        const EXPECTED: &str = "http://HOST[:PORT]/PATH, tcp:PORT or cmd:COMMAND";
        let kind = if text.starts_with("http://") {
            Target::parse(text).map(Kind::Http)
        } else if let Some(port) = text.strip_prefix("tcp:") {
            port.parse().ok().filter(|port| *port != 0).map(Kind::Tcp)
        } else if let Some(command) = text.strip_prefix("cmd:") {
            Some(command).filter(|c| !c.trim().is_empty()).map(|c| Kind::Command(c.to_owned()))
        } else {
            None
        };
        let kind =
            kind.ok_or(Error::Malformed { what: "ready check", seen: text.to_owned(), expected: EXPECTED })?;
        Ok(Self { text: text.to_owned(), kind })
    }
}

impl fmt::Display for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl TryFrom<String> for Ready {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Ready> for String {
    fn from(ready: Ready) -> Self {
        ready.text
    }
}
