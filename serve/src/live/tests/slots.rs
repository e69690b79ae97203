//! The count of requests in flight is that of the slots that somebody has, whatever happens.
//!
//! A slot is given out in one place (`Inner::grant`) and given back when its guard is dropped, by whoever has it then: the request, the
//! queue's channel of a client that has left, or the tunnel of an upgraded connection. The count of a replica that is lost goes with it.

use super::*;

/// Steps in each of the rounds.
const STEPS: usize = 400;

/// Everything that the test holds and plays.
struct Storm {
    world: World,
    random: fastrand::Rng,
    asked: Vec<JoinHandle<Result<Slot, Refusal>>>,
    slots: Vec<Slot>,
    starting: Vec<String>,
    there: Vec<String>,
}

impl Storm {
    fn begin(seed: u64) -> Self {
        let limits = "concurrency = 3\nmax_replicas = 4\nwarm = 1\nqueue = { max = 12, deadline = '20ms' }\n";
        let world = World::new(limits, None);
        Self {
            world,
            random: fastrand::Rng::with_seed(seed),
            asked: Vec::new(),
            slots: Vec::new(),
            starting: Vec::new(),
            there: Vec::new(),
        }
    }

    fn pick<T>(random: &mut fastrand::Rng, from: &mut Vec<T>) -> Option<T> {
        (!from.is_empty()).then(|| from.swap_remove(random.usize(..from.len())))
    }

    /// Does what the pool asks its parent for.
    fn obey(&mut self) {
        let mut heard = self.world.heard.try_lock().expect("nobody else listens");
        while let Ok(message) = heard.try_recv() {
            let live = &self.world.live;
            match message {
                ToParent::Start { name, .. } => self.starting.push(name),
                ToParent::Pause { name } => live.heard(&name, Heard::Paused),
                ToParent::Wake { name } => live.heard(&name, Heard::Woken),
                ToParent::Stop { name, .. } | ToParent::GiveUp { name } => {
                    self.starting.retain(|starting| *starting != name);
                    self.there.retain(|there| *there != name);
                    live.heard(&name, Heard::Stopped);
                }
                other => panic!("{other:?} is not expected"),
            }
        }
    }

    fn step(&mut self) {
        let (random, live) = (&mut self.random, self.world.live.clone());
        // Failures are forgotten, or nothing would be started for most of the time.
        live.with(|inner| inner.tiers = Tiers::new(true));
        match random.u8(..12) {
            0..=3 => self.asked.push(self.world.ask(Want::default())),
            4 => {
                if let Some(asked) = Self::pick(random, &mut self.asked) {
                    asked.abort();
                }
            }
            5..=6 => drop(Self::pick(random, &mut self.slots)),
            7 => {
                if let Some(mut slot) = Self::pick(random, &mut self.slots) {
                    match random.bool() {
                        true => slot.lease.broken("it broke off"),
                        false => slot.lease.unreachable("connection refused"),
                    }
                }
            }
            8..=9 => {
                if let Some(name) = Self::pick(random, &mut self.starting) {
                    if random.u8(..4) == 0 {
                        live.heard(&name, Heard::Failed("bad luck".to_owned()));
                    } else {
                        self.world.serves(&name, Vec::new());
                        self.there.push(name);
                    }
                }
            }
            10 if random.u8(..4) == 0 => {
                if let Some(name) = Self::pick(random, &mut self.there) {
                    live.heard(&name, Heard::Ended("exit status 1".to_owned()));
                }
            }
            10 => {
                if let Some(name) = self.there.first().cloned() {
                    // It may be on its way out already.
                    let _ = live.command(&Command::Drain { pool: "p".to_owned(), replica: name });
                }
            }
            _ => live.with(Inner::pass),
        }
    }

    /// Lets everybody take what was given to them.
    async fn settle(&mut self) {
        for _ in 0..4 {
            tokio::task::yield_now().await;
        }
        let asked = std::mem::take(&mut self.asked);
        for asked in asked {
            if asked.is_finished() {
                self.slots.extend(asked.await.ok().and_then(Result::ok));
            } else {
                self.asked.push(asked);
            }
        }
    }

    /// What the pool counts, and what there is.
    fn counts(&self) -> (u32, usize) {
        let status = self.world.live.status();
        let known = |slot: &&Slot| status.replicas.iter().any(|one| one.name == slot.upstream.name());
        (status.in_flight, self.slots.iter().filter(known).count())
    }
}

#[tokio::test]
async fn requests_in_flight_are_the_slots_that_somebody_has() {
    let mut most = 0;
    for seed in 0..20 {
        let mut storm = Storm::begin(seed);
        for step in 0..STEPS {
            storm.obey();
            storm.step();
            storm.settle().await;
            let (counted, there) = storm.counts();
            assert_eq!(counted as usize, there, "seed {seed}, step {step}");
            most = most.max(there);
        }
        storm.asked.iter().for_each(JoinHandle::abort);
        storm.settle().await;
        storm.slots.clear();
        assert_eq!(storm.counts(), (0, 0), "seed {seed}");
        assert!(storm.world.live.is_idle(), "seed {seed}");
    }
    assert!(most > 4, "{most} at once are too few to say anything");
}
