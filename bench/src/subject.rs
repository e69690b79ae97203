//! Which server is measured: a file that a user writes, or the one of this crate.
//!
//! ```toml
//! command = ["python3", "server.py", "--port", "8000"]
//! port = 8000
//! ready = "http://127.0.0.1:8000/healthz"
//! probe = "probe.toml"          # its first request is the question whose answer is timed
//! mount = ["/models:/models:ro"]
//! ```

use std::path::{Path, PathBuf};

use rewarm_probe::Probe;
use serde::Deserialize;

use crate::error::{Error, Result};

/// A server that can be measured.
#[derive(Debug, Clone)]
pub struct Subject {
    /// What starts it.
    pub command: Vec<String>,
    /// Where it listens.
    pub port: u16,
    /// When it is ready, as `rewarm run --ready` takes it.
    pub ready: String,
    /// Folders that it needs beside the root file system, as `rewarm run --mount` takes them.
    pub mount: Vec<String>,
    /// The probe file that snapshots are made with.
    pub probe: PathBuf,
    /// The question whose answer is timed: its first.
    pub question: Probe,
}

#[derive(Deserialize)]
struct Raw {
    command: Vec<String>,
    port: u16,
    ready: String,
    probe: PathBuf,
    #[serde(default)]
    mount: Vec<String>,
}

const KEYS: [&str; 5] = ["command", "port", "ready", "probe", "mount"];

impl Subject {
    /// Reads a server file. A relative path of the probe counts from the folder of the file.
    ///
    /// # Errors
    /// [`Error::Server`] with what is wrong, the nearest known key for an unknown one included.
    pub fn load(path: &Path) -> Result<Self> {
        let wrong = |problem: String| Error::Server { path: path.to_owned(), problem };
        let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| wrong(error.to_string()))?;
        if let Some(key) = table.keys().find(|key| !KEYS.contains(&key.as_str())) {
            let nearest = KEYS
                .iter()
                .max_by(|a, b| strsim::jaro_winkler(a, key).total_cmp(&strsim::jaro_winkler(b, key)));
            return Err(wrong(format!(
                "unknown key {key:?}; the nearest known key is {:?}",
                nearest.expect("five")
            )));
        }
        let raw: Raw = toml::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        if raw.command.is_empty() {
            return Err(wrong("command is empty, expected a program and its arguments".to_owned()));
        }
        let probe = path.parent().unwrap_or(Path::new("")).join(&raw.probe);
        let mut question = Probe::load(&probe).map_err(|error| wrong(error.to_string()))?;
        question.requests.truncate(1);
        Ok(Self { command: raw.command, port: raw.port, ready: raw.ready, mount: raw.mount, probe, question })
    }

    /// The server of this crate over the file `weights` in the folder `work`; `program` is the one whose hidden verb
    /// `bench-server` serves.
    ///
    /// # Errors
    /// No port is free, or the probe file cannot be written.
    pub fn built_in(program: &Path, work: &Path, touch: f64) -> Result<Self> {
        let (port, probe) = (free_port()?, work.join("probe.toml"));
        let text = "[[request]]\npath = \"/answer\"\ncompare = \"body\"\n";
        std::fs::write(&probe, text).map_err(Error::io(format!("write {}", probe.display())))?;
        let weights = work.join(WEIGHTS).display().to_string();
        let flags = ["--port", &port.to_string(), "--weights", &weights, "--touch", &touch.to_string()];
        let command = [program.display().to_string(), "bench-server".to_owned()].into_iter();
        Ok(Self {
            command: command.chain(flags.map(str::to_owned)).collect(),
            port,
            ready: format!("http://127.0.0.1:{port}/healthz"),
            mount: Vec::new(),
            question: Probe::parse(text, &probe).expect("a probe of this program"),
            probe,
        })
    }
}

/// The file of weights in the work folder.
pub(crate) const WEIGHTS: &str = "weights";

/// A port that nobody listens on now. Another program may take it before the server does, which is told then.
fn free_port() -> Result<u16> {
    let listener =
        std::net::TcpListener::bind(("127.0.0.1", 0)).map_err(Error::io("find a port that is free"))?;
    Ok(listener.local_addr().map_err(Error::io("find a port that is free"))?.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Subject> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("probe.toml"), "[[request]]\npath='/a'\n[[request]]\npath='/b'\n")
            .unwrap();
        let path = folder.path().join("server.toml");
        std::fs::write(&path, text).unwrap();
        Subject::load(&path)
    }

    #[test]
    fn the_first_request_of_the_probe_is_the_question() {
        let subject = load("command=['a']\nport=1\nready='tcp:1'\nprobe='probe.toml'").unwrap();
        assert_eq!(subject.question.requests.len(), 1);
        assert_eq!(subject.question.requests[0].path, "/a");
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, says) in [
            ("comand=['a']\nport=1\nready='tcp:1'\nprobe='probe.toml'", "nearest known key is \"command\""),
            ("command=[]\nport=1\nready='tcp:1'\nprobe='probe.toml'", "command is empty"),
            ("command=['a']\nport=70000\nready='tcp:1'\nprobe='probe.toml'", "port"),
            ("command=['a']\nport=1\nready='tcp:1'\nprobe='gone.toml'", "gone.toml"),
            ("command=", "TOML parse error"),
        ] {
            let error = load(text).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
