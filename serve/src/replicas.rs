//! Who makes replicas: a trait, so that pools know neither containers nor snapshots. The program plugs in what restores.

use std::io;
use std::net::TcpStream;
use std::time::Duration;

use rewarm_autoscaler::pool::Tier;
use rewarm_report::Timing;
use serde::{Deserialize, Serialize};

use crate::config::{Config, PoolConfig};

/// What is known of a pool's snapshot before anything is started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// The snapshot with its digest.
    pub source: String,
    /// Host memory that a replica takes, in bytes.
    pub host_bytes: u64,
    /// Device memory that it takes while it serves, in bytes.
    pub device_bytes: u64,
    /// The port that its server listens on, if the snapshot names one.
    pub port: Option<u16>,
    /// Whether it fits this machine, free memory and devices aside.
    pub fits: bool,
}

/// A replica that is to be made.
#[derive(Debug, Clone)]
pub struct Order {
    /// For which pool.
    pub pool: PoolConfig,
    /// Its name.
    pub name: String,
    /// [`Tier::Restore`] or [`Tier::Cold`].
    pub tier: Tier,
}

/// A replica that serves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Started {
    /// The snapshot that it came from, with its digest; absent for a cold one.
    pub source: Option<String>,
    /// The port that its server listens on.
    pub port: Option<u16>,
    /// What took how long.
    pub stages: Vec<Timing>,
}

/// A replica that is there already, from an earlier `serve` over the same state folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Existing {
    /// Its name.
    pub name: String,
    /// Its pool.
    pub pool: String,
    /// Whether it is paused.
    pub warm: bool,
    /// The snapshot that it came from, with its digest; absent for a cold one.
    pub source: Option<String>,
    /// The port that its server listens on.
    pub port: Option<u16>,
}

/// What is dropped when nobody wants to keep something any more.
pub type Kept = Box<dyn Send>;

/// Makes replicas, and ends them. Errors are told in words, with their causes: they go into a log and onto a page.
#[async_trait::async_trait]
pub trait Replicas: Send + Sync + 'static {
    /// Whether replicas of these pools could be made, as far as that can be said without asking a store.
    ///
    /// # Errors
    /// What is wrong with one of them.
    fn check(&self, config: &Config) -> Result<(), String>;

    /// Bytes of memory that all devices of this machine have together; nothing where there are none, or nobody tells.
    async fn device_bytes(&self) -> Option<u64>;

    /// What the pool's snapshot is at the moment.
    ///
    /// # Errors
    /// There is none, or the store does not answer.
    async fn find(&self, pool: &PoolConfig) -> Result<Known, String>;

    /// Brings a snapshot onto this machine, before a request waits for it, for as long as what is given back lives; `None` where
    /// there is no room for it. Dropping the future gives it up.
    ///
    /// # Errors
    /// The store does not bring it.
    async fn prefetch(&self, pool: &PoolConfig, known: &Known) -> Result<Option<Kept>, String>;

    /// Makes a replica that serves: its answers were compared. Dropping the future gives the start up; nothing is left of
    /// it then, as after a failure.
    ///
    /// # Errors
    /// Why there is none.
    async fn start(&self, order: Order, given_up: GivenUp) -> Result<Started, String>;

    /// Starts a replica cold, makes a snapshot of it before anybody asks it for anything, publishes that under the pool's tag
    /// with the questions of the snapshot that was there, and ends the replica. Nothing is left of it on this machine,
    /// whatever happens.
    ///
    /// # Errors
    /// Why nothing was published.
    async fn capture(&self, order: Order, given_up: GivenUp) -> Result<(), String>;

    /// Pauses a replica.
    ///
    /// # Errors
    /// It serves on, or is gone.
    async fn pause(&self, name: &str) -> Result<(), String>;

    /// Wakes a paused replica.
    ///
    /// # Errors
    /// It is still paused, or gone.
    async fn wake(&self, name: &str) -> Result<(), String>;

    /// Ends a replica, and removes what is left of it.
    ///
    /// # Errors
    /// It could not be reached.
    async fn stop(&self, name: &str, timeout: Duration) -> Result<(), String>;

    /// Completes when a replica has ended, with the reason in words.
    async fn ended(&self, name: &str) -> String;

    /// A connection to a port of a replica's server. Blocks for at most `timeout`.
    ///
    /// # Errors
    /// It does not listen, or is gone.
    fn dial(&self, name: &str, port: u16, timeout: Duration) -> io::Result<TcpStream>;

    /// The replicas of all pools that are there.
    ///
    /// # Errors
    /// The state folder cannot be read.
    fn existing(&self) -> Result<Vec<Existing>, String>;
}

/// Completes when a start is not wanted any more.
pub type GivenUp = tokio::sync::oneshot::Receiver<()>;
