//! A pool without a machine: the test is its parent, and says what becomes of replicas.

use std::os::unix::net::UnixStream;
use std::path::Path;

use rewarm_autoscaler::pool::{State, Tier};
use rewarm_gateway::{Desk, Refusal, Slot, Want};
use rewarm_report::Timing;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::*;
use crate::config::Config;
use crate::link::ToParent;

mod again;
mod existing;
mod luck;
mod removed;
mod room;
mod slots;
mod spans;
mod starts;

/// No step of a test takes as long on any machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A pool, and what it tells its parent.
struct World {
    live: Arc<Live>,
    heard: Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<ToParent>>>,
    shared: Shared,
}

impl World {
    fn new(more: &str, tracer: Option<SdkTracer>) -> Self {
        Self::within(u64::MAX, "p", more, tracer)
    }

    /// A pool with so much host memory.
    fn within(host: u64, name: &str, more: &str, tracer: Option<SdkTracer>) -> Self {
        Self::on(Memory { host, device: u64::MAX }, name, more, tracer)
    }

    /// A pool on a machine with so much memory.
    fn on(machine: Memory, name: &str, more: &str, tracer: Option<SdkTracer>) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let line = Line::new(ours);
        let shared = Shared {
            ticker: Ticker::start(),
            dialler: Arc::new(Dialler::new(line.clone())),
            line,
            notices: broadcast::channel(64).0,
            ledger: Ledger::new(machine),
            room: Room::default(),
            tracer,
        };
        let (parent, (tell, heard)) = (Line::new(theirs), mpsc::unbounded_channel());
        // Ends with the pool, whose end of the line is gone then.
        std::thread::spawn(move || {
            while let Ok(Some((message, _))) = parent.hear() {
                if tell.send(message).is_err() {
                    return;
                }
            }
        });
        Self::pool(shared, Arc::new(tokio::sync::Mutex::new(heard)), name, more)
    }

    /// Another pool that shares with this one what pools share.
    fn another(&self, name: &str, more: &str) -> Self {
        Self::pool(self.shared.clone(), self.heard.clone(), name, more)
    }

    fn pool(
        shared: Shared,
        heard: Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<ToParent>>>,
        name: &str,
        more: &str,
    ) -> Self {
        let text = format!(
            "[[pool]]\nname = '{name}'\nsnapshot = 's3://models/p@v1'\nlisten = '127.0.0.1:1'\n{more}"
        );
        let config = Config::parse(&text, Path::new("pool.toml")).expect("good");
        Self { live: Live::new(config.pools[0].clone(), shared.clone()), heard, shared }
    }

    /// What the pool tells its parent next.
    async fn told(&self) -> ToParent {
        let mut heard = self.heard.lock().await;
        let told = tokio::time::timeout(PATIENCE, heard.recv()).await;
        told.expect("it tells something").expect("it lives")
    }

    /// The start that is asked for next: the replica's name, and how.
    async fn start(&self) -> (String, Tier) {
        match self.told().await {
            ToParent::Start { name, tier, .. } => (name, tier),
            other => panic!("{other:?}, expected a start"),
        }
    }

    /// A replica serves.
    fn serves(&self, name: &str, stages: Vec<Timing>) {
        self.live.heard(name, Heard::Started(Started { source: None, port: Some(1), stages }));
    }

    /// Looks at everything as it will be after so long.
    fn pass(&self, time: Duration) {
        self.live.with(|inner| {
            inner.now = inner.now + time;
            inner.pass();
        });
    }

    /// Lives through so much time at once, looking whenever the pool wants to, as [`Live::run`] does.
    fn live_through(&self, time: Duration) {
        self.live.with(|inner| {
            let end = inner.now + time;
            for _ in 0..100_000 {
                let next = inner.next_moment();
                if next > end {
                    return;
                }
                inner.now = inner.now.max(next);
                inner.pass();
            }
            panic!("it looks without end, at {:?} for {:?}", inner.now, inner.next_moment());
        });
    }

    fn states(&self) -> Vec<State> {
        self.live.status().replicas.iter().map(|replica| replica.state).collect()
    }

    /// A request comes, and waits where it must.
    fn ask(&self, want: Want) -> JoinHandle<Result<Slot, Refusal>> {
        let desk = self.live.desk();
        tokio::spawn(async move { desk.slot(&want).slot().await })
    }

    /// A request comes and finds a slot at once.
    async fn slot(&self) -> Slot {
        self.ask(Want::default()).await.expect("no panic").expect("a slot")
    }

    /// A request comes to a pool without replicas, and has a slot of the one that is started for it: what that is called.
    async fn first_slot(&self) -> (String, Slot) {
        let asked = self.ask(Want::default());
        let (name, _) = self.start().await;
        self.serves(&name, Vec::new());
        (name, asked.await.expect("no panic").expect("a slot"))
    }

    async fn await_held(&self, count: u32) {
        let began = Instant::now();
        while self.live.status().held != count {
            assert!(began.elapsed() < PATIENCE, "{} are held, expected {count}", self.live.status().held);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
