//! Two pools whose replicas do not fit into memory together.

use super::*;

const WAITS: &str = "replica_memory = '45MiB'\nwarm = 1\nconcurrency = 1\n";

fn scale(pool: &str, replicas: u32) -> Command {
    Command::Scale { pool: pool.to_owned(), replicas: Some(replicas) }
}

impl World {
    /// A replica of this pool that waits: what it is called.
    pub(super) async fn with_warm(&self) -> String {
        self.live.with(Inner::pass);
        let (name, _) = self.start().await;
        self.serves(&name, Vec::new());
        assert!(matches!(self.told().await, ToParent::Pause { .. }));
        self.live.heard(&name, Heard::Paused);
        name
    }

    /// The parent is told to stop this one, and does.
    pub(super) async fn stops(&self, name: &str, because: &str) {
        match self.told().await {
            ToParent::Stop { name: stopped, why } => {
                assert_eq!((stopped.as_str(), why.as_str()), (name, because))
            }
            other => panic!("{other:?}, expected the end of {name}"),
        }
    }

    fn look_for_room(&self) {
        if let Some(short) = self.live.with(Inner::asks_for_room) {
            self.shared.room.make(&self.live, short);
        }
    }

    /// Taken by all pools, in MiB.
    fn used(&self) -> u64 {
        self.shared.ledger.used().host >> 20
    }
}

#[tokio::test]
async fn a_held_request_gets_the_room_of_a_replica_that_waits_in_another_pool() {
    let q = World::within(100 << 20, "q", WAITS, None);
    let p = q.another("p", "replica_memory = '60MiB'\n");
    let warm = q.with_warm().await;
    for pool in [&p, &q] {
        tokio::spawn(pool.live.clone().run());
    }
    let asked = p.ask(Want::default());
    p.stops(&warm, "it makes room for a start of another pool").await;
    let status = p.live.status();
    let obstacle = "a start waits for memory: host memory: 62914560 bytes wanted, 57671680 of 104857600 free";
    assert_eq!(status.obstacle.as_deref(), Some(obstacle));
    let said: Vec<_> = status.decisions.iter().flat_map(|decision| &decision.steps).collect();
    assert_eq!(said, [obstacle], "a decision that waits is one, too");
    assert_eq!(q.used(), 45, "what is being ended has its memory until it is gone");
    q.live.heard(&warm, Heard::Stopped);
    // Not the other pool, which lacks a replica that waits.
    let (name, _) = p.start().await;
    assert!(name.starts_with("p-"), "{name}");
    p.serves(&name, Vec::new());
    drop(asked.await.expect("no panic").expect("a slot"));
    assert_eq!((p.live.status().obstacle, q.used()), (None, 60));
    // When that one goes, there is one again that waits.
    p.live.command(&scale("p", 0)).expect("done");
    p.stops(&name, "it is not needed").await;
    p.live.heard(&name, Heard::Stopped);
    let (name, _) = q.start().await;
    assert!(name.starts_with("q-"), "{name}");
}

#[tokio::test]
async fn what_waits_is_given_up_when_that_is_enough_and_not_before() {
    let q = World::within(100 << 20, "q", WAITS, None);
    let (p, r) = (q.another("p", "replica_memory = '60MiB'\n"), q.another("r", "replica_memory = '45MiB'\n"));
    let warm = q.with_warm().await;
    let (busy, serving) = r.first_slot().await;
    let asked = p.ask(Want::default());
    p.await_held(1).await;
    p.look_for_room();
    assert_eq!(q.live.status().replicas.len(), 1, "50 MiB are missing, and 45 wait");
    r.live.command(&scale("r", 0)).expect("done");
    drop(serving);
    r.stops(&busy, "it is not needed").await;
    p.look_for_room();
    q.stops(&warm, "it makes room for a start of another pool").await;
    p.look_for_room();
    assert_eq!(q.used(), 90);
    r.live.heard(&busy, Heard::Stopped);
    q.live.heard(&warm, Heard::Stopped);
    p.live.with(Inner::pass);
    let (name, _) = p.start().await;
    p.serves(&name, Vec::new());
    drop(asked.await.expect("no panic").expect("a slot"));
}

#[tokio::test]
async fn only_a_request_takes_the_room_of_what_waits() {
    let q = World::within(100 << 20, "q", WAITS, None);
    let p = q.another("p", "replica_memory = '60MiB'\nmin_replicas = 1\n");
    let warm = q.with_warm().await;
    p.live.with(Inner::pass);
    assert!(p.live.status().obstacle.is_some());
    p.look_for_room();
    assert_eq!(q.live.status().replicas[0].name, warm);
    // With one that is held it is another matter.
    let _asked = p.ask(Want::default());
    p.await_held(1).await;
    p.look_for_room();
    q.stops(&warm, "it makes room for a start of another pool").await;
}

#[tokio::test]
async fn what_will_never_fit_keeps_nobody_from_anything() {
    let q = World::within(100 << 20, "q", WAITS, None);
    let p = q.another("p", "replica_memory = '200MiB'\n");
    let asked = p.ask(Want::default());
    p.await_held(1).await;
    let obstacle = p.live.status().obstacle.expect("it is told why");
    assert!(obstacle.ends_with("209715200 bytes wanted, 104857600 of 104857600 free"), "{obstacle}");
    let warm = q.with_warm().await;
    p.look_for_room();
    assert_eq!(q.live.status().replicas[0].name, warm);
    asked.abort();
}

#[tokio::test]
async fn a_replica_for_which_devices_have_no_memory_waits_until_one_that_has_it_goes() {
    let machine = Memory { host: u64::MAX, device: 15 << 20 };
    let p = World::on(machine, "p", "concurrency = 1\n", None);
    let q = p.another("q", "concurrency = 1\nwarm = 1\n");
    for pool in [&p, &q] {
        pool.live.known(super::existing::known(60 << 20, 10 << 20));
    }
    // One that waits has nothing of a device, but it needs it until then.
    let warm = q.with_warm().await;
    let (name, busy) = p.first_slot().await;
    let asked = q.ask(Want::default());
    q.await_held(1).await;
    q.pass(Duration::from_secs(2));
    let obstacle = "a start waits for memory: device memory: 10485760 bytes wanted, 5242880 of 15728640 free";
    assert_eq!(q.live.status().obstacle.as_deref(), Some(obstacle));
    assert_eq!((q.states(), asked.is_finished()), (vec![State::Warm], false));
    p.live.command(&scale("p", 0)).expect("done");
    drop(busy);
    p.stops(&name, "it is not needed").await;
    p.live.heard(&name, Heard::Stopped);
    q.pass(Duration::from_secs(2));
    assert!(matches!(q.told().await, ToParent::Wake { name } if name == warm));
    q.live.heard(&warm, Heard::Woken);
    let slot = tokio::time::timeout(PATIENCE, asked).await.expect("in time");
    assert_eq!(slot.expect("no panic").expect("a slot").upstream.name(), warm);
}
