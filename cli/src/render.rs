//! What is printed: text or JSON on stdout, talk on stderr. Nothing else in the workspace prints.
//!
//! A reader that closes the pipe (`rewarm ps | head -1`) has what it wanted: the program then ends quietly with 0.

mod bars;
mod table;

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;

use rewarm_report::{Hidden, Progress, Timing};
use serde::Serialize;

pub(crate) use bars::Bars;
pub(crate) use table::{bytes, count, table};

use crate::args::Global;
use crate::env;

/// Where a command's answer goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    json: bool,
    quiet: bool,
}

impl Output {
    pub(crate) fn new(global: &Global) -> Self {
        Self { json: global.json, quiet: global.quiet }
    }

    /// Prints the answer: one line of JSON, or the text that `text` makes of it.
    pub(crate) fn answer<T: Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) -> io::Result<()> {
        if !self.json {
            return print(&text(value));
        }
        let mut line = serde_json::to_string(value).map_err(io::Error::other)?;
        line.push('\n');
        print(&line)
    }

    /// The bars of a long operation; nobody watches in a pipe.
    pub(crate) fn progress(self) -> Arc<dyn Progress> {
        let quiet = self.quiet || env::dumb_terminal() || !io::stderr().is_terminal();
        if quiet { Arc::new(Warnings) } else { Arc::new(Bars::new()) }
    }
}

/// No bars, but what a person should read is still said.
struct Warnings;

impl Progress for Warnings {
    fn started(&self, stage: rewarm_report::Stage) {
        Hidden.started(stage);
    }

    fn warning(&self, text: &str) {
        warn(text);
    }
}

/// Writes to stdout.
pub(crate) fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Writes a line to stderr. If even that fails there is nobody left to tell.
pub(crate) fn talk(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Writes a warning to stderr.
pub(crate) fn warn(text: &str) {
    talk(&format!("{} {text}", paint("warning:", "33")));
}

/// Colours a word of stderr, where that is a terminal and colour is wanted. `code` is an SGR parameter.
pub(crate) fn paint(word: &str, code: &str) -> String {
    if io::stderr().is_terminal() && !env::no_color() && !env::dumb_terminal() {
        format!("\x1b[1;{code}m{word}\x1b[0m")
    } else {
        word.to_owned()
    }
}

/// The stages of an operation as lines of text: name, start and duration.
pub(crate) fn stages(timings: &[Timing]) -> String {
    let rows = timings.iter().map(|timing| {
        vec![timing.stage.name().to_owned(), seconds(timing.start_ms), seconds(timing.took_ms)]
    });
    table(&["STAGE", "AT", "TOOK"], rows)
}

/// Milliseconds as seconds with three decimals.
pub(crate) fn seconds(millis: f64) -> String {
    format!("{:.3} s", millis / 1000.0)
}
