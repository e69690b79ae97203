//! The `rewarm` program: the only crate that prints, parses flags, reads the environment and exits.
//!
//! [`main_impl`] parses the command line (`args.rs`), runs the verb (`commands/`, one file each) and turns what it failed
//! with into text and an exit code (`failure.rs`, [`exit`]).

mod args;
mod commands;
mod config;
mod doctor;
mod drained;
pub mod env;
pub mod exit;
mod failure;
mod hints;
mod pools;
mod programs;
mod render;
mod replicas;
mod signals;
mod values;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::parser::ValueSource;
use clap::{CommandFactory, FromArgMatches};

use crate::args::{Cli, Command};
use crate::exit::Exit;
use crate::failure::{Cause, Failure};

/// Runs the program with the arguments of this process and gives its exit code.
#[must_use]
pub fn main_impl() -> ExitCode {
    ExitCode::from(run(std::env::args_os()))
}

/// Runs the program with these arguments, the program's own name first, and gives its exit code: one of [`Exit`], or, for
/// `exec` and `wait`, that of what was executed or waited for.
pub fn run(arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> u8 {
    let cli = match parse(arguments) {
        Ok(cli) => cli,
        Err(error) => return refused(&error).code(),
    };
    log_to_stderr(cli.global.verbose);
    let json = cli.global.json;
    match dispatch(&cli) {
        Ok(code) => code,
        Err(cause) => Failure { doing: doing(&cli.command), cause }.tell(json).code(),
    }
}

/// As `Cli::try_parse_from`, but `simulate --config` is not filled from the variable of the program's own configuration.
fn parse(arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Result<Cli, clap::Error> {
    let matches = Cli::command().try_get_matches_from(arguments)?;
    let typed = matches
        .subcommand()
        .is_some_and(|(_, verb)| verb.value_source("config") == Some(ValueSource::CommandLine));
    let mut cli = Cli::from_arg_matches(&matches)?;
    if let Command::Simulate(args) = &mut cli.command
        && !typed
    {
        args.config = None;
    }
    Ok(cli)
}

/// Help and version come here too, and are no error.
fn refused(error: &clap::Error) -> Exit {
    // When stdout is gone there is nothing left to say.
    let _ = error.print();
    if error.use_stderr() { Exit::Usage } else { Exit::Done }
}

fn dispatch(cli: &Cli) -> Result<u8, Cause> {
    let global = &cli.global;
    match &cli.command {
        Command::Doctor(args) => commands::doctor::run(args, global),
        Command::Run(args) => wait_for(commands::run::run(args, global)),
        Command::Snapshot(args) => wait_for(commands::snapshot::run(args, global)),
        Command::Restore(args) => wait_for(commands::restore::run(args, global)),
        Command::Ps(args) => commands::ps::run(args, global),
        Command::Logs(args) => commands::logs::run(args, global),
        Command::Exec(args) => wait_for(commands::exec::run(args, global)),
        Command::Pause(args) => wait_for(commands::pause::run(args, global)),
        Command::Wake(args) => wait_for(commands::wake::run(args, global)),
        Command::Stop(args) => commands::stop::run(args, global),
        Command::Wait(args) => commands::wait::run(args, global),
        Command::Rm(args) => wait_for(commands::rm::run(args, global)),
        Command::Ls(args) => wait_for(commands::ls::run(args, global)),
        Command::Inspect(args) => wait_for(commands::inspect::run(args, global)),
        Command::Verify(args) => wait_for(commands::verify::run(args, global)),
        Command::Diff(args) => wait_for(commands::diff::run(args, global)),
        Command::Cp(args) => wait_for(commands::cp::run(args, global)),
        Command::Gc(args) => wait_for(commands::gc::run(args, global)),
        Command::Key(args) => commands::key::run(args, global),
        Command::Engine(args) => commands::engine::run(args, global),
        Command::Serve(args) => wait_for(commands::serve::run(args, global)),
        Command::Bench(args) => wait_for(commands::bench::run(args, global)),
        Command::BenchServer(args) => commands::bench::server(args),
        Command::Simulate(args) => commands::simulate::run(args, global),
        Command::Cache(args) => commands::cache::run(global, args),
        Command::Completions(args) => commands::completions::run(args),
        Command::Man(args) => commands::man::run(args, global),
        Command::Shim(args) => Ok(commands::shim::run(args, global)),
        Command::Pager(args) => Ok(commands::pager::run(args)),
        Command::GpuHelper => Ok(commands::gpu_helper::run()),
        Command::Fetcher(args) => Ok(commands::fetcher::run(args)),
        Command::Gateway => Ok(commands::gateway::run()),
        Command::Help(args) => commands::help::run(args),
    }
}

/// How long a failed command waits for what undoes itself in the background, given up uploads above all.
const UNDO_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a thread for calls that block waits for the next one. Seldom is none called for so long, so that there is one also
/// when memory has become short meanwhile: where no thread can be made such calls are queued until one is free.
const KEEP_ALIVE: Duration = Duration::from_secs(600);

/// Runs an asynchronous command.
fn wait_for(command: impl Future<Output = Result<u8, Cause>>) -> Result<u8, Cause> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let builder = builder.enable_all().thread_keep_alive(KEEP_ALIVE);
    let runtime = builder.build().map_err(Cause::Runtime)?;
    let outcome = runtime.block_on(command);
    if outcome.is_err() {
        let deadline = Instant::now() + UNDO_TIMEOUT;
        while runtime.metrics().num_alive_tasks() > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    // What still waits in a blocking call waits for a shim; the end of this process is the end of its lease.
    runtime.shutdown_background();
    outcome
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
        Command::Pause(args) => format!("pause {}", args.name),
        Command::Wake(args) => format!("wake {}", args.name),
        Command::Stop(args) => format!("stop {}", joined(&args.names)),
        Command::Wait(args) => format!("wait for {}", args.name),
        Command::Rm(args) => format!("remove {}", joined(&args.names)),
        Command::Ls(args) => format!("list {}", args.store),
        Command::Inspect(args) => format!("inspect {}", args.reference),
        Command::Verify(args) => format!("verify {}", args.reference),
        Command::Diff(args) => format!("compare {} with {}", args.first, args.second),
        Command::Cp(args) => format!("copy {} to {}", args.source, args.destination),
        Command::Gc(args) => format!("collect garbage in {}", args.store),
        Command::Key(args) => args.doing(),
        Command::Engine(_) => "show engines".to_owned(),
        Command::Serve(args) => format!("serve {}", args.file.display()),
        Command::Gateway => "talk to clients".to_owned(),
        Command::Bench(_) => "measure".to_owned(),
        Command::BenchServer(args) => format!("serve on port {}", args.port),
        Command::Simulate(_) => "simulate".to_owned(),
        Command::Cache(_) => "look into the fetcher".to_owned(),
        Command::Completions(_) => "print completions".to_owned(),
        Command::Man(_) => "write manual pages".to_owned(),
        Command::Shim(args) => format!("own {}", args.name),
        Command::Pager(_) => "fill a replica's memory".to_owned(),
        Command::GpuHelper => "make the CUDA driver's calls".to_owned(),
        Command::Fetcher(_) => "fetch for restores".to_owned(),
        Command::Help(_) => "print help".to_owned(),
    }
}

fn joined(names: &[impl ToString]) -> String {
    names.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
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
