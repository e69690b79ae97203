//! Starts and wakes that take too long, and what a person or the load makes of replicas that go.

use rewarm_autoscaler::pool::State;

use super::*;
use crate::status::{DECISIONS_MAX, StartOutcome};

/// Longer than any start of these tests may take.
const LATE: Duration = Duration::from_secs(6);

/// How the last start ended, and why.
fn outcome(world: &World) -> (StartOutcome, Option<String>) {
    let starts = world.live.status().starts;
    let last = starts.last().expect("one was begun");
    (last.outcome, last.reason.clone())
}

fn scale(replicas: u32) -> Command {
    Command::Scale { pool: "p".to_owned(), replicas: Some(replicas) }
}

#[tokio::test]
async fn a_start_that_takes_too_long_is_ended_and_counted_and_the_next_one_is_cold() {
    let world = World::new("start_timeout = '5s'\n", None);
    let asked = world.ask(Want::default());
    let (late, tier) = world.start().await;
    assert_eq!(tier, Tier::Restore);
    world.pass(Duration::from_secs(4));
    assert_eq!(world.live.status().starts.len(), 0, "it may still come");
    world.pass(LATE);
    assert!(matches!(world.told().await, ToParent::GiveUp { name } if name == late));
    assert_eq!(outcome(&world), (StartOutcome::TimedOut, Some("it took more than 5000 ms".to_owned())));
    let counted = world.live.status().totals.starts;
    assert_eq!(counted, [(Tier::Restore, StartOutcome::TimedOut, 1)]);
    let (next, tier) = world.start().await;
    assert_eq!(tier, Tier::Cold);
    // It comes all the same, and is not wanted any more.
    world.serves(&late, Vec::new());
    assert!(!asked.is_finished());
    world.serves(&next, Vec::new());
    assert_eq!(asked.await.expect("no panic").expect("a slot").upstream.name(), next);
}

#[tokio::test]
async fn a_wake_that_takes_too_long_is_ended_and_another_replica_is_restored() {
    let world = World::new("warm = 1\nstart_timeout = '5s'\n", None);
    let late = world.with_warm().await;
    let asked = world.ask(Want::default());
    assert!(matches!(world.told().await, ToParent::Wake { name } if name == late));
    world.pass(LATE);
    world.stops(&late, "it took more than 5000 ms").await;
    assert_eq!(outcome(&world).0, StartOutcome::TimedOut);
    let (next, tier) = world.start().await;
    assert_eq!(tier, Tier::Restore);
    world.serves(&next, Vec::new());
    assert_eq!(asked.await.expect("no panic").expect("a slot").upstream.name(), next);
}

#[tokio::test]
async fn once_enough_starts_are_known_a_start_may_take_three_times_as_long_as_the_slowest_of_a_hundred() {
    let world = World::new("start_timeout = '60s'\n", None);
    let limit = |took: Vec<f64>| {
        world.live.with(|inner| {
            inner.took = took;
            inner.start_timeout().as_secs_f64()
        })
    };
    let seconds = |count: u32| (1..=count).map(f64::from).collect::<Vec<_>>();
    assert!((limit(seconds(19)) - 60.0).abs() < 1e-9, "too few are known");
    assert!((limit(seconds(20)) - 60.0).abs() < 1e-9, "three times 20 s");
    assert!((limit(seconds(200)) - 594.0).abs() < 1e-9, "two of two hundred were slower");
    assert!((limit(vec![0.01; 50]) - 1.0).abs() < 1e-9, "a busy machine is allowed a second");
}

#[tokio::test]
async fn a_replica_that_is_let_go_is_taken_back_while_it_is_there() {
    let world = World::new("concurrency = 2\n", None);
    let (name, busy) = world.first_slot().await;
    world.live.command(&scale(0)).expect("it can");
    let states = || world.live.status().replicas.iter().map(|replica| replica.state).collect::<Vec<_>>();
    assert_eq!(states(), [State::Draining]);
    let held = world.ask(Want::default());
    world.await_held(1).await;
    world.live.command(&scale(1)).expect("it can");
    assert_eq!(states(), [State::Busy]);
    assert_eq!(held.await.expect("no panic").expect("a slot").upstream.name(), name);
    drop(busy);
    assert!(world.heard.lock().await.try_recv().is_err(), "nothing was started or ended");
}

#[tokio::test]
async fn a_paused_pool_answers_what_it_has_refuses_the_rest_and_goes_on_when_it_is_told_to() {
    let world = World::new("concurrency = 1\nmax_replicas = 1\n", None);
    let (name, busy) = world.first_slot().await;
    let held = world.ask(Want::default());
    world.await_held(1).await;
    world.live.command(&Command::Pause { pool: "p".to_owned() }).expect("it can");
    let paused = || Err(Refusal::Closed { why: "pool p is paused".to_owned() });
    assert_eq!(held.await.expect("no panic").map(drop), paused());
    assert_eq!(world.ask(Want::default()).await.expect("no panic").map(drop), paused());
    assert_eq!(world.live.status().in_flight, 1, "what is there is answered");
    drop(busy);
    world.stops(&name, "it is not needed").await;
    world.live.command(&Command::Resume { pool: "p".to_owned() }).expect("it can");
    let (name, slot) = world.first_slot().await;
    assert_eq!(slot.upstream.name(), name);
}

#[tokio::test]
async fn the_last_thousand_decisions_are_kept_with_their_reasons() {
    let world = World::new("", None);
    for _ in 0..600 {
        world.live.command(&scale(1)).expect("it can");
        let (name, _) = world.start().await;
        world.serves(&name, Vec::new());
        world.live.command(&scale(0)).expect("it can");
        world.stops(&name, "it is not needed").await;
    }
    let status = world.live.status();
    assert_eq!((status.decisions.len(), status.totals.decisions), (DECISIONS_MAX, 1200));
    let [.., started, let_go] = &status.decisions[..] else { panic!("{:?}", status.decisions.len()) };
    assert_eq!((started.desired, let_go.desired), (1, 0));
    assert_eq!(started.reason, "1 replicas were asked for by hand");
    assert!(started.steps[0].ends_with(" is restored"), "{started:?}");
    assert!(let_go.steps[0].ends_with(" is let go"), "{let_go:?}");
}
