//! What has to be done with an inference engine around a checkpoint: ordered steps, in a TOML file that a user can copy and
//! change.
//!
//! Those for the engines that people use come with the program ([`PRESETS`]). The steps before a checkpoint make the server small
//! and quiet, those after it make it serve again, on the source as in each clone.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::dial::{Dial, tail};
use crate::error::{Error, RequestError, Result};
use crate::http::{Call, call};
use crate::limits::{ENGINE_FILE_BYTES_MAX, ENGINE_RETRIES_MAX, ENGINE_STEPS_MAX, HOOK_TIMEOUT};

/// Names and texts of the presets.
pub const PRESETS: [(&str, &str); 5] = [
    ("vllm", include_str!("engine/vllm.toml")),
    ("sglang", include_str!("engine/sglang.toml")),
    ("torch", include_str!("engine/torch.toml")),
    ("llamacpp", include_str!("engine/llamacpp.toml")),
    ("generic", include_str!("engine/generic.toml")),
];

/// Between two attempts of a step, unless it says otherwise.
const PAUSE: Duration = Duration::from_millis(500);

/// The steps of an engine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Engine {
    /// Before a checkpoint, in this order. If one fails, nothing is checkpointed.
    #[serde(default)]
    pub before: Vec<Step>,
    /// After a checkpoint on the source, after a restore in each clone, and after a wake. If one fails, a clone is killed.
    #[serde(default)]
    pub after: Vec<Step>,
}

/// One step: a request inside the replica, or a command there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// What it is called in messages.
    pub name: String,
    /// A POST to this path and query.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post: Option<String>,
    /// A GET of this path and query.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub get: Option<String>,
    /// A command, run by `sh -c`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// Body of a POST, as JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub json: Option<serde_json::Value>,
    /// The status that counts as done; without it any below 400.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Port inside the replica; without it the first that the replica declares.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// How long one attempt may take; without it one minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Span>,
    /// How often it is tried again after a failure.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub retries: u32,
    /// How long to wait before it is tried again; without it half a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause: Option<Span>,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// A duration, written as `30s` or `500ms`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Span(pub Duration);

impl TryFrom<String> for Span {
    type Error = humantime::DurationError;

    fn try_from(text: String) -> Result<Self, humantime::DurationError> {
        humantime::parse_duration(&text).map(Self)
    }
}

impl From<Span> for String {
    fn from(span: Span) -> Self {
        humantime::format_duration(span.0).to_string()
    }
}

impl Engine {
    /// Steps by the name of a preset, or from a file where the text is a path (it has a slash or ends with `.toml`).
    ///
    /// # Errors
    /// [`Error::Malformed`] for an unknown name, and what [`Engine::parse`] says of a file.
    pub fn load(text: &str) -> Result<Self> {
        let path = Path::new(text);
        if text.contains('/') || path.extension().is_some_and(|kind| kind == "toml") {
            let read = crate::file::read_bounded(path, ENGINE_FILE_BYTES_MAX).and_then(|bytes| {
                String::from_utf8(bytes)
                    .map_err(|error| std::io::Error::new(std::io::ErrorKind::InvalidData, error))
            });
            let content = read.map_err(|source| Error::ReadFile { path: path.to_owned(), source })?;
            return Self::parse(&content, path);
        }
        let preset = PRESETS.iter().find(|(name, _)| *name == text).ok_or_else(|| Error::Malformed {
            what: "engine",
            seen: text.to_owned(),
            expected: "vllm, sglang, torch, llamacpp, generic, or the path of a file",
        })?;
        Self::parse(preset.1, Path::new(preset.0))
    }

    /// Steps from TOML; `path` is how errors call it.
    ///
    /// # Errors
    /// [`Error::ParseFile`] with the line, [`Error::BadValue`] for a step that says too much or too little.
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let parse_error = |source| Error::ParseFile { path: path.to_owned(), source: Box::new(source) };
        let engine: Self = toml::from_str(text).map_err(parse_error)?;
        for (list, steps) in [("before", &engine.before), ("after", &engine.after)] {
            let bad =
                |table: String, key, seen: String, expected| Error::BadValue { key, table, seen, expected };
            if steps.len() > ENGINE_STEPS_MAX {
                let seen = format!("given {} times", steps.len());
                return Err(bad(path.display().to_string(), list, seen, "at most 32 steps"));
            }
            for step in steps {
                let table = format!("[[{list}]] {:?} of {}", step.name, path.display());
                let kinds =
                    [&step.post, &step.get, &step.command].iter().filter(|kind| kind.is_some()).count();
                if kinds != 1 {
                    let seen = format!("{kinds} of them");
                    return Err(bad(table, "post, get or command", seen, "exactly one"));
                }
                if [&step.post, &step.get].into_iter().flatten().any(|path| !path.starts_with('/')) {
                    let seen = step.post.clone().or(step.get.clone()).unwrap_or_default();
                    return Err(bad(table, "post or get", seen, "a path that begins with a slash"));
                }
                if step.json.is_some() && step.post.is_none() {
                    return Err(bad(table, "json", "given".to_owned(), "only beside post"));
                }
                if step.retries > ENGINE_RETRIES_MAX {
                    return Err(bad(table, "retries", step.retries.to_string(), "at most 1000"));
                }
            }
        }
        Ok(engine)
    }
}

/// Takes steps in their order. `port` is the first that the replica declares.
///
/// # Errors
/// [`Error::Step`] with the first step that failed in all its attempts, and what it failed with in the last.
pub async fn take(steps: &[Step], dial: &dyn Dial, port: Option<u16>) -> Result<()> {
    for step in steps {
        step.take(dial, port).await?;
    }
    Ok(())
}

/// Takes steps in their order, each whether the one before it failed or not, and gives the failures. For a server that serves
/// others: one that was told to wait would wait for ever if the step that lets it go on were left out.
pub async fn take_all(steps: &[Step], dial: &dyn Dial, port: Option<u16>) -> Vec<Error> {
    let mut failures = Vec::new();
    for step in steps {
        failures.extend(step.take(dial, port).await.err());
    }
    failures
}

impl Step {
    /// In as many attempts as it may have.
    async fn take(&self, dial: &dyn Dial, port: Option<u16>) -> Result<()> {
        let mut attempts = 0;
        while let Err(failure) = self.attempt(dial, port).await {
            attempts += 1;
            if attempts > self.retries {
                return Err(Error::Step { step: self.name.clone(), attempts, failure });
            }
            tokio::time::sleep(self.pause.map_or(PAUSE, |pause| pause.0)).await;
        }
        Ok(())
    }

    /// One attempt; what it failed with.
    async fn attempt(&self, dial: &dyn Dial, port: Option<u16>) -> Result<(), String> {
        let timeout = self.timeout.map_or(HOOK_TIMEOUT, |timeout| timeout.0);
        if let Some(command) = &self.command {
            let ended = dial.exec(command, timeout).await.map_err(|error| error.to_string())?;
            return match ended.status {
                Some(status) if status.success() => Ok(()),
                Some(status) => Err(format!("ended with {status}: {}", ended.tail())),
                None => Err(format!("did not end within {}", humantime::format_duration(timeout))),
            };
        }
        let (method, path) = match (&self.post, &self.get) {
            (Some(path), _) => ("POST", path),
            (None, Some(path)) => ("GET", path),
            (None, None) => unreachable!("looked at when it was read"),
        };
        let Some(port) = self.port.or(port) else {
            return Err("the replica declares no port, and the step names none".to_owned());
        };
        let json = self.json.as_ref().map(|json| Bytes::from(json.to_string()));
        let headers = [("content-type".to_owned(), "application/json".to_owned())];
        let headers = if json.is_some() { &headers[..] } else { &[] };
        let body = json.unwrap_or_default();
        let reply = call(dial, &Call { port, method, path, headers, body, timeout }).await;
        let reply = reply.map_err(|error| match error {
            RequestError::TimedOut { .. } => {
                format!("no answer within {}", humantime::format_duration(timeout))
            }
            error => error.to_string(),
        })?;
        let status = reply.status.as_u16();
        if self.status.map_or(status < 400, |wanted| wanted == status) {
            Ok(())
        } else {
            Err(format!("answered {status}: {}", tail(&reply.body)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_understood_and_survives_json() {
        for (name, text) in PRESETS {
            let says = text.contains("not tried") || name == "generic";
            assert!(says, "{name} does not say what was not tried");
            let engine = Engine::load(name).unwrap_or_else(|error| panic!("{name}: {error}"));
            let json = serde_json::to_value(&engine).expect("JSON");
            assert_eq!(serde_json::from_value::<Engine>(json).expect("JSON"), engine, "{name}");
        }
        let paths = |steps: &[Step]| -> Vec<String> {
            let path = |step: &Step| step.post.clone().or(step.get.clone()).unwrap_or_default();
            steps.iter().map(|step| path(step).split('?').next().unwrap_or_default().to_owned()).collect()
        };
        // Whatever is asked to sleep has nothing in work any more, and what is asked to answer goes on before.
        let vllm = Engine::load("vllm").expect("a preset");
        assert_eq!(paths(&vllm.before), ["/pause", "/sleep", "/wake_up"]);
        assert_eq!(paths(&vllm.after), ["/wake_up", "/resume", "/health", "/v1/completions"]);
        let sglang = Engine::load("sglang").expect("a preset");
        assert_eq!(paths(&sglang.before), ["/pause_generation", "/release_memory_occupation"]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_step() {
        let text = |text: &str| Engine::parse(text, Path::new("x.toml")).expect_err("wrong").to_string();
        let unknown = Engine::load("tgi").expect_err("unknown").to_string();
        assert!(unknown.contains("vllm, sglang"), "{unknown}");
        assert!(text("[[before]]\nname = 'a'\n").contains("\"a\" of x.toml"));
        assert!(text("[[after]]\nname = 'a'\nget = 'health'\n").contains("a path that begins with a slash"));
        assert!(text("[[after]]\nname = 'a'\nget = '/'\njson = {}\n").contains("only beside post"));
        assert!(text("[[after]]\nname = 'a'\nget = '/'\nretries = 5000\n").contains("at most 1000"));
        assert!(matches!(Engine::parse("[[befor]]", Path::new("x.toml")), Err(Error::ParseFile { .. })));
        assert!(matches!(Engine::load("/no/such.toml"), Err(Error::ReadFile { .. })));
    }
}
