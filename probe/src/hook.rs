//! Hooks: what an operator wants done before a dump and after a restore.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::dial::{Dial, tail};
use crate::error::{Error, RequestError, Result};
use crate::http::{Call, call};
use crate::target::Target;

/// `http://...` is a POST inside the replica's network namespace, anything else a command run there by `sh -c`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hook {
    text: String,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Post(Target),
    Command,
}

/// A hook that succeeded.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HookReport {
    /// Milliseconds that it took.
    pub took_ms: f64,
    /// Its last lines of output, or the body of the answer.
    pub output: String,
}

impl Hook {
    /// Runs the hook and waits for its end. `port` is the first that the replica declares, for a URL without one.
    ///
    /// # Errors
    /// [`Error::HookStart`] when it could not be run, [`Error::HookFailed`] with its output when it failed: a status other
    /// than 0, an answer of 400 and above, or no end within `timeout`.
    pub async fn run(&self, dial: &dyn Dial, port: Option<u16>, timeout: Duration) -> Result<HookReport> {
        let start = Instant::now();
        let output = match &self.kind {
            Kind::Post(target) => self.post(dial, target, port, timeout).await?,
            Kind::Command => self.command(dial, timeout).await?,
        };
        Ok(HookReport { took_ms: start.elapsed().as_secs_f64() * 1000.0, output })
    }

    async fn post(
        &self,
        dial: &dyn Dial,
        target: &Target,
        port: Option<u16>,
        timeout: Duration,
    ) -> Result<String> {
        let request = Call {
            port: target.port(port),
            method: "POST",
            path: &target.path,
            headers: &[],
            body: Bytes::new(),
            timeout,
        };
        match call(dial, &request).await {
            Ok(reply) if reply.status.as_u16() < 400 => Ok(tail(&reply.body)),
            Ok(reply) => Err(self.failed(format!("answered {}", reply.status.as_u16()), tail(&reply.body))),
            Err(RequestError::TimedOut { .. }) => {
                let limit = humantime::format_duration(timeout);
                Err(self.failed(format!("did not answer within {limit}"), String::new()))
            }
            Err(source) => Err(Error::HookStart { hook: self.text.clone(), source }),
        }
    }

    async fn command(&self, dial: &dyn Dial, timeout: Duration) -> Result<String> {
        let start_error =
            |source| Error::HookStart { hook: self.text.clone(), source: RequestError::Exec(source) };
        let ended = dial.exec(&self.text, timeout).await.map_err(start_error)?;
        match ended.status {
            Some(status) if status.success() => Ok(ended.tail()),
            Some(status) => Err(self.failed(format!("ended with {status}"), ended.tail())),
            None => {
                let limit = humantime::format_duration(timeout);
                Err(self.failed(format!("was killed, it did not end within {limit}"), ended.tail()))
            }
        }
    }

    fn failed(&self, outcome: String, output: String) -> Error {
        Error::HookFailed { hook: self.text.clone(), outcome, output }
    }
}

impl FromStr for Hook {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let malformed = |expected| Error::Malformed { what: "hook", seen: text.to_owned(), expected };
        let kind = if text.starts_with("http://") {
            Kind::Post(Target::parse(text).ok_or_else(|| malformed("http://HOST[:PORT]/PATH or a command"))?)
        } else if text.starts_with("https://") {
            return Err(malformed(
                "http://..., since inside a replica there is no one to prove a certificate to",
            ));
        } else if text.trim().is_empty() {
            return Err(malformed("a URL or a command"));
        } else {
            Kind::Command
        };
        Ok(Self { text: text.to_owned(), kind })
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl TryFrom<String> for Hook {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Hook> for String {
    fn from(hook: Hook) -> Self {
        hook.text
    }
}
