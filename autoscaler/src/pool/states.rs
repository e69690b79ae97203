//! The states of a replica and the moves between them, as a table.
//!
//! ```text
//!            start                started            fill
//!   Cold ───────────> Restoring ──────────> Ready <────────> Busy
//!    ^ ^                  │ parked            │ ^    empty    │
//!    │ │ remove           v        started    │ │ undrain     │ drain
//!    │ └─────────────── Warm ──> Waking ──────┼─┘             │
//!    │                    ^  wake             │ drain         │
//!    │ remove             │ paused            v               │
//!    └── Failed        Pausing <────────── Draining <─────────┘
//!           ^                     pause
//!           └ fail, from every state but Cold; remove leads from Restoring, Ready, Draining, Warm and Failed back to Cold
//! ```
//!
//! A start that is not wanted any more is given up: `remove` from Restoring, `pause` or `remove` from Waking.
//! `pause` and `remove` of a draining replica wait until nothing is in flight: [`super::Pool`] sees to that.

/// What a replica is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It does not exist; its snapshot lies in the store.
    Cold,
    /// It is being restored, or started by its command.
    Restoring,
    /// It is asleep or paused: complete, but without device memory.
    Warm,
    /// It takes its device memory again.
    Waking,
    /// It serves and has nothing to do.
    Ready,
    /// It serves and has requests in flight.
    Busy,
    /// It gets no further requests and finishes those it has.
    Draining,
    /// It gives its device memory back.
    Pausing,
    /// Something went wrong; it gets nothing any more and is removed.
    Failed,
}

/// What happens to a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Move {
    /// Begin a restore or a cold start.
    Start,
    /// Its answers were compared and it may have requests.
    Started,
    /// It was restored in order to wait.
    Parked,
    /// Begin to wake it.
    Wake,
    /// Its first request came.
    Fill,
    /// Its last request left.
    Empty,
    /// Give it no further requests.
    Drain,
    /// Give it requests again.
    Undrain,
    /// Begin to pause it.
    Pause,
    /// It is paused.
    Paused,
    /// It is gone.
    Remove,
    /// It died, or took too long.
    Fail,
}

impl State {
    /// All states.
    pub const ALL: [State; 9] = [
        State::Cold,
        State::Restoring,
        State::Warm,
        State::Waking,
        State::Ready,
        State::Busy,
        State::Draining,
        State::Pausing,
        State::Failed,
    ];

    /// Where a move leads from here; nothing where it is not legal.
    #[must_use]
    pub fn after(self, step: Move) -> Option<State> {
        MOVES.iter().find(|(from, by, _)| *from == self && *by == step).map(|(_, _, to)| *to)
    }

    /// Whether it uses a replica's worth of processor or device: from the start of a restore or wake to the end of the drain.
    #[must_use]
    pub fn is_charged(self) -> bool {
        matches!(self, State::Restoring | State::Waking | State::Ready | State::Busy | State::Draining)
    }
}

impl Move {
    /// All moves.
    pub const ALL: [Move; 12] = [
        Move::Start,
        Move::Started,
        Move::Parked,
        Move::Wake,
        Move::Fill,
        Move::Empty,
        Move::Drain,
        Move::Undrain,
        Move::Pause,
        Move::Paused,
        Move::Remove,
        Move::Fail,
    ];
}

/// Every legal move.
pub const MOVES: &[(State, Move, State)] = &[
    (State::Cold, Move::Start, State::Restoring),
    (State::Restoring, Move::Started, State::Ready),
    (State::Restoring, Move::Parked, State::Warm),
    (State::Restoring, Move::Remove, State::Cold),
    (State::Restoring, Move::Fail, State::Failed),
    (State::Warm, Move::Wake, State::Waking),
    (State::Warm, Move::Remove, State::Cold),
    (State::Warm, Move::Fail, State::Failed),
    (State::Waking, Move::Started, State::Ready),
    (State::Waking, Move::Pause, State::Pausing),
    (State::Waking, Move::Remove, State::Cold),
    (State::Waking, Move::Fail, State::Failed),
    (State::Ready, Move::Fill, State::Busy),
    (State::Ready, Move::Drain, State::Draining),
    (State::Ready, Move::Remove, State::Cold),
    (State::Ready, Move::Fail, State::Failed),
    (State::Busy, Move::Empty, State::Ready),
    (State::Busy, Move::Drain, State::Draining),
    (State::Busy, Move::Fail, State::Failed),
    (State::Draining, Move::Undrain, State::Ready),
    (State::Draining, Move::Pause, State::Pausing),
    (State::Draining, Move::Remove, State::Cold),
    (State::Draining, Move::Fail, State::Failed),
    (State::Pausing, Move::Paused, State::Warm),
    (State::Pausing, Move::Fail, State::Failed),
    (State::Failed, Move::Remove, State::Cold),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_move_leads_to_one_state_only() {
        let keys: BTreeSet<String> = MOVES.iter().map(|(from, by, _)| format!("{from:?} {by:?}")).collect();
        assert_eq!(keys.len(), MOVES.len());
    }

    #[test]
    fn every_state_can_be_reached_and_left_for_cold() {
        let reach = |start: State, forward: bool| {
            let mut seen = vec![start];
            let mut next = 0;
            while next < seen.len() {
                let here = seen[next];
                for (from, _, to) in MOVES {
                    let (a, b) = if forward { (*from, *to) } else { (*to, *from) };
                    if a == here && !seen.contains(&b) {
                        seen.push(b);
                    }
                }
                next += 1;
            }
            seen.len()
        };
        assert_eq!(reach(State::Cold, true), State::ALL.len());
        assert_eq!(reach(State::Cold, false), State::ALL.len());
    }

    /// All 108 pairs, so that a new move is a change of this picture.
    #[test]
    fn the_table_of_every_state_and_move() {
        let mut text = String::new();
        for state in State::ALL {
            for step in Move::ALL {
                if let Some(to) = state.after(step) {
                    text.push_str(&format!("{state:?} --{step:?}--> {to:?}\n"));
                }
            }
        }
        insta::assert_snapshot!("moves", text);
        assert_eq!(text.lines().count(), MOVES.len());
    }

    #[test]
    fn only_what_serves_can_be_filled_and_only_what_exists_can_fail() {
        for state in State::ALL {
            assert_eq!(state.after(Move::Fill).is_some(), state == State::Ready, "{state:?}");
            let alive = state != State::Cold && state != State::Failed;
            assert_eq!(state.after(Move::Fail).is_some(), alive, "{state:?}");
        }
    }
}
