//! Requests that a replica lost: they are tried elsewhere, and before all that are held.

use rewarm_gateway::{Asked, Choice, Front, Lanes, Limits, Router};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use super::*;

/// What a replica lost comes again.
fn lost_by(name: &str, session: Option<&str>) -> Want {
    let session = session.map(|session| session.as_bytes().to_vec());
    Want { session, lost_by: vec![name.to_owned()], trace: None }
}

/// A slot that is given in time.
async fn given(asked: JoinHandle<Result<Slot, Refusal>>) -> Slot {
    let slot = tokio::time::timeout(PATIENCE, asked).await.expect("in time");
    slot.expect("no panic").expect("a slot")
}

struct Only(crate::live::requests::LiveDesk);

impl Router for Only {
    fn choose(&self, _asked: &Asked<'_>) -> Choice {
        Choice::Desk(Arc::new(self.0.clone()))
    }

    fn choose_by_model(&self, _asked: &Asked<'_>, _model: Option<&str>) -> Option<Arc<dyn Desk>> {
        None
    }
}

impl World {
    /// A pool with two replicas that serve.
    fn of_two(more: &str) -> Self {
        let world = Self::new(&format!("min_replicas = 2\n{more}"), None);
        world.adopts(&[("p-1", false), ("p-2", false)]);
        world
    }

    /// As the parent, gives the gateway the connection that it asks for: to which replica, and the replica's end of it.
    async fn dialled(&self) -> (String, TcpStream) {
        let ToParent::Dial { number, name, .. } = self.told().await else { panic!("expected a connection") };
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let address = listener.local_addr().expect("its address");
        let ours = std::net::TcpStream::connect(address).expect("it listens");
        self.shared.dialler.answered(number, Ok(ours.into()));
        (name, listener.accept().await.expect("a connection").0)
    }
}

/// Everything up to the end of a head.
async fn head(stream: &mut TcpStream) -> String {
    let mut seen = Vec::new();
    while !seen.ends_with(b"\r\n\r\n") {
        let byte = tokio::time::timeout(PATIENCE, stream.read_u8()).await.expect("in time");
        seen.push(byte.expect("a whole head"));
    }
    String::from_utf8_lossy(&seen).to_lowercase()
}

#[tokio::test]
async fn a_request_that_a_replica_loses_is_answered_by_the_other_one() {
    let world = World::of_two("");
    let limits = Limits { header_timeout: PATIENCE, body_timeout: None, body_max: None };
    let (lanes, places) = (Lanes::start(1).expect("threads"), Arc::new(Semaphore::new(10)));
    let front = Front::new(Arc::new(Only(world.live.desk())), limits, None, lanes, places, None);
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
    let address = listener.local_addr().expect("its address");
    tokio::spawn(front.serve(listener));
    let mut client = TcpStream::connect(address).await.expect("it listens");
    client.write_all(b"GET / HTTP/1.1\r\nhost: p\r\n\r\n").await.expect("it is sent");
    let (first, mut replica) = world.dialled().await;
    head(&mut replica).await;
    drop(replica);
    let (second, mut replica) = world.dialled().await;
    assert_eq!([first.as_str(), second.as_str()], ["p-1", "p-2"]);
    head(&mut replica).await;
    replica.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.expect("it is sent");
    let answer = head(&mut client).await;
    assert!(answer.starts_with("http/1.1 200 ok") && answer.contains("x-rewarm-replica: p-2"), "{answer}");
}

#[tokio::test]
async fn what_a_replica_lost_goes_to_another_one_by_whatever_rule_requests_go() {
    for rule in ["", "routing = 'least-in-flight'\n", "affinity = 'x-session'\n"] {
        let world = World::of_two(rule);
        for lost in ["p-1", "p-2"] {
            for session in [None, Some("a"), Some("b"), Some("c")] {
                let slot = given(world.ask(lost_by(lost, session))).await;
                assert_ne!(slot.upstream.name(), lost, "{rule}{session:?}");
            }
        }
        assert_eq!(world.live.status().totals.requests, 0, "each was counted when it came first");
    }
}

#[tokio::test]
async fn the_only_replica_gets_what_it_lost_again() {
    let world = World::new("min_replicas = 1\n", None);
    world.adopts(&[("p-1", false)]);
    let slot = given(world.ask(lost_by("p-1", None))).await;
    assert_eq!(slot.upstream.name(), "p-1");
}

#[tokio::test]
async fn what_a_replica_lost_waits_for_one_that_is_on_its_way_and_keeps_nobody_from_a_slot() {
    let world = World::new("concurrency = 2\nmin_replicas = 1\n", None);
    world.adopts(&[("p-1", false)]);
    world.live.command(&Command::Scale { pool: "p".to_owned(), replicas: Some(2) }).expect("it can");
    let (coming, _) = world.start().await;
    let again = world.ask(lost_by("p-1", None));
    world.await_held(1).await;
    // Another one comes later, and is not lost.
    let other = given(world.ask(Want::default())).await;
    assert_eq!((other.upstream.name(), again.is_finished()), ("p-1", false));
    world.serves(&coming, Vec::new());
    assert_eq!(given(again).await.upstream.name(), coming);
}

#[tokio::test]
async fn what_no_other_replica_takes_in_time_goes_to_the_one_that_lost_it() {
    let world = World::of_two("concurrency = 1\nrouting = 'least-in-flight'\ntarget_wait = '5s'\n");
    let (first, second) = (world.slot().await, world.slot().await);
    assert_eq!([first.upstream.name(), second.upstream.name()], ["p-1", "p-2"]);
    drop(first);
    let again = world.ask(lost_by("p-1", None));
    world.await_held(1).await;
    world.pass(Duration::from_secs(4));
    assert_eq!(world.live.status().held, 1, "the other one may still take it");
    let due = world.live.with(|inner| inner.next_moment().since(inner.now));
    assert!(due <= Duration::from_secs(5), "{due:?}");
    world.pass(Duration::from_secs(6));
    assert_eq!(given(again).await.upstream.name(), "p-1");
}

#[tokio::test]
async fn what_a_replica_lost_goes_before_all_that_are_held() {
    let world = World::new("concurrency = 1\nmax_replicas = 1\nqueue = { max = 1 }\n", None);
    let (name, busy) = world.first_slot().await;
    let held = world.ask(Want::default());
    world.await_held(1).await;
    let again = world.ask(lost_by(&name, None));
    world.await_held(2).await;
    drop(busy);
    let slot = given(again).await;
    assert!(!held.is_finished());
    drop(slot);
    given(held).await;
}
