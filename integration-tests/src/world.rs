//! A world of its own for one test: a state folder, a store, a folder for temporary files and an id.
//!
//! The id is part of every replica's name, so it stands in cgroups and command lines; together with the mark in the
//! environment it finds everything that the world started. Dropping the world ends all of it by process id, whether the
//! test passed or not.

use std::collections::BTreeSet;
use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::checks;
use crate::cloud::Cloud;
use crate::command::Rewarm;
use crate::garage::Garage;
use crate::needs::{self, Need};
use crate::replica::Replica;
use crate::residue::{self, MARK, Trace};
use crate::server::Server;
use crate::slots::{self, Slot};
use crate::slow::Slow;

/// How long a killed command's shim may take to clean up behind it.
pub const CLEAN_UP_MAX: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(50);
/// So that a world can be left soon, and tests meet fetchers of every age.
const FETCHER_IDLE: &str = "700ms";

/// One test's own part of the machine.
#[derive(Debug)]
pub struct World {
    id: String,
    program: PathBuf,
    folder: TempDir,
    store: String,
    store_env: Vec<(String, String)>,
    garage: Option<Garage>,
    _cloud: Option<Cloud>,
    /// A program and its arguments that start `rewarm`; empty if it is started directly.
    wrapper: Vec<String>,
    _slot: Option<Slot>,
}

impl World {
    /// A world whose `rewarm` is `program`, or nothing where one of `needs` is missing (which is said).
    ///
    /// # Panics
    ///
    /// When its folders cannot be made, or a promised need is missing.
    #[must_use]
    pub fn new(program: impl Into<PathBuf>, needs: &[Need]) -> Option<Self> {
        needs::met(needs).then(|| Self::make(program.into()))
    }

    fn make(program: PathBuf) -> Self {
        // Lower case, because it becomes part of names.
        let random = RandomState::new().build_hasher().finish();
        let id = format!("w{:08x}", random & 0xffff_ffff);
        let folder =
            tempfile::Builder::new().prefix(&id).rand_bytes(0).tempdir().expect("a temporary folder");
        let root = folder.path();
        for part in ["state", "store", "tmp", "files"] {
            fs::create_dir_all(root.join(part)).expect("a folder in a temporary folder");
        }
        // Replicas with another user must be able to read what a test mounts into them.
        let public = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(folder.path(), public).expect("our own folder");
        let store = folder.path().join("store").to_string_lossy().into_owned();
        Self {
            id,
            program,
            folder,
            store,
            store_env: Vec::new(),
            garage: None,
            _cloud: None,
            wrapper: Vec::new(),
            _slot: None,
        }
    }

    /// Waits for one of the two places of heavy tests and keeps it as long as the world lives.
    #[must_use]
    pub fn heavy(mut self) -> Self {
        self._slot = Some(slots::heavy());
        self
    }

    /// Uses a bucket of an S3 server of its own instead of a folder.
    ///
    /// # Panics
    ///
    /// When the server does not start.
    #[must_use]
    pub fn on_garage(mut self) -> Self {
        let garage = Garage::start(&self.root().join("garage"), &self.id);
        self.store = garage.url();
        self.store_env = garage.env();
        self.garage = Some(garage);
        self
    }

    /// Uses a container of an Azure emulator of its own instead of a folder.
    ///
    /// # Panics
    ///
    /// When the emulator does not start.
    #[must_use]
    pub fn on_azure(self) -> Self {
        let cloud = Cloud::azure(&self.root().join("azure"));
        self.in_cloud(cloud)
    }

    /// Uses a bucket of a Google emulator of its own instead of a folder.
    ///
    /// # Panics
    ///
    /// When the emulator does not start.
    #[must_use]
    pub fn on_google(self) -> Self {
        let cloud = Cloud::google(&self.root().join("google"));
        self.in_cloud(cloud)
    }

    fn in_cloud(mut self, cloud: Cloud) -> Self {
        self.store = cloud.url();
        self.store_env = cloud.env();
        self._cloud = Some(cloud);
        self
    }

    /// Shows `rewarm`, and all that it starts, a machine that has cgroup v2 and nothing else. Controllers that the machine
    /// has on v1 are on neither then.
    #[must_use]
    pub fn on_cgroup_v2(mut self) -> Self {
        const SCRIPT: &str = "umount --recursive --lazy /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec \"$0\" \"$@\"";
        self.wrapper = ["unshare", "--mount", "sh", "-c", SCRIPT].map(str::to_owned).to_vec();
        self
    }

    /// Puts a slow way in front of the bucket.
    ///
    /// # Panics
    ///
    /// When the store is not a bucket.
    #[must_use]
    pub fn behind(mut self) -> (Self, Slow) {
        let endpoint = self.store_env.iter_mut().find(|(name, _)| name == "AWS_ENDPOINT");
        let (_, endpoint) = endpoint.expect("the store is a bucket");
        let port = endpoint.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port");
        let slow = Slow::to(port);
        *endpoint = format!("http://127.0.0.1:{}", slow.port());
        (self, slow)
    }

    /// What Garage says of the bucket: objects, unfinished uploads.
    ///
    /// # Panics
    ///
    /// When the store is no Garage, or it does not answer.
    #[must_use]
    pub fn bucket_info(&self) -> String {
        self.garage.as_ref().expect("a world on Garage").info()
    }

    /// Uses the folder `path` as the store.
    #[must_use]
    pub fn with_store(mut self, path: &Path) -> Self {
        self.store = path.to_string_lossy().into_owned();
        self
    }

    /// The S3 server of this world.
    ///
    /// # Panics
    ///
    /// When its store is a folder.
    #[must_use]
    pub fn garage(&self) -> &Garage {
        self.garage.as_ref().expect("the world is on Garage")
    }

    /// What makes this world different from all others.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The folder of the world.
    #[must_use]
    pub fn root(&self) -> &Path {
        self.folder.path()
    }

    /// The state folder of `rewarm`.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.root().join("state")
    }

    /// A folder for files of the test.
    #[must_use]
    pub fn files(&self) -> PathBuf {
        self.root().join("files")
    }

    /// The store as it is given on the command line.
    #[must_use]
    pub fn store(&self) -> &str {
        &self.store
    }

    /// The variables that the store needs, when it is asked by the straight way: see [`World::behind`].
    #[must_use]
    pub fn straight_env(&self) -> Vec<(String, String)> {
        self.garage.as_ref().map_or_else(|| self.store_env.clone(), Garage::env)
    }

    /// The store's folder.
    ///
    /// # Panics
    ///
    /// When the store is not a folder.
    #[must_use]
    pub fn store_folder(&self) -> PathBuf {
        assert!(self.store.starts_with('/'), "{} is not a folder", self.store);
        PathBuf::from(&self.store)
    }

    /// A replica's name in this world.
    #[must_use]
    pub fn name(&self, short: &str) -> String {
        format!("{short}-{}", self.id)
    }

    /// `STORE/NAME@TAG` in this world's store, or `STORE/NAME` for an empty tag.
    #[must_use]
    pub fn reference(&self, short: &str, tag: &str) -> String {
        let at = if tag.is_empty() { String::new() } else { format!("@{tag}") };
        format!("{}/{}{at}", self.store, self.name(short))
    }

    /// A call of `rewarm` in this world, arguments still to come.
    #[must_use]
    pub fn rewarm(&self) -> Rewarm {
        let mut call = Rewarm::new(&self.program)
            .env(MARK, &self.id)
            .env("TMPDIR", self.root().join("tmp"))
            .env("NO_COLOR", "1")
            .env("REWARM_FETCHER_IDLE", FETCHER_IDLE)
            // One test's packs are no other's business; those that try it have a folder of their own.
            .env("REWARM_CACHE_DISK", "0")
            .env_remove("REWARM_STATE")
            .env_remove("RUST_LOG");
        for (name, value) in &self.store_env {
            call = call.env(name, value);
        }
        if let Some((program, prefix)) = self.wrapper.split_first() {
            let prefix: Vec<&str> = prefix.iter().map(String::as_str).collect();
            call = call.under(program, &prefix);
        }
        call.arg("--state").arg(self.state())
    }

    /// A call of the script `setup/NAME`: the program that it starts is the one under test, and what it leaves is found.
    #[must_use]
    pub fn setup(&self, name: &str) -> Rewarm {
        Rewarm::script(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../setup").join(name))
            .env(MARK, &self.id)
            .env("REWARM", &self.program)
            .env("TMPDIR", self.root().join("tmp"))
            .env("REWARM_FETCHER_IDLE", FETCHER_IDLE)
            .env("REWARM_CACHE_DISK", "0")
            .env_remove("REWARM_STATE")
            .env_remove("RUST_LOG")
    }

    /// A call with `--json`.
    #[must_use]
    pub fn rewarm_json(&self) -> Rewarm {
        self.rewarm().arg("--json")
    }

    /// Starts `server` as the replica `short`, which must become ready, with its port published.
    ///
    /// # Panics
    ///
    /// When it does not become ready.
    #[must_use]
    pub fn start(&self, short: &str, server: &Server) -> Replica<'_> {
        self.start_with(short, server, &[])
    }

    /// [`World::start`] with further flags of `rewarm run`.
    ///
    /// # Panics
    ///
    /// As [`World::start`].
    #[must_use]
    pub fn start_with(&self, short: &str, server: &Server, flags: &[&str]) -> Replica<'_> {
        let name = self.name(short);
        let output = self.run_call(&name, server, flags).ok();
        Replica::of_run(self, name, server.port, &output)
    }

    /// The call that starts `server` as the replica `name`.
    #[must_use]
    pub fn run_call(&self, name: &str, server: &Server, flags: &[&str]) -> Rewarm {
        let mark = format!("{MARK}={}", self.id);
        let mut call = self.rewarm_json().args(["run", name, "--env", &mark]);
        call = call.args(["--publish", &format!("0:{}", server.port), "--ready", &server.ready]);
        for (key, value) in &server.env {
            call = call.args(["--env", &format!("{key}={value}")]);
        }
        for mount in &server.mounts {
            call = call.args(["--mount", mount]);
        }
        call.args(flags).arg("--").args(&server.command)
    }

    /// Snapshots `replica` under `tag`; must succeed. Gives the last JSON object that the program printed.
    ///
    /// # Panics
    ///
    /// When it fails.
    pub fn snapshot(&self, replica: &Replica<'_>, tag: &str, flags: &[&str]) -> Value {
        self.snapshot_call(replica, tag, flags).ok().json()
    }

    /// The call that snapshots `replica` under `tag`.
    #[must_use]
    pub fn snapshot_call(&self, replica: &Replica<'_>, tag: &str, flags: &[&str]) -> Rewarm {
        let reference = self.reference(replica.short(), tag);
        self.rewarm_json().args(["snapshot", replica.name(), &reference]).args(flags)
    }

    /// Restores `short@tag` with `flags`, its port published; must succeed.
    ///
    /// # Panics
    ///
    /// When it fails.
    #[must_use]
    pub fn restore(&self, short: &str, tag: &str, port: u16, flags: &[&str]) -> Vec<Replica<'_>> {
        let output = self.restore_call(short, tag, port, flags).ok();
        Replica::of_restore(self, port, &output)
    }

    /// The call that restores `short@tag` with its port published.
    #[must_use]
    pub fn restore_call(&self, short: &str, tag: &str, port: u16, flags: &[&str]) -> Rewarm {
        let call = self.rewarm_json().args(["restore", &self.reference(short, tag)]);
        call.args(["--publish", &format!("0:{port}")]).args(flags)
    }

    /// Everything of this world that exists at the moment.
    #[must_use]
    pub fn traces(&self) -> BTreeSet<Trace> {
        residue::of(&self.id, self.root())
    }

    /// Waits until `done` says so.
    ///
    /// # Panics
    ///
    /// When it does not within `timeout`; `what` names what was waited for.
    pub fn await_state(&self, what: &str, timeout: Duration, mut done: impl FnMut() -> bool) {
        let began = Instant::now();
        while !done() {
            assert!(began.elapsed() < timeout, "{what}: not within {timeout:?}");
            std::thread::sleep(POLL);
        }
    }

    /// Stops and removes every replica, and asserts that nothing of the world is left on the machine, and that each snapshot in
    /// its store is whole.
    ///
    /// # Panics
    ///
    /// When something is left, or damaged.
    pub fn finish(self) {
        self.clear();
        checks::no_half_uploads(&self);
        checks::verified(&self);
        self.await_no_services();
    }

    /// Nobody can take away what a killed command had half uploaded, so gc does, when it is so old that nobody is taken for alive: a
    /// day passes in the store's folder.
    ///
    /// # Panics
    ///
    /// When gc fails, or the store is not a folder.
    pub fn collect_what_the_killed_left(&self) {
        let yesterday = SystemTime::now() - Duration::from_secs(24 * 3600);
        for folder in ["sessions", "packs"] {
            for entry in fs::read_dir(self.store_folder().join(folder)).into_iter().flatten().flatten() {
                if folder == "sessions" || entry.file_name().to_string_lossy().contains('#') {
                    let file = fs::File::options().write(true).open(entry.path()).expect("our own folder");
                    file.set_modified(yesterday).expect("our own file");
                }
            }
        }
        self.rewarm().args(["gc", &self.store]).ok();
    }

    fn clear(&self) {
        let list = self.rewarm_json().args(["ps", "--all"]).ok();
        for name in crate::replica::names(&list) {
            // It may have ended by itself, which is not what is tested here.
            let _ = self.rewarm().args(["stop", &name, "--timeout", "300ms"]).run();
            self.rewarm().args(["rm", &name]).ok();
        }
        checks::nothing_left(self);
    }

    /// Waits until the fetcher has ended for lack of work.
    ///
    /// # Panics
    ///
    /// When it does not.
    pub fn await_no_services(&self) {
        self.await_state("the fetcher has ended", CLEAN_UP_MAX, || residue::services(&self.id).is_empty());
    }

    fn kill_all(&self) {
        let began = Instant::now();
        loop {
            let mut processes = residue::processes(&self.id);
            processes.extend(residue::services(&self.id));
            if processes.is_empty() || began.elapsed() > CLEAN_UP_MAX {
                return;
            }
            thaw(&self.id);
            for (pid, _) in processes {
                // A process that ended meanwhile is what is wanted.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            std::thread::sleep(POLL);
        }
    }
}

/// A frozen process does not die: its cgroup has to be thawed first.
fn thaw(id: &str) {
    for group in residue::cgroups(id) {
        for (file, value) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
            if group.join(file).exists() {
                let _ = fs::write(group.join(file), value);
            }
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.explain();
        }
        self.kill_all();
        for trace in self.traces().iter().rev() {
            if let Trace::Mount(path) = trace {
                let _ = std::process::Command::new("umount").arg("--lazy").arg(path).status();
            }
        }
        for group in residue::cgroups(&self.id) {
            let _ = fs::remove_dir(group);
        }
    }
}

impl World {
    /// Prints what helps to understand a failed test: the newest logs below the state folder.
    #[expect(clippy::print_stderr, reason = "the test has failed and its reader needs the logs")]
    fn explain(&self) {
        for trace in self.traces() {
            let Trace::File(path) = &trace else {
                eprintln!("exists: {trace}");
                continue;
            };
            let is_log = path.extension().is_some_and(|extension| extension == "log");
            if is_log && let Ok(text) = fs::read_to_string(path) {
                let lines: Vec<&str> = text.lines().collect();
                let last = lines[lines.len().saturating_sub(20)..].join("\n  ");
                eprintln!("{}:\n  {last}", path.display());
            }
        }
    }
}
