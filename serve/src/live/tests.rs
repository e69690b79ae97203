//! A pool without a machine: the test is its parent, and says what becomes of replicas.

use std::os::unix::net::UnixStream;
use std::path::Path;

use rewarm_autoscaler::pool::Tier;
use rewarm_gateway::{Desk, Refusal, Slot, Want};
use rewarm_report::Timing;
use tokio::task::JoinHandle;

use super::*;
use crate::config::Config;
use crate::link::ToParent;

mod luck;
mod slots;
mod spans;

/// No step of a test takes as long on any machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A pool, and the other end of its line.
struct World {
    live: Arc<Live>,
    parent: Line,
}

impl World {
    fn new(more: &str, tracer: Option<SdkTracer>) -> Self {
        let text =
            format!("[[pool]]\nname = 'p'\nsnapshot = 's3://models/p@v1'\nlisten = '127.0.0.1:1'\n{more}");
        let config = Config::parse(&text, Path::new("pool.toml")).expect("good");
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let line = Line::new(ours);
        let shared = Shared {
            ticker: Ticker::start(),
            dialler: Arc::new(Dialler::new(line.clone())),
            line,
            notices: broadcast::channel(64).0,
            ledger: Ledger::new(Memory { host: u64::MAX, device: u64::MAX }),
            tracer,
        };
        Self { live: Live::new(config.pools[0].clone(), shared), parent: Line::new(theirs) }
    }

    /// What the pool tells its parent next.
    fn told(&self) -> ToParent {
        self.parent.hear().expect("good").expect("it lives").0
    }

    /// The start that is asked for next: the replica's name, and how.
    fn start(&self) -> (String, Tier) {
        match self.told() {
            ToParent::Start { name, tier, .. } => (name, tier),
            other => panic!("{other:?}, expected a start"),
        }
    }

    /// A replica serves.
    fn serves(&self, name: &str, stages: Vec<Timing>) {
        self.live.heard(name, Heard::Started(Started { source: None, port: Some(1), stages }));
    }

    /// A request comes, and waits where it must.
    fn ask(&self, want: Want) -> JoinHandle<Result<Slot, Refusal>> {
        let desk = LiveDesk(self.live.clone());
        tokio::spawn(async move { desk.slot(want).await })
    }

    /// A request comes and finds a slot at once.
    async fn slot(&self) -> Slot {
        self.ask(Want::default()).await.expect("no panic").expect("a slot")
    }

    async fn await_held(&self, count: u32) {
        let began = Instant::now();
        while self.live.status().held != count {
            assert!(began.elapsed() < PATIENCE, "{} are held, expected {count}", self.live.status().held);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
