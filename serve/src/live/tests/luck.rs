//! Replicas that serve, and then do not.

use super::*;

impl World {
    /// This replica answers one request and refuses the next.
    async fn flaps(&self, name: &str) {
        self.serves(name, Vec::new());
        drop(self.slot().await);
        let mut refused = self.slot().await;
        refused.lease.unreachable("connection refused");
        drop(refused);
        assert_eq!(self.live.status().totals.cut_off, 0);
    }

    /// This replica goes, since nobody listens in it.
    async fn goes(&self, name: &str) {
        match self.told().await {
            ToParent::Stop { name: stopped, why } if stopped == name => {
                assert_eq!(why, "its server cannot be reached: connection refused");
            }
            other => panic!("{other:?}, expected the end of {name}"),
        }
    }

    /// As [`World::flaps`]; the one in its place is of this tier.
    async fn flaps_and_is_replaced(&self, name: &str, tier: Tier) -> String {
        self.flaps(name).await;
        let (next, how) = self.start().await;
        assert_eq!(how, tier);
        self.goes(name).await;
        next
    }
}

#[tokio::test]
async fn replicas_that_answer_and_then_refuse_are_not_started_without_end() {
    let world = World::new("min_replicas = 1\ncold = false\n", None);
    world.live.with(Inner::pass);
    let (mut name, _) = world.start().await;
    for _ in 0..2 {
        name = world.flaps_and_is_replaced(&name, Tier::Restore).await;
    }
    world.flaps(&name).await;
    world.goes(&name).await;
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
    let (name, _) = world.start().await;
    world.serves(&name, Vec::new());
    asked.await.expect("no panic").expect("a slot");
}

#[tokio::test]
async fn where_restored_replicas_refuse_cold_ones_take_their_place() {
    let world = World::new("min_replicas = 1\n", None);
    world.live.with(Inner::pass);
    let (mut name, _) = world.start().await;
    for tier in [Tier::Restore, Tier::Restore, Tier::Cold] {
        name = world.flaps_and_is_replaced(&name, tier).await;
    }
}

#[tokio::test]
async fn a_replica_that_goes_in_order_after_an_answer_has_worked() {
    let world = World::new("min_replicas = 1\n", None);
    world.live.with(Inner::pass);
    let (mut name, _) = world.start().await;
    for _ in 0..3 {
        for _ in 0..2 {
            name = world.flaps_and_is_replaced(&name, Tier::Restore).await;
        }
        world.serves(&name, Vec::new());
        drop(world.slot().await);
        let drain = Command::Drain { pool: "p".to_owned(), replica: name.clone() };
        world.live.command(&drain).expect("it is there");
        assert!(matches!(world.told().await, ToParent::Stop { name: stopped, .. } if stopped == name));
        let (next, tier) = world.start().await;
        assert_eq!(tier, Tier::Restore);
        name = next;
    }
}

#[tokio::test]
async fn what_a_replica_still_answers_is_not_cut_off_because_it_refuses_others() {
    let world = World::new("", None);
    let (name, streaming) = world.first_slot().await;
    let mut refused = world.slot().await;
    refused.lease.unreachable("connection refused");
    drop(refused);
    let status = world.live.status();
    assert_eq!((status.in_flight, status.totals.cut_off), (1, 0));
    // It gets no further request, though it has free slots.
    let (second, next) = world.first_slot().await;
    assert_eq!(next.upstream.name(), second);
    drop(streaming);
    assert!(matches!(world.told().await, ToParent::Stop { name: stopped, .. } if stopped == name));
    assert_eq!(world.live.status().totals.cut_off, 0);
}

#[tokio::test]
async fn a_drain_waits_until_its_limit_and_what_it_cuts_off_then_is_counted() {
    let world = World::new("drain = '1h'\n", None);
    let (name, slot) = world.first_slot().await;
    world.live.command(&Command::Drain { pool: "p".to_owned(), replica: name.clone() }).expect("it is there");
    let (before, after) = (Duration::from_secs(3_590), Duration::from_secs(3_610));
    for (passed, in_flight, killed) in [(before, 1, 0), (after, 0, 1)] {
        world.pass(passed);
        let status = world.live.status();
        assert_eq!((status.in_flight, status.totals.killed_in_flight), (in_flight, killed), "{passed:?}");
    }
    match world.told().await {
        ToParent::Stop { name: stopped, why } => {
            assert_eq!((stopped, &*why), (name, "its drain took longer than the pool allows"));
        }
        other => panic!("{other:?}, expected its end"),
    }
    drop(slot);
    assert_eq!(world.live.status().in_flight, 0);
}

/// What a machine's clock says is shown to people and decides nothing.
#[tokio::test]
async fn a_clock_that_is_set_delays_nothing() {
    for step in [-3_600_000_i64, 3_600_000] {
        let world = World::new("warm = 1\ncold = false\n", None);
        world.live.with(Inner::pass);
        let (name, _) = world.start().await;
        world.live.heard(&name, Heard::Failed("bad luck".to_owned()));
        assert!(matches!(world.told().await, ToParent::GiveUp { .. }));
        // As if the start had been written down before the clock was set.
        world.live.with(|inner| {
            let start = inner.starts.back_mut().expect("it failed");
            start.at = start.at.saturating_add_signed(-step);
        });
        world.pass(Duration::from_secs(5));
        assert!(world.live.status().replicas.is_empty(), "it rests after a failure, step {step} ms");
        world.pass(Duration::from_secs(15));
        assert_eq!(world.live.status().replicas.len(), 1, "step {step} ms");
    }
}
