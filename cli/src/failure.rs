//! What a command failed with, how it is told, and what to do next.
//!
//! The libraries' errors keep their type up to here, so that class and hint are chosen by a match and not by reading text.

use std::error::Error as _;
use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;

use rewarm_report::{Class, Classify};
use serde_json::json;

use crate::exit::Exit;
use crate::render;

/// Why a command did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Cause {
    /// A malformed combination of flags that clap cannot see.
    #[error("{problem}")]
    Usage {
        /// The flag, the value seen and the one expected.
        problem: String,
    },
    /// A probe, a hook or a ready check.
    #[error(transparent)]
    Probe(#[from] rewarm_probe::Error),
    /// A file that the command line names.
    #[error("{doing} {}", path.display())]
    File {
        /// `write`, `read`.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The answer could not be written to stdout.
    #[error("write to stdout")]
    Stdout(#[source] io::Error),
    /// The machine lacks something.
    #[error("{missing}")]
    Unfit {
        /// The needs that are missing.
        missing: String,
    },
}

impl From<io::Error> for Cause {
    /// Only [`render`] gives bare errors: those of stdout.
    fn from(source: io::Error) -> Self {
        Cause::Stdout(source)
    }
}

impl Classify for Cause {
    fn class(&self) -> Class {
        match self {
            Cause::Usage { .. } => Class::Usage,
            Cause::Probe(error) => error.class(),
            Cause::Unfit { .. } => Class::Incompatible,
            Cause::File { .. } | Cause::Stdout(_) => Class::Failed,
        }
    }
}

impl Cause {
    /// What to do next, where we know it.
    fn hint(&self) -> Option<String> {
        use rewarm_probe::Error as Probe;
        let hint = match self {
            Cause::Probe(Probe::NotReady { .. }) => {
                "--ready is asked inside the replica's network namespace; --ready-timeout waits longer"
            }
            Cause::Probe(Probe::NoPort { .. }) => {
                "say the port in the probe file, or give the replica one by --port"
            }
            Cause::Probe(Probe::Differs(_)) => {
                "if this part of the answer may vary, let the probe file compare less of it or with a tolerance (docs/probe.md)"
            }
            Cause::Probe(Probe::UnknownKey { .. } | Probe::BadValue { .. } | Probe::ParseFile { .. }) => {
                "docs/probe.md lists every key of a probe file"
            }
            Cause::Unfit { .. } => "`rewarm doctor` lists every need with its fix",
            Cause::Probe(_) | Cause::Usage { .. } | Cause::File { .. } | Cause::Stdout(_) => return None,
        };
        Some(hint.to_owned())
    }
}

/// A failure and what was being done.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Reads after "failed to": `restore /srv/embed@latest`.
    pub(crate) doing: String,
    pub(crate) cause: Cause,
}

impl Failure {
    /// The message of the error and of each of its sources, outermost first.
    fn chain(&self) -> Vec<String> {
        let mut chain = vec![self.cause.to_string()];
        let mut source = self.cause.source();
        while let Some(error) = source {
            let text = error.to_string();
            // Some libraries repeat the source in their own message.
            if chain.last().is_some_and(|last| !last.ends_with(&text)) {
                chain.push(text);
            }
            source = error.source();
        }
        chain
    }

    /// The error as a person reads it, hint included.
    pub(crate) fn text(&self) -> String {
        let mut text = format!(
            "{} failed to {}: {}",
            render::paint("error:", "31"),
            self.doing,
            self.chain().join(": ")
        );
        if let Some(hint) = self.cause.hint() {
            let _ = write!(text, "\n{} {hint}", render::paint("hint:", "36"));
        }
        text
    }

    /// The error as a program reads it.
    fn json(&self, exit: Exit) -> serde_json::Value {
        json!({ "error": {
            "doing": self.doing,
            "chain": self.chain(),
            "class": self.cause.class(),
            "exit": exit.code(),
            "hint": self.cause.hint(),
        }})
    }

    /// Tells it and gives the exit code. A reader who closed the pipe has what it wanted.
    pub(crate) fn tell(&self, json: bool) -> Exit {
        if let Cause::Stdout(error) = &self.cause
            && error.kind() == io::ErrorKind::BrokenPipe
        {
            return Exit::Done;
        }
        let exit = Exit::from(self.cause.class());
        render::talk(&self.text());
        if json {
            // A stdout that is gone is told on stderr already.
            let _ = render::print(&format!("{}\n", self.json(exit)));
        }
        exit
    }
}
