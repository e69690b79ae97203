//! The rounds: everything is made ready once, then every case is measured once in each round, in turns, so that what
//! disturbs the machine disturbs all of them alike.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::case::{Case, Place, pairs};
use crate::client::Expected;
use crate::error::{Error, Result};
use crate::files;
use crate::machine::Machine;
use crate::outcome::{Outcome, Sample, Samples};
use crate::own::own_memory;
use crate::rewarm::Rewarm;
use crate::server::make_weights;
use crate::stock::Stock;
use crate::subject::{Subject, WEIGHTS};

/// What is measured, and with what.
#[derive(Debug, Clone)]
pub struct Options {
    /// The `rewarm` program.
    pub program: PathBuf,
    /// The CRIU program that both sides use.
    pub criu: PathBuf,
    /// A server file; absent: the server of this crate with `size_bytes` of weights.
    pub server: Option<PathBuf>,
    /// Weights of the server of this crate.
    pub size_bytes: u64,
    /// Part of the weights that its answers read, above 0 and at most 1.
    pub touch: f64,
    /// A store over the network; its URL without a name. Absent: files and the cache only.
    pub store: Option<String>,
    /// How chunks are stored, as `rewarm snapshot --compression` takes it.
    pub compression: String,
    /// Bytes of free memory that are made this machine's own before each measurement; 0: as the host of a virtual machine gives it.
    pub own_bytes: u64,
    /// Rounds; at least one.
    pub rounds: usize,
    /// Folder for everything that is made; it exists and is empty.
    pub work: PathBuf,
}

/// Measures. `note` is told what is going on, a line at a time; `interrupted` completes when it should end early.
///
/// # Errors
/// Anything that does not work, and any answer that differs from the running server's. Nothing that was started is left.
pub async fn run(
    options: &Options,
    note: impl Fn(&str),
    interrupted: impl Future<Output = &'static str>,
) -> Result<Outcome> {
    let running = Rewarm::new(&options.program, &options.criu, &options.work.join("running"));
    let result = tokio::select! {
        result = rounds(options, &running, &note) => result,
        _ = interrupted => Err(Error::Interrupted),
    };
    // Of the replicas of all state folders: those that a failure left.
    for state in states(&options.work) {
        let rewarm = Rewarm::new(&options.program, &options.criu, &state);
        let _ = rewarm.remove().await;
        let _ = rewarm.end_fetcher().await;
    }
    result
}

/// Every state folder below the work folder.
fn states(work: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(work).into_iter().flatten().flatten();
    let states = entries.map(|entry| entry.path());
    states.filter(|path| path.join("replicas").is_dir()).collect()
}

async fn rounds(options: &Options, running: &Rewarm, note: &impl Fn(&str)) -> Result<Outcome> {
    note("making the server, its snapshots and its images");
    let bench = Bench::make(options, running).await?;
    let places = options.places();
    let pairs = pairs(&places);
    let mut samples = Samples::default();
    let mut stock =
        Stock::make(&options.criu, &options.work.join("stock"), &bench.subject, &bench.expected).await?;
    for round in 0..options.rounds {
        note(&format!("round {} of {}", round + 1, options.rounds));
        for &pair in &pairs {
            own_memory(options.own_bytes).map_err(Error::io("touch free memory"))?;
            let sample = bench.measure(pair, &mut stock).await?;
            samples.add(pair, sample);
        }
    }
    drop(stock);
    running.remove().await?;
    Ok(Outcome {
        machine: Machine::here()?,
        date: jiff::Timestamp::now().strftime("%Y-%m-%d").to_string(),
        results: samples.rows(&pairs),
    })
}

impl Options {
    fn places(&self) -> Vec<Place> {
        match &self.store {
            None => vec![Place::FileWarm, Place::Cache],
            Some(_) => vec![Place::FileWarm, Place::FileCold, Place::S3, Place::Cache],
        }
    }

    /// A state folder of its own: what an earlier restore left in memory is not found from there.
    fn fresh(&self) -> Rewarm {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        // A short name: sockets lie below, and their paths may have 107 bytes.
        let name = format!("s{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        Rewarm::new(&self.program, &self.criu, &self.work.join(name))
    }
}

/// Everything that the rounds share.
struct Bench<'a> {
    options: &'a Options,
    subject: Subject,
    expected: Expected,
    /// Port of the running server on this machine.
    port: u16,
    /// Restores from its decoded cache.
    cached: Rewarm,
}

impl<'a> Bench<'a> {
    async fn make(options: &'a Options, running: &Rewarm) -> Result<Self> {
        let subject = subject(options)?;
        let port = running.run(&subject).await?;
        let expected = Expected::of(&subject, port).await?;
        let probe = subject.probe.clone();
        let cached = options.fresh().keeping_decoded();
        let bench = Self { options, subject, expected, port, cached };
        running.snapshot(&bench.reference("plain"), &probe, &options.compression).await?;
        let (plain, recorded) = (options.work.join("plain"), options.work.join("recorded"));
        files::link(&plain, &recorded).map_err(Error::io("copy the store"))?;
        bench.cached.prime(&bench.reference("recorded")).await?;
        bench.cached.await_decoded().await?;
        if let Some(store) = &options.store {
            running.snapshot(&remote(store, "plain"), &probe, &options.compression).await?;
            running.snapshot(&remote(store, "recorded"), &probe, &options.compression).await?;
            let first = options.fresh();
            first.prime(&remote(store, "recorded")).await?;
            first.end_fetcher().await?;
        }
        Ok(bench)
    }

    /// A snapshot in one of the folders `plain`, which nobody restored with its probe, and `recorded`.
    fn reference(&self, folder: &str) -> String {
        self.options.work.join(folder).join("bench").display().to_string()
    }

    async fn measure(&self, pair: (Case, Place), stock: &mut Stock) -> Result<Sample> {
        let (case, place) = pair;
        let name = format!("{} {}", case.name(), place.name());
        match case {
            Case::Running => {
                let began = Instant::now();
                let first_answer_ms = Some(self.expected.ask(self.port, began, &name).await?);
                Ok(Sample { first_answer_ms, ..Sample::default() })
            }
            Case::Cold => self.options.fresh().cold(&self.subject, &self.expected).await,
            Case::CriuEager | Case::CriuLazy => {
                prepare(place, &stock.images())?;
                stock.round(case == Case::CriuLazy, &self.expected, &name).await
            }
            Case::RewarmEager => self.restore(place, "recorded", "eager", &name).await,
            Case::RewarmLazy => self.restore(place, "plain", "lazy", &name).await,
            Case::RewarmLazyRecorded => self.restore(place, "recorded", "lazy", &name).await,
        }
    }

    async fn restore(&self, place: Place, folder: &str, mode: &str, case: &str) -> Result<Sample> {
        let reference = match (place, &self.options.store) {
            (Place::S3, Some(store)) => remote(store, folder),
            _ => self.reference(folder),
        };
        prepare(place, &self.options.work.join(folder))?;
        let rewarm = match place {
            Place::Cache => self.cached.clone(),
            _ => self.options.fresh(),
        };
        let sample = rewarm.restore(&reference, mode, &self.subject, &self.expected, case).await?;
        if place != Place::Cache {
            rewarm.end_fetcher().await?;
        }
        Ok(sample)
    }
}

/// Brings files into the page cache, or out of it.
fn prepare(place: Place, folder: &Path) -> Result<()> {
    match place {
        Place::FileWarm => files::warm(folder).map_err(Error::io("read the files")),
        Place::FileCold => files::cool(folder).map_err(Error::io("drop the files from the page cache")),
        Place::None | Place::S3 | Place::Cache => Ok(()),
    }
}

fn remote(store: &str, name: &str) -> String {
    let (url, options) = store.split_once('?').map_or((store, None), |(url, options)| (url, Some(options)));
    let options = options.map_or_else(String::new, |options| format!("?{options}"));
    format!("{}/{name}{options}", url.trim_end_matches('/'))
}

fn subject(options: &Options) -> Result<Subject> {
    match &options.server {
        Some(path) => Subject::load(path),
        None => {
            let weights = options.work.join(WEIGHTS);
            make_weights(&weights, options.size_bytes)
                .map_err(Error::io(format!("write {}", weights.display())))?;
            Subject::built_in(&options.program, &options.work, options.touch)
        }
    }
}
