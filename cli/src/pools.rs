//! Replicas for `rewarm serve`: made by the restore pipeline, found again by their shims.
//!
//! A label in its record says to which pool a replica belongs, so another `serve` over the same state folder finds it.

mod capture;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rewarm_autoscaler::pool::Tier;
use rewarm_container::shim::Client;
use rewarm_container::{Error, Name, Origin, Spec, State, Status};
use rewarm_gpu::{Helper, Launch};
use rewarm_probe::Engine;
use rewarm_probe::limits::HOOK_TIMEOUT;
use rewarm_report::{Clock, Hidden};
use rewarm_restore::{Context, Ground, Mode, Request, Seen, cold};
use rewarm_serve::config::{Cold, Config as PoolsConfig, PoolConfig};
use rewarm_serve::replicas::{Existing, GivenUp, Kept, Known, Order, Replicas, Started};
use rewarm_store::Reference;

use crate::args::Global;
use crate::commands::restore;
use crate::config::Config;
use crate::failure::{Cause, messages};
use crate::{drained, programs};

/// The label that says to which pool a replica belongs.
const POOL: &str = "rewarm.pool";
/// How long work on a device may take to finish before a replica is paused.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the driver may take to say what devices there are.
const DEVICES_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the folder of a replica that has ended may take to go.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(20);
const REMOVAL_POLL: Duration = Duration::from_millis(5);

/// Shuts a connection down when it is dropped.
struct HangUp(Arc<UnixStream>);

impl Drop for HangUp {
    fn drop(&mut self) {
        // The other side may have closed it.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// What replicas are made with.
pub(crate) struct Pools {
    context: Context,
    config: Config,
    runc_version: String,
    /// What each pool's snapshot described when it was looked at last: a cold start needs no store.
    specs: Mutex<HashMap<String, Spec>>,
    /// The network namespaces of replicas that were dialled.
    networks: Mutex<HashMap<String, Arc<std::fs::File>>>,
    /// The engine of each pool's snapshot, by whose steps its replicas are paused.
    engines: Mutex<HashMap<String, Option<Engine>>>,
    /// Held by who brings a snapshot here.
    prefetching: tokio::sync::Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An error with its causes, in one line.
fn told(error: &dyn std::error::Error) -> String {
    messages(error).join(": ")
}

/// Whether the pools' snapshots can be understood, and captured where they are to be.
pub(crate) fn check(pools: &PoolsConfig, config: &Config) -> Result<(), Cause> {
    for pool in &pools.pools {
        let reference = reference(pool).map_err(|problem| Cause::Usage { problem })?;
        config.demand(&reference.store, None)?;
        if pool.capture {
            capture::check(pool, config)?;
        }
    }
    Ok(())
}

impl Pools {
    /// Looks for the programs. The pools are those of a file that is good.
    pub(crate) async fn new(global: &Global, pools: &PoolsConfig, config: Config) -> Result<Self, Cause> {
        let cache = pools.serve.memory.map(|memory| memory.cache);
        let context = restore::context(global, Clock::start(Arc::new(Hidden)), cache).await?;
        let runc_version = programs::runc_version().await?;
        let (specs, networks, engines) = (Mutex::default(), Mutex::default(), Mutex::default());
        let prefetching = tokio::sync::Mutex::default();
        Ok(Self { context, config, runc_version, specs, networks, engines, prefetching })
    }

    /// The state folder.
    pub(crate) fn state(&self) -> &Path {
        self.context.state.dir()
    }

    /// A restore of one replica, timed from now on.
    fn context(&self) -> (Context, Clock) {
        let clock = Clock::start(Arc::new(Hidden));
        (Context { clock: clock.clone(), ..self.context.clone() }, clock)
    }

    fn request(&self, pool: &PoolConfig, name: Option<Name>) -> Result<Request, String> {
        let source = reference(pool)?;
        let trust = self.config.demand(&source.store, None).map_err(|cause| told(&cause))?;
        Ok(Request {
            source,
            trust,
            name,
            count: 1,
            publish: Vec::new(),
            memory_bytes: None,
            cpus: None,
            env: Vec::new(),
            labels: label(pool),
            net: None,
            ready: None,
            ready_timeout: pool.start_timeout,
            mode: Mode::Auto,
            gpu: rewarm_gpu::Wish::default(),
            no_probe: false,
            hook_timeout: HOOK_TIMEOUT,
            cold_fallback: None,
        })
    }

    /// Looks at the pool's snapshot.
    async fn look(&self, pool: &PoolConfig) -> Result<Seen, String> {
        let request = self.request(pool, None)?;
        let (context, _) = self.context();
        rewarm_restore::look(&request, &context).await.map_err(|error| told(&error))
    }

    async fn restore(&self, pool: &PoolConfig, name: Name, given_up: GivenUp) -> Result<Started, String> {
        let request = self.request(pool, Some(name))?;
        let (context, clock) = self.context();
        let outcome = rewarm_restore::run(request, context, not_wanted(given_up))
            .await
            .map_err(|error| told(&error))?;
        let restored = outcome.replicas.into_iter().next().expect("one was asked for");
        restored.map_err(|error| told(&error))?;
        let port = lock(&self.specs).get(&pool.name).and_then(|spec| spec.ports.first().copied());
        Ok(Started { source: outcome.source, port, stages: clock.timings() })
    }

    async fn cold(&self, pool: &PoolConfig, name: Name, given_up: GivenUp) -> Result<Started, String> {
        let mut spec = self.spec(pool).await?;
        if let Cold::Command(command) = &pool.cold {
            spec.command.clone_from(command);
        }
        spec.labels.extend(label(pool));
        let port = spec.ports.first().copied();
        let (context, clock) = self.context();
        let ground = Ground { state: context.state, program: context.program, clock: clock.clone() };
        cold::run(&name, spec, None, pool.start_timeout, &ground, not_wanted(given_up))
            .await
            .map_err(|error| told(&error))?;
        Ok(Started { source: None, port, stages: clock.timings() })
    }

    /// What a cold replica is made of: as the snapshot says, where that was ever seen.
    async fn spec(&self, pool: &PoolConfig) -> Result<Spec, String> {
        if let Some(spec) = lock(&self.specs).get(&pool.name) {
            return Ok(spec.clone());
        }
        match (self.find(pool).await, &pool.cold) {
            (Ok(_), _) => Ok(lock(&self.specs).get(&pool.name).cloned().unwrap_or_default()),
            (Err(_), Cold::Command(_)) => {
                Ok(Spec { ports: pool.port.into_iter().collect(), ..Spec::default() })
            }
            (Err(reason), _) => Err(format!("nothing is known of its command: {reason}")),
        }
    }

    async fn with_client<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce(&Client) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, String> {
        let (state, name) = (self.context.state.clone(), parse(name)?);
        let work = move || Client::connect(&state, &name).and_then(|client| work(&client));
        tokio::task::spawn_blocking(work)
            .await
            .expect("calls to the shim do not panic")
            .map_err(|error| told(&error))
    }

    /// A connection to a replica's shim.
    async fn client(&self, name: &str) -> Result<Arc<Client>, String> {
        let (state, name) = (self.context.state.clone(), parse(name)?);
        let connected = tokio::task::spawn_blocking(move || Client::connect(&state, &name)).await;
        connected.expect("connecting does not panic").map(Arc::new).map_err(|error| told(&error))
    }

    /// The engine of the snapshot of a replica's pool, where it has one and that is known.
    async fn engine(&self, name: &str) -> Result<Option<Engine>, String> {
        let record = self.with_client(name, Client::status).await?;
        let pool = record.spec.labels.get(POOL);
        Ok(pool.and_then(|pool| lock(&self.engines).get(pool).cloned().flatten()))
    }

    /// Ends a replica, and removes what is left of it.
    async fn end(&self, name: &str, timeout: Duration) -> Result<(), String> {
        let stopped = self.with_client(name, move |client| client.stop(timeout).map(drop)).await;
        let (state, name) = (self.context.state.clone(), parse(name)?);
        let removed = tokio::task::spawn_blocking(move || remove(&state, &name));
        match removed.await.expect("removing a folder does not panic") {
            // It had ended by itself, before or while it was asked.
            Ok(()) => Ok(()),
            Err(error) => stopped.and(Err(told(&error))),
        }
    }

    /// The network namespace that a replica's server lives in.
    fn network(&self, name: &str) -> io::Result<Arc<std::fs::File>> {
        if let Some(network) = lock(&self.networks).get(name) {
            return Ok(network.clone());
        }
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        let parsed = parse(name).map_err(io::Error::other)?;
        let entry = self.context.state.entry(&parsed).map_err(io::Error::other)?.ok_or_else(gone)?;
        let pid =
            entry.record.filter(|_| entry.exit.is_none()).and_then(|record| record.pid).ok_or_else(gone)?;
        let network = Arc::new(std::fs::File::open(format!("/proc/{pid}/ns/net"))?);
        lock(&self.networks).insert(name.to_owned(), network.clone());
        Ok(network)
    }
}

fn reference(pool: &PoolConfig) -> Result<Reference, String> {
    let parsed = crate::values::spelled::<Reference>(&pool.snapshot);
    parsed.map_err(|problem| format!("snapshot of pool {} is {}: {problem}", pool.name, pool.snapshot))
}

fn label(pool: &PoolConfig) -> BTreeMap<String, String> {
    BTreeMap::from([(POOL.to_owned(), pool.name.clone())])
}

fn parse(name: &str) -> Result<Name, String> {
    name.parse::<Name>().map_err(|error| error.to_string())
}

async fn not_wanted(given_up: GivenUp) -> &'static str {
    // The other end is dropped where nobody is left who wants it.
    let _ = given_up.await;
    "the pool, which does not want it any more"
}

#[async_trait::async_trait]
impl Replicas for Pools {
    fn check(&self, pools: &PoolsConfig) -> Result<(), String> {
        check(pools, &self.config).map_err(|cause| told(&cause))
    }

    async fn device_bytes(&self) -> Option<u64> {
        let program = self.context.program.clone();
        // The driver's libraries are never loaded here: a call may hang.
        let look = move || {
            let launch = Launch { program, args: vec!["gpu-helper".into()], env: Vec::new() };
            Helper::new(launch).with_deadline(DEVICES_TIMEOUT).machine().ok().flatten()
        };
        let machine = tokio::task::spawn_blocking(look).await.ok().flatten()?;
        let bytes: u64 = machine.gpus.iter().map(|gpu| gpu.total_bytes).sum();
        (bytes > 0).then_some(bytes)
    }

    async fn find(&self, pool: &PoolConfig) -> Result<Known, String> {
        let Seen { source, spec, host_bytes, device_bytes, fits, hooks, .. } = self.look(pool).await?;
        let port = spec.ports.first().copied();
        let engine = hooks.engine.map(serde_json::from_value::<Engine>).transpose();
        let engine = engine.map_err(|error| format!("the steps of the snapshot's engine: {error}"))?;
        lock(&self.engines).insert(pool.name.clone(), engine);
        lock(&self.specs).insert(pool.name.clone(), spec);
        Ok(Known { source, host_bytes, device_bytes, port, fits })
    }

    async fn prefetch(&self, pool: &PoolConfig, known: &Known) -> Result<Option<Kept>, String> {
        // One after the other: a second one would delay the first, and count on the same room.
        let _turn = self.prefetching.lock().await;
        let source = crate::values::spelled::<Reference>(&known.source)?;
        let trust = self.config.demand(&reference(pool)?.store, None).map_err(|cause| told(&cause))?;
        let (context, _) = self.context();
        let brought =
            rewarm_restore::prefetch(&source, trust, &context).await.map_err(|error| told(&error))?;
        Ok(brought.map(|presence| Box::new(presence) as Kept))
    }

    async fn capture(&self, order: Order, given_up: GivenUp) -> Result<(), String> {
        self.captured(&order.pool, parse(&order.name)?, given_up).await
    }

    async fn start(&self, order: Order, given_up: GivenUp) -> Result<Started, String> {
        let name = parse(&order.name)?;
        match order.tier {
            Tier::Cold => self.cold(&order.pool, name, given_up).await,
            Tier::Restore | Tier::Wake => self.restore(&order.pool, name, given_up).await,
        }
    }

    async fn pause(&self, name: &str) -> Result<(), String> {
        let Some(engine) = self.engine(name).await? else {
            return self.with_client(name, |client| client.pause(LOCK_TIMEOUT).map(drop)).await;
        };
        let client = self.client(name).await?;
        let paused = drained::pause(&client, &engine, HOOK_TIMEOUT, LOCK_TIMEOUT).await;
        paused.map(drop).map_err(|drained::Failed { cause, left }| {
            left.iter().for_each(|problem| tracing::warn!(replica = name, problem));
            told(&cause)
        })
    }

    async fn wake(&self, name: &str) -> Result<(), String> {
        let client = self.client(name).await?;
        let woken = client.clone();
        let woken = tokio::task::spawn_blocking(move || woken.wake().map(drop)).await;
        woken.expect("calls to the shim do not panic").map_err(|error| told(&error))?;
        let failures = drained::go_on(&client).await.map_err(|error| told(&error))?;
        let Some(first) = failures.first() else { return Ok(()) };
        // It is awake, and not as it was: no request may reach it.
        let gone = self.end(name, Duration::ZERO).await;
        Err(format!(
            "it was ended, since its engine does not go on: {}{}",
            told(first),
            gone.err().map_or_else(String::new, |error| format!("; {error}"))
        ))
    }

    async fn stop(&self, name: &str, timeout: Duration) -> Result<(), String> {
        lock(&self.networks).remove(name);
        self.end(name, timeout).await
    }

    async fn ended(&self, name: &str) -> String {
        let (state, name) = match parse(name) {
            Ok(name) => (self.context.state.clone(), name),
            Err(problem) => return problem,
        };
        let connect = move || {
            let client = Client::connect(&state, &name)?;
            let connection = client.waiting()?;
            Ok::<_, Error>((client, connection))
        };
        let connected = tokio::task::spawn_blocking(connect).await.expect("connecting does not panic");
        let (client, connection) = match connected {
            Ok(connected) => connected,
            Err(error) => return told(&error),
        };
        let connection = Arc::new(connection);
        // Where nobody wants to know any more, the thread and its connections go too.
        let _end = HangUp(connection.clone());
        // A thread of its own: it waits for as long as the replica lives.
        let (tell, hear) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let exit = client.wait_over(&connection);
            // Nobody may be listening any more.
            let _ = tell.send(exit.map_or_else(|error| told(&error), |exit| exit.to_string()));
        });
        hear.await.unwrap_or_else(|_| "its shim is gone".to_owned())
    }

    fn dial(&self, name: &str, port: u16, timeout: Duration) -> io::Result<TcpStream> {
        let network = self.network(name)?;
        rewarm_sys::netns::dial(&*network, SocketAddr::from((Ipv4Addr::LOCALHOST, port)), timeout)
    }

    fn existing(&self) -> Result<Vec<Existing>, String> {
        let state = &self.context.state;
        state.sweep().map_err(|error| told(&error))?;
        capture::sweep(state).map_err(|error| told(&error))?;
        let entries = state.list().map_err(|error| told(&error))?;
        let alive = entries.into_iter().filter(|entry| entry.exit.is_none());
        let found = alive.filter_map(|entry| {
            let warm = match entry.status {
                Status::Ready | Status::Frozen => false,
                Status::Paused => true,
                // Its maker is gone, and it goes too.
                Status::Starting | Status::Stopping | Status::Exited | Status::Crashed => return None,
                // It would never answer again, and holds what it has on its devices.
                Status::Stranded => {
                    if entry.record.is_some_and(|record| record.spec.labels.contains_key(POOL)) {
                        end_stranded(state.clone(), entry.name);
                    }
                    return None;
                }
            };
            let record = entry.record?;
            Some(Existing {
                pool: record.spec.labels.get(POOL)?.clone(),
                name: entry.name.to_string(),
                warm,
                port: record.spec.ports.first().copied(),
                source: match record.origin {
                    Origin::Restored { source } => Some(source),
                    Origin::Cold => None,
                },
            })
        });
        Ok(found.collect())
    }
}

/// Ends what a `serve` before this one left, beside everything else: its devices may take long.
fn end_stranded(state: State, name: Name) {
    std::thread::spawn(move || {
        let ended = Client::connect(&state, &name).and_then(|client| client.kill("it was stranded"));
        if let Err(error) = ended.and_then(|_| remove(&state, &name)) {
            tracing::warn!(replica = %name, error = told(&error), "a stranded replica is left");
        }
    });
}

/// Frees the name of a replica that has ended.
fn remove(state: &State, name: &Name) -> Result<(), Error> {
    let deadline = Instant::now() + REMOVAL_TIMEOUT;
    loop {
        match state.remove(name) {
            Ok(()) | Err(Error::UnknownName { .. }) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error),
            // Its shim is about to end.
            Err(_) => std::thread::sleep(REMOVAL_POLL),
        }
    }
}
