//! Runs the `rewarm` program as a user would.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::process::Command;

use crate::client::Expected;
use crate::error::{Error, Result};
use crate::machine;
use crate::outcome::Sample;
use crate::subject::Subject;

/// Name of the replica in every case.
const NAME: &str = "bench";
/// How long the rest of the memory may take to arrive.
const PRESENT_WITHIN: Duration = Duration::from_secs(600);
/// How long a fetcher may take to end.
const ENDED_WITHIN: Duration = Duration::from_secs(10);
/// How often it is looked whether it has.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// The program and one state folder.
#[derive(Debug, Clone)]
pub(crate) struct Rewarm {
    program: PathBuf,
    criu: PathBuf,
    state: PathBuf,
    keeps_decoded: bool,
}

impl Rewarm {
    pub(crate) fn new(program: &Path, criu: &Path, state: &Path) -> Self {
        Self {
            program: program.to_owned(),
            criu: criu.to_owned(),
            state: state.to_owned(),
            keeps_decoded: false,
        }
    }

    /// What it restores stays decoded in memory for the next restore.
    pub(crate) fn keeping_decoded(self) -> Self {
        Self { keeps_decoded: true, ..self }
    }

    /// Runs one command and gives what it printed.
    pub(crate) async fn call<S: AsRef<str>>(&self, arguments: &[S]) -> Result<Value> {
        let arguments: Vec<&str> = arguments.iter().map(AsRef::as_ref).collect();
        let mut command = Command::new(&self.program);
        command.arg("--json").arg("--state").arg(&self.state).arg("--criu").arg(&self.criu).args(&arguments);
        // The fetcher ends when it is told to, not meanwhile. What is read from a store is read from the store.
        command.env("REWARM_FETCHER_IDLE", "1h");
        if self.keeps_decoded {
            command.env_remove("REWARM_CACHE_MEMORY");
        } else {
            // Nor is anything decoded for a later restore, which does not come, while the next case is measured.
            command.env("REWARM_CACHE_MEMORY", "0");
        }
        command.env("REWARM_CACHE_DISK", "0");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output =
            command.output().await.map_err(Error::io(format!("start {}", self.program.display())))?;
        let program = format!("rewarm {}", arguments.first().unwrap_or(&""));
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said.lines().rev().take(5).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>();
            let status = output.status.to_string();
            return Err(Error::Program { program, status, last: last.join("; ") });
        }
        serde_json::from_slice(&output.stdout).map_err(|_| Error::Output {
            program,
            expected: "JSON",
            seen: String::from_utf8_lossy(&output.stdout).chars().take(200).collect(),
        })
    }

    /// Starts the server cold and gives its port on the machine.
    pub(crate) async fn run(&self, subject: &Subject) -> Result<u16> {
        let (port, publish) = (subject.port.to_string(), publish(subject));
        let mut arguments =
            vec!["run", NAME, "--port", &port, "--publish", &publish, "--ready", &subject.ready];
        for mount in &subject.mount {
            arguments.extend(["--mount", mount]);
        }
        arguments.push("--");
        arguments.extend(subject.command.iter().map(String::as_str));
        host_port("run", &self.call(&arguments).await?)
    }

    /// A cold start: from the command to its first answer.
    pub(crate) async fn cold(&self, subject: &Subject, expected: &Expected) -> Result<Sample> {
        let (began, busy) = (Instant::now(), machine::busy_ms()?);
        let port = self.run(subject).await?;
        let resume = began.elapsed().as_secs_f64() * 1000.0;
        let first_answer = expected.ask(port, began, "cold").await?;
        let cpu_ms = Some(machine::busy_ms()? - busy);
        self.remove().await?;
        Ok(Sample {
            resume_ms: Some(resume),
            first_answer_ms: Some(first_answer),
            cpu_ms,
            ..Sample::default()
        })
    }

    /// One restore: ready, first answer, all memory present; then the replica is removed.
    pub(crate) async fn restore(
        &self,
        reference: &str,
        mode: &str,
        subject: &Subject,
        expected: &Expected,
        case: &str,
    ) -> Result<Sample> {
        let before = self.bytes_read().await?;
        let (began, busy) = (Instant::now(), machine::busy_ms()?);
        let elapsed = || began.elapsed().as_secs_f64() * 1000.0;
        let publish = publish(subject);
        let arguments =
            ["restore", reference, "--name", NAME, "--mode", mode, "--no-probe", "--publish", &publish];
        let answer = self.call(&arguments).await?;
        let resume = elapsed();
        let first_answer = expected.ask(host_port("restore", &answer)?, began, case).await?;
        let told = self.present(began).await?;
        // All of it was there before the server ran, as with stock CRIU, whenever it is told.
        let present = if mode == "eager" { resume } else { told };
        let cpu_ms = Some(machine::busy_ms()? - busy);
        let bytes_read = Some(self.bytes_read().await? - before);
        self.remove().await?;
        Ok(Sample {
            resume_ms: Some(resume),
            first_answer_ms: Some(first_answer),
            present_ms: Some(present),
            bytes_read,
            cpu_ms,
        })
    }

    /// Restores with the whole probe, so that the working set is recorded and the cache is filled, and removes the replica.
    pub(crate) async fn prime(&self, reference: &str) -> Result<()> {
        self.call(&["restore", reference, "--name", NAME, "--mode", "lazy"]).await?;
        self.present(Instant::now()).await?;
        self.remove().await
    }

    /// Waits until what was restored lies decoded in memory, which begins when nobody waits.
    pub(crate) async fn await_decoded(&self) -> Result<()> {
        let began = Instant::now();
        loop {
            let cache = self.call(&["cache"]).await?;
            if cache.pointer("/streams/0/complete") == Some(&Value::Bool(true)) {
                return Ok(());
            }
            if began.elapsed() > PRESENT_WITHIN {
                let what = "the decoded content of the snapshot".to_owned();
                return Err(Error::Late { what, seconds: PRESENT_WITHIN.as_secs() });
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Snapshots the running server, which goes on.
    pub(crate) async fn snapshot(&self, reference: &str, probe: &Path, compression: &str) -> Result<()> {
        let probe = probe.display().to_string();
        self.call(&["snapshot", NAME, reference, "--probe", &probe, "--compression", compression]).await?;
        Ok(())
    }

    /// Waits until all memory of the replica is resident. Milliseconds since `began`.
    async fn present(&self, began: Instant) -> Result<f64> {
        loop {
            let listed = self.call(&["ps"]).await?;
            match listed.pointer("/replicas/0/memory").and_then(Value::as_str) {
                Some("present") => return Ok(began.elapsed().as_secs_f64() * 1000.0),
                Some("filling") if began.elapsed() < PRESENT_WITHIN => {}
                Some("filling") => {
                    let what = "all memory of the replica present".to_owned();
                    return Err(Error::Late { what, seconds: PRESENT_WITHIN.as_secs() });
                }
                _ => {
                    let seen = listed.to_string().chars().take(200).collect();
                    return Err(Error::Output { program: "rewarm ps".to_owned(), expected: "memory", seen });
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Bytes that the fetcher has read, once all its streams are complete; none where there is no fetcher.
    async fn bytes_read(&self) -> Result<u64> {
        let deadline = Instant::now() + PRESENT_WITHIN;
        loop {
            let cache = self.call(&["cache"]).await?;
            let streams = cache["streams"].as_array().map_or(&[][..], Vec::as_slice);
            if streams.iter().all(|stream| stream["complete"] == true) {
                return Ok(cache["read_bytes"].as_u64().unwrap_or(0));
            }
            if Instant::now() > deadline {
                let what = "the end of the fetch".to_owned();
                return Err(Error::Late { what, seconds: PRESENT_WITHIN.as_secs() });
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Ends the fetcher, and what it holds in memory with it, and waits until it is gone.
    pub(crate) async fn end_fetcher(&self) -> Result<()> {
        let cache = self.call(&["cache"]).await?;
        let pid = cache["pid"].as_u64().and_then(|pid| i32::try_from(pid).ok());
        let Some(pid) = pid.map(Pid::from_raw) else { return Ok(()) };
        // One that has ended by itself is as good.
        let _ = kill(pid, Signal::SIGTERM);
        let deadline = Instant::now() + ENDED_WITHIN;
        // Whoever asks it in its last moment gets an error.
        while !self.call(&["cache"]).await.is_ok_and(|cache| cache["running"] == false) {
            if Instant::now() > deadline {
                let what = "the end of the fetcher".to_owned();
                return Err(Error::Late { what, seconds: ENDED_WITHIN.as_secs() });
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// Ends the replica and forgets it.
    pub(crate) async fn remove(&self) -> Result<()> {
        self.call(&["stop", NAME, "--timeout", "0s"]).await?;
        self.call(&["rm", NAME]).await?;
        Ok(())
    }
}

fn publish(subject: &Subject) -> String {
    format!("127.0.0.1:0:{}", subject.port)
}

/// The host port of the only published port in what `run` or `restore` printed.
fn host_port(verb: &str, answer: &Value) -> Result<u16> {
    let replica = answer.pointer("/replicas/0").unwrap_or(answer);
    let port = replica.pointer("/publish/0/host_port").and_then(Value::as_u64);
    port.and_then(|port| u16::try_from(port).ok()).ok_or_else(|| Error::Output {
        program: format!("rewarm {verb}"),
        expected: "host port",
        seen: answer.to_string().chars().take(200).collect(),
    })
}
