//! The stages of both pipelines, in order, and how long each took.
//!
//! The same list is what the command line draws, what `--json` prints and what the fault tests iterate over: a stage
//! that is added here is covered there or the test fails.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::progress::Progress;

/// The two long operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// A running server becomes a snapshot in a store.
    Snapshot,
    /// A snapshot becomes running replicas.
    Restore,
}

macro_rules! stages {
    ($($variant:ident $name:literal $operation:ident $doc:literal;)*) => {
        /// One stage of a pipeline.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Stage { $(#[doc = $doc] $variant,)* }

        impl Stage {
            /// Every stage, in the order in which the pipelines pass through them.
            pub const ALL: &'static [Stage] = &[$(Stage::$variant,)*];

            /// The name as it appears in JSON, in errors and on the terminal.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Stage::$variant => $name,)* }
            }

            /// The pipeline that the stage belongs to.
            #[must_use]
            pub fn operation(self) -> Operation {
                match self { $(Stage::$variant => Operation::$operation,)* }
            }
        }
    };
}

stages! {
    Preflight "preflight" Snapshot "Looks for what cannot be dumped, before anything is touched.";
    Record "record" Snapshot "Asks the running server the probe's questions and keeps the answers.";
    Drain "drain" Snapshot "Runs the pre hook.";
    Dump "dump" Snapshot "CRIU dumps; pages stream into the receiver while the server is frozen.";
    Delta "delta" Snapshot "Copies the root file system's delta and `/dev/shm`, inside the freeze.";
    Resume "resume" Snapshot "The server goes on; the post hook runs.";
    Upload "upload" Snapshot "Chunks, compresses and uploads what was received.";
    Publish "publish" Snapshot "Writes the manifest, then the tag: the snapshot exists from here on.";
    Admit "admit" Restore "Reads the manifest and compares it with this machine, before any data moves.";
    Sandbox "sandbox" Restore "Root file system, namespaces, shim.";
    Fetch "fetch" Restore "Fetches, verifies and decodes what the store holds.";
    Skeleton "skeleton" Restore "CRIU restores kernel objects; memory is filled.";
    Identity "identity" Restore "Gives the clone its own identity and runs the post hook.";
    Replay "replay" Restore "Asks the probe's questions again and compares the answers.";
    Ready "ready" Restore "Waits until the server is ready and opens its published ports.";
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// When a stage began, counted from the start of the operation, and how long it took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Which stage.
    pub stage: Stage,
    /// Milliseconds from the start of the operation.
    pub start_ms: f64,
    /// Milliseconds that the stage took.
    pub took_ms: f64,
}

/// Measures the stages of one operation. Clones share the same record, so stages may run in parallel.
#[derive(Clone)]
pub struct Clock {
    began: Instant,
    timings: Arc<Mutex<Vec<Timing>>>,
    latest: Arc<Mutex<Option<Stage>>>,
    progress: Arc<dyn Progress>,
    pause: Option<Pause>,
}

/// Where an operation waits, for tests that want to find it there.
#[derive(Debug, Clone)]
pub struct Pause {
    /// At the beginning of this stage.
    pub stage: Stage,
    /// As long as this file is there; without one for half a minute, which is the longest in any case.
    pub file: Option<PathBuf>,
}

const PAUSE_MAX: Duration = Duration::from_secs(30);
const PAUSE_POLL: Duration = Duration::from_millis(10);

impl Pause {
    fn is_over(&self, began: Instant) -> bool {
        began.elapsed() >= PAUSE_MAX || self.file.as_ref().is_some_and(|file| !file.exists())
    }
}

impl Clock {
    /// Starts the clock of an operation and tells `progress` of each stage.
    #[must_use]
    pub fn start(progress: Arc<dyn Progress>) -> Self {
        Self { began: Instant::now(), timings: Arc::default(), latest: Arc::default(), progress, pause: None }
    }

    /// Makes the operation wait at the beginning of a stage, and say so first. This is how the fault tests kill a command at
    /// every stage.
    #[must_use]
    pub fn pausing_at(mut self, pause: Option<Pause>) -> Self {
        self.pause = pause;
        self
    }

    /// Runs `work` as `stage`, and records how long it took whether it succeeded or not.
    pub async fn stage<T>(&self, stage: Stage, work: impl Future<Output = T>) -> T {
        self.begin(stage);
        self.pause(stage).await;
        let start = Instant::now();
        self.progress.started(stage);
        let value = work.await;
        self.record(stage, start, start.elapsed());
        value
    }

    /// [`Clock::stage`] for work that blocks its thread.
    pub fn stage_blocking<T>(&self, stage: Stage, work: impl FnOnce() -> T) -> T {
        self.begin(stage);
        if let Some(pause) = self.pauses_at(stage) {
            let began = Instant::now();
            while !pause.is_over(began) {
                std::thread::sleep(PAUSE_POLL);
            }
        }
        let start = Instant::now();
        self.progress.started(stage);
        let value = work();
        self.record(stage, start, start.elapsed());
        value
    }

    fn begin(&self, stage: Stage) {
        *self.latest.lock().expect("no panic while recording") = Some(stage);
    }

    /// The stage that began last; `None` before the first.
    #[must_use]
    pub fn latest(&self) -> Option<Stage> {
        *self.latest.lock().expect("no panic while recording")
    }

    /// Waits if the operation was told to pause at this stage.
    async fn pause(&self, stage: Stage) {
        if let Some(pause) = self.pauses_at(stage) {
            let began = Instant::now();
            while !pause.is_over(began) {
                tokio::time::sleep(PAUSE_POLL).await;
            }
        }
    }

    /// How the operation pauses at this stage, if it does; says so then.
    fn pauses_at(&self, stage: Stage) -> Option<&Pause> {
        let pause = self.pause.as_ref().filter(|pause| pause.stage == stage)?;
        self.progress.warning(&format!("paused at {stage}"));
        Some(pause)
    }

    /// Records a stage that was measured elsewhere, for one that runs inside another process.
    pub fn record(&self, stage: Stage, start: Instant, took: Duration) {
        let timing = Timing {
            stage,
            start_ms: millis(start.saturating_duration_since(self.began)),
            took_ms: millis(took),
        };
        self.timings.lock().expect("no panic while recording").push(timing);
        self.progress.finished(timing);
    }

    /// What the stages report progress to.
    #[must_use]
    pub fn progress(&self) -> &Arc<dyn Progress> {
        &self.progress
    }

    /// Time since the start of the operation.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// The stages so far, by their start.
    #[must_use]
    pub fn timings(&self) -> Vec<Timing> {
        let mut timings = self.timings.lock().expect("no panic while recording").clone();
        timings.sort_by(|a, b| a.start_ms.total_cmp(&b.start_ms));
        timings
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Hidden;

    #[test]
    fn names_in_json_and_in_text_are_the_same() {
        for stage in Stage::ALL {
            let json = serde_json::to_string(stage).expect("a unit variant");
            assert_eq!(json, format!("\"{}\"", stage.name()));
        }
    }

    #[test]
    fn snapshot_stages_come_before_restore_stages() {
        let first_restore = Stage::ALL.iter().position(|s| s.operation() == Operation::Restore);
        let last_snapshot = Stage::ALL.iter().rposition(|s| s.operation() == Operation::Snapshot);
        assert!(last_snapshot < first_restore);
    }

    #[test]
    fn timings_are_sorted_by_start_even_if_a_later_stage_ends_first() {
        let clock = Clock::start(Arc::new(Hidden));
        let now = Instant::now();
        clock.record(Stage::Fetch, now + Duration::from_millis(5), Duration::from_millis(1));
        clock.record(Stage::Admit, now, Duration::from_millis(20));
        let stages: Vec<Stage> = clock.timings().iter().map(|t| t.stage).collect();
        assert_eq!(stages, [Stage::Admit, Stage::Fetch]);
    }
}
