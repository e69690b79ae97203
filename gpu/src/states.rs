//! The driver's states of a process and the steps between them, as a table.
//!
//! A state is a number and not an enum: a newer driver may answer with one that nobody here knows, and that must be an
//! ordinary answer.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A state as the driver tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct State(pub u32);

impl State {
    /// It computes.
    pub const RUNNING: Self = Self(0);
    /// Its CUDA calls block; what it had submitted is finished.
    pub const LOCKED: Self = Self(1);
    /// Its device memory lies in its host memory, and it holds no device.
    pub const CHECKPOINTED: Self = Self(2);
    /// A checkpoint or a restore failed for good: it can only be killed.
    pub const FAILED: Self = Self(3);
    /// Its device memory is left to a caller who copies it away (custom storage), and nothing else leads on.
    pub const CHECKPOINTING: Self = Self(4);
    /// Its device memory is left to a caller who fills it, and nothing else leads on.
    pub const RESTORING: Self = Self(5);
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::RUNNING => f.write_str("running"),
            Self::LOCKED => f.write_str("locked"),
            Self::CHECKPOINTED => f.write_str("checkpointed"),
            Self::FAILED => f.write_str("failed"),
            Self::CHECKPOINTING => f.write_str("in the middle of a checkpoint"),
            Self::RESTORING => f.write_str("in the middle of a restore"),
            Self(other) => write!(f, "unknown state {other}"),
        }
    }
}

/// One of the driver's four steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Finish what was submitted, block further calls.
    Lock,
    /// Device memory to the host; the devices are let go.
    Checkpoint,
    /// Back to the devices.
    Restore,
    /// Let calls go on.
    Unlock,
}

impl Step {
    /// All of them, in the order of a snapshot followed by a restore.
    pub const ALL: [Self; 4] = [Self::Lock, Self::Checkpoint, Self::Restore, Self::Unlock];

    /// Where the step leads from `state`; none where the driver refuses it.
    #[must_use]
    pub fn from(self, state: State) -> Option<State> {
        MOVES.iter().find(|(step, from, _)| *step == self && *from == state).map(|(_, _, to)| *to)
    }

    /// The only state that shows that this step was done.
    #[must_use]
    pub fn target(self) -> State {
        match self {
            Self::Lock | Self::Restore => State::LOCKED,
            Self::Checkpoint => State::CHECKPOINTED,
            Self::Unlock => State::RUNNING,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lock => "lock",
            Self::Checkpoint => "checkpoint",
            Self::Restore => "restore",
            Self::Unlock => "unlock",
        })
    }
}

/// All moves that the driver allows. A restored process is locked, and unlocking it is a step of its own.
const MOVES: [(Step, State, State); 4] = [
    (Step::Lock, State::RUNNING, State::LOCKED),
    (Step::Checkpoint, State::LOCKED, State::CHECKPOINTED),
    (Step::Restore, State::CHECKPOINTED, State::LOCKED),
    (Step::Unlock, State::LOCKED, State::RUNNING),
];

/// The steps that bring a process from `state` back to running, in order; none where only its end is left.
#[must_use]
pub fn way_back(state: State) -> Option<&'static [Step]> {
    match state {
        State::RUNNING => Some(&[]),
        State::LOCKED => Some(&[Step::Unlock]),
        State::CHECKPOINTED => Some(&[Step::Restore, Step::Unlock]),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_from_every_state() {
        let known = [State::RUNNING, State::LOCKED, State::CHECKPOINTED, State::FAILED, State(4), State(99)];
        for step in Step::ALL {
            for state in known {
                let wanted = match (step, state) {
                    (Step::Lock, State::RUNNING) | (Step::Restore, State::CHECKPOINTED) => {
                        Some(State::LOCKED)
                    }
                    (Step::Checkpoint, State::LOCKED) => Some(State::CHECKPOINTED),
                    (Step::Unlock, State::LOCKED) => Some(State::RUNNING),
                    _ => None,
                };
                assert_eq!(step.from(state), wanted, "{step} from {state}");
                assert!(wanted.is_none_or(|to| to == step.target()), "{step}");
            }
        }
    }

    #[test]
    fn every_way_back_ends_in_running() {
        for state in [State::RUNNING, State::LOCKED, State::CHECKPOINTED] {
            let steps = way_back(state).expect("a way");
            let end = steps.iter().try_fold(state, |state, step| step.from(state));
            assert_eq!(end, Some(State::RUNNING), "from {state}");
        }
        for state in [State::FAILED, State(4), State(5), State(99)] {
            assert_eq!(way_back(state), None, "from {state}");
        }
    }
}
