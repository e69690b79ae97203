//! The stages of a snapshot, in order. Open this file first.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rewarm_container::dial::Inside;
use rewarm_container::shim::Client;
use rewarm_container::{Name, Net, Record, State, Status};
use rewarm_probe::{Engine, Hook, Probe, Recorded, Resume, engine};
use rewarm_report::{Aftermath, Clock, Stage};
use rewarm_store::{Compression, Published, Reference, Session, SessionOptions, SigningKey, Store, Target};

use crate::budget::Budget;
use crate::dump::Dumped;
use crate::error::{Cause, Error, Result};
use crate::preflight::{self, Findings, Rules};
use crate::{direct, dump, facts, skeleton};

/// How long a failed snapshot waits for its uploads to be aborted, once the server goes on.
const ABORT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a dump that was given up may take to end until it is told so again.
const GIVE_UP_AGAIN: Duration = Duration::from_secs(1);

/// What a user asks for.
#[derive(Debug, Clone)]
pub struct Request {
    /// The replica.
    pub name: Name,
    /// Where to.
    pub destination: Reference,
    /// End the server once the snapshot is published.
    pub stop: bool,
    /// Questions whose answers every restored replica must repeat.
    pub probe: Option<Probe>,
    /// Steps of the inference engine before and after the dump; those after it also in each restored replica.
    pub engine: Option<Engine>,
    /// Hook before the dump, and before the engine's steps.
    pub pre: Option<Hook>,
    /// Hook after it, here and in each restored replica.
    pub post: Option<Hook>,
    /// How long a hook may take.
    pub hook_timeout: Duration,
    /// Signs the manifest.
    pub sign: Option<SigningKey>,
    /// How chunks are stored.
    pub compression: Compression,
    /// Bytes a second at which restores will read, where it is known.
    pub rate: Option<u64>,
    /// Connections to the outside come back closed instead of being refused.
    pub tcp_close: bool,
    /// How long the server may be frozen before the dump is given up.
    pub freeze_timeout: Duration,
    /// Bytes of memory for what the frozen server has and the store has not taken; without it half of what is free, and
    /// at most 256 MiB with `stop`. What finds no room waits, and the server with it.
    pub freeze_memory: Option<u64>,
    /// Device memory goes past the server's own (CUDA 13.4).
    pub gpu_direct: bool,
}

/// What the pipeline works with.
#[derive(Clone)]
pub struct Context {
    /// The replicas of this machine.
    pub state: State,
    /// The CRIU program.
    pub criu: PathBuf,
    /// Its version.
    pub criu_version: rewarm_criu::binary::Version,
    /// runc's version.
    pub runc_version: String,
    /// Measures the stages.
    pub clock: Clock,
}

/// A snapshot that was made.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Where it lies.
    pub reference: Reference,
    /// Its digest and its sums.
    pub published: Published,
    /// How long CRIU held the server.
    pub frozen: Duration,
    /// Bytes that CRIU sent.
    pub received_bytes: u64,
    /// Answers recorded by the probe.
    pub probe_answers: usize,
    /// Things a person should read.
    pub warnings: Vec<String>,
}

/// Makes a snapshot of a running replica. `interrupted` completes when the caller wants it given up, with the reason.
///
/// # Errors
/// Whatever stage fails; the error says in which state the server was found after everything was undone.
pub async fn run(
    request: Request,
    context: Context,
    interrupted: impl Future<Output = &'static str>,
) -> Result<Outcome> {
    let mut attempt = Attempt {
        request,
        context,
        warnings: Vec::new(),
        replica: None,
        session: None,
        drained: false,
        stage: Stage::Preflight,
    };
    let result = tokio::select! {
        result = attempt.stages() => result,
        signal = interrupted => Err(Cause::Interrupted { signal }),
    };
    let stage = attempt.stage;
    let aftermath = attempt.undo(result.is_ok()).await;
    let warnings = std::mem::take(&mut attempt.warnings);
    result.map(|outcome| Outcome { warnings, ..outcome }).map_err(|cause| Error {
        name: attempt.request.name.to_string(),
        stage,
        cause,
        aftermath,
    })
}

/// The replica that is being dumped.
pub(crate) struct Replica {
    pub(crate) client: Arc<Client>,
    pub(crate) record: Record,
    pub(crate) inside: Inside,
}

struct Attempt {
    request: Request,
    context: Context,
    warnings: Vec<String>,
    replica: Option<Replica>,
    /// What is written so far. The streamer holds it too while it is at work.
    session: Option<Arc<Session>>,
    /// The pre hook ran, so the post hook is due.
    drained: bool,
    /// The stage that began last.
    stage: Stage,
}

impl Attempt {
    async fn stages(&mut self) -> std::result::Result<Outcome, Cause> {
        let clock = self.context.clock.clone();
        let (findings, budget) = clock.stage(self.begin(Stage::Preflight), self.preflight()).await?;
        let recorded = clock.stage(self.begin(Stage::Record), self.record()).await?;
        clock.stage(self.begin(Stage::Drain), self.drain()).await?;
        let dumped = clock.stage(self.begin(Stage::Dump), self.dump(&findings, budget)).await?;
        clock.stage(self.begin(Stage::Resume), self.resume()).await?;
        let (frozen, received_bytes) = (dumped.stats.frozen, dumped.received_bytes);
        let facts = clock.stage(self.begin(Stage::Upload), self.upload(dumped, recorded.as_ref())).await?;
        let published = clock.stage(self.begin(Stage::Publish), self.publish(facts)).await?;
        Ok(Outcome {
            reference: self.request.destination.clone(),
            published,
            frozen,
            received_bytes,
            probe_answers: recorded.map_or(0, |recorded| recorded.exchanges.len()),
            warnings: Vec::new(),
        })
    }

    fn begin(&mut self, stage: Stage) -> Stage {
        self.stage = stage;
        stage
    }

    async fn preflight(&mut self) -> std::result::Result<(Findings, Budget), Cause> {
        let (state, name) = (self.context.state.clone(), self.request.name.clone());
        let client = Arc::new(blocking(move || Client::connect(&state, &name)).await?);
        let asked = client.clone();
        let record = blocking(move || asked.status()).await?;
        self.replica = Some(Replica { inside: Inside::new(client.clone()), client, record: record.clone() });
        let (Status::Ready, Some(pid)) = (record.status, record.pid) else {
            return Err(Cause::State { status: record.status.to_string() });
        };
        if record.drained.is_some() && self.resume_by().is_empty() {
            // Its clones would wait as it does.
            return Err(Cause::State { status: "drained".to_owned() });
        }
        let rules = Rules {
            tcp_close: self.request.tcp_close,
            private_net: record.spec.net == Net::Private,
            criu: self.context.criu_version,
        };
        let examined = tokio::task::spawn_blocking(move || {
            preflight::examine(signed(pid), signed(record.shim_pid), rules)
        });
        let findings = examined.await.expect("the preflight does not panic");
        let mut findings = findings.map_err(|obstacles| Cause::Obstacles { obstacles })?;
        let asked = self.replica.as_ref().expect("connected above").client.clone();
        let direct = self.request.gpu_direct;
        findings.memory_bytes += blocking(move || asked.examine_devices(direct)).await?;
        for warning in &findings.warnings {
            self.context.clock.progress().warning(warning);
        }
        self.warnings.append(&mut findings.warnings);
        let free = rewarm_sys::machine::free_bytes().map_err(Cause::io("look at free memory"))?;
        let request = &self.request;
        let budget = Budget::new(request.freeze_memory, request.stop, free, findings.memory_bytes);
        self.session = Some(Arc::new(self.open_store(budget).await?));
        Ok((findings, budget))
    }

    /// Before anything is frozen: a store that cannot be reached must cost the server nothing.
    async fn open_store(&self, budget: Budget) -> std::result::Result<Session, Cause> {
        let destination = &self.request.destination;
        let store = Store::open(&destination.store).await?;
        let options = SessionOptions {
            compression: self.request.compression,
            rate: self.request.rate,
            destination: Some((destination.name.clone(), self.tag().to_owned())),
            sign: self.request.sign.clone(),
            memory_bytes: Some(budget.writer),
            copy_raw: budget.scarce,
        };
        Ok(store.begin(options).await?)
    }

    async fn record(&mut self) -> std::result::Result<Option<Recorded>, Cause> {
        let Some(probe) = &self.request.probe else { return Ok(None) };
        let replica = self.replica.as_ref().expect("connected at the preflight");
        Ok(Some(probe.record(&replica.inside, replica.port()).await?))
    }

    async fn drain(&mut self) -> std::result::Result<(), Cause> {
        let replica = self.replica.as_ref().expect("connected at the preflight");
        let resume = self.resume_by();
        if !resume.is_empty() {
            // Killed from here on, this command leaves it to the shim.
            let client = replica.client.clone();
            blocking(move || client.drain(resume)).await?;
        }
        self.drained = true;
        if let Some(hook) = &self.request.pre {
            hook.run(&replica.inside, replica.port(), self.request.hook_timeout).await?;
        }
        if let Some(engine) = &self.request.engine {
            engine::take(&engine.before, &replica.inside, replica.port()).await?;
        }
        Ok(())
    }

    async fn dump(&mut self, findings: &Findings, budget: Budget) -> std::result::Result<Dumped, Cause> {
        let replica = self.replica.as_ref().expect("connected at the preflight");
        let session = self.session.clone().expect("begun at the preflight");
        if self.request.stop {
            let client = replica.client.clone();
            blocking(move || client.freeze()).await?;
        }
        dump::dump(replica, findings, budget, session, &self.request, &self.context).await
    }

    /// The server goes on; with `--stop` it stays frozen until the snapshot exists.
    async fn resume(&mut self) -> std::result::Result<(), Cause> {
        if !self.request.stop {
            self.post_hook().await;
        }
        Ok(())
    }

    async fn upload(
        &mut self,
        dumped: Dumped,
        recorded: Option<&Recorded>,
    ) -> std::result::Result<rewarm_store::Facts, Cause> {
        let replica = self.replica.as_ref().expect("connected at the preflight");
        let session = self.session.as_ref().expect("begun at the preflight");
        let closed = skeleton::store(session, replica, &dumped.own, self.request.tcp_close).await?;
        if closed > 0 {
            tracing::debug!(closed, "connections will come back closed");
        }
        let mut facts = facts::gather(replica, &dumped, &self.request, &self.context, recorded).await?;
        let client = replica.client.clone();
        blocking(move || client.release_dump()).await?;
        if let (Some(kept), Some(device)) = (&dumped.kept, &dumped.device) {
            direct::store(session, kept, device).await?;
        }
        let progress = self.context.clock.progress().as_ref();
        facts.memory = dumped.streamer.finish(dumped.received_bytes, progress).await?;
        Ok(facts)
    }

    async fn publish(&mut self, facts: rewarm_store::Facts) -> std::result::Result<Published, Cause> {
        let session = self.session.take().and_then(Arc::into_inner).expect("the streamer has ended");
        let published = session.publish(&self.request.destination.name, self.tag(), facts).await?;
        if self.request.stop {
            let client = self.replica.as_ref().expect("connected at the preflight").client.clone();
            blocking(move || client.kill("snapshot --stop")).await?;
        }
        Ok(published)
    }

    /// Lets the server go on whatever happened, runs the post hook if it is still due, and looks at what is true.
    async fn undo(&mut self, succeeded: bool) -> Aftermath {
        let Some(replica) = &self.replica else { return Aftermath::Nothing };
        let suspended = matches!(self.stage, Stage::Dump);
        if (self.request.stop || suspended) && !succeeded {
            thaw(&replica.client).await;
        }
        if !succeeded || !self.request.stop {
            self.post_hook().await;
        }
        if let Some(session) = self.session.take() {
            // What cannot be aborted in time is referred to by nothing and stays for gc.
            let _ = tokio::time::timeout(ABORT_TIMEOUT, session.abort()).await;
        }
        let replica = self.replica.as_ref().expect("matched above");
        let client = replica.client.clone();
        match blocking(move || client.status()).await.map(|record| record.status) {
            Ok(Status::Ready) => Aftermath::Serving,
            Ok(Status::Frozen) => Aftermath::Stopped,
            // It was refused as it was.
            Ok(Status::Paused | Status::Stranded) if self.stage == Stage::Preflight => Aftermath::Nothing,
            // The devices did not take its memory back after the dump, or the driver left it between two states.
            Ok(Status::Paused | Status::Stranded) => Aftermath::Stopped,
            _ => Aftermath::Gone,
        }
    }

    async fn post_hook(&mut self) {
        if !std::mem::take(&mut self.drained) {
            return;
        }
        let Some(replica) = &self.replica else { return };
        let resume = self.resume_by();
        if resume.is_empty() {
            return;
        }
        let failures = resume.take(&replica.inside, replica.port()).await;
        let (client, whole) = (replica.client.clone(), failures.is_empty());
        // A shim that is gone is seen by what follows.
        let _ = blocking(move || client.resumed(whole)).await;
        // The snapshot itself is as good as without them: clones take these steps for themselves.
        for failure in failures {
            let warning = format!("the source is to go on, but {failure}");
            self.context.clock.progress().warning(&warning);
            self.warnings.push(warning);
        }
    }

    /// What the source goes on by after it was drained.
    fn resume_by(&self) -> Resume {
        let Request { engine, post, hook_timeout, .. } = &self.request;
        Resume::new(engine.as_ref(), post.as_ref(), *hook_timeout)
    }

    fn tag(&self) -> &str {
        match &self.request.destination.target {
            Target::Tag(tag) => tag,
            Target::Digest(_) => unreachable!("the command line refuses a digest as a destination"),
        }
    }
}

impl Replica {
    /// The port that probes and hooks mean when they name none.
    pub(crate) fn port(&self) -> Option<u16> {
        self.record.spec.ports.first().copied()
    }
}

/// Lets the server go on. A dump that still runs is given up, which its own call waits for.
async fn thaw(client: &Arc<Client>) {
    let thawing = client.clone();
    let thawed = blocking(move || thawing.thaw());
    tokio::pin!(thawed);
    loop {
        let asked = client.clone();
        // Without a dump there is nothing to give up; what counts is the state that is read afterwards.
        let _ = blocking(move || asked.give_up_dump()).await;
        // Not frozen by us is as good. Again where it takes long: the dump may just have been asked for.
        if tokio::time::timeout(GIVE_UP_AGAIN, &mut thawed).await.is_ok() {
            return;
        }
    }
}

/// Runs a call to the shim where it may block.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::result::Result<T, rewarm_container::Error> + Send + 'static,
) -> std::result::Result<T, rewarm_container::Error> {
    tokio::task::spawn_blocking(work).await.expect("calls to the shim do not panic")
}

fn signed(pid: u32) -> i32 {
    i32::try_from(pid).expect("the kernel's largest pid fits")
}
