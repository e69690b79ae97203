//! Progress bars on a terminal: one line for each stage that runs, after 250 ms, at most 30 times a second.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use rewarm_report::{Progress, Stage, Timing};

use crate::render::paint;

/// What is over sooner needs no bar.
const QUIET_FOR: Duration = Duration::from_millis(250);
const DRAWS_PER_SECOND: u8 = 30;
/// Steps of the spinner.
const TICK: Duration = Duration::from_millis(100);

/// Draws the stages of an operation on stderr.
pub(crate) struct Bars {
    lines: Arc<Lines>,
}

struct Lines {
    group: MultiProgress,
    running: Mutex<HashMap<Stage, ProgressBar>>,
}

impl Bars {
    pub(crate) fn new() -> Self {
        let group = MultiProgress::with_draw_target(ProgressDrawTarget::hidden());
        let lines = Arc::new(Lines { group, running: Mutex::default() });
        let watched: Weak<Lines> = Arc::downgrade(&lines);
        // Ends by itself, and holds nothing: an operation that is over sooner has dropped its lines.
        std::thread::spawn(move || {
            std::thread::sleep(QUIET_FOR);
            if let Some(lines) = watched.upgrade() {
                lines.group.set_draw_target(ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND));
            }
        });
        Self { lines }
    }

    fn with<T>(&self, stage: Stage, change: impl FnOnce(&ProgressBar) -> T) -> T {
        let mut running = self.lines.running.lock().expect("no panic while a bar is changed");
        let bar = running.entry(stage).or_insert_with(|| {
            let bar = self.lines.group.add(ProgressBar::no_length());
            bar.set_style(style("{spinner} {prefix:10} {elapsed}"));
            bar.set_prefix(stage.name());
            bar.enable_steady_tick(TICK);
            bar
        });
        change(bar)
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("a template of this file").progress_chars("=> ")
}

impl Progress for Bars {
    fn started(&self, stage: Stage) {
        self.with(stage, |_| ());
    }

    fn finished(&self, timing: Timing) {
        let bar = self.lines.running.lock().expect("no panic while a bar is changed").remove(&timing.stage);
        if let Some(bar) = bar {
            bar.finish_and_clear();
            self.lines.group.remove(&bar);
        }
    }

    fn bytes(&self, stage: Stage, done: u64, total: Option<u64>) {
        self.with(stage, |bar| {
            match total {
                Some(total) if bar.length() != Some(total) => {
                    bar.set_length(total);
                    bar.set_style(style(
                        "{spinner} {prefix:10} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}",
                    ));
                }
                None if bar.position() == 0 => {
                    bar.set_style(style("{spinner} {prefix:10} {binary_bytes} {binary_bytes_per_sec}"));
                }
                _ => {}
            }
            bar.set_position(done);
        });
    }

    fn warning(&self, text: &str) {
        let line = format!("{} {text}", paint("warning:", "33"));
        self.lines.group.suspend(|| super::talk(&line));
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        let _ = self.lines.group.clear();
    }
}
