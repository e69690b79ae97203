//! Lays a replica out, and starts its command.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rewarm_sys::mount;
use uuid::Uuid;

use crate::bundle::{self, Place};
use crate::cgroup::Cgroup;
use crate::error::{Context, Error};
use crate::namespaces::Network;
use crate::record::{Identity, Origin, Record, Status, write_json};
use crate::rootfs;
use crate::runc::Runc;
use crate::shim::children::Outcome;
use crate::shim::logs::Pump;
use crate::shim::protocol::{Prepare, Prepared};
use crate::shim::publish;
use crate::shim::replica::{Asker, Parts, Replica};
use crate::state::make_dir;

/// Length of `identity.json`. The longest name, number and time take 240.
const IDENTITY_BYTES: usize = 512;

impl Replica {
    /// Everything but the server itself.
    pub(super) fn prepare(&self, request: Prepare) -> Result<Prepared, Error> {
        if self.parts.get().is_some() {
            return Err(self.out_of_order("prepare", Status::Starting, "not prepared yet"));
        }
        let Prepare { spec, origin, generation, .. } = request;
        let uuid = Uuid::new_v4();
        let cgroup_name = format!("rewarm-{}-{}", self.name, &uuid.simple().to_string()[..8]);
        let cgroup = Cgroup::open(&cgroup_name)?;
        bundle::check(&spec, &cgroup)?;
        let ports = publish::reserve(&spec.publish)?;
        let network = Network::make(&spec.net)?;
        let created = Timestamp::now();
        let identity = Identity { name: self.name.clone(), uuid, generation, time: created };
        self.lay_out(&spec, &network, &cgroup_name, &identity, &origin)?;
        let published: Vec<_> = ports.iter().map(publish::Reserved::publish).collect();
        let record = Record {
            name: self.name.clone(),
            uuid,
            generation,
            created,
            origin,
            spec: spec.clone(),
            status: Status::Starting,
            shim_pid: std::process::id(),
            pid: None,
            cgroup: cgroup_name,
            published: published.clone(),
            device: None,
            memory: None,
            drained: None,
        };
        // Written before runc makes anything: a sweep finds the cgroup by it.
        write_json(&self.paths.record(), &record)?;
        self.change(|inner| inner.record = Some(record.clone()));
        let runc = Runc::new(self.runc_root.clone(), &self.name, &self.paths);
        let parts = Parts { spec, network, cgroup, runc, ports: Mutex::new(ports) };
        self.parts.set(parts).expect("only the lease's thread prepares, and it looked above");
        Ok(Prepared { record, published })
    }

    fn lay_out(
        &self,
        spec: &crate::spec::Spec,
        network: &Network,
        cgroup: &str,
        identity: &Identity,
        origin: &Origin,
    ) -> Result<(), Error> {
        let paths = &self.paths;
        let memory = bundle::memory_total()?;
        rootfs::prepare(paths, memory / 2)?;
        for dir in [paths.bundle(), paths.identity(), paths.shm(), paths.work()] {
            make_dir(&dir)?;
        }
        let shm = paths.shm();
        let shm_bytes = spec.shm_bytes.unwrap_or(memory / 2);
        mount::tmpfs(&shm, shm_bytes, "1777").context("mount a tmpfs on", shm.display())?;
        if matches!(origin, Origin::Restored { .. }) {
            let images = paths.images();
            make_dir(&images)?;
            mount::tmpfs(&images, memory, "0700").context("mount a tmpfs on", images.display())?;
        }
        write_identity(&paths.identity().join("identity.json"), identity)?;
        open_to_all(&paths.identity())?;
        std::fs::write(paths.criu_config(), "").context("write", paths.criu_config().display())?;
        let network = network.path();
        let place = Place { paths, network: network.as_deref(), cgroup, host_name: self.name.as_str() };
        write_json(&paths.bundle().join("config.json"), &bundle::config(spec, place)?)
    }

    /// Starts the server's command.
    pub(super) fn start(self: &Arc<Self>, asker: Asker<'_>, timeout: Duration) -> Result<u32, Error> {
        let (_busy, parts) = self.begin_start("start")?;
        let deadline = Instant::now() + timeout;
        rootfs::mount_over(&parts.spec.rootfs, &self.paths)?;
        let pid_file = self.paths.dir().join("init.pid");
        let mut create = parts.runc.create(&self.paths.bundle(), &pid_file);
        if parts.spec.deterministic {
            rewarm_sys::process::fixed_addresses(&mut create);
        }
        let pump = Pump::attach(&mut create, &self.paths, parts.spec.log_bytes)?;
        self.change(|inner| inner.pump = Some(pump));
        self.run(asker, "create", create, deadline)?;
        let pid = read_pid(&pid_file)?;
        self.adopt_init(pid);
        let mut start = parts.runc.start();
        start.stdin(std::process::Stdio::null());
        start.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        self.run(asker, "start", start, deadline)?;
        self.set_status(Status::Starting)?;
        Ok(pid)
    }

    /// Runs one runc command to its end; kills it if it must not go on.
    fn run(
        &self,
        asker: Asker<'_>,
        verb: &'static str,
        mut command: std::process::Command,
        deadline: Instant,
    ) -> Result<(), Error> {
        let parts = self.parts(verb)?;
        let began = Instant::now();
        let mut child = self.children.spawn(&mut command).context("start", "runc")?;
        // Our ends of the pipes for output go with it.
        drop(command);
        let outcome = self
            .children
            .wait(&mut child, asker.socket, deadline, || self.lock().doomed)
            .context("wait for", "runc")?;
        let error = match outcome {
            Outcome::Ended(status) if status.success() => return Ok(()),
            Outcome::Ended(status) => parts.runc.failure(verb, status, None),
            Outcome::Late => {
                let seconds = deadline.saturating_duration_since(began).as_secs();
                Error::Deadline { operation: verb, seconds }
            }
            Outcome::Lost | Outcome::Doomed => Error::Abandoned { operation: verb },
        };
        // No init may be waiting to be started any more.
        if !matches!(error, Error::Program { .. }) {
            self.children.end(&mut child, Duration::ZERO).context("end", "runc")?;
        }
        self.kill_processes();
        Err(error)
    }
}

pub(super) fn read_pid(file: &std::path::Path) -> Result<u32, Error> {
    let text = std::fs::read_to_string(file).context("read", file.display())?;
    text.trim().parse().map_err(|_| Error::Malformed {
        what: "pid file",
        value: text,
        expected: "a process number",
    })
}

/// Each identity takes as many bytes as every other, with blanks at its end: a server may have the file open at the freeze, and
/// CRIU insists on the length that it had then. Names and times are of different lengths.
fn write_identity(path: &std::path::Path, identity: &Identity) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(identity).expect("an identity has string keys only");
    std::fs::write(path, format!("{text:IDENTITY_BYTES$}")).context("write", path.display())
}

/// The replica's user need not be root.
fn open_to_all(dir: &std::path::Path) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt;
    let set = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
            .context("set the mode of", path.display())
    };
    set(&dir.join("identity.json"), 0o644)?;
    set(dir, 0o755)
}
