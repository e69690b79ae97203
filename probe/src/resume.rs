//! What lets a server go on that was drained for a checkpoint: the steps of its engine, then the operator's hook.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::dial::Dial;
use crate::engine::{Engine, Step, take_all};
use crate::error::Error;
use crate::hook::Hook;

/// Kept where it outlives the command that drains a server, so that one that is killed leaves no server waiting.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// The steps that the engine takes after a checkpoint.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Step>,
    /// What is run after them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hook: Option<Hook>,
    /// How long the hook may take.
    pub hook_timeout: Duration,
}

impl Resume {
    /// The steps after a checkpoint of `engine`, and `hook`.
    #[must_use]
    pub fn new(engine: Option<&Engine>, hook: Option<&Hook>, hook_timeout: Duration) -> Self {
        let steps = engine.map(|engine| engine.after.clone()).unwrap_or_default();
        Self { steps, hook: hook.cloned(), hook_timeout }
    }

    /// Whether nothing is to be done.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.hook.is_none()
    }

    /// Does all of it, each whether the one before it failed or not, and gives the failures. `port` is the first that the replica
    /// declares.
    pub async fn take(&self, dial: &dyn Dial, port: Option<u16>) -> Vec<Error> {
        let mut failures = take_all(&self.steps, dial, port).await;
        if let Some(hook) = &self.hook {
            failures.extend(hook.run(dial, port, self.hook_timeout).await.err());
        }
        failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_survives_json_and_says_when_there_is_nothing_to_do() {
        let engine = Engine::load("vllm").expect("a preset");
        let hook: Hook = "http://localhost:8000/reseed".parse().expect("a hook");
        let resume = Resume::new(Some(&engine), Some(&hook), Duration::from_secs(7));
        assert_eq!((resume.steps.len(), resume.is_empty()), (engine.after.len(), false));
        let json = serde_json::to_string(&resume).expect("JSON");
        assert_eq!(serde_json::from_str::<Resume>(&json).expect("JSON"), resume);
        assert!(!Resume::new(None, Some(&hook), Duration::ZERO).is_empty());
        assert!(Resume::new(Some(&Engine::default()), None, Duration::ZERO).is_empty());
    }
}
