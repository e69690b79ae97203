//! The gateway process: it has the clients and decides, and has no rights at all.
//!
//! What it needs of the machine it gets from its parent: listening sockets, connections into replicas, and replicas. When
//! the parent is gone it ends at once, so that the next `rewarm serve` finds the addresses free.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rewarm_autoscaler::ledger::{Ledger, Memory};
use rewarm_gateway::{Asked, Choice, Desk, Front, Lanes, Limits, Router, tls};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, broadcast, mpsc};

use crate::config::{Budget, Config, Matching, PoolConfig};
use crate::link::{Configure, Line, Purpose, ToGateway, ToParent};
use crate::live::{Dialler, Heard, Live, Room, Shared, Ticker};
use crate::operators::Operators;
use crate::status::{self, Command, Handle, MemoryStatus, Notice, Refused, Source, Status, UnixMs};
use crate::traces::Traces;

/// The number under which the gateway finds its socket to the parent.
pub(crate) const SOCKET_FD: i32 = 3;
/// The user that the gateway runs as: one that no machine has.
pub const USER: u32 = 60872;
/// How many notices a reader may be behind.
const NOTICES_MAX: usize = 1024;
/// The gateway's nice value. Model servers keep all cores busy, and a request that comes or an answer that goes takes
/// microseconds: it is not to wait for the end of their turn.
const NICE: i32 = -5;
/// How often is looked whether all is answered, before the end.
const FINISH_POLL: Duration = Duration::from_millis(20);

/// How long the collector may take for the last spans, before the end.
const LAST_SPANS: Duration = Duration::from_secs(3);

/// The hidden verb `gateway`: serves until its parent is gone or says so. Gives the exit code. No thread may have been
/// started yet.
#[must_use]
pub fn main() -> u8 {
    match run() {
        Ok(()) => 0,
        Err(error) => {
            tracing::error!(%error, "the gateway failed");
            1
        }
    }
}

fn run() -> io::Result<()> {
    let socket = UnixStream::from(rewarm_sys::process::take_inherited(SOCKET_FD)?);
    if let Err(error) = rewarm_sys::priority::go_before(NICE) {
        tracing::warn!(%error, "the gateway waits for its turn as others do: CAP_SYS_NICE would let it go before them");
    }
    rewarm_sys::confine::confine(USER, USER, None)?;
    allow_many_files();
    take_small_pages();
    let line = Line::new(socket);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let (told, heard) = mpsc::unbounded_channel();
    let hearing = line.clone();
    std::thread::Builder::new().name("parent".to_owned()).spawn(move || {
        loop {
            match hearing.hear::<ToGateway>() {
                Ok(Some(message)) => {
                    if told.send(message).is_err() {
                        return;
                    }
                }
                Ok(None) => return,
                Err(error) => return tracing::error!(%error, "the parent sent nonsense"),
            }
        }
    })?;
    // A thread for each core carries clients; the runtime decides, tells and listens.
    let lanes = Lanes::start(std::thread::available_parallelism()?.get())?;
    runtime.block_on(Control::new(line, lanes).serve(heard))?;
    runtime.shutdown_background();
    Ok(())
}

/// Takes as many descriptors as this process may: one for each client and one for each request in a replica. Its parent stays as
/// it is, since replicas inherit from it.
fn allow_many_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most).map(|()| most));
    match raised {
        Ok(most) => tracing::debug!(most, "open files"),
        Err(error) => {
            tracing::warn!(%error, "the limit of open files stays as it is: raise it with ulimit -n")
        }
    }
}

/// Takes no huge pages. What a held request needs are a few buffers of which the beginning is used: in huge pages, for which the
/// allocator asks, it is all there, and 10,000 of them take 360 MiB instead of 220. Its parent stays as it is, since replicas
/// inherit from it.
fn take_small_pages() {
    if let Err(error) = nix::sys::prctl::set_thp_disable(true) {
        tracing::warn!(%error, "held requests take more memory than they need: huge pages cannot be turned off");
    }
}

/// All pools and all addresses.
struct Control {
    line: Line,
    world: Arc<World>,
    room: Room,
    fronts: HashMap<SocketAddr, Arc<Front>>,
    /// Those of addresses that are not in the file any more, for as long as they have clients.
    closed: Vec<Weak<Front>>,
    operators: Operators,
    lanes: Arc<Lanes>,
    places: Arc<Semaphore>,
    drain: Duration,
    /// Where spans go, from the first configuration on.
    traces: Option<Traces>,
}

/// What others may see and ask for.
struct World {
    since: UnixMs,
    notices: broadcast::Sender<Notice>,
    dialler: Arc<Dialler>,
    pools: Mutex<Pools>,
}

#[derive(Default)]
struct Pools {
    /// In the order of the file.
    served: Vec<Arc<Live>>,
    /// Not in the file any more, with requests that came before, or with replicas that are still there.
    leaving: Vec<Arc<Live>>,
    /// From the first configuration on.
    memory: Option<(Ledger, Option<Budget>)>,
}

impl Pools {
    /// All that have anything to do.
    fn all(&self) -> impl Iterator<Item = &Arc<Live>> {
        self.served.iter().chain(&self.leaving)
    }
}

impl World {
    fn lock(&self) -> std::sync::MutexGuard<'_, Pools> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pool(&self, name: &str) -> Option<Arc<Live>> {
        self.lock().served.iter().find(|pool| pool.name() == name).cloned()
    }

    /// The pool that has a replica of this name.
    fn pool_of(&self, replica: &str) -> Option<Arc<Live>> {
        let pools = self.lock();
        pools.all().find(|pool| pool.has(replica)).cloned()
    }
}

#[async_trait::async_trait]
impl Source for World {
    fn status(&self) -> Status {
        let (served, memory) = {
            let pools = self.lock();
            (pools.served.clone(), pools.memory.clone())
        };
        let memory = memory.map_or_else(MemoryStatus::default, |(ledger, budget)| {
            let used = ledger.used();
            MemoryStatus {
                host_used: used.host,
                host_limit: budget.map(|budget| budget.replicas),
                cache_limit: budget.map(|budget| budget.cache),
                device_used: used.device,
            }
        });
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            since: self.since,
            now: status::now(),
            memory,
            pools: served.iter().map(|pool| pool.status()).collect(),
        }
    }

    fn notices(&self) -> broadcast::Receiver<Notice> {
        self.notices.subscribe()
    }

    async fn command(&self, command: Command) -> Result<String, Refused> {
        let unknown = || Refused::UnknownPool { pool: command.pool().to_owned() };
        self.pool(command.pool()).ok_or_else(unknown)?.command(&command)
    }

    async fn dial(&self, replica: &str) -> io::Result<TcpStream> {
        let port = self.pool_of(replica).and_then(|pool| pool.port_of(replica));
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("no replica is called {replica:?}"));
        self.dialler.dial(replica, port.ok_or_else(missing)?).await
    }
}

impl Control {
    fn new(line: Line, lanes: Arc<Lanes>) -> Self {
        let (notices, _) = broadcast::channel(NOTICES_MAX);
        let dialler = Arc::new(Dialler::new(line.clone()));
        let world = World { since: status::now(), notices, dialler, pools: Mutex::default() };
        let world = Arc::new(world);
        Self {
            line,
            operators: Operators::new(Handle::new(world.clone())),
            world,
            room: Room::default(),
            fronts: HashMap::new(),
            closed: Vec::new(),
            lanes,
            places: Arc::new(Semaphore::new(0)),
            drain: Duration::ZERO,
            traces: None,
        }
    }

    async fn serve(
        mut self,
        mut heard: mpsc::UnboundedReceiver<(ToGateway, Vec<OwnedFd>)>,
    ) -> io::Result<()> {
        let ticker = Ticker::start();
        while let Some((message, fds)) = heard.recv().await {
            match message {
                ToGateway::Configure(configure) => {
                    self.configure(*configure, fds, ticker)?;
                    self.line.tell(&ToParent::Configured, &[])?;
                }
                ToGateway::Known { pool, known } => {
                    if let Some(pool) = self.world.pool(&pool) {
                        pool.known(known);
                    }
                }
                ToGateway::Started { name, started } => self.heard(&name, Heard::Started(started)),
                ToGateway::Paused { name } => self.heard(&name, Heard::Paused),
                ToGateway::Woken { name } => self.heard(&name, Heard::Woken),
                ToGateway::Failed { name, reason } => self.heard(&name, Heard::Failed(reason)),
                ToGateway::Stopped { name } => self.heard(&name, Heard::Stopped),
                ToGateway::Ended { name, reason } => self.heard(&name, Heard::Ended(reason)),
                ToGateway::Captured { name, problem } => self.heard(&name, Heard::Captured(problem)),
                ToGateway::Dialled { number, error } => {
                    let answer = match (error, fds.into_iter().next()) {
                        (None, Some(socket)) => Ok(socket),
                        (Some((0, what)), _) => Err(io::Error::other(what)),
                        (Some((errno, _)), _) => Err(io::Error::from_raw_os_error(errno)),
                        (None, None) => Err(io::ErrorKind::InvalidData.into()),
                    };
                    self.world.dialler.answered(number, answer);
                }
                ToGateway::Finish => self.finish(),
            }
        }
        // The next gateway needs the addresses: nothing is waited for.
        if let Some(traces) = &self.traces {
            traces.end(Duration::ZERO);
        }
        Ok(())
    }

    fn heard(&self, replica: &str, heard: Heard) {
        if let Some(pool) = self.world.pool_of(replica) {
            pool.heard(replica, heard);
        }
        self.world.lock().leaving.retain(|pool| !pool.is_over());
    }

    /// Takes a configuration in. The parent has found it to be good.
    fn configure(&mut self, configure: Configure, fds: Vec<OwnedFd>, ticker: Ticker) -> io::Result<()> {
        let config = Config::parse(&configure.text, &configure.path).map_err(io::Error::other)?;
        let first = self.world.lock().memory.is_none();
        if first {
            self.traces = config.serve.otlp.as_deref().map(Traces::begin).transpose()?;
        }
        // Its size stays for as long as the process: replicas hold parts of it.
        let new = || {
            let host = config.serve.memory.map_or(u64::MAX, |budget| budget.replicas);
            let device = configure.device_bytes.unwrap_or(u64::MAX);
            (Ledger::new(Memory { host, device }), config.serve.memory)
        };
        let (ledger, _) = self.world.lock().memory.get_or_insert_with(new).clone();
        let shared = Shared {
            ticker,
            line: self.line.clone(),
            notices: self.world.notices.clone(),
            dialler: self.world.dialler.clone(),
            ledger,
            room: self.room.clone(),
            tracer: self.traces.as_ref().map(Traces::tracer),
        };
        let begun = self.pools(&config, &shared);
        for pool in &begun {
            if let Some(known) = configure.known.get(pool.name()) {
                pool.known(known.clone());
            }
        }
        let mut existing: BTreeMap<&str, Vec<&crate::replicas::Existing>> = BTreeMap::new();
        for replica in &configure.existing {
            existing.entry(&replica.pool).or_default().push(replica);
        }
        for (pool, replicas) in existing {
            match self.world.pool(pool) {
                Some(pool) => pool.adopt(&replicas),
                None => {
                    for replica in replicas {
                        let why = format!("pool {pool} is not in the configuration");
                        self.line.tell(&ToParent::Stop { name: replica.name.clone(), why }, &[])?;
                    }
                }
            }
        }
        // Only now: a pool that decides before it knows what is there starts what it has already.
        for pool in begun {
            tokio::spawn(pool.run());
        }
        self.addresses(&config, &configure, fds)
    }

    /// Makes, changes and ends pools, and gives those that are to run.
    fn pools(&self, config: &Config, shared: &Shared) -> Vec<Arc<Live>> {
        let mut begun = Vec::new();
        let old = std::mem::take(&mut self.world.lock().served);
        let mut before: BTreeMap<String, Arc<Live>> =
            old.into_iter().map(|pool| (pool.name().to_owned(), pool)).collect();
        let served: Vec<Arc<Live>> = config
            .pools
            .iter()
            .map(|wanted| match before.remove(&wanted.name) {
                Some(pool) => {
                    pool.change(wanted.clone());
                    pool
                }
                None => {
                    let pool = Live::new(wanted.clone(), shared.clone());
                    begun.push(pool.clone());
                    pool
                }
            })
            .collect();
        for pool in before.into_values() {
            pool.close();
            self.world.lock().leaving.push(pool);
        }
        let mut pools = self.world.lock();
        pools.served = served;
        pools.leaving.retain(|pool| !pool.is_over());
        begun
    }

    /// Opens and closes addresses, and says which pools are behind each.
    fn addresses(&mut self, config: &Config, configure: &Configure, fds: Vec<OwnedFd>) -> io::Result<()> {
        let tls = configure.tls.as_ref();
        let tls = tls.map(|(certificate, key)| tls::acceptor(certificate.as_bytes(), key.as_bytes()));
        let tls = tls.transpose().map_err(io::Error::other)?;
        let serve = &config.serve;
        let limits = Limits {
            header_timeout: serve.header_timeout,
            body_timeout: Some(serve.body_timeout).filter(|timeout| !timeout.is_zero()),
            body_max: serve.body_max,
        };
        if self.fronts.is_empty() {
            self.places.add_permits(config.serve.connections_max as usize);
        }
        self.drain = config.serve.drain;
        let served = self.world.lock().served.clone();
        let router = |address: SocketAddr| -> Arc<dyn Router> {
            let here = served.iter().map(|pool| (pool.config(), pool));
            let here = here.filter(|(config, _)| config.listen == address);
            Arc::new(Table(
                here.map(|(config, pool)| (config.matching, Arc::new(pool.desk()) as _)).collect(),
            ))
        };
        self.operators.change(config, configure)?;
        for ((purpose, address), socket) in configure.listening.iter().zip(fds) {
            let listener = std::net::TcpListener::from(socket);
            listener.set_nonblocking(true)?;
            match purpose {
                Purpose::Clients => {
                    let listener = TcpListener::from_std(listener)?;
                    let (lanes, places) = (self.lanes.clone(), self.places.clone());
                    let front = Front::new(
                        router(*address),
                        limits,
                        tls.clone(),
                        lanes,
                        places,
                        self.traces.as_ref().map(Traces::tracer),
                    );
                    tokio::spawn(front.clone().serve(listener));
                    self.fronts.insert(*address, front);
                }
                Purpose::Admin | Purpose::Keda => self.operators.offer(*purpose, *address, listener)?,
            }
        }
        let wanted =
            |address: &SocketAddr| config.pools.iter().any(|pool: &PoolConfig| pool.listen == *address);
        let closed = &mut self.closed;
        closed.retain(|front| front.strong_count() > 0);
        self.fronts.retain(|address, front| {
            let stays = wanted(address);
            if stays {
                front.change(router(*address), limits, tls.clone());
            } else {
                front.close();
                closed.push(Arc::downgrade(front));
            }
            stays
        });
        Ok(())
    }

    /// Takes nothing more, lets what is there be answered, and says so.
    fn finish(&self) {
        let closed = self.closed.iter().filter_map(Weak::upgrade);
        let fronts: Vec<Arc<Front>> = self.fronts.values().cloned().chain(closed).collect();
        let (world, line, drain) = (self.world.clone(), self.line.clone(), self.drain);
        let traces = self.traces.clone();
        fronts.iter().for_each(|front| front.close());
        tokio::spawn(async move {
            let answered = async {
                let idle = || world.lock().all().all(|pool| pool.is_idle());
                while !idle() {
                    tokio::time::sleep(FINISH_POLL).await;
                }
                for front in fronts {
                    front.closed().await;
                }
            };
            if tokio::time::timeout(drain, answered).await.is_err() {
                tracing::warn!(
                    "requests are still in flight after {} s, and are cut off",
                    drain.as_secs_f64()
                );
            }
            world.lock().all().for_each(|pool| pool.finish());
            if let Some(traces) = traces {
                // It waits and does not panic.
                let _ = tokio::task::spawn_blocking(move || traces.end(LAST_SPANS)).await;
            }
            // The parent may be gone already.
            let _ = line.tell(&ToParent::Finished, &[]);
        });
    }
}

/// The pools of one address, in the order of the file.
struct Table(Vec<(Matching, Arc<dyn Desk>)>);

impl Table {
    fn find(&self, asked: &Asked<'_>, model: Option<Option<&str>>) -> Choice {
        let mut default = None;
        for (matching, desk) in &self.0 {
            if matching.is_default() {
                default = Some(desk);
            } else if fits(matching, asked) {
                match (&matching.model, model) {
                    (None, _) => return Choice::Desk(desk.clone()),
                    (Some(_), None) => return Choice::ByModel,
                    (Some(wanted), Some(found)) if found == Some(wanted) => {
                        return Choice::Desk(desk.clone());
                    }
                    (Some(_), Some(_)) => {}
                }
            }
        }
        default.map_or(Choice::Nobody, |desk| Choice::Desk(desk.clone()))
    }
}

/// Whether a request is for a pool, its model aside.
fn fits(matching: &Matching, asked: &Asked<'_>) -> bool {
    let host = matching
        .host
        .as_ref()
        .is_none_or(|wanted| asked.host.is_some_and(|host| host.eq_ignore_ascii_case(wanted)));
    let path = matching.path_prefix.as_ref().is_none_or(|prefix| below(asked.path, prefix));
    let header = matching.header.as_ref().is_none_or(|(name, value)| {
        asked.headers.get(name).is_some_and(|found| found.as_bytes() == value.as_bytes())
    });
    host && path && header
}

/// `/v1` has `/v1` and `/v1/x` below it, and not `/v10`.
fn below(path: &str, prefix: &str) -> bool {
    let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '?']))
}

impl Router for Table {
    fn choose(&self, asked: &Asked<'_>) -> Choice {
        self.find(asked, None)
    }

    fn choose_by_model(&self, asked: &Asked<'_>, model: Option<&str>) -> Option<Arc<dyn Desk>> {
        match self.find(asked, Some(model)) {
            Choice::Desk(desk) => Some(desk),
            Choice::ByModel | Choice::Nobody => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use rewarm_gateway::{Manners, Refusal, Traffic, Turn, Want};

    use super::*;

    /// A pool of which only the name is asked.
    struct Named(&'static str, Arc<Traffic>);

    impl Desk for Named {
        fn name(&self) -> &str {
            self.0
        }
        fn manners(&self) -> Arc<Manners> {
            Arc::default()
        }
        fn slot(&self, _want: &Want) -> Turn {
            Turn::Refused(Refusal::Closed { why: "it has none".to_owned() })
        }
        fn retry_after(&self) -> Duration {
            Duration::ZERO
        }
        fn traffic(&self) -> &Arc<Traffic> {
            &self.1
        }
    }

    #[test]
    fn a_request_goes_to_the_first_pool_that_all_fits_and_else_to_the_one_without_match() {
        let text = "[[pool]]\nname = 'rest'\nsnapshot = 's3://m/p@v1'\nlisten = '127.0.0.1:1'\n".to_owned()
            + &[
                ("host", "host = 'a.example'"),
                ("header", "header = 'x-team: red'"),
                ("both", "path_prefix = '/v2', model = 'llama'"),
                ("path", "path_prefix = '/v2'"),
                ("model", "model = 'bert'"),
            ]
            .map(|(name, matching)| {
                format!(
                    "[[pool]]\nname = '{name}'\nsnapshot = 's3://m/p@v1'\nlisten = '127.0.0.1:1'\nmatch = {{ {matching} }}\n"
                )
            })
            .concat();
        let config = Config::parse(&text, std::path::Path::new("pool.toml")).expect("good");
        let names = ["rest", "host", "header", "both", "path", "model"];
        let desks = names.map(|name| Arc::new(Named(name, Arc::default())) as Arc<dyn Desk>);
        let table = Table(config.pools.iter().map(|pool| pool.matching.clone()).zip(desks).collect());
        let found = |host, path, team: &'static str, model: Option<&str>| {
            let mut headers = hyper::HeaderMap::new();
            headers.insert("x-team", hyper::header::HeaderValue::from_static(team));
            let asked = Asked { host, path, headers: &headers };
            match table.choose(&asked) {
                Choice::Desk(desk) => desk.name().to_owned(),
                Choice::ByModel => {
                    let desk = table.choose_by_model(&asked, model).expect("one takes the rest");
                    format!("{} by model", desk.name())
                }
                Choice::Nobody => "nobody".to_owned(),
            }
        };
        assert_eq!(found(Some("A.Example"), "/v2", "red", None), "host");
        assert_eq!(found(Some("b.example"), "/v2", "red", None), "header");
        assert_eq!(found(None, "/v2/x", "blue", Some("llama")), "both by model");
        assert_eq!(found(None, "/v2/x", "blue", Some("bert")), "path by model");
        assert_eq!(found(None, "/v1", "Red", Some("bert")), "model by model");
        assert_eq!(found(None, "/v1", "blue", Some("other")), "rest by model");
        assert_eq!(found(None, "/v1", "blue", None), "rest by model", "no model was found");
    }

    #[test]
    fn a_prefix_ends_where_a_part_of_the_path_does() {
        assert!(below("/v1", "/v1") && below("/v1/x", "/v1") && below("/v1/x", "/v1/") && below("/x", "/"));
        assert!(!below("/v10", "/v1") && !below("/v2/v1", "/v1"));
    }
}
