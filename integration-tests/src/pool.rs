//! `rewarm serve` under test: a configuration, the program, and what can be seen of it from outside.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::command::{Output, Rewarm, Running};
use crate::replica::entries;
use crate::world::World;

/// How long a busy machine may take until replicas are as they should be.
const REPLICAS_MAX: Duration = Duration::from_secs(60);
/// How long `serve` may run, all in all: hours where `make soak` asks for many rounds.
fn serve_max() -> Duration {
    let soak = ["REWARM_SOAK_SCALINGS", "REWARM_SOAK_RESTARTS", "REWARM_SOAK_AWAY_SECONDS"]
        .iter()
        .any(|name| std::env::var_os(name).is_some());
    Duration::from_secs(if soak { 7200 } else { 300 })
}

const POLL: Duration = Duration::from_millis(50);

/// `rewarm serve` in a world. Dropping it kills it; its replicas stay until the world ends.
#[derive(Debug)]
pub struct Serving<'a> {
    world: &'a World,
    running: Running,
}

/// A port of this machine that nobody has at the moment.
///
/// # Panics
///
/// When there is none.
#[must_use]
pub fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
    listener.local_addr().expect("its address").port()
}

impl World {
    /// Starts `rewarm serve` with this configuration, and waits until clients can come.
    ///
    /// # Panics
    ///
    /// When it ends before that.
    #[must_use]
    pub fn serve(&self, config: &str) -> Serving<'_> {
        self.serve_as(config, |call| call)
    }

    /// The same with something added to the call.
    ///
    /// # Panics
    ///
    /// As [`World::serve`].
    #[must_use]
    pub fn serve_as(&self, config: &str, call: impl FnOnce(Rewarm) -> Rewarm) -> Serving<'_> {
        self.configure(config);
        let running = call(self.serve_call()).spawn();
        running.await_stdout("is served");
        Serving { world: self, running }
    }

    /// Writes the configuration of [`World::serve`].
    ///
    /// # Panics
    ///
    /// When the file cannot be written.
    pub fn configure(&self, config: &str) {
        std::fs::write(self.files().join("pool.toml"), config).expect("our own folder");
    }

    /// The call of `rewarm serve`.
    #[must_use]
    pub fn serve_call(&self) -> Rewarm {
        let file = self.files().join("pool.toml");
        self.rewarm().env("REWARM_LOG", "info").args(["serve", "-f"]).arg(file).timeout(serve_max())
    }
}

impl Serving<'_> {
    /// Its process.
    #[must_use]
    pub fn running(&self) -> &Running {
        &self.running
    }

    /// Process id of the gateway.
    ///
    /// # Panics
    ///
    /// When there is none for a minute.
    #[must_use]
    pub fn gateway(&self) -> i32 {
        let began = Instant::now();
        loop {
            if let Some(pid) = children(self.running.pid()).into_iter().find(|pid| is_gateway(*pid)) {
                return pid;
            }
            assert!(began.elapsed() < REPLICAS_MAX, "no gateway; serve said:\n{}", self.running.stderr());
            std::thread::sleep(POLL);
        }
    }

    /// The replicas that live, as `rewarm ps` shows them: name and status.
    #[must_use]
    pub fn replicas(&self) -> Vec<(String, String)> {
        let list = self.world.rewarm_json().arg("ps").ok();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        entries(&list)
            .iter()
            .filter(|entry| !entry["labels"]["rewarm.pool"].is_null())
            .map(|entry| (text(&entry["name"]), text(&entry["status"])))
            .collect()
    }

    /// Descriptors of all shims of the pools' replicas.
    ///
    /// # Panics
    ///
    /// When one ends meanwhile.
    #[must_use]
    pub fn descriptors_of_shims(&self) -> usize {
        let list = self.world.rewarm_json().arg("ps").ok();
        let of_pools = |entry: &&Value| !entry["labels"]["rewarm.pool"].is_null();
        let shim =
            |entry: &Value| i32::try_from(entry["shim_pid"].as_i64().expect("its shim")).expect("a process");
        entries(&list).iter().filter(of_pools).map(|entry| descriptors(shim(entry))).sum()
    }

    /// Waits until the replicas that live have these statuses, in any order.
    ///
    /// # Panics
    ///
    /// When they do not for a minute.
    pub fn await_replicas(&self, statuses: &[&str]) {
        let mut wanted: Vec<&str> = statuses.to_vec();
        wanted.sort_unstable();
        let began = Instant::now();
        loop {
            let replicas = self.replicas();
            let mut seen: Vec<&str> = replicas.iter().map(|(_, status)| status.as_str()).collect();
            seen.sort_unstable();
            if seen == wanted {
                return;
            }
            let said = self.running.stderr();
            assert!(began.elapsed() < REPLICAS_MAX, "{replicas:?}, expected {wanted:?}; serve said:\n{said}");
            std::thread::sleep(POLL);
        }
    }

    /// Asks it to end, and waits for that.
    ///
    /// # Panics
    ///
    /// When it does not end with 0.
    pub fn end(self) -> Output {
        self.running.signal(Signal::SIGTERM);
        let output = self.running.wait();
        output.expect_code(0);
        output
    }

    /// Kills it.
    pub fn kill(self) {
        self.running.signal(Signal::SIGKILL);
        let _ = self.running.wait();
    }
}

/// The children of all threads of a process; none where it is gone.
fn children(pid: i32) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

fn is_gateway(pid: i32) -> bool {
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    command.split(|byte| *byte == 0).nth(1) == Some(b"gateway")
}

/// How many descriptors a process has open.
///
/// # Panics
///
/// When it is gone.
#[must_use]
pub fn descriptors(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it lives").count()
}
