//! Pools that do what a test says, for tests of what is built on [`crate::status`].

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rewarm_autoscaler::pool::State;
use tokio::net::TcpStream;
use tokio::sync::broadcast;

use crate::status::{
    Command, Handle, LimitsStatus, MemoryStatus, Notice, PoolStatus, Refused, Source, StartSecondsStatus,
    Status, Totals, now,
};

/// Notices that a slow reader may be behind.
const NOTICES: usize = 64;

/// Pools without anything behind them.
#[derive(Debug)]
pub struct Scripted {
    status: Mutex<Status>,
    notices: broadcast::Sender<Notice>,
    /// Every command, in order.
    commands: Mutex<Vec<Command>>,
    /// Where every replica is.
    replicas: Option<SocketAddr>,
}

impl Scripted {
    /// Pools of these names, without replicas; connections into replicas go to one address.
    #[must_use]
    pub fn new(names: &[&str], replicas: Option<SocketAddr>) -> Arc<Self> {
        let since = now();
        let status = Status {
            version: "0.0.0".to_owned(),
            since,
            now: since,
            memory: MemoryStatus::default(),
            pools: names.iter().map(|name| empty_pool(name)).collect(),
        };
        Arc::new(Self {
            status: status.into(),
            notices: broadcast::channel(NOTICES).0,
            commands: Mutex::default(),
            replicas,
        })
    }

    /// The handle that is given to others.
    #[must_use]
    pub fn handle(self: &Arc<Self>) -> Handle {
        Handle::new(self.clone())
    }

    /// Changes everything. Nobody is told.
    pub fn change(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.lock());
    }

    /// Changes the pool of this name. Nobody is told.
    ///
    /// # Panics
    /// There is none.
    pub fn change_pool(&self, name: &str, change: impl FnOnce(&mut PoolStatus)) {
        let mut status = self.lock();
        change(status.pools.iter_mut().find(|pool| pool.name == name).expect("a pool of the test"));
    }

    /// Tells everybody.
    pub fn tell(&self, notice: Notice) {
        // Nobody may be listening.
        let _ = self.notices.send(notice);
    }

    /// What was asked for so far.
    #[must_use]
    pub fn commands(&self) -> Vec<Command> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn lock(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry_out(&self, command: &Command) -> Result<String, Refused> {
        let mut status = self.lock();
        let name = command.pool();
        let unknown = || Refused::UnknownPool { pool: name.to_owned() };
        let pool = status.pools.iter_mut().find(|pool| pool.name == name).ok_or_else(unknown)?;
        match command {
            Command::Scale { replicas, .. } => {
                if replicas.is_some_and(|count| count > pool.limits.max_replicas) {
                    let problem = format!(
                        "{} replicas, expected at most {}",
                        replicas.unwrap_or(0),
                        pool.limits.max_replicas
                    );
                    return Err(Refused::Impossible { problem });
                }
                pool.fixed = *replicas;
                pool.desired = replicas.unwrap_or(pool.desired);
                Ok(match replicas {
                    Some(count) => format!("{name} is to have {count} replicas"),
                    None => format!("the policy decides about {name} again"),
                })
            }
            Command::Drain { replica, .. } => {
                let unknown = || Refused::UnknownReplica { pool: name.to_owned(), replica: replica.clone() };
                let found =
                    pool.replicas.iter_mut().find(|found| found.name == *replica).ok_or_else(unknown)?;
                found.state = State::Draining;
                Ok(format!("{replica} gets no further requests"))
            }
            Command::Pause { .. } | Command::Resume { .. } => {
                pool.paused = matches!(command, Command::Pause { .. });
                Ok(format!("{name} is {}", if pool.paused { "paused" } else { "resumed" }))
            }
        }
    }
}

#[async_trait::async_trait]
impl Source for Scripted {
    fn status(&self) -> Status {
        Status { now: now(), ..self.lock().clone() }
    }

    fn notices(&self) -> broadcast::Receiver<Notice> {
        self.notices.subscribe()
    }

    async fn command(&self, command: Command) -> Result<String, Refused> {
        let answer = self.carry_out(&command);
        self.commands.lock().unwrap_or_else(PoisonError::into_inner).push(command);
        answer
    }

    async fn dial(&self, _replica: &str) -> io::Result<TcpStream> {
        match self.replicas {
            Some(address) => TcpStream::connect(address).await,
            None => Err(io::ErrorKind::ConnectionRefused.into()),
        }
    }
}

fn empty_pool(name: &str) -> PoolStatus {
    PoolStatus {
        name: name.to_owned(),
        snapshot: format!("s3://models/{name}@prod"),
        digest: None,
        listen: "0.0.0.0:8000".to_owned(),
        limits: LimitsStatus {
            concurrency: 8,
            target_concurrency: 6,
            min_replicas: 0,
            max_replicas: 16,
            warm: 2,
            queue_max: 1000,
            queue_deadline_ms: 30_000.0,
            target_wait_ms: 1000.0,
        },
        policy: "rewarm".to_owned(),
        paused: false,
        fixed: None,
        in_flight: 0,
        held: 0,
        oldest_held_ms: None,
        desired: 0,
        start_seconds: StartSecondsStatus { wake: 0.03, restore: 0.4 },
        circuit: None,
        obstacle: None,
        replicas: Vec::new(),
        decisions: Vec::new(),
        starts: Vec::new(),
        totals: Totals::default(),
    }
}
