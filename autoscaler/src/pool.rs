//! The replicas of one pool: their states, their requests in flight, and the memory they hold.
//!
//! A pool only keeps the book. The live loop and the simulator tell it what happens and do what [`crate::steer`] derives
//! from a decision. A call that is not legal in a replica's state panics: the caller and this book would not agree about
//! what exists, and nothing good follows from going on.

mod states;

pub use states::{MOVES, Move, State};

use std::cmp::Reverse;

use crate::ledger::{Hold, Ledger, Memory, Short};
use crate::moment::Moment;

/// Where a start comes from, fastest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// A warm replica is woken.
    Wake,
    /// The snapshot is restored.
    Restore,
    /// The server is started by its command.
    Cold,
}

/// A replica of a pool. The generation tells it from an earlier one in the same place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaId {
    place: u32,
    generation: u32,
}

/// One replica.
#[derive(Debug)]
pub struct Replica {
    id: ReplicaId,
    state: State,
    in_flight: u32,
    tier: Tier,
    since: Moment,
    ready_since: Moment,
    /// Requests since it was started last.
    assigned: u64,
    /// It is on its way in order to wait.
    parking: bool,
    /// It is to go for good: it is neither taken back nor kept warm.
    dismissed: bool,
    hold: Option<Hold>,
}

impl Replica {
    /// Its name in this pool.
    #[must_use]
    pub fn id(&self) -> ReplicaId {
        self.id
    }

    /// What it is doing.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// Requests that it is answering.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// How it was started last.
    #[must_use]
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// When it is expected to serve, while it starts; since when it has been in its state, otherwise.
    #[must_use]
    pub fn since(&self) -> Moment {
        self.since
    }

    /// When it began to serve.
    #[must_use]
    pub fn ready_since(&self) -> Moment {
        self.ready_since
    }

    /// Requests that it was given since it was started last.
    #[must_use]
    pub fn assigned(&self) -> u64 {
        self.assigned
    }

    fn serves(&self) -> bool {
        matches!(self.state, State::Ready | State::Busy)
    }

    /// Whether it is on its way to serve.
    #[must_use]
    pub fn is_starting(&self) -> bool {
        matches!(self.state, State::Restoring | State::Waking) && !self.parking
    }

    /// Whether it is on its way in order to wait.
    #[must_use]
    pub fn is_parking(&self) -> bool {
        self.parking
    }

    /// Whether it is to go for good.
    #[must_use]
    pub fn is_dismissed(&self) -> bool {
        self.dismissed
    }

    /// What it holds.
    #[must_use]
    pub fn memory(&self) -> Memory {
        self.hold.as_ref().map(Hold::memory).unwrap_or_default()
    }
}

/// What became of a replica that is not needed.
#[derive(Debug)]
pub enum Retired {
    /// It is being paused: [`Pool::paused`] follows.
    Pausing,
    /// It is gone from the book, with what it holds until it is really gone.
    Removed(Option<Hold>),
}

/// What the replicas of a pool are like.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Requests that one replica answers at once, at most.
    pub concurrency: u32,
    /// Most replicas, warm ones not counted.
    pub max: u32,
    /// Most warm replicas.
    pub warm: u32,
    /// What a serving replica holds.
    pub serving: Memory,
    /// What a warm replica holds.
    pub paused: Memory,
}

impl Shape {
    /// What one holds that is being restored, paused or woken: device memory and its copy in the host are there at once.
    fn changing(&self) -> Memory {
        self.serving.max(self.paused)
    }
}

/// The replicas of one pool.
#[derive(Debug)]
pub struct Pool {
    shape: Shape,
    ledger: Ledger,
    /// A place whose replica is cold is free.
    replicas: Vec<Replica>,
    counts: [u32; State::ALL.len()],
    in_flight: u32,
    in_flight_draining: u32,
    parking: u32,
}

impl Pool {
    /// A pool without replicas.
    #[must_use]
    pub fn new(shape: Shape, ledger: Ledger) -> Self {
        let counts = [0; State::ALL.len()];
        Self { shape, ledger, replicas: Vec::new(), counts, in_flight: 0, in_flight_draining: 0, parking: 0 }
    }

    /// What its replicas are like.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Changes what its replicas are like from now on. Those that exist keep the memory that they have taken.
    pub fn reshape(&mut self, shape: Shape) {
        self.shape = shape;
    }

    /// Counts every replica that exists as the shape says, for a book that did not know before what one takes. They are
    /// there, so they count even where that is more than there is.
    pub fn recount(&mut self) {
        let shape = self.shape;
        for replica in self.replicas.iter_mut().filter(|replica| replica.state != State::Cold) {
            let memory = match replica.state {
                State::Ready | State::Busy | State::Draining => shape.serving,
                State::Warm => shape.paused,
                _ => shape.changing(),
            };
            if let Some(hold) = &mut replica.hold {
                hold.correct(memory);
            }
        }
    }

    /// Every replica that exists.
    pub fn replicas(&self) -> impl Iterator<Item = &Replica> {
        self.replicas.iter().filter(|replica| replica.state != State::Cold)
    }

    /// How many are in this state.
    #[must_use]
    pub fn count(&self, state: State) -> u32 {
        self.counts[state as usize]
    }

    /// Replicas that get requests.
    #[must_use]
    pub fn serving(&self) -> u32 {
        self.count(State::Ready) + self.count(State::Busy)
    }

    /// Replicas that are on their way to serve.
    #[must_use]
    pub fn starting(&self) -> u32 {
        self.count(State::Restoring) + self.count(State::Waking) - self.parking
    }

    /// Replicas that are on their way in order to wait.
    #[must_use]
    pub fn parking(&self) -> u32 {
        self.parking
    }

    /// Replicas that a decision counts: those that serve and those on their way.
    #[must_use]
    pub fn active(&self) -> u32 {
        self.serving() + self.starting()
    }

    /// Replicas that are charged for.
    #[must_use]
    pub fn charged(&self) -> u32 {
        self.active() + self.count(State::Draining)
    }

    /// Requests in flight, those of draining replicas too.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight + self.in_flight_draining
    }

    /// Requests in flight in draining replicas.
    #[must_use]
    pub fn in_flight_draining(&self) -> u32 {
        self.in_flight_draining
    }

    /// Slots that are free in replicas that serve. After a [`Pool::reshape`] to fewer slots more may be taken than there are.
    #[must_use]
    pub fn free_slots(&self) -> u32 {
        (self.serving() * self.shape.concurrency).saturating_sub(self.in_flight)
    }

    /// Restores a replica that waits, complete and paused.
    ///
    /// # Errors
    /// Where memory is short; then nothing was begun.
    pub fn park(&mut self, now: Moment) -> Result<ReplicaId, Short> {
        let hold = self.ledger.take(self.shape.paused)?;
        let id = self.admit(now, Tier::Restore, hold);
        self.step(id, Move::Parked, now);
        Ok(id)
    }

    /// Begins to restore a replica that is to wait; it counts as one on its way only when it is [`Pool::claim`]ed.
    ///
    /// # Errors
    /// Where memory is short; then nothing was begun.
    pub fn start_parking(&mut self, tier: Tier, expected: Moment) -> Result<ReplicaId, Short> {
        let id = self.start(tier, expected)?;
        self.get_mut(id).parking = true;
        self.parking += 1;
        Ok(id)
    }

    /// Lets a replica serve that was on its way in order to wait.
    pub fn claim(&mut self, id: ReplicaId) {
        assert!(self.get(id).parking, "{id:?} is not on its way in order to wait");
        self.unpark(id);
    }

    fn unpark(&mut self, id: ReplicaId) {
        let replica = self.get_mut(id);
        if std::mem::take(&mut replica.parking) {
            self.parking -= 1;
        }
    }

    /// A replica that was restored in order to wait is paused.
    ///
    /// # Errors
    /// Where a paused replica needs more host memory than there is; it must be removed then.
    pub fn parked(&mut self, id: ReplicaId, now: Moment) -> Result<(), Short> {
        let paused = self.shape.paused;
        self.get_mut(id).hold.as_mut().expect("what exists holds memory").change(paused)?;
        self.unpark(id);
        self.step(id, Move::Parked, now);
        Ok(())
    }

    /// A replica that served or waited before this book was opened.
    ///
    /// # Errors
    /// Where memory is short; then it is not in the book.
    pub fn adopt(&mut self, tier: Tier, warm: bool, now: Moment) -> Result<ReplicaId, Short> {
        if warm {
            return self.park(now);
        }
        let hold = self.ledger.take(self.shape.serving)?;
        let id = self.admit(now, tier, hold);
        self.started(id, now);
        Ok(id)
    }

    /// This replica is to go for good: once it is drained it is removed, and until then it is not taken back.
    pub fn dismiss(&mut self, id: ReplicaId) {
        self.get_mut(id).dismissed = true;
    }

    /// Begins to wake a warm replica; `expected` is when it should serve.
    ///
    /// # Errors
    /// Where memory is short; then it stays warm.
    pub fn wake(&mut self, id: ReplicaId, expected: Moment) -> Result<(), Short> {
        let changing = self.shape.changing();
        let replica = self.get_mut(id);
        replica.hold.as_mut().expect("what exists holds memory").change(changing)?;
        replica.tier = Tier::Wake;
        self.step(id, Move::Wake, expected);
        Ok(())
    }

    /// Begins a restore or a cold start; `expected` is when it should serve.
    ///
    /// # Errors
    /// Where memory is short; then nothing was begun.
    pub fn start(&mut self, tier: Tier, expected: Moment) -> Result<ReplicaId, Short> {
        let hold = self.ledger.take(self.shape.changing())?;
        Ok(self.admit(expected, tier, hold))
    }

    /// The replica serves.
    pub fn started(&mut self, id: ReplicaId, now: Moment) {
        self.step(id, Move::Started, now);
        let serving = self.shape.serving;
        let replica = self.get_mut(id);
        // Less than before, unless its shape was changed meanwhile: then it takes more, whether that fits or not.
        replica.hold.as_mut().expect("what exists holds memory").correct(serving);
        replica.ready_since = now;
        replica.assigned = 0;
    }

    /// Gives a request to the busiest replica that has a free slot, so that others become idle. `spare` of the idlest
    /// replicas that serve are left out.
    pub fn assign(&mut self, now: Moment, spare: u32) -> Option<ReplicaId> {
        if self.free_slots() == 0 || spare >= self.serving() {
            return None;
        }
        let id = if spare == 0 { self.busiest_with_a_slot() } else { self.busiest_of_many(spare) }?;
        self.assign_to(id, now).then_some(id)
    }

    /// Gives a request to the replica with the fewest, where a slot is free.
    pub fn assign_idlest(&mut self, now: Moment) -> Option<ReplicaId> {
        let free = |r: &&Replica| r.serves() && r.in_flight < self.shape.concurrency;
        let id = self.replicas.iter().filter(free).min_by_key(|r| (r.in_flight, r.id)).map(|r| r.id)?;
        self.assign_to(id, now).then_some(id)
    }

    /// Gives a request to this replica. Whether it serves and has a free slot.
    pub fn assign_to(&mut self, id: ReplicaId, now: Moment) -> bool {
        let concurrency = self.shape.concurrency;
        if !self.find(id).is_some_and(|replica| replica.serves() && replica.in_flight < concurrency) {
            return false;
        }
        self.in_flight += 1;
        let replica = self.get_mut(id);
        replica.in_flight += 1;
        replica.assigned += 1;
        if replica.in_flight == 1 {
            self.step(id, Move::Fill, now);
        }
        true
    }

    /// Of equals the older: the newer one is the next to go.
    fn busiest_with_a_slot(&self) -> Option<ReplicaId> {
        let free = |r: &&Replica| r.serves() && r.in_flight < self.shape.concurrency;
        self.replicas.iter().filter(free).max_by_key(|r| (r.in_flight, Reverse(r.id))).map(|r| r.id)
    }

    /// As above, but only if at least `spare` replicas that serve are idler still.
    fn busiest_of_many(&self, spare: u32) -> Option<ReplicaId> {
        let id = self.busiest_with_a_slot()?;
        let key = |r: &Replica| (r.in_flight, Reverse(r.id));
        let chosen = key(self.get(id));
        let idler = self.replicas.iter().filter(|r| r.serves() && key(r) < chosen).count();
        (idler >= spare as usize).then_some(id)
    }

    /// A request has left this replica. Whether its drain is over now.
    pub fn finish(&mut self, id: ReplicaId, now: Moment) -> bool {
        let replica = self.get_mut(id);
        assert!(replica.in_flight > 0, "{id:?} has nothing in flight");
        replica.in_flight -= 1;
        let (state, left) = (replica.state, replica.in_flight);
        match state {
            State::Draining => self.in_flight_draining -= 1,
            _ => self.in_flight -= 1,
        }
        if state == State::Busy && left == 0 {
            self.step(id, Move::Empty, now);
        }
        state == State::Draining && left == 0
    }

    /// Gives this replica no further requests. Whether its drain is over at once.
    pub fn drain(&mut self, id: ReplicaId, now: Moment) -> bool {
        self.step(id, Move::Drain, now);
        let in_flight = self.get(id).in_flight;
        self.in_flight -= in_flight;
        self.in_flight_draining += in_flight;
        in_flight == 0
    }

    /// Gives a draining replica requests again.
    pub fn undrain(&mut self, id: ReplicaId, now: Moment) {
        self.step(id, Move::Undrain, now);
        let in_flight = self.get(id).in_flight;
        self.in_flight += in_flight;
        self.in_flight_draining -= in_flight;
        if in_flight > 0 {
            self.step(id, Move::Fill, now);
        }
    }

    /// Ends a replica that has drained, or a start that is not wanted any more: it is paused where a warm replica has room and
    /// memory allows it, else it is removed.
    pub fn retire(&mut self, id: ReplicaId, now: Moment) -> Retired {
        let replica = self.get(id);
        assert_eq!(replica.in_flight, 0, "{id:?} would be cut off its requests");
        let room = self.count(State::Warm) + self.count(State::Pausing) + self.parking < self.shape.warm;
        let stays = room && !replica.dismissed && replica.state.after(Move::Pause).is_some();
        let changing = self.shape.changing();
        let hold = self.get_mut(id).hold.as_mut().expect("what exists holds memory");
        if stays && hold.change(changing).is_ok() {
            self.step(id, Move::Pause, now);
            Retired::Pausing
        } else {
            Retired::Removed(self.remove(id, now))
        }
    }

    /// The replica has given its device memory back.
    ///
    /// # Errors
    /// Where a paused replica needs more host memory than there is; it must be removed then.
    pub fn paused(&mut self, id: ReplicaId, now: Moment) -> Result<(), Short> {
        let paused = self.shape.paused;
        self.get_mut(id).hold.as_mut().expect("what exists holds memory").change(paused)?;
        self.step(id, Move::Paused, now);
        Ok(())
    }

    /// The replica died or took too long. How many requests were cut off.
    pub fn fail(&mut self, id: ReplicaId, now: Moment) -> u32 {
        let draining = self.get(id).state == State::Draining;
        self.unpark(id);
        self.step(id, Move::Fail, now);
        let cut = std::mem::take(&mut self.get_mut(id).in_flight);
        if draining {
            self.in_flight_draining -= cut;
        } else {
            self.in_flight -= cut;
        }
        cut
    }

    /// The replica is gone from the book. Its memory is free when what is returned is dropped.
    pub fn remove(&mut self, id: ReplicaId, now: Moment) -> Option<Hold> {
        assert_eq!(self.get(id).in_flight, 0, "{id:?} would be cut off its requests");
        self.unpark(id);
        self.step(id, Move::Remove, now);
        self.get_mut(id).hold.take()
    }

    /// A replica, as long as it exists.
    #[must_use]
    pub fn find(&self, id: ReplicaId) -> Option<&Replica> {
        self.replicas.get(id.place as usize).filter(|found| found.id == id && found.state != State::Cold)
    }

    fn get(&self, id: ReplicaId) -> &Replica {
        self.find(id).expect("the caller knows only replicas that exist")
    }

    fn get_mut(&mut self, id: ReplicaId) -> &mut Replica {
        let replica = &mut self.replicas[id.place as usize];
        assert_eq!(replica.id, id, "the replica in this place is another one");
        replica
    }

    /// Takes a free place and begins a start in it.
    fn admit(&mut self, since: Moment, tier: Tier, hold: Hold) -> ReplicaId {
        let free = self.replicas.iter().position(|replica| replica.state == State::Cold);
        let place = free.unwrap_or(self.replicas.len());
        let generation = free.map_or(0, |place| self.replicas[place].id.generation + 1);
        let id = ReplicaId { place: place as u32, generation };
        let replica = Replica {
            id,
            state: State::Cold,
            in_flight: 0,
            tier,
            since,
            ready_since: since,
            assigned: 0,
            parking: false,
            dismissed: false,
            hold: Some(hold),
        };
        match free {
            Some(place) => self.replicas[place] = replica,
            None => {
                self.replicas.push(replica);
                self.counts[State::Cold as usize] += 1;
            }
        }
        self.step(id, Move::Start, since);
        id
    }

    fn step(&mut self, id: ReplicaId, by: Move, since: Moment) {
        let replica = self.get_mut(id);
        let from = replica.state;
        let to =
            from.after(by).unwrap_or_else(|| panic!("{by:?} is not legal for a replica that is {from:?}"));
        replica.state = to;
        replica.since = since;
        self.counts[from as usize] -= 1;
        self.counts[to as usize] += 1;
    }

    /// Replicas on their way, with the time at which each is expected to serve.
    pub fn expected(&self) -> impl Iterator<Item = Moment> {
        self.replicas.iter().filter(|replica| replica.is_starting()).map(|replica| replica.since)
    }
}

#[cfg(test)]
mod tests;
