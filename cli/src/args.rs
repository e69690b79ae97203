//! The command line: every verb, flag and value. What a verb does is in `commands/`.

mod hidden;

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::Styles;
use clap::builder::styling::{AnsiColor, Effects};
use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use rewarm_container::{Mount, Name, Net, Publish, User};
use rewarm_gpu::provide::Wanted;
use rewarm_probe::{Engine, Hook, Ready};
use rewarm_store::{Compression, Reference, StoreUrl};

pub(crate) use self::hidden::{BenchServer, Fetcher, Pager, Shim};
use crate::env;
use crate::exit::Exit;
use crate::values;

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().effects(Effects::BOLD))
    .usage(AnsiColor::Green.on_default().effects(Effects::BOLD))
    .literal(AnsiColor::Cyan.on_default().effects(Effects::BOLD))
    .placeholder(AnsiColor::Cyan.on_default());

/// Snapshots model servers that are ready into object storage, and starts further replicas by restoring them.
#[derive(Debug, Parser)]
#[command(name = "rewarm", version, styles = STYLES, max_term_width = 100, after_help = exit_codes())]
#[command(disable_help_subcommand = true, subcommand_required = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

fn exit_codes() -> String {
    format!("Exit codes:\n{}", Exit::table())
}

/// Flags of every verb.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Folder of running replicas.
    #[arg(long, global = true, value_name = "DIR", default_value = "/run/rewarm")]
    #[arg(env = env::STATE.name, hide_env_values = true)]
    pub(crate) state: PathBuf,
    /// The CRIU program; without it the one in the cache folder, else the one in PATH.
    #[arg(long, global = true, value_name = "FILE", env = env::CRIU.name, hide_env_values = true)]
    pub(crate) criu: Option<PathBuf>,
    /// Configuration file; without it /etc/rewarm/config.toml, if it is there.
    #[arg(long, global = true, value_name = "FILE", env = env::CONFIG.name, hide_env_values = true)]
    pub(crate) config: Option<PathBuf>,
    /// Print JSON instead of text.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Draw no progress bars.
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
    /// Log what happens to stderr; twice for everything.
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Say what works on this machine, what does not, and the fix.
    Doctor(Doctor),
    /// Start a server in a container and wait until it is ready.
    Run(Run),
    /// Snapshot a running replica into a store.
    Snapshot(Snapshot),
    /// Start replicas from a snapshot.
    Restore(Restore),
    /// List replicas.
    Ps(Ps),
    /// Print what a replica wrote to stdout and stderr.
    Logs(Logs),
    /// Run a command inside a replica.
    Exec(Exec),
    /// Give a replica's device memory and processor back; it stays in host memory.
    Pause(Pause),
    /// Let a paused replica go on.
    Wake(Wake),
    /// Stop a replica: SIGTERM, then SIGKILL.
    Stop(Stop),
    /// Wait until a replica ends; exits with its status.
    Wait(Wait),
    /// Remove what a stopped replica left, or a snapshot from a store.
    Rm(Rm),
    /// List the snapshots of a store.
    Ls(Ls),
    /// Show a snapshot, and whether this machine can restore it.
    Inspect(Inspect),
    /// Read every byte of a snapshot and check that a restore would find all it needs.
    Verify(Verify),
    /// Compare two snapshots: chunks, processes and mappings.
    Diff(Diff),
    /// Copy a snapshot into another store.
    Cp(Cp),
    /// Remove from a store what no tag leads to.
    Gc(Gc),
    /// Make and list signing keys.
    Key(Key),
    /// Show the steps of an inference engine, to be copied and changed.
    Engine(EngineArgs),
    /// Put pools of replicas behind addresses: they follow their load, down to zero.
    Serve(Serve),
    /// Measure cold start, stock CRIU and Rewarm side by side on this machine.
    Bench(Bench),
    /// Replay request traces through scaling policies, and compare them.
    Simulate(Simulate),
    /// Show which decoded snapshots lie in memory.
    Cache(Cache),
    /// Print a completion script for a shell.
    Completions(Completions),
    /// Write manual pages.
    Man(Man),
    /// Own a replica. Started by `run` and `restore`, not by hand.
    #[command(hide = true)]
    Shim(Shim),
    /// Fill a restored replica's memory. Started by its shim, not by hand.
    #[command(hide = true)]
    Pager(Pager),
    /// Make the CUDA driver's calls. Started by a shim, not by hand.
    #[command(hide = true)]
    GpuHelper,
    /// Serve a file of weights. Started by `bench`, not by hand.
    #[command(hide = true)]
    BenchServer(BenchServer),
    /// Download, verify and decode for restores. Started by `restore`, not by hand.
    #[command(hide = true)]
    Fetcher(Fetcher),
    /// Talk to clients. Started by `serve`, not by hand.
    #[command(hide = true)]
    Gateway,
    /// Print this help, or that of a verb, or the exit codes.
    Help(Help),
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  rewarm doctor --json | jq '.needs[] | select(.state != \"ok\")'")]
pub(crate) struct Doctor {
    /// Ask the CUDA driver too, which may take seconds. Without it only what NVML and /proc tell is shown.
    #[arg(long)]
    pub(crate) gpu: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    rewarm run embed --port 8000 --ready http://localhost/health -- python3 server.py\n  \
    rewarm run llm --memory 16GiB --mount /models:/models:ro --port 8000 --publish 8080:8000 -- python3 llm.py")]
pub(crate) struct Run {
    /// Name of the replica: [a-z0-9._-]+.
    #[arg(value_name = "NAME")]
    pub(crate) name: Name,
    /// Root file system; without it the host's `/`, which stays as it is: writes go to a private layer.
    #[arg(long, value_name = "DIR")]
    pub(crate) rootfs: Option<PathBuf>,
    /// Bring a folder or file of the host in; what is mounted below `/` is not in the default root.
    #[arg(long, value_name = "SRC:DST[:ro]")]
    pub(crate) mount: Vec<Mount>,
    /// GPUs: all, or numbers or identities with commas between them. Devices and libraries are those that the machine's CDI file
    /// names, else those of its driver.
    #[arg(long, value_name = "all|N|UUID", value_parser = values::spelled::<Wanted>)]
    pub(crate) gpu: Option<Wanted>,
    /// User and group of the server, by name or number.
    #[arg(long, value_name = "U[:G]")]
    pub(crate) user: Option<User>,
    /// Environment variable; it becomes part of every snapshot.
    #[arg(long, value_name = "K=V", value_parser = values::key_value)]
    pub(crate) env: Vec<(String, String)>,
    /// Folder inside the replica in which the command starts.
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub(crate) workdir: PathBuf,
    /// Limit of memory.
    #[arg(long, value_name = "BYTES", value_parser = values::bytes)]
    pub(crate) memory: Option<u64>,
    /// Limit of processors.
    #[arg(long, value_name = "N", value_parser = values::cpus)]
    pub(crate) cpus: Option<f64>,
    /// Network: private (loopback only), host, none or ns:/PATH.
    #[arg(long, value_name = "NET", default_value = "private")]
    pub(crate) net: Net,
    /// Port on which the server listens; the first is the one that checks, probes and hooks mean.
    #[arg(long, value_name = "P", value_parser = values::port)]
    pub(crate) port: Vec<u16>,
    /// Put a port of the host in front; without an address on all of IPv4, port 0 lets the kernel choose.
    #[arg(long, value_name = "[ADDR:]HP:P")]
    pub(crate) publish: Vec<Publish>,
    /// When the server is ready: http://HOST[:PORT]/PATH, tcp:PORT or cmd:COMMAND; without it, when the first port listens, or at once where there is none.
    #[arg(long, value_name = "CHECK")]
    pub(crate) ready: Option<Ready>,
    /// How long to wait for it.
    #[arg(long, value_name = "TIME", value_parser = values::duration, default_value = "10m")]
    pub(crate) ready_timeout: Duration,
    /// Label, shown by `ps --json` and kept in snapshots.
    #[arg(long, value_name = "K=V", value_parser = values::key_value)]
    pub(crate) label: Vec<(String, String)>,
    /// No random addresses (ASLR) and, unless set, PYTHONHASHSEED=0 and MALLOC_MMAP_THRESHOLD_=131072: snapshots of two starts
    /// share most of their pages, at the price of a defence against attackers.
    #[arg(long)]
    pub(crate) deterministic: bool,
    /// The server.
    #[arg(last = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    rewarm snapshot embed /srv/snapshots/embed --probe probe.toml\n  \
    rewarm snapshot llm s3://bucket/models/llm@v2 --stop --pre http://localhost/drain")]
pub(crate) struct Snapshot {
    /// The replica.
    #[arg(value_name = "NAME")]
    pub(crate) name: Name,
    /// Where to: STORE/NAME[@TAG].
    #[arg(value_name = "DEST", value_parser = values::spelled::<Reference>)]
    pub(crate) destination: Reference,
    /// End the server once the snapshot is published; without it the server goes on.
    #[arg(long)]
    pub(crate) stop: bool,
    /// Questions whose answers every restored replica must repeat (docs/probe.md).
    #[arg(long, value_name = "FILE")]
    pub(crate) probe: Option<PathBuf>,
    /// Inference engine whose steps are taken before the dump and after it, there and in each restored replica: vllm, sglang,
    /// torch, llamacpp, generic, or a file (`rewarm engine` shows and lists them).
    #[arg(long, value_name = "NAME|FILE", value_parser = values::spelled_by(Engine::load))]
    pub(crate) engine: Option<Engine>,
    /// Hook before the dump: http://... is a POST inside the replica, anything else a command there.
    #[arg(long, value_name = "URL|CMD")]
    pub(crate) pre: Option<Hook>,
    /// Hook after it, here and in each restored replica.
    #[arg(long, value_name = "URL|CMD")]
    pub(crate) post: Option<Hook>,
    /// How long each hook may take here.
    #[arg(long, value_name = "TIME", value_parser = values::duration, default_value = "60s")]
    pub(crate) hook_timeout: Duration,
    /// auto (what pays), planes (for weights of 16 bits), zstd:LEVEL or none.
    #[arg(long, value_name = "CODEC", default_value = "auto", value_parser = values::spelled::<Compression>)]
    pub(crate) compression: Compression,
    /// Bytes a second at which restores will read, for auto; without it as fast as memory in a folder, 1250MB in a bucket.
    #[arg(long, value_name = "BYTES", value_parser = values::bytes)]
    pub(crate) rate: Option<u64>,
    /// Sign it: the name of a key, or the path of its secret part.
    #[arg(long, value_name = "KEY")]
    pub(crate) sign: Option<String>,
    /// Allow connections to the outside; they come back closed.
    #[arg(long)]
    pub(crate) tcp_close: bool,
    /// Memory for what the frozen server has and the store has not taken yet, at least 16MiB; what finds no room waits, and
    /// the server with it. Without it half of what is free, and at most 256MiB with --stop.
    #[arg(long, value_name = "BYTES", value_parser = values::freeze_memory)]
    pub(crate) freeze_memory: Option<u64>,
    /// How long the server may be frozen; then the dump is given up and it goes on. Without it 5m, and 1h with --stop.
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    pub(crate) freeze_timeout: Option<Duration>,
    /// Move device memory past the server's own memory; needs CUDA 13.4 (docs/gpu.md).
    #[arg(long)]
    pub(crate) gpu_direct: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    rewarm restore /srv/snapshots/embed --publish 8080:8000\n  \
    rewarm restore s3://bucket/models/llm@v2 --name llm --count 3 --cold-fallback")]
pub(crate) struct Restore {
    /// The snapshot: STORE/NAME, STORE/NAME@TAG or STORE/NAME@blake3:DIGEST.
    #[arg(value_name = "SRC", value_parser = values::spelled::<Reference>)]
    pub(crate) source: Reference,
    /// Name of the replica; without it the snapshot's.
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<Name>,
    /// So many replicas, NAME-1 to NAME-N.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub(crate) count: u16,
    /// As for run; with a count above 1 the host port must be 0.
    #[arg(long, value_name = "[ADDR:]HP:P")]
    pub(crate) publish: Vec<Publish>,
    /// Limit of memory; must hold what the snapshot holds.
    #[arg(long, value_name = "BYTES", value_parser = values::bytes)]
    pub(crate) memory: Option<u64>,
    /// Limit of processors.
    #[arg(long, value_name = "N", value_parser = values::cpus)]
    pub(crate) cpus: Option<f64>,
    /// For a cold fallback and for hooks: the restored server keeps the environment that it was snapshotted with.
    #[arg(long, value_name = "K=V", value_parser = values::key_value)]
    pub(crate) env: Vec<(String, String)>,
    /// As for run; without it the snapshot's.
    #[arg(long, value_name = "NET")]
    pub(crate) net: Option<Net>,
    /// As for run; without it the snapshot's.
    #[arg(long, value_name = "CHECK")]
    pub(crate) ready: Option<Ready>,
    /// How long to wait for it.
    #[arg(long, value_name = "TIME", value_parser = values::duration, default_value = "10m")]
    pub(crate) ready_timeout: Duration,
    /// How long the snapshot's post hook may take.
    #[arg(long, value_name = "TIME", value_parser = values::duration, default_value = "60s")]
    pub(crate) hook_timeout: Duration,
    /// When memory is filled: lazy (while the server runs), eager (before it runs) or auto.
    #[arg(long, value_name = "MODE", value_enum, default_value = "auto")]
    pub(crate) mode: Mode,
    /// Which GPUs: auto (those of the same kind that have enough free memory) or identities, as nvidia-smi -L shows them, with
    /// commas between them; without it those of the snapshot, where they are here.
    #[arg(long, value_name = "auto|UUID", value_parser = values::spelled::<rewarm_gpu::Wish>)]
    pub(crate) gpu: Option<rewarm_gpu::Wish>,
    /// Refuse a snapshot that this key did not sign, or, without a key, none of the key folder or the configuration.
    #[arg(long, value_name = "KEY", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub(crate) require_signature: Option<Vec<String>>,
    /// Do not ask the recorded questions: the replica may answer otherwise and nobody would know.
    #[arg(long)]
    pub(crate) no_probe: bool,
    /// If it cannot be restored, start the recorded command, or the one after `--`, cold.
    #[arg(long)]
    pub(crate) cold_fallback: bool,
    /// The command of a cold fallback.
    #[arg(last = true, value_name = "CMD", requires = "cold_fallback")]
    pub(crate) command: Vec<String>,
}

/// When a restored replica's memory is filled.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum Mode {
    /// What suits the snapshot.
    Auto,
    /// While the server runs; what is touched comes first.
    Lazy,
    /// Before the server runs.
    Eager,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  rewarm ps --all --json | jq -r '.replicas[].name'")]
pub(crate) struct Ps {
    /// Stopped replicas too.
    #[arg(long, short)]
    pub(crate) all: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  rewarm logs -f embed")]
pub(crate) struct Logs {
    /// The replica, running or stopped.
    #[arg(value_name = "NAME")]
    pub(crate) name: Name,
    /// Go on as more is written, until the replica ends.
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Begin with the last N lines.
    #[arg(long, short = 'n', value_name = "N")]
    pub(crate) tail: Option<usize>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  rewarm exec embed -- ps aux")]
pub(crate) struct Exec {
    /// The replica.
    #[arg(value_name = "NAME")]
    pub(crate) name: Name,
    /// User and group, by number or by name in the replica's own /etc/passwd; without it the server's.
    #[arg(long, value_name = "U[:G]")]
    pub(crate) user: Option<User>,
    /// Environment variable.
    #[arg(long, value_name = "K=V", value_parser = values::key_value)]
    pub(crate) env: Vec<(String, String)>,
    /// Folder in which the command starts.
    #[arg(long, value_name = "DIR")]
    pub(crate) workdir: Option<PathBuf>,
    /// The command; its stdin, output, status and signals pass through, with `--json` too. 127: there is no such program, 126: it cannot
    /// be run.
    #[arg(last = true, required = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  rewarm pause llm --pre http://localhost/drain && rewarm wake llm")]
pub(crate) struct Pause {
    /// The replica.
    #[arg(value_name = "NAME")]
    pub(crate) name: Name,
    /// Inference engine whose steps are taken before it, as for snapshot.
    #[arg(long, value_name = "NAME|FILE", value_parser = values::spelled_by(Engine::load))]
    pub(crate) engine: Option<Engine>,
    /// Hook before it, such as one that stops admitting requests: http://... is a POST inside the replica, anything else a
    /// command there.
    #[arg(long, value_name = "URL|CMD")]
    pub(crate) pre: Option<Hook>,
    /// How long the hook may take.
    #[arg(long, value_name = "TIME", value_parser = values::duration, default_value = "60s")]
    pub(crate) hook_timeout: Duration,
    /// How long work on the device may take to finish; if it takes longer, the replica goes on.
    #[arg(long, value_name = "TIME", value_parser = values::duration, default_value = "10s")]
    pub(crate) lock_timeout: Duration,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  rewarm wake llm")]
pub(crate) struct Wake {
    /// The replica.
    #[arg(value_name = "NAME")]
    pub(crate) name: Name,
    /// Inference engine whose steps are taken after it, as for snapshot.
    #[arg(long, value_name = "NAME|FILE", value_parser = values::spelled_by(Engine::load))]
    pub(crate) engine: Option<Engine>,
    /// Hook after it, such as one that admits requests again.
    #[arg(long, value_name = "URL|CMD")]
    pub(crate) post: Option<Hook>,
    /// How long the hook may take.
    #[arg(long, value_name = "TIME", value_parser = values::duration, default_value = "60s")]
    pub(crate) hook_timeout: Duration,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  rewarm stop embed --timeout 30s")]
pub(crate) struct Stop {
    /// The replicas.
    #[arg(value_name = "NAME", required = true)]
    pub(crate) names: Vec<Name>,
    /// Time between SIGTERM and SIGKILL.
    #[arg(long, value_name = "TIME", value_parser = values::duration, default_value = "10s")]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  rewarm wait embed; echo \"server ended with $?\"")]
pub(crate) struct Wait {
    /// The replica.
    #[arg(value_name = "NAME")]
    pub(crate) name: Name,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    rewarm stop embed && rewarm rm embed\n  \
    rewarm rm s3://bucket/models/llm@v1 && rewarm gc s3://bucket/models")]
pub(crate) struct Rm {
    /// A stopped replica, or, with a slash, a snapshot: STORE/NAME, STORE/NAME@TAG or STORE/NAME@blake3:DIGEST.
    #[arg(value_name = "NAME|REF", required = true, value_parser = values::unwanted)]
    pub(crate) names: Vec<Unwanted>,
}

/// What `rm` removes.
#[derive(Debug, Clone)]
pub(crate) enum Unwanted {
    /// What a stopped replica left.
    Replica(Name),
    /// A snapshot.
    Snapshot(Reference),
}

impl std::fmt::Display for Unwanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Unwanted::Replica(name) => name.fmt(f),
            Unwanted::Snapshot(reference) => reference.fmt(f),
        }
    }
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  rewarm ls s3://bucket/models")]
pub(crate) struct Ls {
    /// The store: a folder, file://, s3://, gs:// or az://.
    #[arg(value_name = "STORE", value_parser = values::spelled::<StoreUrl>)]
    pub(crate) store: StoreUrl,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    rewarm inspect s3://bucket/models/llm@v2\n  \
    rewarm inspect s3://bucket/models/llm@v2 --mappings")]
pub(crate) struct Inspect {
    /// Show the processes too, mapping by mapping.
    #[arg(long)]
    pub(crate) mappings: bool,
    /// The snapshot: STORE/NAME, STORE/NAME@TAG or STORE/NAME@blake3:DIGEST.
    #[arg(value_name = "REF", value_parser = values::spelled::<Reference>)]
    pub(crate) reference: Reference,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  rewarm verify s3://bucket/models/llm@v2 --require-signature=release")]
pub(crate) struct Verify {
    /// The snapshot: STORE/NAME, STORE/NAME@TAG or STORE/NAME@blake3:DIGEST.
    #[arg(value_name = "REF", value_parser = values::spelled::<Reference>)]
    pub(crate) reference: Reference,
    /// Refuse a snapshot that this key did not sign, or, without a key, none of the key folder or the configuration.
    #[arg(long, value_name = "KEY", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub(crate) require_signature: Option<Vec<String>>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  rewarm diff /srv/snapshots/llm@v1 /srv/snapshots/llm@v2")]
pub(crate) struct Diff {
    /// The first snapshot.
    #[arg(value_name = "REF", value_parser = values::spelled::<Reference>)]
    pub(crate) first: Reference,
    /// The second snapshot.
    #[arg(value_name = "REF", value_parser = values::spelled::<Reference>)]
    pub(crate) second: Reference,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  rewarm cp /srv/snapshots/llm@v2 s3://bucket/models/llm@v2")]
pub(crate) struct Cp {
    /// The snapshot; of a tag all variants.
    #[arg(value_name = "SRC", value_parser = values::spelled::<Reference>)]
    pub(crate) source: Reference,
    /// Where to: STORE/NAME[@TAG].
    #[arg(value_name = "DEST", value_parser = values::spelled::<Reference>)]
    pub(crate) destination: Reference,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    rewarm gc s3://bucket/models --dry-run\n  \
    rewarm gc s3://bucket/models --grace 7d")]
pub(crate) struct Gc {
    /// The store.
    #[arg(value_name = "STORE", value_parser = values::spelled::<StoreUrl>)]
    pub(crate) store: StoreUrl,
    /// How long what is marked stays for a later run to remove: longer than any restore takes.
    #[arg(long, value_name = "TIME", value_parser = values::duration, default_value = "24h")]
    pub(crate) grace: Duration,
    /// Only say what would be done.
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    rewarm engine\n  \
    rewarm engine vllm > mine.toml && rewarm snapshot llm s3://bucket/models/llm --engine ./mine.toml")]
pub(crate) struct EngineArgs {
    /// Which; without it their names are listed.
    #[arg(value_name = "NAME", value_parser = values::engine_name)]
    pub(crate) name: Option<&'static str>,
}

#[derive(Debug, Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
#[command(after_help = "Examples:\n  \
    rewarm key new release --dir /etc/rewarm/keys\n  \
    rewarm snapshot llm s3://bucket/models/llm@v2 --sign release\n  \
    rewarm restore s3://bucket/models/llm@v2 --require-signature=release")]
pub(crate) struct Key {
    #[command(subcommand)]
    pub(crate) verb: KeyVerb,
}

impl Key {
    /// What a failure is a failure to do.
    pub(crate) fn doing(&self) -> String {
        match &self.verb {
            KeyVerb::New(args) => format!("make the key {}", args.name),
            KeyVerb::List(_) => "list keys".to_owned(),
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeyVerb {
    /// Make a key: NAME.key, which nobody else may read, and NAME.pub, which every machine that restores needs.
    New(KeyNew),
    /// List the keys of a folder.
    List(KeyList),
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  rewarm key new release")]
pub(crate) struct KeyNew {
    /// Name of the key: [a-z0-9._-]+.
    #[arg(value_name = "NAME", value_parser = values::spelled::<rewarm_store::Name>)]
    pub(crate) name: rewarm_store::Name,
    /// The folder; without it REWARM_KEYS, else /etc/rewarm/keys.
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  rewarm key list --json | jq -r '.keys[].public'")]
pub(crate) struct KeyList {
    /// The folder; without it REWARM_KEYS, else /etc/rewarm/keys.
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    rewarm bench --size 1GiB\n  \
    rewarm bench --server server.toml --store s3://bucket/bench --json --plot bench.svg")]
pub(crate) struct Bench {
    /// A server file: TOML with command, port, ready, probe and mount; without it a server of weights and nothing else.
    #[arg(long, value_name = "FILE")]
    pub(crate) server: Option<PathBuf>,
    /// Weights of the server where no file names one; at most 4GiB.
    #[arg(long, value_name = "BYTES", default_value = "1GiB", value_parser = values::bench_size)]
    pub(crate) size: u64,
    /// Part of these weights that an answer reads: 1 as a dense model does, 0.1 as a sparse one.
    #[arg(long, value_name = "PART", default_value_t = 1.0, value_parser = values::part)]
    pub(crate) touch: f64,
    /// A store over the network; without it only files and the decoded cache are measured.
    #[arg(long, value_name = "STORE", value_parser = values::spelled::<StoreUrl>)]
    pub(crate) store: Option<StoreUrl>,
    /// As for snapshot.
    #[arg(long, value_name = "CODEC", default_value = "auto", value_parser = values::spelled::<Compression>)]
    pub(crate) compression: Compression,
    /// Every case once in each round.
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub(crate) rounds: u16,
    /// Free memory that is touched and let go before each measurement, since the host of a virtual machine may have taken it back; 0: none.
    #[arg(long, value_name = "BYTES", default_value = "2GiB", value_parser = values::bytes_or_none)]
    pub(crate) own_memory: u64,
    /// Folder in which weights, snapshots and images lie meanwhile: about six times the size of the server.
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    pub(crate) work: PathBuf,
    /// Draw the first answers as SVG.
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    rewarm serve -f pool.toml --check\n  \
    rewarm serve -f pool.toml")]
pub(crate) struct Serve {
    /// The pools, their addresses and limits (docs/serve.md). SIGHUP reads it again.
    #[arg(short = 'f', long, value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Only say whether the file is good.
    #[arg(long)]
    pub(crate) check: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    rewarm simulate requests.csv\n  \
    rewarm simulate requests.csv --policy rewarm --policy kpa --restore 2s --json\n  \
    rewarm simulate monday.csv tuesday.csv --config sweep.toml --plot sweep.svg")]
pub(crate) struct Simulate {
    /// Traces: CSV with TIMESTAMP,ContextTokens,GeneratedTokens or arrival_s,service_s, or JSON lines with timestamp, input_length, output_length.
    #[arg(value_name = "TRACE", required = true)]
    pub(crate) traces: Vec<PathBuf>,
    /// rewarm, kpa, hpa, tracker, fixed, or a policy of the configuration; without it the configuration's, else all five.
    #[arg(long, value_name = "P")]
    pub(crate) policy: Vec<String>,
    /// Starts, limits and policies (docs/autoscaling.md); the other flags win over it.
    // The same name as that of the program's own configuration, which no simulation reads.
    #[arg(long, id = "config", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// How long a restore takes, or a file of measured times; none: every start is cold [default: 5s].
    #[arg(long, value_name = "TIME|FILE")]
    pub(crate) restore: Option<String>,
    /// How long a warm replica takes to wake, or a file of measured times [default: 500ms].
    #[arg(long, value_name = "TIME|FILE")]
    pub(crate) wake: Option<String>,
    /// How long a cold start takes, or a file of measured times [default: 60s].
    #[arg(long, value_name = "TIME|FILE")]
    pub(crate) cold: Option<String>,
    /// Warm replicas at the beginning, and at most [default: 4].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub(crate) warm: Option<u32>,
    /// Requests that a replica answers at once, at most [default: 8].
    #[arg(long, value_name = "C", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) concurrency: Option<u32>,
    /// Most replicas [default: 16].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) max: Option<u32>,
    /// How long a request may wait for a slot [default: 1s].
    #[arg(long, value_name = "TIME", value_parser = values::duration)]
    pub(crate) target_wait: Option<Duration>,
    /// Draw what each policy costs against what it gives.
    #[arg(long, value_name = "FILE.svg")]
    pub(crate) plot: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  rewarm cache\n  rewarm cache --clear\n  rewarm cache --json | jq '.streams[] | select(.holders == 0)'"
)]
pub(crate) struct Cache {
    /// Drop all that nobody is restored from at the moment, in memory and on disk.
    #[arg(long)]
    pub(crate) clear: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  rewarm completions bash > /etc/bash_completion.d/rewarm")]
pub(crate) struct Completions {
    /// The shell.
    #[arg(value_name = "SHELL")]
    pub(crate) shell: Shell,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  rewarm man /usr/local/share/man/man1")]
pub(crate) struct Man {
    /// The folder; it must exist.
    #[arg(value_name = "DIR")]
    pub(crate) folder: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Help {
    /// A verb, or `exit-codes`.
    #[arg(value_name = "VERB")]
    pub(crate) topic: Option<String>,
}
