//! Starts and wakes that take too long, and what a person or the load makes of replicas that go.

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

/// The limit stays what it is: slots are given beyond the mean that is aimed at.
#[tokio::test]
async fn the_policy_aims_at_the_target_concurrency_and_slots_go_up_to_the_limit() {
    for (target, wanted) in [(4, 1), (2, 2)] {
        let world = World::new(
            &format!(
                "concurrency = 4\ntarget_concurrency = {target}\nmax_replicas = 4\npolicy = {{ kind = 'tracker', utilization = 1.0 }}\n"
            ),
            None,
        );
        let (_, first) = world.first_slot().await;
        let mut slots = vec![first];
        for _ in 0..3 {
            slots.push(world.slot().await);
        }
        assert!(slots.iter().all(|slot| slot.upstream.name() == slots[0].upstream.name()));
        world.live.with(Inner::pass);
        assert_eq!(world.states().len(), wanted, "four in flight, {target} are aimed at");
    }
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
async fn a_cold_start_is_not_bound_by_what_restores_took_nor_a_restore_by_what_cold_starts_took() {
    let world = World::new("start_timeout = '60s'\n", None);
    world.live.with(|inner| (0..20).for_each(|_| inner.took.record(Tier::Restore, 0.1)));
    let asked = world.ask(Want::default());
    let (late, tier) = world.start().await;
    assert_eq!(tier, Tier::Restore);
    world.pass(Duration::from_millis(1500));
    assert!(matches!(world.told().await, ToParent::GiveUp { name } if name == late));
    assert_eq!(outcome(&world).1, Some("it took more than 1000 ms".to_owned()));
    assert_eq!(world.live.with(|inner| inner.start_timeout(Tier::Restore)), Duration::from_secs(2));
    let (cold, tier) = world.start().await;
    assert_eq!(tier, Tier::Cold);
    world.pass(Duration::from_secs(20));
    assert_eq!(world.live.status().starts.len(), 1, "it may still come");
    world.serves(&cold, Vec::new());
    assert_eq!(asked.await.expect("no panic").expect("a slot").upstream.name(), cold);

    let world = World::new("start_timeout = '5s'\n", None);
    world.live.with(|inner| (0..20).for_each(|_| inner.took.record(Tier::Cold, 60.0)));
    let _asked = world.ask(Want::default());
    let (late, tier) = world.start().await;
    assert_eq!(tier, Tier::Restore);
    world.pass(LATE);
    assert!(matches!(world.told().await, ToParent::GiveUp { name } if name == late));
}

/// Restores of 0.4 s and cold starts of 30 s were measured.
fn measured(world: &World) {
    world.live.with(|inner| {
        for _ in 0..5 {
            inner.times.record(Tier::Restore, 0.4);
            inner.times.record(Tier::Cold, 30.0);
        }
    });
}

fn expected(world: &World) -> f64 {
    world.live.status().start_seconds.restore
}

#[tokio::test]
async fn cold_starts_are_reckoned_with_only_while_they_take_the_place_of_restores() {
    let world = World::new("", None);
    measured(&world);
    assert!((expected(&world) - 0.4).abs() < 1e-9);
    for _ in 0..2 {
        world.live.with(|inner| inner.tiers.failed(Tier::Restore, inner.now, "the store is down"));
        assert!((expected(&world) - 0.4).abs() < 1e-9, "the next may work");
    }
    world.live.with(|inner| inner.tiers.failed(Tier::Restore, inner.now, "the store is down"));
    assert!((expected(&world) - 30.0).abs() < 1e-9);
    world.live.heard("p-captured", Heard::Captured(None));
    assert!((expected(&world) - 1.0).abs() < 1e-9, "restores are of another snapshot, and not cold starts");
}

#[tokio::test]
async fn a_snapshot_of_other_bytes_is_another_guess_and_what_the_one_before_took_is_forgotten() {
    let world = World::new("start_timeout = '60s'\n", None);
    let known = |digest: &str, gib: u64| Known {
        source: format!("s3://models/p@{digest}"),
        host_bytes: gib << 30,
        device_bytes: 0,
        port: None,
        fits: true,
    };
    let limit = || world.live.with(|inner| inner.start_timeout(Tier::Restore).as_secs());
    world.live.known(known("one", 4));
    assert!((expected(&world) - 4.2).abs() < 1e-9, "{}", expected(&world));
    measured(&world);
    world.live.with(|inner| (0..20).for_each(|_| inner.took.record(Tier::Restore, 0.4)));
    world.live.known(known("one", 4));
    assert!((expected(&world) - 0.4).abs() < 1e-9, "what was measured counts more");
    assert_eq!(limit(), 1);
    world.live.known(known("two", 40));
    assert!((expected(&world) - 40.2).abs() < 1e-9, "{}", expected(&world));
    assert_eq!(limit(), 60);
}

#[tokio::test]
async fn where_wakes_fail_three_times_in_a_row_warm_replicas_are_left_alone_for_a_while() {
    let world = World::new("warm = 1\n", None);
    let mut warm = world.with_warm().await;
    for _ in 0..3 {
        let asked = world.ask(Want::default());
        assert!(matches!(world.told().await, ToParent::Wake { name } if name == warm));
        world.live.heard(&warm, Heard::Failed("its device is gone".to_owned()));
        world.stops(&warm, "its device is gone").await;
        let (name, _) = world.start().await;
        world.serves(&name, Vec::new());
        drop(asked.await.expect("no panic").expect("a slot"));
        assert!(matches!(world.told().await, ToParent::Pause { name: paused } if paused == name));
        world.live.heard(&name, Heard::Paused);
        warm = name;
    }
    let circuit = world.live.status().circuit.expect("wakes are left alone");
    assert_eq!((circuit.failures, circuit.reason.as_str()), (3, "its device is gone"));
    let asked = world.ask(Want::default());
    let (name, tier) = world.start().await;
    assert_eq!(tier, Tier::Restore, "although one is warm");
    world.serves(&name, Vec::new());
    drop(asked.await.expect("no panic").expect("a slot"));
    world.stops(&name, "it is not needed").await;
    let began = Instant::now();
    while world.live.status().circuit.is_some() {
        assert!(began.elapsed() < PATIENCE, "the circuit stays open");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let asked = world.ask(Want::default());
    assert!(matches!(world.told().await, ToParent::Wake { name } if name == warm));
    world.live.heard(&warm, Heard::Woken);
    assert_eq!(asked.await.expect("no panic").expect("a slot").upstream.name(), warm);
    assert_eq!(world.live.with(|inner| inner.tiers.wakes_again()), None, "one that works closes it for good");
}

#[tokio::test]
async fn no_policy_leaves_a_pool_at_zero_that_is_asked_nor_one_with_replicas_that_is_not() {
    let kinds = ["{ kind = 'kpa' }", "{ kind = 'hpa' }", "{ kind = 'tracker' }", "{ kind = 'rewarm' }"];
    for kind in kinds {
        let world = World::new(&format!("policy = {kind}\n"), None);
        let (name, slot) = world.first_slot().await;
        world.live_through(Duration::from_secs(400));
        assert_eq!(world.states(), [State::Busy], "{kind}: it answers");
        drop(slot);
        // From now on, and not from where it has been already.
        world.live_through(Duration::from_secs(1200));
        assert_eq!(world.states(), [], "{kind}");
        world.stops(&name, "it is not needed").await;
    }
}

#[tokio::test]
async fn a_policy_that_is_chosen_for_a_pool_with_replicas_lets_them_go_when_they_are_idle() {
    for kind in ["kpa", "hpa", "tracker", "rewarm"] {
        let before = if kind == "rewarm" { "tracker" } else { "rewarm" };
        let world = World::new(&format!("target_wait = '1ms'\npolicy = {{ kind = '{before}' }}\n"), None);
        let (name, slot) = world.first_slot().await;
        let mut config = world.live.config();
        config.policy = World::new(&format!("policy = {{ kind = '{kind}' }}\n"), None).live.config().policy;
        world.live.change(config);
        drop(slot);
        world.live_through(Duration::from_secs(400));
        assert_eq!(world.states(), [], "{kind}");
        world.stops(&name, "it is not needed").await;
    }
}

#[tokio::test]
async fn a_policy_that_is_chosen_late_does_not_catch_up_on_what_was_before() {
    for kind in ["kpa", "hpa", "tracker"] {
        let world = World::new("", None);
        let mut config = world.live.config();
        config.policy = World::new(&format!("policy = {{ kind = '{kind}' }}\n"), None).live.config().policy;
        world.live.with(|inner| {
            inner.now = inner.now + Duration::from_secs(30 * 86_400);
            inner.change(config);
            inner.pass();
            assert!(inner.next_moment() > inner.now, "{kind}: {:?} at {:?}", inner.next_moment(), inner.now);
        });
    }
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
