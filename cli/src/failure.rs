//! What a command failed with, how it is told, and what to do next.
//!
//! The libraries' errors keep their type up to here, so that class and hint are chosen by a match and not by reading text.

use std::error::Error;
use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;

use rewarm_report::{Aftermath, Class, Classify, Stage};
use serde::Serialize;
use serde_json::json;

use crate::exit::Exit;
use crate::{hints, render};

/// A failure in JSON.
#[derive(Debug, Serialize)]
pub(crate) struct Told {
    /// What failed, as a phrase after "failed to".
    #[serde(skip_serializing_if = "Option::is_none")]
    doing: Option<String>,
    /// The replica, where it is one of several.
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stage: Option<Stage>,
    /// The messages, outermost first.
    chain: Vec<String>,
    class: Class,
    /// The exit code of this class.
    exit: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'static str>,
    /// The last lines of the server's output.
    #[serde(skip_serializing_if = "Option::is_none")]
    output: Option<String>,
    /// What is true of the server now.
    #[serde(skip_serializing_if = "Option::is_none")]
    aftermath: Option<Aftermath>,
}

/// Why a command did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Cause {
    /// A malformed combination of flags that clap cannot see.
    #[error("{problem}")]
    Usage {
        /// The flag, the value seen and the one expected.
        problem: String,
    },
    /// A container or its shim.
    #[error(transparent)]
    Container(Box<rewarm_container::Error>),
    /// A store or a snapshot in it.
    #[error(transparent)]
    Store(Box<rewarm_store::Error>),
    /// Objects of a snapshot are damaged.
    #[error("{damaged} of what was read {}", if *damaged == 1 { "is damaged" } else { "are damaged" })]
    Damaged {
        /// How many damages were found.
        damaged: usize,
        /// Each of them.
        causes: Vec<Cause>,
    },
    /// What a snapshot says of itself cannot be used.
    #[error(transparent)]
    Parts(Box<rewarm_restore::Cause>),
    /// A copy that the readers of its destination would refuse.
    #[error("{digest} would not be trusted in {store}")]
    NotForDestination {
        /// The snapshot.
        digest: rewarm_store::Digest,
        /// Where to.
        store: String,
        /// Why not.
        source: rewarm_store::Mistrust,
    },
    /// A signing key.
    #[error(transparent)]
    Key(Box<rewarm_store::KeyError>),
    /// The configuration file is not understood.
    #[error("{} is not understood: {reason}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        reason: String,
    },
    /// The fetcher.
    #[error(transparent)]
    Fetcher(Box<rewarm_fetcher::Error>),
    /// GPUs that a container cannot get.
    #[error(transparent)]
    Gpu(Box<rewarm_gpu::provide::ProvideError>),
    /// CRIU.
    #[error(transparent)]
    Criu(Box<rewarm_criu::Error>),
    /// A stage of the snapshot pipeline.
    #[error(transparent)]
    Snapshot(Box<rewarm_snapshot::Error>),
    /// A stage of the restore pipeline.
    #[error(transparent)]
    Restore(Box<rewarm_restore::Error>),
    /// Some of several replicas could not be restored; the others serve.
    #[error("{failed} of {of} replicas could not be restored; the others serve")]
    SomeFailed {
        /// How many failed.
        failed: usize,
        /// How many were wanted.
        of: usize,
        /// Why each of them.
        causes: Vec<Cause>,
    },
    /// `/proc` does not tell what this machine is.
    #[error("look at this machine")]
    Machine(#[source] io::Error),
    /// This process may not do what containers need.
    #[error("needs {name}, found {found}: {consequence}")]
    Unprivileged {
        /// What is needed.
        name: &'static str,
        /// What was found.
        found: String,
        /// What follows.
        consequence: &'static str,
        /// What to do about it.
        fix: &'static str,
    },
    /// There is no runc.
    #[error("no runc program in PATH")]
    NoRunc,
    /// The system does not give this command its threads.
    #[error("start the runtime")]
    Runtime(#[source] io::Error),
    /// Signals cannot be watched.
    #[error("watch for signals")]
    Signals(#[source] io::Error),
    /// A probe, a hook or a ready check.
    #[error(transparent)]
    Probe(Box<rewarm_probe::Error>),
    /// A benchmark.
    #[error(transparent)]
    Bench(Box<rewarm_bench::Error>),
    /// A trace, a policy or the picture of a simulation.
    #[error(transparent)]
    Autoscaler(Box<rewarm_autoscaler::Error>),
    /// Pools, their file, or the gateway.
    #[error(transparent)]
    Serve(Box<rewarm_serve::Error>),
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
}

/// The errors of the libraries are large, and a result is returned from everywhere: they travel in a box.
macro_rules! boxed {
    ($($variant:ident $error:ty;)*) => {$(
        impl From<$error> for Cause {
            fn from(error: $error) -> Self {
                Self::$variant(Box::new(error))
            }
        }
    )*};
}
boxed! {
    Container rewarm_container::Error;
    Store rewarm_store::Error;
    Key rewarm_store::KeyError;
    Fetcher rewarm_fetcher::Error;
    Gpu rewarm_gpu::provide::ProvideError;
    Criu rewarm_criu::Error;
    Snapshot rewarm_snapshot::Error;
    Restore rewarm_restore::Error;
    Probe rewarm_probe::Error;
    Bench rewarm_bench::Error;
    Autoscaler rewarm_autoscaler::Error;
    Serve rewarm_serve::Error;
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
            Cause::Usage { .. } | Cause::Config { .. } => Class::Usage,
            Cause::Key(error) => error.class(),
            Cause::Damaged { .. } | Cause::NotForDestination { .. } => Class::Integrity,
            Cause::Parts(error) => error.class(),
            Cause::Probe(error) => error.class(),
            Cause::Bench(error) => error.class(),
            Cause::Autoscaler(error) => error.class(),
            Cause::Serve(error) => error.class(),
            Cause::Container(error) => error.class(),
            Cause::Store(error) => error.class(),
            Cause::Fetcher(error) => error.class(),
            Cause::Criu(error) => error.class(),
            Cause::Snapshot(error) => error.class(),
            Cause::Restore(error) => error.class(),
            Cause::NoRunc | Cause::Unprivileged { .. } | Cause::Gpu(_) => Class::Incompatible,
            Cause::SomeFailed { .. }
            | Cause::Machine(_)
            | Cause::Signals(_)
            | Cause::Runtime(_)
            | Cause::File { .. }
            | Cause::Stdout(_) => Class::Failed,
        }
    }
}

impl Cause {
    /// What to do next, where we know it.
    fn hint(&self) -> Option<&'static str> {
        match self {
            Cause::Container(error) => hints::container(error),
            Cause::Criu(error) => hints::criu(error),
            Cause::Store(error) => hints::store(error),
            Cause::Key(error) => hints::key(error),
            Cause::Config { .. } => Some("docs/signatures.md lists every key of the file"),
            Cause::Fetcher(error) => hints::fetcher(error),
            Cause::Probe(error) => hints::probe(error),
            Cause::Autoscaler(error) => hints::autoscaler(error),
            Cause::Serve(error) => hints::serve(error),
            Cause::Snapshot(error) => hints::snapshot(&error.cause),
            Cause::Restore(error) => hints::restore(&error.cause),
            Cause::Unprivileged { fix, .. } => Some(fix),
            Cause::Gpu(_) => {
                Some("`rewarm doctor` shows this machine's GPUs; docs/gpu.md says where they are looked for")
            }
            Cause::NoRunc => {
                Some("install runc 1.1 or later; `rewarm doctor` lists every need of this machine")
            }
            Cause::Damaged { .. } => {
                Some("take the snapshot again, or `rewarm cp` it from a store where it is whole")
            }
            Cause::NotForDestination { .. } => Some("docs/signatures.md says who decides what a store takes"),
            Cause::Parts(error) => hints::restore(error),
            Cause::Usage { .. }
            | Cause::SomeFailed { .. }
            | Cause::Machine(_)
            | Cause::Signals(_)
            | Cause::Runtime(_)
            | Cause::Bench(_)
            | Cause::File { .. }
            | Cause::Stdout(_) => None,
        }
    }

    /// What is true of the server now, where an operation on it failed.
    fn aftermath(&self) -> Option<Aftermath> {
        match self {
            Cause::Snapshot(error) => Some(error.aftermath),
            _ => None,
        }
    }

    /// The messages, outermost first, without what `doing` says already.
    fn chain(&self) -> Vec<String> {
        match self {
            Cause::Snapshot(error) => staged(error.stage, &error.cause),
            Cause::Restore(error) => staged(error.stage, &error.cause),
            other => messages(other),
        }
    }

    /// The failure as a program reads it.
    pub(crate) fn told(&self) -> Told {
        Told {
            doing: None,
            name: match self {
                Cause::Restore(error) => Some(error.name.clone()),
                _ => None,
            },
            stage: match self {
                Cause::Snapshot(error) => Some(error.stage),
                Cause::Restore(error) => Some(error.stage),
                _ => None,
            },
            chain: self.chain(),
            class: self.class(),
            exit: Exit::from(self.class()).code(),
            hint: self.hint(),
            output: self.output().map(str::to_owned),
            aftermath: self.aftermath(),
        }
    }

    /// Which of several replicas it is about.
    fn subject(&self) -> String {
        match self {
            Cause::Restore(error) => format!("{}: ", error.name),
            _ => String::new(),
        }
    }

    /// What the server wrote, where that says why.
    fn output(&self) -> Option<&str> {
        match self {
            Cause::Restore(error) => match &error.cause {
                rewarm_restore::Cause::NotStarted { output, .. } if !output.is_empty() => Some(output),
                _ => None,
            },
            _ => None,
        }
    }
}

fn staged(stage: Stage, cause: &dyn Error) -> Vec<String> {
    let mut chain = vec![format!("stage {stage}")];
    chain.extend(messages(cause));
    chain
}

/// The message of an error and of each of its sources; a source that the message before it repeats is left out.
pub(crate) fn messages(error: &dyn Error) -> Vec<String> {
    let mut chain: Vec<String> = Vec::new();
    let mut next: Option<&dyn Error> = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        if chain.last().is_none_or(|last| !last.ends_with(&text)) {
            chain.push(text);
        }
        next = error.source();
    }
    chain
}

fn situation(aftermath: Aftermath) -> &'static str {
    match aftermath {
        Aftermath::Serving => "the server goes on serving",
        Aftermath::Stopped => "the server is left stopped: look at `rewarm ps --all`",
        Aftermath::Gone => "the server is gone",
        Aftermath::Nothing => "nothing was touched",
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
    /// The error as a person reads it, hint included.
    pub(crate) fn text(&self) -> String {
        let mut text = format!(
            "{} failed to {}: {}",
            render::paint("error:", "31"),
            self.doing,
            self.cause.chain().join(": ")
        );
        if let Cause::SomeFailed { causes, .. } | Cause::Damaged { causes, .. } = &self.cause {
            for cause in causes {
                let _ = write!(text, "\n  {}{}", cause.subject(), cause.chain().join(": "));
            }
        }
        if let Some(output) = self.cause.output() {
            let _ = write!(text, "\n{output}");
        }
        if let Some(aftermath) = self.cause.aftermath() {
            let _ = write!(text, "\n{}", situation(aftermath));
        }
        if let Some(hint) = self.cause.hint() {
            let _ = write!(text, "\n{} {hint}", render::paint("hint:", "36"));
        }
        text
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
            let told = Told { doing: Some(self.doing.clone()), ..self.cause.told() };
            let _ = render::print(&format!("{}\n", json!({ "error": told })));
        }
        exit
    }
}
