//! Replicas that serve, and then do not.

use super::*;

impl World {
    /// The replica that is started now answers one request and refuses the next.
    async fn flaps(&self, tier: Tier) {
        let (name, how) = self.start();
        assert_eq!(how, tier);
        self.serves(&name, Vec::new());
        drop(self.slot().await);
        let mut refused = self.slot().await;
        refused.lease.unreachable("connection refused");
        drop(refused);
        assert!(matches!(self.told(), ToParent::Stop { name: stopped, .. } if stopped == name));
    }
}

#[tokio::test]
async fn replicas_that_answer_and_then_refuse_are_not_started_without_end() {
    let world = World::new("min_replicas = 1\ncold = false\n", None);
    world.live.with(Inner::pass);
    for _ in 0..3 {
        world.flaps(Tier::Restore).await;
    }
    let status = world.live.status();
    let circuit = status.circuit.as_ref().expect("nothing is started for a while");
    assert_eq!(circuit.failures, 3);
    assert!(circuit.reason.contains("connection refused"), "{circuit:?}");
    assert!(status.replicas.is_empty(), "{status:?}");
    // Whoever comes is held until the circuit closes, and answered by the next replica.
    let asked = world.ask(Want::default());
    world.await_held(1).await;
    let began = Instant::now();
    while world.live.status().circuit.is_some() {
        assert!(began.elapsed() < PATIENCE, "the circuit stays open");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    world.live.with(Inner::pass);
    let (name, _) = world.start();
    world.serves(&name, Vec::new());
    asked.await.expect("no panic").expect("a slot");
}

#[tokio::test]
async fn where_restored_replicas_refuse_cold_ones_take_their_place() {
    let world = World::new("min_replicas = 1\n", None);
    world.live.with(Inner::pass);
    for tier in [Tier::Restore, Tier::Restore, Tier::Restore, Tier::Cold] {
        world.flaps(tier).await;
    }
}

#[tokio::test]
async fn a_replica_that_goes_in_order_after_an_answer_has_worked() {
    let world = World::new("min_replicas = 1\n", None);
    world.live.with(Inner::pass);
    for _ in 0..3 {
        world.flaps(Tier::Restore).await;
        world.flaps(Tier::Restore).await;
        let (name, _) = world.start();
        world.serves(&name, Vec::new());
        drop(world.slot().await);
        let drain = Command::Drain { pool: "p".to_owned(), replica: name };
        world.live.command(&drain).expect("it is there");
        assert!(matches!(world.told(), ToParent::Stop { .. }));
    }
}

#[tokio::test]
async fn what_a_replica_still_answers_is_not_cut_off_because_it_refuses_others() {
    let world = World::new("", None);
    let asked = world.ask(Want::default());
    let (name, _) = world.start();
    world.serves(&name, Vec::new());
    let streaming = asked.await.expect("no panic").expect("a slot");
    let mut refused = world.slot().await;
    refused.lease.unreachable("connection refused");
    drop(refused);
    let status = world.live.status();
    assert_eq!((status.in_flight, status.totals.cut_off), (1, 0));
    // It gets no further request, though it has free slots.
    let next = world.ask(Want::default());
    let (second, _) = world.start();
    world.serves(&second, Vec::new());
    let next = next.await.expect("no panic").expect("a slot");
    assert_eq!(next.upstream.name(), second);
    drop(streaming);
    assert!(matches!(world.told(), ToParent::Stop { name: stopped, .. } if stopped == name));
    assert_eq!(world.live.status().totals.cut_off, 0);
}
