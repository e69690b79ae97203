//! The file of `rewarm serve`: pools, each with its snapshot, its address and its limits, and what they share.
//!
//! docs/serve.md is its reference. Unknown keys are errors that name the nearest known one; a file is good as a whole or
//! not at all.

mod reader;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::http::HeaderName;
use rewarm_autoscaler::config::PolicySpec;
use rewarm_gateway::Protocol;
use toml::{Table, Value};

use self::reader::{BYTES, Reader, bytes, plain, text};
use crate::error::{Error, Result};

/// Where the admin API is unless the file says otherwise.
const ADMIN: &str = "127.0.0.1:9901";

/// The whole file.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// What all pools share.
    pub serve: Serve,
    /// The pools, in the order of the file.
    pub pools: Vec<PoolConfig>,
}

/// What all pools share: the table `[serve]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Serve {
    /// Where the admin API, the metrics and the status page are.
    pub admin: Option<SocketAddr>,
    /// A file whose content the admin API wants as a bearer token.
    pub admin_token: Option<PathBuf>,
    /// Where the KEDA scaler is.
    pub keda: Option<SocketAddr>,
    /// The address of a collector of traces, for OTLP over HTTP.
    pub otlp: Option<String>,
    /// What becomes of the replicas when `serve` is asked to end.
    pub on_exit: OnExit,
    /// Host memory that replicas and decoded snapshots may take together; without it nothing is counted.
    pub memory: Option<Budget>,
    /// Certificate and key of the pools' addresses and of the KEDA scaler.
    pub tls: Option<Tls>,
    /// How long a client may take for the head of a request, and a new connection for its first byte.
    pub header_timeout: Duration,
    /// How long a client may send nothing of a body that is waited for, until its answer begins; zero: for ever.
    pub body_timeout: Duration,
    /// Most bytes of a request's body; without it there is no limit.
    pub body_max: Option<u64>,
    /// Most connections of clients.
    pub connections_max: u32,
    /// How long requests in flight may go on when `serve` is asked to end.
    pub drain: Duration,
}

impl Serve {
    /// Keys with another value than `before` of which a running `serve` takes no notice.
    pub(crate) fn waits_for_a_start(&self, before: &Self) -> Vec<&'static str> {
        let part = |budget: Option<Budget>, of: fn(Budget) -> u64| budget.map(of);
        let all = |budget: Budget| budget.replicas.saturating_add(budget.cache);
        let memory = part(self.memory, all) != part(before.memory, all);
        let cache = part(self.memory, |budget| budget.cache) != part(before.memory, |budget| budget.cache);
        let changed = [("memory", memory), ("cache", cache), ("otlp", self.otlp != before.otlp)];
        changed.into_iter().filter(|(_, changed)| *changed).map(|(key, _)| key).collect()
    }
}

/// How host memory is divided, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// What replicas may take.
    pub replicas: u64,
    /// What decoded snapshots may take, those that are being restored and those that are kept for the next restore.
    pub cache: u64,
}

/// Files in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// The certificate, and those that lead to its root.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// What becomes of replicas when `serve` ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnExit {
    /// They are stopped.
    Stop,
    /// They stay, and the next `serve` finds them.
    Keep,
}

/// One pool: a table `[[pool]]`.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolConfig {
    /// Its name, the first part of its replicas' names.
    pub name: String,
    /// What is restored, as `rewarm restore` takes it.
    pub snapshot: String,
    /// Where clients come.
    pub listen: SocketAddr,
    /// Which of several pools at one address a request is for.
    pub matching: Matching,
    /// The port of the server inside a replica; without it the first that the snapshot names.
    pub port: Option<u16>,
    /// What that server speaks. A change holds for replicas that are started from then on.
    pub protocol: Protocol,
    /// Requests that one replica answers at once, at most.
    pub concurrency: u32,
    /// Requests for each replica that the policy aims at.
    pub target_concurrency: u32,
    /// Fewest replicas.
    pub min_replicas: u32,
    /// Most replicas, warm ones not counted.
    pub max_replicas: u32,
    /// Replicas that are restored and paused, at most.
    pub warm: u32,
    /// Held requests.
    pub queue: QueueConfig,
    /// How long a request may wait for a slot before the policy helps.
    pub target_wait: Duration,
    /// How long a start may take, until enough starts were seen.
    pub start_timeout: Duration,
    /// How many replicas there are.
    pub policy: Policy,
    /// Which of several replicas with a free slot gets a request.
    pub routing: Routing,
    /// Requests with the same value of this header go to the same replica, as long as it has a free slot.
    pub affinity: Option<HeaderName>,
    /// Whether a request that no replica began to answer may be tried once elsewhere.
    pub retry: bool,
    /// How long a replica may take from the beginning of a request to the head of its answer; without it as long as that takes.
    pub answer_timeout: Option<Duration>,
    /// How long a replica that is let go may take for what it has in flight; without it as long as that lasts.
    pub drain: Option<Duration>,
    /// How a server is started where its snapshot cannot be restored.
    pub cold: Cold,
    /// Host memory of one replica in bytes, where the snapshot's own size is not what is wanted.
    pub replica_memory: Option<u64>,
    /// How often is looked whether the tag names another snapshot; zero: never.
    pub follow: Duration,
    /// Whether a snapshot is brought onto this machine before a replica is needed.
    pub prefetch: bool,
    /// Whether a snapshot that does not fit this machine is given a variant that does.
    pub capture: bool,
}

/// A cold start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cold {
    /// By the command that the snapshot holds.
    Recorded,
    /// By this command.
    Command(Vec<String>),
    /// Never.
    Never,
}

/// Which of several replicas with a free slot gets a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routing {
    /// The one with the most requests, so that others become idle.
    Busiest,
    /// The one with the fewest.
    LeastInFlight,
}

/// Limits of held requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueConfig {
    /// Most requests held; one more is refused (429).
    pub max: usize,
    /// How long one is held; then it is refused (503).
    pub deadline: Duration,
}

/// Which requests are for a pool: those that fit everything that is said. A pool that says nothing takes what is left.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Matching {
    /// The host name of the request, without its port.
    pub host: Option<String>,
    /// The beginning of its path.
    pub path_prefix: Option<String>,
    /// A header and its value.
    pub header: Option<(String, String)>,
    /// The field `model` of a JSON body.
    pub model: Option<String>,
}

impl Matching {
    /// Whether it takes what no other pool wants.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A policy with its settings.
#[derive(Debug, Clone)]
pub struct Policy {
    /// What decides.
    pub spec: PolicySpec,
    /// As it was written, by which a change is seen.
    written: String,
}

impl PartialEq for Policy {
    fn eq(&self, other: &Self) -> bool {
        self.written == other.written
    }
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, is not TOML, has an unknown key, or a value that makes no sense.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::ReadFile {
            what: "configuration",
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// Reads the text of a file; `path` names it in errors.
    ///
    /// # Errors
    /// As [`Config::read`].
    pub fn parse(text: &str, path: &Path) -> Result<Self> {
        let source = |source| Error::Parse { path: path.to_owned(), source: Box::new(source) };
        let table: Table = text.parse().map_err(source)?;
        let mut reader = Reader::new(format!("configuration {}", path.display()), table);
        let serve = match reader.table("serve")? {
            Some(table) => serve(table)?,
            None => serve(Reader::new("", Table::new()))?,
        };
        let list = reader.required("pool", "at least one [[pool]]", |value| {
            value.as_array().filter(|list| !list.is_empty()).cloned()
        })?;
        let mut pools = Vec::new();
        for (index, value) in list.into_iter().enumerate() {
            let Value::Table(table) = value else {
                return Err(reader.bad("pool", plain(&value), "tables [[pool]]"));
            };
            let named = table.get("name").and_then(Value::as_str);
            let place = match named {
                Some(name) => format!("{}, pool {name}", reader.place()),
                None => format!("{}, pool number {}", reader.place(), index + 1),
            };
            pools.push(pool(Reader::new(place, table))?);
        }
        let config = Self { serve, pools };
        config.agree(&reader)?;
        reader.finish()?;
        Ok(config)
    }

    /// What no single table can see: names and addresses that are taken twice.
    fn agree(&self, reader: &Reader) -> Result<()> {
        if let Some(admin) = self.serve.admin.filter(|address| !address.ip().is_loopback())
            && self.serve.admin_token.is_none()
        {
            let expected = "an address of this machine alone (127.0.0.1), or a file in admin_token";
            return Err(reader.bad("admin", admin.to_string(), expected));
        }
        let mut names = BTreeMap::new();
        let mut defaults = BTreeMap::new();
        for pool in &self.pools {
            if names.insert(&pool.name, ()).is_some() {
                return Err(reader.bad(
                    "name",
                    format!("{} twice", pool.name),
                    "a name of its own for each pool",
                ));
            }
            if pool.matching.is_default()
                && let Some(other) = defaults.insert(pool.listen, &pool.name)
            {
                let seen = format!("{} for both {other} and {}", pool.listen, pool.name);
                return Err(reader.bad("listen", seen, "at most one pool without match at each address"));
            }
        }
        Ok(())
    }
}

fn address(value: &Value) -> Option<SocketAddr> {
    value.as_str()?.parse().ok()
}

const COLLECTOR: &str = "the address of a collector such as \"http://127.0.0.1:4318\"";

fn collector(value: &Value) -> Option<String> {
    let address: hyper::Uri = value.as_str()?.parse().ok()?;
    (address.scheme_str() == Some("http") && address.query().is_none()).then(|| address.to_string())
}

const ADDRESS: &str = "an address and port such as \"0.0.0.0:8000\"";

fn path(value: &Value) -> Option<PathBuf> {
    text(value).map(PathBuf::from)
}

fn serve(mut from: Reader) -> Result<Serve> {
    let off =
        |value: &Value| if value.as_bool() == Some(false) { Some(None) } else { address(value).map(Some) };
    let admin = from.get("admin", ADDRESS, off)?;
    let tls = match from.table("tls")? {
        None => None,
        Some(mut tls) => {
            let (cert, key) = (tls.required("cert", "a file", path)?, tls.required("key", "a file", path)?);
            tls.finish()?;
            Some(Tls { cert, key })
        }
    };
    let serve = Serve {
        admin: admin.unwrap_or_else(|| ADMIN.parse().ok()),
        admin_token: from.get("admin_token", "a file", path)?,
        keda: from.get("keda", ADDRESS, address)?,
        otlp: from.get("otlp", COLLECTOR, collector)?,
        on_exit: from
            .get("on_exit", "\"stop\" or \"keep\"", |value| match value.as_str()? {
                "stop" => Some(OnExit::Stop),
                "keep" => Some(OnExit::Keep),
                _ => None,
            })?
            .unwrap_or(OnExit::Stop),
        memory: budget(&mut from)?,
        tls,
        header_timeout: from.time("header_timeout")?.unwrap_or(Duration::from_secs(30)),
        body_timeout: from.time("body_timeout")?.unwrap_or(Duration::from_secs(60)),
        body_max: from.get("body_max", BYTES, bytes)?,
        connections_max: from.count("connections_max", 1)?.unwrap_or(20_000),
        drain: from.time("drain")?.unwrap_or(Duration::from_secs(30)),
    };
    from.finish()?;
    Ok(serve)
}

/// Part of the memory that decoded snapshots may take unless the file says otherwise.
const CACHE_PART: u64 = 4;

fn budget(from: &mut Reader) -> Result<Option<Budget>> {
    let memory = from.get("memory", BYTES, bytes)?;
    let none = |value: &Value| if value.as_bool() == Some(false) { Some(0) } else { bytes(value) };
    let cache = from.get("cache", "a size such as \"5GiB\", or false", none)?;
    match (memory, cache) {
        (None, None) => Ok(None),
        (None, Some(cache)) => {
            Err(from.bad("cache", format!("{cache} bytes"), "memory beside it, of which it is a part"))
        }
        (Some(memory), Some(cache)) if cache >= memory => Err(from.bad(
            "cache",
            format!("{cache} bytes"),
            &format!("less than memory, which is {memory} bytes"),
        )),
        (Some(memory), cache) => {
            let cache = cache.unwrap_or(memory / CACHE_PART);
            Ok(Some(Budget { replicas: memory - cache, cache }))
        }
    }
}

fn pool(mut from: Reader) -> Result<PoolConfig> {
    let name = from.required("name", "letters, digits and dashes, at most 40", |value| {
        let name = text(value)?;
        let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        (name.len() <= 40 && !name.starts_with('-') && name.chars().all(good)).then_some(name)
    })?;
    let concurrency = from.count("concurrency", 1)?.unwrap_or(8);
    let policy = policy(&mut from)?;
    let pool = PoolConfig {
        name,
        snapshot: from.required("snapshot", "a snapshot such as \"s3://models/llama@prod\"", text)?,
        listen: from.required("listen", ADDRESS, address)?,
        matching: matching(&mut from)?,
        port: from.get("port", "a port", |value| {
            u16::try_from(value.as_integer()?).ok().filter(|port| *port > 0)
        })?,
        protocol: from
            .get("protocol", "\"http1\" or \"h2c\"", |value| match value.as_str()? {
                "http1" => Some(Protocol::Http1),
                "h2c" => Some(Protocol::H2c),
                _ => None,
            })?
            .unwrap_or(Protocol::Http1),
        concurrency,
        target_concurrency: from.count("target_concurrency", 1)?.unwrap_or(concurrency),
        min_replicas: from.count("min_replicas", 0)?.unwrap_or(0),
        max_replicas: from.count("max_replicas", 1)?.unwrap_or(16),
        warm: from.count("warm", 0)?.unwrap_or(0),
        queue: queue(&mut from)?,
        target_wait: from.time("target_wait")?.unwrap_or(Duration::from_secs(1)),
        start_timeout: from.time("start_timeout")?.unwrap_or(Duration::from_secs(60)),
        policy,
        routing: from
            .get("routing", "\"busiest\" or \"least-in-flight\"", |value| match value.as_str()? {
                "busiest" => Some(Routing::Busiest),
                "least-in-flight" => Some(Routing::LeastInFlight),
                _ => None,
            })?
            .unwrap_or(Routing::Busiest),
        affinity: from.get("affinity", "the name of a header", |value| text(value)?.parse().ok())?,
        retry: from.flag("retry")?.unwrap_or(true),
        answer_timeout: from.time("answer_timeout")?,
        drain: from.time("drain")?,
        cold: from
            .get("cold", "a command as a list of words, or false", |value| match value {
                Value::Boolean(false) => Some(Cold::Never),
                Value::Boolean(true) => Some(Cold::Recorded),
                Value::Array(words) => {
                    let words: Option<Vec<String>> = words.iter().map(text).collect();
                    words.filter(|words| !words.is_empty()).map(Cold::Command)
                }
                _ => None,
            })?
            .unwrap_or(Cold::Recorded),
        replica_memory: from.get("replica_memory", BYTES, bytes)?,
        follow: from.time("follow")?.unwrap_or(Duration::from_secs(30)),
        prefetch: from.flag("prefetch")?.unwrap_or(true),
        capture: from.flag("capture")?.unwrap_or(false),
    };
    if pool.capture && pool.cold == Cold::Never {
        let expected = "false where cold is false: what is captured is started cold";
        return Err(from.bad("capture", "true".to_owned(), expected));
    }
    if pool.min_replicas > pool.max_replicas {
        let expected = format!("at most max_replicas, which is {}", pool.max_replicas);
        return Err(from.bad("min_replicas", pool.min_replicas.to_string(), &expected));
    }
    if pool.target_concurrency > concurrency {
        let expected = format!("at most concurrency, which is {concurrency}");
        return Err(from.bad("target_concurrency", pool.target_concurrency.to_string(), &expected));
    }
    from.finish()?;
    Ok(pool)
}

fn queue(from: &mut Reader) -> Result<QueueConfig> {
    let mut queue = QueueConfig { max: 1000, deadline: Duration::from_secs(30) };
    if let Some(mut table) = from.table("queue")? {
        queue.max = table.count("max", 0)?.map_or(queue.max, |max| max as usize);
        queue.deadline = table.time("deadline")?.unwrap_or(queue.deadline);
        table.finish()?;
    }
    Ok(queue)
}

fn matching(from: &mut Reader) -> Result<Matching> {
    let Some(mut table) = from.table("match")? else { return Ok(Matching::default()) };
    let matching = Matching {
        host: table.string("host")?.map(|host| host.to_ascii_lowercase()),
        path_prefix: table.get("path_prefix", "a path that begins with /", |value| {
            text(value).filter(|path| path.starts_with('/'))
        })?,
        header: table.get("header", "a header such as \"x-model: llama\"", |value| {
            let header = text(value)?;
            let (name, value) = header.split_once(':')?;
            Some((name.trim().to_ascii_lowercase(), value.trim().to_owned()))
                .filter(|(name, _)| !name.is_empty())
        })?,
        model: table.string("model")?,
    };
    table.finish()?;
    Ok(matching)
}

/// The name of a policy, or a table of its settings with `kind`.
fn policy(from: &mut Reader) -> Result<Policy> {
    let value = from.value("policy").unwrap_or_else(|| Value::String("rewarm".to_owned()));
    let spec = PolicySpec::from_value(&value, from.place())?;
    Ok(Policy { spec, written: value.to_string() })
}

#[cfg(test)]
mod tests;
