//! What a gateway may ask its parent: it talks to strangers, and may have been taken over by one.

use std::io;
use std::net::TcpStream;
use std::sync::Mutex;

use rewarm_autoscaler::pool::Tier;

use super::*;
use crate::replicas::{Existing, GivenUp, Kept, Started};

/// Replicas that are never made. What is asked for is written down.
#[derive(Default)]
struct Asked(Mutex<Vec<String>>);

impl Asked {
    fn note(&self, what: String) {
        self.0.lock().expect("no panic").push(what);
    }
}

#[async_trait::async_trait]
impl Replicas for Asked {
    fn check(&self, _: &Config) -> Result<(), String> {
        Ok(())
    }
    async fn device_bytes(&self) -> Option<u64> {
        None
    }
    async fn find(&self, _: &PoolConfig) -> Result<Known, String> {
        Err("there is none".to_owned())
    }
    async fn prefetch(&self, _: &PoolConfig, _: &Known) -> Result<Option<Kept>, String> {
        Ok(None)
    }
    async fn start(&self, order: Order, _: GivenUp) -> Result<Started, String> {
        self.note(format!("start {}", order.name));
        std::future::pending().await
    }
    async fn capture(&self, order: Order, _: GivenUp) -> Result<(), String> {
        self.note(format!("capture {}", order.name));
        std::future::pending().await
    }
    async fn pause(&self, name: &str) -> Result<(), String> {
        self.note(format!("pause {name}"));
        Ok(())
    }
    async fn wake(&self, name: &str) -> Result<(), String> {
        self.note(format!("wake {name}"));
        Ok(())
    }
    async fn stop(&self, name: &str, _: Duration) -> Result<(), String> {
        self.note(format!("stop {name}"));
        Ok(())
    }
    async fn ended(&self, _: &str) -> String {
        std::future::pending().await
    }
    fn dial(&self, name: &str, port: u16, _: Duration) -> io::Result<TcpStream> {
        self.note(format!("dial {name} {port}"));
        Err(io::ErrorKind::ConnectionRefused.into())
    }
    fn existing(&self) -> Result<Vec<Existing>, String> {
        Ok(Vec::new())
    }
}

/// A parent with two pools of at most two replicas, of which only `q` is captured, and the gateway's end of its line.
fn parent() -> (Keeper, Arc<Asked>, Line) {
    let pool = |name: &str, more: &str| {
        format!(
            "[[pool]]\nname = '{name}'\nsnapshot = 's3://models/{name}@v1'\nlisten = '127.0.0.1:1'\nmax_replicas = 2\n{more}"
        )
    };
    let text = format!("{}{}", pool("p", ""), pool("q", "match = { host = 'q' }\ncapture = true\n"));
    let config = Config::parse(&text, Path::new("pool.toml")).expect("good");
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    theirs.set_read_timeout(Some(Duration::from_secs(30))).expect("a socket");
    let asked = Arc::new(Asked::default());
    let keeper = Keeper {
        settings: Settings { config: PathBuf::new(), state: PathBuf::new(), program: PathBuf::new() },
        replicas: asked.clone(),
        config,
        left: Vec::new(),
        addresses: Addresses::default(),
        tasks: HashMap::new(),
        finding: Vec::new(),
        device_bytes: None,
        line: Some(Line::new(ours)),
    };
    (keeper, asked, Line::new(theirs))
}

fn start(pool: &str, name: &str) -> ToParent {
    ToParent::Start { pool: pool.to_owned(), name: name.to_owned(), tier: Tier::Restore }
}

fn told(line: &Line) -> ToGateway {
    line.hear().expect("a message").expect("the parent lives").0
}

/// What was asked of the machine once `count` things were.
async fn asked(replicas: &Asked, count: usize) -> Vec<String> {
    let began = Instant::now();
    loop {
        let seen = replicas.0.lock().expect("no panic").clone();
        if seen.len() >= count || began.elapsed() > Duration::from_secs(30) {
            return seen;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_gateway_gets_replicas_of_its_pools_under_names_of_theirs_and_no_others() {
    let (mut keeper, replicas, line) = parent();
    for (pool, name) in [("other", "other-1"), ("p", "q-1"), ("p", "p"), ("p", "web-1"), ("", "-1")] {
        keeper.carry_out(start(pool, name));
        let refused = told(&line);
        assert!(
            matches!(&refused, ToGateway::Failed { name: told, reason } if told == name && reason == "it may not be started"),
            "{pool} {name}: {refused:?}"
        );
    }
    keeper.carry_out(start("p", "p-1"));
    assert_eq!(asked(&replicas, 1).await, ["start p-1"]);
    // The same one once more.
    keeper.carry_out(start("p", "p-1"));
    assert!(matches!(told(&line), ToGateway::Failed { .. }));
    assert_eq!(asked(&replicas, 1).await.len(), 1);
}

#[tokio::test]
async fn a_gateway_gets_no_more_replicas_than_its_pools_may_have() {
    let (mut keeper, replicas, line) = parent();
    let mut refused = 0;
    for number in 0..200 {
        let before = keeper.tasks.len();
        keeper.carry_out(start("p", &format!("p-{number}")));
        if keeper.tasks.len() == before {
            assert!(matches!(told(&line), ToGateway::Failed { .. }));
            refused += 1;
        }
    }
    // Those on their way out have room beside two for each pool.
    let most = 24;
    assert_eq!((keeper.tasks.len(), refused), (most, 200 - most));
    assert_eq!(asked(&replicas, most).await.len(), most);
}

#[tokio::test]
async fn only_pools_that_say_so_are_captured() {
    let (mut keeper, replicas, line) = parent();
    for (pool, name) in [("p", "p-1"), ("q", "p-1"), ("other", "other-1")] {
        keeper.carry_out(ToParent::Capture { pool: pool.to_owned(), name: name.to_owned() });
        let refused = told(&line);
        assert!(
            matches!(&refused, ToGateway::Captured { name: told, problem: Some(_) } if told == name),
            "{refused:?}"
        );
    }
    keeper.carry_out(ToParent::Capture { pool: "q".to_owned(), name: "q-1".to_owned() });
    assert_eq!(asked(&replicas, 1).await, ["capture q-1"]);
}

/// Other replicas of the machine are somebody else's.
#[tokio::test]
async fn what_is_no_replica_of_its_pools_is_neither_reached_nor_touched() {
    let (mut keeper, replicas, line) = parent();
    let name = || "web-1".to_owned();
    for message in [
        ToParent::Pause { name: name() },
        ToParent::Wake { name: name() },
        ToParent::Stop { name: name(), why: "it wants to".to_owned() },
        ToParent::GiveUp { name: name() },
    ] {
        keeper.carry_out(message);
        assert!(matches!(told(&line), ToGateway::Stopped { name } if name == "web-1"));
    }
    keeper.carry_out(ToParent::Dial { number: 7, name: name(), port: 22 });
    // It comes from a thread of its own.
    let dialled = tokio::task::spawn_blocking(move || told(&line)).await.expect("no panic");
    assert!(matches!(dialled, ToGateway::Dialled { number: 7, error: Some(_) }), "{dialled:?}");
    assert_eq!(asked(&replicas, 0).await, [""; 0]);
}
