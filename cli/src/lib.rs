//! The `rewarm` program: the only crate that prints, parses flags, reads the environment and exits.
//!
//! [`main_impl`] parses the command line ([`args`]), runs the verb (`commands/`, one file each) and turns what it failed
//! with into text and an exit code ([`failure`], [`exit`]).

mod args;
mod commands;
mod doctor;
pub mod env;
pub mod exit;
mod failure;
mod render;
mod values;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};
use crate::exit::Exit;
use crate::failure::{Cause, Failure};

/// Runs the program with the arguments of this process and gives its exit code.
#[must_use]
pub fn main_impl() -> ExitCode {
    ExitCode::from(run(std::env::args_os()).code())
}

/// Runs the program with these arguments, the program's own name first.
pub fn run(arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Exit {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => return refused(&error),
    };
    log_to_stderr(cli.global.verbose);
    let json = cli.global.json;
    match dispatch(&cli) {
        Ok(exit) => exit,
        Err(cause) => Failure { doing: doing(&cli.command), cause }.tell(json),
    }
}

/// Help and version come here too, and are no error.
fn refused(error: &clap::Error) -> Exit {
    // When stdout is gone there is nothing left to say.
    let _ = error.print();
    if error.use_stderr() { Exit::Usage } else { Exit::Done }
}

fn dispatch(cli: &Cli) -> Result<Exit, Cause> {
    let global = &cli.global;
    match &cli.command {
        Command::Doctor(_) => commands::doctor::run(global),
        Command::Completions(args) => commands::completions::run(args),
        Command::Man(args) => commands::man::run(args, global),
        Command::Help(args) => commands::help::run(args),
        _ => todo!(),
    }
}

/// What a failure of this command is a failure to do.
fn doing(command: &Command) -> String {
    match command {
        Command::Doctor(_) => "examine this machine".to_owned(),
        Command::Run(args) => format!("run {}", args.name),
        Command::Snapshot(args) => format!("snapshot {} to {}", args.name, args.destination),
        Command::Restore(args) => format!("restore {}", args.source),
        Command::Ps(_) => "list replicas".to_owned(),
        Command::Logs(args) => format!("read the logs of {}", args.name),
        Command::Exec(args) => format!("execute in {}", args.name),
        Command::Stop(args) => format!("stop {}", args.names.join(", ")),
        Command::Wait(args) => format!("wait for {}", args.name),
        Command::Rm(args) => format!("remove {}", args.names.join(", ")),
        Command::Ls(args) => format!("list {}", args.store),
        Command::Inspect(args) => format!("inspect {}", args.reference),
        Command::Completions(_) => "print completions".to_owned(),
        Command::Man(_) => "write manual pages".to_owned(),
        Command::Shim(args) => format!("own {}", args.name),
        Command::Help(_) => "print help".to_owned(),
    }
}

/// Warnings of the libraries go to stderr, beside the talk of the commands.
fn log_to_stderr(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info,rewarm=debug",
        _ => "debug,rewarm=trace",
    };
    let filter = env::log_filter().unwrap_or_else(|| level.to_owned());
    let filter = tracing_subscriber::EnvFilter::try_new(&filter).unwrap_or_else(|error| {
        render::warn(&format!("log filter {filter:?} is malformed: {error}"));
        tracing_subscriber::EnvFilter::new(level)
    });
    // A second call in one process, as tests make, keeps the first subscriber.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}
