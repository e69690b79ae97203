//! Replicas that were there before this process: what they take is counted, whenever that becomes known.

use super::*;

const MIB: u64 = 1 << 20;

pub(super) fn known(host_bytes: u64, device_bytes: u64) -> Known {
    let source = "s3://models/p@sha256".to_owned();
    Known { source, host_bytes, device_bytes, port: None, fits: true }
}

impl World {
    pub(super) fn adopts(&self, replicas: &[(&str, bool)]) {
        let existing = replicas.iter().map(|(name, warm)| Existing {
            name: (*name).to_owned(),
            pool: "p".to_owned(),
            warm: *warm,
            source: Some("s3://models/p@sha256".to_owned()),
            port: None,
        });
        let existing: Vec<Existing> = existing.collect();
        self.live.adopt(&existing.iter().collect::<Vec<_>>());
    }

    fn taken(&self) -> Memory {
        self.shared.ledger.used()
    }
}

#[tokio::test]
async fn what_replicas_take_that_were_there_is_counted_as_soon_as_it_is_known() {
    let world = World::within(100 * MIB, "p", "min_replicas = 1\nwarm = 1\nconcurrency = 1\n", None);
    world.adopts(&[("p-1", false), ("p-2", true)]);
    assert_eq!(world.taken(), Memory::default(), "nothing is known yet");
    world.live.known(known(60 * MIB, 10 * MIB));
    assert_eq!(world.taken(), Memory { host: 130 * MIB, device: 10 * MIB }, "one serves, one has a copy");
    assert_eq!(world.states(), [State::Ready, State::Warm], "both are there, and stay");
    // Nothing more is started, whoever asks.
    let _busy = world.slot().await;
    let other = world.another("q", "replica_memory = '1MiB'\n");
    let asked = other.ask(Want::default());
    other.await_held(1).await;
    let obstacle = other.live.status().obstacle.expect("it is told why");
    assert_eq!(obstacle, "a start waits for memory: host memory: 1048576 bytes wanted, 0 of 104857600 free");
    asked.abort();
    // What wakes takes no more than before, and both of its copies until it serves.
    let woken = world.ask(Want::default());
    world.await_held(1).await;
    world.pass(Duration::from_secs(2));
    assert!(matches!(world.told().await, ToParent::Wake { name } if name == "p-2"));
    world.live.heard("p-2", Heard::Woken);
    world.pass(Duration::from_secs(2));
    assert_eq!(woken.await.expect("no panic").expect("a slot").upstream.name(), "p-2");
    assert_eq!(world.taken(), Memory { host: 120 * MIB, device: 20 * MIB });
}

#[tokio::test]
async fn a_start_that_was_begun_before_anything_was_known_is_counted_too() {
    let world = World::within(100 * MIB, "p", "concurrency = 1\n", None);
    let asked = world.ask(Want::default());
    let (name, _) = world.start().await;
    world.live.known(known(60 * MIB, 10 * MIB));
    assert_eq!(world.taken(), Memory { host: 70 * MIB, device: 10 * MIB }, "it is being restored");
    world.serves(&name, Vec::new());
    assert_eq!(world.taken(), Memory { host: 60 * MIB, device: 10 * MIB });
    drop(asked.await.expect("no panic").expect("a slot"));
}

#[tokio::test]
async fn of_those_that_are_known_to_fit_no_longer_the_memory_counts_until_they_are_gone() {
    let world = World::within(100 * MIB, "p", "replica_memory = '60MiB'\nmin_replicas = 2\n", None);
    world.adopts(&[("p-1", false), ("p-2", false)]);
    let why = "host memory: 62914560 bytes wanted, 41943040 of 104857600 free";
    world.stops("p-2", why).await;
    assert_eq!(world.taken().host, 120 * MIB);
    world.live.heard("p-2", Heard::Stopped);
    assert_eq!(world.taken().host, 60 * MIB);
}
