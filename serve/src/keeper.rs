//! The parent process: root, makes and ends replicas, opens connections into them, and parses nothing from clients.
//!
//! It does what the gateway asks for, as far as that is about the pools of its configuration, and tells what came of it.
//! Each replica has a task of its own, in which one thing happens after the other.

mod addresses;
mod file;
mod replica;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use rewarm_autoscaler::pool::Tier;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use self::addresses::Addresses;
use self::file::File;
use self::replica::{Job, Task};
use crate::config::{Config, OnExit, PoolConfig};
use crate::control::SOCKET_FD;
use crate::error::{Error, Result};
use crate::link::{Configure, Line, ToGateway, ToParent};
use crate::replicas::{Known, Order, Replicas};

/// How long a connection to a replica's own loopback interface may take.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the gateway may be started anew in a row, and how long that waits.
const GATEWAY_DEATHS_MAX: u32 = 5;
const GATEWAY_REST: Duration = Duration::from_millis(500);
/// A gateway that has lived so long was no failure.
const GATEWAY_SETTLED: Duration = Duration::from_secs(60);
/// How often a snapshot is looked for that was not found, or is not followed.
const FIND_AGAIN: Duration = Duration::from_secs(10);
/// How often it is looked whether a snapshot is still on this machine that is to be, and whether there is room for one by now.
const PREFETCH_AGAIN: Duration = Duration::from_secs(10);
const ROOM_AGAIN: Duration = Duration::from_secs(60);
/// How long a store may take for what a new pool's replicas take of memory, before the pool begins without that.
const FIRST_LOOK: Duration = Duration::from_secs(2);
const LOCK: &str = "serve.lock";

/// What `rewarm serve` works with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The configuration file.
    pub config: PathBuf,
    /// The state folder: one `serve` for each.
    pub state: PathBuf,
    /// The program whose hidden verb `gateway` is the other process.
    pub program: PathBuf,
}

/// Serves until SIGTERM or SIGINT; SIGHUP reads the file again. `ready` is called once, when clients can come.
///
/// # Errors
/// The configuration is not good, another `serve` has the state folder, an address is taken, or the gateway cannot be
/// kept alive. Replicas stay then; the next `serve` finds them.
pub async fn run(settings: Settings, replicas: Arc<dyn Replicas>, ready: impl FnOnce(&Config)) -> Result<()> {
    let config = check(&settings.config)?;
    let _lock = lock(&settings.state)?;
    let device_bytes = replicas.device_bytes().await;
    let mut keeper = Keeper {
        settings,
        replicas,
        config,
        left: Vec::new(),
        addresses: Addresses::default(),
        tasks: HashMap::new(),
        finding: Vec::new(),
        device_bytes,
        line: None,
    };
    let outcome = keeper.serve(ready).await;
    keeper.finding.iter().for_each(JoinHandle::abort);
    outcome
}

/// Reads a configuration and the files that it names, and starts nothing.
///
/// # Errors
/// One of them cannot be read, or is not good.
pub fn check(file: &Path) -> Result<Config> {
    File::read(file).map(|file| file.config)
}

fn lock(state: &Path) -> Result<Flock<std::fs::File>> {
    let path = state.join(LOCK);
    let open = std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(&path);
    let file = open.map_err(|source| Error::ReadFile { what: "lock", path: path.clone(), source })?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| Error::Taken { state: state.to_owned() })
}

struct Keeper {
    settings: Settings,
    replicas: Arc<dyn Replicas>,
    config: Config,
    /// Pools that are not in the file any more, until nothing can be held there from before.
    left: Vec<(PoolConfig, Instant)>,
    addresses: Addresses,
    tasks: HashMap<String, Task>,
    /// One for each pool: looks at its snapshot.
    finding: Vec<JoinHandle<()>>,
    /// What all devices of this machine have, where that is known: they stay as they are.
    device_bytes: Option<u64>,
    line: Option<Line>,
}

/// The gateway process.
struct Gateway {
    child: Child,
    heard: mpsc::UnboundedReceiver<ToParent>,
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // It ends when its parent closes the line; one that does not has nothing left to answer.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How a gateway's life ended.
enum Ended {
    /// As it was asked to.
    Finished,
    /// By itself.
    Died,
}

impl Keeper {
    async fn serve(&mut self, ready: impl FnOnce(&Config)) -> Result<()> {
        let watch =
            |kind| signal(kind).map_err(|source| Error::Gateway { doing: "watch for signals", source });
        let mut signals = Signals {
            ends: [watch(SignalKind::terminate())?, watch(SignalKind::interrupt())?],
            hang_up: watch(SignalKind::hangup())?,
        };
        let mut ready = Some(ready);
        let mut deaths = 0;
        loop {
            let began = Instant::now();
            let mut gateway = self.start_gateway().await?;
            match self.attend(&mut gateway, &mut signals, &mut ready).await? {
                Ended::Finished => break,
                Ended::Died => {
                    drop(gateway);
                    self.line = None;
                    deaths = if began.elapsed() > GATEWAY_SETTLED { 1 } else { deaths + 1 };
                    if deaths > GATEWAY_DEATHS_MAX {
                        return Err(Error::GatewayDies { times: deaths });
                    }
                    tracing::error!("the gateway has ended; replicas stay, and another one is started");
                    self.abandon().await;
                    tokio::time::sleep(GATEWAY_REST).await;
                }
            }
        }
        self.leave().await;
        Ok(())
    }

    /// Starts a gateway, and tells it everything.
    async fn start_gateway(&mut self) -> Result<Gateway> {
        let failed = |doing| move |source| Error::Gateway { doing, source };
        let (ours, theirs) = UnixStream::pair().map_err(failed("make its socket"))?;
        let mut command = Command::new(&self.settings.program);
        command.arg("gateway").current_dir("/").stdin(Stdio::null()).env_clear();
        command.envs(std::env::vars_os().filter(|(name, _)| name == "REWARM_LOG" || name == "NO_COLOR"));
        rewarm_sys::process::inherit(&mut command, vec![(theirs.into(), SOCKET_FD)])
            .map_err(failed("prepare its socket"))?;
        let child = command.spawn().map_err(failed("start it"))?;
        drop(command);
        let line = Line::new(ours);
        let (told, heard) = mpsc::unbounded_channel();
        let hearing = line.clone();
        let listen = move || {
            loop {
                match hearing.hear::<ToParent>() {
                    Ok(Some((message, _))) => {
                        if told.send(message).is_err() {
                            return;
                        }
                    }
                    Ok(None) => return,
                    Err(error) => return tracing::error!(%error, "the gateway sent nonsense"),
                }
            }
        };
        std::thread::Builder::new()
            .name("gateway".to_owned())
            .spawn(listen)
            .map_err(failed("listen to it"))?;
        let gateway = Gateway { child, heard };
        self.line = Some(line.clone());
        self.addresses.forget();
        let existing = self.replicas.existing().map_err(|reason| Error::Replicas { reason })?;
        for replica in &existing {
            let task = Task::adopt(&replica.name, self.replicas.clone(), line.clone());
            self.tasks.insert(replica.name.clone(), task);
        }
        self.configure(existing, true).await?;
        Ok(gateway)
    }

    /// Tells the gateway what it is to do from now on. `first`: it knows nothing yet.
    async fn configure(&mut self, existing: Vec<crate::replicas::Existing>, first: bool) -> Result<()> {
        let Some(line) = self.line.clone() else { return Ok(()) };
        let File { text, config, tls, token } = File::read(&self.settings.config)?;
        self.replicas.check(&config).map_err(|problem| Error::Pools { problem })?;
        let before = if first { &[][..] } else { &self.config.pools };
        let known = first_look(&config, before, self.device_bytes.is_some(), &self.replicas).await;
        let opened = self.addresses.open(&config)?;
        let listening = opened.iter().map(|(purpose, address, _)| (*purpose, *address)).collect();
        let sockets: Vec<OwnedFd> = opened.into_iter().map(|(_, _, socket)| socket.into()).collect();
        let fds: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
        let configure = Configure {
            text,
            path: self.settings.config.clone(),
            listening,
            tls,
            token,
            existing,
            device_bytes: self.device_bytes,
            known,
        };
        line.tell(&ToGateway::Configure(Box::new(configure)), &fds)
            .map_err(|source| Error::Gateway { doing: "tell it its configuration", source })?;
        self.finding.drain(..).for_each(|task| task.abort());
        for pool in &config.pools {
            self.finding.push(tokio::spawn(find(pool.clone(), self.replicas.clone(), line.clone())));
        }
        let before = std::mem::replace(&mut self.config, config);
        let now = Instant::now();
        let gone = before.pools.into_iter().map(|pool| (pool.queue.deadline, pool));
        self.left.extend(gone.map(|(deadline, pool)| (pool, now + deadline)));
        let again = |pool: &PoolConfig| self.config.pools.iter().any(|config| config.name == pool.name);
        self.left.retain(|(pool, until)| *until > now && !again(pool));
        Ok(())
    }

    /// Does what the gateway asks for, until one of the two ends.
    async fn attend(
        &mut self,
        gateway: &mut Gateway,
        signals: &mut Signals,
        ready: &mut Option<impl FnOnce(&Config)>,
    ) -> Result<Ended> {
        loop {
            let message = tokio::select! {
                message = gateway.heard.recv() => message,
                signal = signals.next() => {
                    match signal {
                        Asked::End => self.tell(&ToGateway::Finish),
                        Asked::Reload => self.reload().await,
                    }
                    continue;
                }
            };
            match message {
                None => return Ok(Ended::Died),
                Some(ToParent::Finished) => return Ok(Ended::Finished),
                Some(ToParent::Configured) => {
                    if let Some(ready) = ready.take() {
                        ready(&self.config);
                    }
                }
                Some(message) => self.carry_out(message),
            }
        }
    }

    fn tell(&self, message: &ToGateway) {
        if let Some(line) = &self.line
            && let Err(error) = line.tell(message, &[])
        {
            tracing::debug!(%error, "the gateway cannot be told");
        }
    }

    /// Reads the file again. A file that is not good changes nothing.
    async fn reload(&mut self) {
        let before = self.config.serve.clone();
        match self.configure(Vec::new(), false).await {
            Ok(()) => {
                tracing::info!("the configuration was read again");
                for key in self.config.serve.waits_for_a_start(&before) {
                    tracing::warn!(key, "[serve] has another value, which holds from the next start on");
                }
            }
            Err(error) => {
                tracing::error!(error = %chain(&error), "the configuration is not good; the old one holds")
            }
        }
    }

    /// Does one thing that the gateway asks for. It is asked by a process that strangers talk to: what is not about a
    /// replica of its pools is not done.
    fn carry_out(&mut self, message: ToParent) {
        self.tasks.retain(|_, task| !task.is_over());
        match message {
            ToParent::Start { pool, name, tier } => {
                let Some(config) = self.may_start(&pool, &name) else {
                    tracing::error!(pool, name, "the gateway asked for a replica that it may not have");
                    return self
                        .tell(&ToGateway::Failed { name, reason: "it may not be started".to_owned() });
                };
                let Some(line) = self.line.clone() else { return };
                let order = Order { pool: config.clone(), name: name.clone(), tier };
                self.tasks.insert(name, Task::start(order, self.replicas.clone(), line));
            }
            ToParent::Capture { pool, name } => {
                let Some(config) = self.may_start(&pool, &name).filter(|config| config.capture) else {
                    let problem = Some("it may not be captured".to_owned());
                    return self.tell(&ToGateway::Captured { name, problem });
                };
                let Some(line) = self.line.clone() else { return };
                let order = Order { pool: config.clone(), name: name.clone(), tier: Tier::Cold };
                self.tasks.insert(name, Task::capture(order, self.replicas.clone(), line));
            }
            ToParent::GiveUp { name } => self.job(&name, Job::GiveUp),
            ToParent::Pause { name } => self.job(&name, Job::Pause),
            ToParent::Wake { name } => self.job(&name, Job::Wake),
            ToParent::Stop { name, why } => {
                tracing::info!(replica = name, why, "a replica is stopped");
                self.job(&name, Job::Stop);
            }
            ToParent::Dial { number, name, port } => self.dial(number, name, port),
            ToParent::Configured | ToParent::Finished => {}
        }
    }

    fn may_start(&self, pool: &str, name: &str) -> Option<&PoolConfig> {
        // What is held in a pool that is not in the file any more is answered all the same.
        let left = self.left.iter().filter(|(_, until)| *until > Instant::now()).map(|(config, _)| config);
        let config = self.config.pools.iter().chain(left).find(|config| config.name == pool)?;
        let own = name.strip_prefix(pool).is_some_and(|rest| rest.starts_with('-'));
        // Those that are on their way out count too, so there is some room.
        let most = (config.max_replicas + config.warm) as usize * 2 + 8;
        let pools = self.config.pools.len() + self.left.len();
        (own && !self.tasks.contains_key(name) && self.tasks.len() < most * pools).then_some(config)
    }

    fn job(&mut self, name: &str, job: Job) {
        match self.tasks.get_mut(name) {
            Some(task) => task.give(job),
            // It failed before, and nothing is left of it.
            None => self.tell(&ToGateway::Stopped { name: name.to_owned() }),
        }
    }

    fn dial(&self, number: u64, name: String, port: u16) {
        let Some(line) = self.line.clone() else { return };
        let (known, replicas) = (self.tasks.contains_key(&name), self.replicas.clone());
        tokio::task::spawn_blocking(move || {
            let dialled = if known {
                replicas.dial(&name, port, DIAL_TIMEOUT)
            } else {
                Err(io::ErrorKind::NotFound.into())
            };
            let told = match dialled {
                Ok(socket) => line.tell(&ToGateway::Dialled { number, error: None }, &[socket.as_fd()]),
                Err(error) => {
                    let error = Some((error.raw_os_error().unwrap_or(0), chain(&error)));
                    line.tell(&ToGateway::Dialled { number, error }, &[])
                }
            };
            if let Err(error) = told {
                tracing::debug!(%error, "the gateway cannot be told");
            }
        });
    }

    /// The gateway is gone: starts are given up, everything else stays.
    async fn abandon(&mut self) {
        for (_, task) in self.tasks.drain() {
            task.abandon().await;
        }
    }

    /// The end, as the file wants it.
    async fn leave(&mut self) {
        let stop = self.config.serve.on_exit == OnExit::Stop;
        let mut ending = Vec::new();
        for (_, mut task) in self.tasks.drain() {
            if stop {
                task.give(Job::GiveUp);
            }
            ending.push(tokio::spawn(task.abandon()));
        }
        for task in ending {
            // A task does not panic.
            let _ = task.await;
        }
    }
}

/// Looks at the snapshots that say what replicas of new pools take, where that is counted. A store that does not answer keeps no
/// pool from serving: what its replicas take is counted as soon as it is known.
async fn first_look(
    config: &Config,
    before: &[PoolConfig],
    devices: bool,
    replicas: &Arc<dyn Replicas>,
) -> BTreeMap<String, Known> {
    let new = |pool: &&PoolConfig| before.iter().all(|other| other.name != pool.name);
    let host = config.serve.memory.is_some();
    let counted = |pool: &&PoolConfig| devices || host && pool.replica_memory.is_none();
    let unknown = config.pools.iter().filter(counted).filter(new);
    let looks = unknown.map(async |pool| {
        let known = tokio::time::timeout(FIRST_LOOK, replicas.find(pool)).await.ok()?.ok()?;
        Some((pool.name.clone(), known))
    });
    futures::future::join_all(looks).await.into_iter().flatten().collect()
}

/// Looks at a pool's snapshot again and again, and tells what is new.
async fn find(pool: PoolConfig, replicas: Arc<dyn Replicas>, line: Line) {
    let mut last = None;
    let mut complained = false;
    // Ends with this.
    let mut prefetching = tokio::task::JoinSet::new();
    loop {
        let wait = match replicas.find(&pool).await {
            Ok(known) => {
                complained = false;
                if last.as_ref() != Some(&known) {
                    let told =
                        line.tell(&ToGateway::Known { pool: pool.name.clone(), known: known.clone() }, &[]);
                    if told.is_err() {
                        return;
                    }
                    prefetching.abort_all();
                    if pool.prefetch && known.fits {
                        prefetching.spawn(prefetch(pool.clone(), known.clone(), replicas.clone()));
                    }
                    last = Some(known);
                }
                pool.follow
            }
            Err(reason) => {
                if !std::mem::replace(&mut complained, true) {
                    tracing::warn!(
                        pool = pool.name,
                        snapshot = pool.snapshot,
                        reason,
                        "the snapshot was not found"
                    );
                }
                FIND_AGAIN.min(if pool.follow.is_zero() { FIND_AGAIN } else { pool.follow })
            }
        };
        if last.is_some() && pool.follow.is_zero() {
            while prefetching.join_next().await.is_some() {}
            return;
        }
        tokio::time::sleep(wait).await;
    }
}

/// Sees to it that a snapshot is on this machine, as long as it is the one that is wanted: a store that failed may come back, and
/// what lay decoded here goes when something else needs the memory.
async fn prefetch(pool: PoolConfig, known: Known, replicas: Arc<dyn Replicas>) {
    let (pool_name, snapshot) = (&pool.name, &known.source);
    let mut before = None;
    // The earlier one goes when the next one is there.
    let mut _kept = None;
    loop {
        let (now, reason) = match replicas.prefetch(&pool, &known).await {
            Ok(Some(kept)) => {
                _kept = Some(kept);
                (Prefetched::Here, None)
            }
            Ok(None) => (Prefetched::NoRoom, None),
            Err(reason) => (Prefetched::Failed, Some(reason)),
        };
        if before.replace(now) != Some(now) {
            match now {
                Prefetched::Here => {
                    tracing::info!(pool = pool_name, snapshot, "the snapshot is on this machine")
                }
                Prefetched::NoRoom => {
                    tracing::info!(
                        pool = pool_name,
                        snapshot,
                        "there is no room to keep the snapshot decoded"
                    )
                }
                Prefetched::Failed => {
                    tracing::warn!(
                        pool = pool_name,
                        snapshot,
                        reason,
                        "the snapshot was not brought here; it is tried again"
                    )
                }
            }
        }
        tokio::time::sleep(if now == Prefetched::NoRoom { ROOM_AGAIN } else { PREFETCH_AGAIN }).await;
    }
}

/// What became of bringing a snapshot here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prefetched {
    Here,
    NoRoom,
    Failed,
}

struct Signals {
    ends: [tokio::signal::unix::Signal; 2],
    hang_up: tokio::signal::unix::Signal,
}

/// What a signal asks for.
enum Asked {
    End,
    Reload,
}

impl Signals {
    async fn next(&mut self) -> Asked {
        let [terminate, interrupt] = &mut self.ends;
        tokio::select! {
            _ = terminate.recv() => Asked::End,
            _ = interrupt.recv() => Asked::End,
            _ = self.hang_up.recv() => Asked::Reload,
        }
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

#[cfg(test)]
mod tests;
