//! Pools that are not in the file any more: what came before is answered, and nothing is left after that.

use rewarm_autoscaler::pool::State;

use super::*;

/// Nothing is left of it, and its time passes no more.
async fn is_over(world: World) {
    let World { live, .. } = world;
    assert!(live.is_over());
    tokio::time::timeout(PATIENCE, live.run()).await.expect("a pool that is over has no time");
}

#[tokio::test]
async fn a_pool_that_is_removed_answers_what_it_has_and_what_it_holds() {
    let world = World::new("concurrency = 1\nmax_replicas = 1\nmin_replicas = 1\n", None);
    let (name, busy) = world.first_slot().await;
    let held = world.ask(Want::default());
    world.await_held(1).await;
    world.live.close();
    assert_eq!((world.live.status().held, world.live.is_idle(), held.is_finished()), (1, false, false));
    drop(busy);
    let slot = held.await.expect("no panic").expect("it is answered");
    assert_eq!(slot.upstream.name(), name);
    // Nobody else waits: it is the last one, and nothing is kept for the minimum.
    assert_eq!(world.live.status().replicas[0].state, State::Draining);
    assert!(!world.live.is_over());
    drop(slot);
    world.stops(&name, "it is not needed").await;
    assert!(!world.live.is_over(), "it is still on the machine");
    world.live.heard(&name, Heard::Stopped);
    is_over(world).await;
}

#[tokio::test]
async fn what_a_removed_pool_holds_is_answered_by_replicas_that_are_started_after_that() {
    let world = World::new("concurrency = 1\nmax_replicas = 1\n", None);
    let held = world.ask(Want::default());
    let (first, _) = world.start().await;
    world.live.close();
    world.live.heard(&first, Heard::Failed("bad luck".to_owned()));
    assert!(matches!(world.told().await, ToParent::GiveUp { name } if name == first));
    let (second, _) = world.start().await;
    world.serves(&second, Vec::new());
    let slot = held.await.expect("no panic").expect("it is answered");
    assert_eq!(slot.upstream.name(), second);
    drop(slot);
    world.stops(&second, "it is not needed").await;
    world.live.heard(&first, Heard::Stopped);
    world.live.heard(&second, Heard::Stopped);
    is_over(world).await;
}

#[tokio::test]
async fn replicas_that_wait_in_a_pool_that_is_removed_go_when_nothing_is_held() {
    let world = World::new("concurrency = 1\nmax_replicas = 1\nwarm = 1\n", None);
    let name = world.with_warm().await;
    let held = world.ask(Want::default());
    assert!(matches!(world.told().await, ToParent::Wake { .. }));
    world.live.close();
    world.live.heard(&name, Heard::Woken);
    drop(held.await.expect("no panic").expect("it is answered"));
    world.stops(&name, "it is not needed").await;
    let world = World::new("warm = 1\n", None);
    let waiting = world.with_warm().await;
    world.live.close();
    world.stops(&waiting, "it is not needed").await;
    assert_eq!(world.live.status().replicas, []);
}

/// A request may have found its pool before the file was read again, and ask it only after that.
#[tokio::test]
async fn a_pool_that_is_removed_is_there_for_as_long_as_anybody_can_ask_it() {
    let world = World::new("", None);
    let desk = world.live.desk();
    world.live.close();
    assert!(!world.live.is_over());
    let late = tokio::spawn(async move { desk.slot(&Want::default()).slot().await });
    let (name, _) = world.start().await;
    world.serves(&name, Vec::new());
    drop(late.await.expect("no panic").expect("it is answered"));
    world.stops(&name, "it is not needed").await;
    world.live.heard(&name, Heard::Stopped);
    is_over(world).await;
}
