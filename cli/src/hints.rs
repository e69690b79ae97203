//! What to do next: one line below an error, chosen by what the error is.

use rewarm_autoscaler::Error as Autoscaler;
use rewarm_container::Error as Container;
use rewarm_criu::Error as Criu;
use rewarm_fetcher::{Error as Fetcher, Kind};
use rewarm_probe::Error as Probe;
use rewarm_report::{Class, Classify};
use rewarm_restore::Cause as Restore;
use rewarm_serve::Error as Serve;
use rewarm_snapshot::Cause as Snapshot;
use rewarm_store::{Error as Store, KeyError as Key};

pub(crate) fn container(error: &Container) -> Option<&'static str> {
    match error {
        Container::NameInUse { .. } => {
            Some("`rewarm ps --all` lists the replicas; stop this one or choose another name")
        }
        Container::UnknownName { .. } => Some("`rewarm ps --all` lists the replicas"),
        Container::NotRunning { .. } => Some("`rewarm logs NAME` shows what it wrote"),
        Container::Busy { .. } => Some("a replica that runs is stopped by `rewarm stop NAME`"),
        Container::PortInUse { .. } => Some("host port 0 lets the kernel choose a free one"),
        error if is_full(error) => {
            Some("the disk of the state folder is full: make room there, or choose another one with --state")
        }
        Container::Order { status: rewarm_container::Status::Paused, .. } => {
            Some("`rewarm wake NAME` lets a paused replica go on")
        }
        Container::Order { status: rewarm_container::Status::Stranded, .. } => {
            Some("`rewarm stop NAME` ends it; docs/gpu.md says what happened")
        }
        error if error.class() == Class::Stranded => Some(
            "`rewarm stop NAME` ends it; `rewarm ps --all` shows what is left; docs/gpu.md says what happened",
        ),
        error if error.class() == Class::Incompatible => {
            Some("`rewarm doctor` lists every need of this machine with its fix")
        }
        _ => None,
    }
}

/// Whether the system said so, here or in the shim.
fn is_full(error: &Container) -> bool {
    let full = std::io::Error::from_raw_os_error(nix::libc::ENOSPC).to_string();
    let mut next: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = next {
        if error.to_string().contains(&full) {
            return true;
        }
        next = error.source();
    }
    false
}

pub(crate) fn criu(error: &Criu) -> Option<&'static str> {
    match error {
        Criu::Missing { .. } | Criu::TooOld { .. } => {
            Some("`make setup` builds CRIU; --criu or REWARM_CRIU names another; `rewarm doctor` says more")
        }
        Criu::Refused { verb: "dump", .. } => Some(
            "CRIU cannot carry this: let a hook (--pre) close it before the dump, or start the server without it; docs/operating.md explains CRIU's messages",
        ),
        Criu::Refused { .. } => Some(
            "what the server had at the snapshot must be found here too; --cold-fallback starts it cold instead; docs/operating.md explains CRIU's messages",
        ),
        _ => None,
    }
}

pub(crate) fn store(error: &Store) -> Option<&'static str> {
    match error {
        Store::NotFound { .. } => of_kind(Kind::NotFound),
        Store::Denied { .. } => of_kind(Kind::Denied),
        Store::Unreachable { .. } => of_kind(Kind::Unreachable),
        Store::TagTaken { .. } => Some("the other snapshot stands; take this one again"),
        Store::Newer { .. } => of_kind(Kind::Newer),
        Store::Untrusted { .. } => of_kind(Kind::Untrusted),
        Store::Collecting { .. } => {
            Some("wait until it has ended; what a killed one left is ignored after 15 minutes")
        }
        Store::Doomed { .. } => {
            Some("`rewarm gc STORE` removes it once its grace time is over; copy it then")
        }
        Store::Lapsed { .. } => Some("take the snapshot again"),
        _ => None,
    }
}

pub(crate) fn fetcher(error: &Fetcher) -> Option<&'static str> {
    of_kind(error.kind())
}

/// The same failure of a store has the same hint, whichever process met it.
fn of_kind(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::NotFound => Some("`rewarm ls STORE` lists the snapshots of a store"),
        Kind::Denied => {
            Some("credentials come from the environment (AWS_*, GOOGLE_*, AZURE_*) or from ?option=value")
        }
        Kind::Unreachable => Some("the endpoint comes from AWS_ENDPOINT_URL or from ?endpoint=URL"),
        Kind::Newer => Some("a newer rewarm reads it"),
        Kind::Untrusted => Some(
            "sign it when it is taken (`rewarm snapshot --sign KEY`), or trust another key (docs/signatures.md)",
        ),
        Kind::Other => None,
    }
}

pub(crate) fn key(error: &Key) -> Option<&'static str> {
    match error {
        Key::Missing { .. } => Some("`rewarm key list` lists the keys; REWARM_KEYS names another folder"),
        Key::Open { .. } => Some("chmod 600 it, if nobody else has read it yet; else make a new key"),
        Key::Exists { .. } => Some("choose another name; what the old key signed needs it"),
        _ => None,
    }
}

pub(crate) fn probe(error: &Probe) -> Option<&'static str> {
    match error {
        Probe::NotReady { .. } => {
            Some("--ready is asked inside the replica's network namespace; --ready-timeout waits longer")
        }
        Probe::NoPort { .. } => Some("say the port in the probe file, or give the replica one by --port"),
        Probe::Differs(_) => Some(
            "if this part of the answer may vary, let the probe file compare less of it or with a tolerance (docs/probe.md)",
        ),
        Probe::UnknownKey { .. } | Probe::BadValue { .. } | Probe::ParseFile { .. } => {
            Some("docs/probe.md lists every key of a probe file")
        }
        _ => None,
    }
}

pub(crate) fn autoscaler(error: &Autoscaler) -> Option<&'static str> {
    match error {
        Autoscaler::BadLine { .. } | Autoscaler::Empty { .. } => {
            Some("docs/autoscaling.md shows the formats of traces and of measured times")
        }
        Autoscaler::UnknownKey { .. } | Autoscaler::BadValue { .. } | Autoscaler::ParseConfig { .. } => {
            Some("docs/autoscaling.md lists every key of a configuration")
        }
        Autoscaler::UnknownPolicy { .. } => Some(
            "rewarm, kpa, hpa, tracker and fixed are built in; others need [policy.NAME] in a configuration",
        ),
        _ => None,
    }
}

pub(crate) fn serve(error: &Serve) -> Option<&'static str> {
    match error {
        Serve::UnknownKey { .. } | Serve::BadValue { .. } | Serve::Parse { .. } | Serve::Policy(_) => Some(
            "docs/serve.md lists every key of the file; `rewarm serve --check` reads it and starts nothing",
        ),
        Serve::Taken { .. } => Some("stop the other one, or give this one a folder of its own with --state"),
        Serve::Listen { .. } => Some("`ss -ltnp` says who listens there"),
        _ => None,
    }
}

pub(crate) fn snapshot(cause: &Snapshot) -> Option<&'static str> {
    match cause {
        Snapshot::Container(error) => container(error),
        Snapshot::Criu(error) => criu(error),
        Snapshot::Store(error) => store(error),
        Snapshot::Probe(error) => probe(error),
        Snapshot::NewConnection { .. } => {
            Some("close it in a hook (--pre), or let clones find it closed with --tcp-close")
        }
        _ => None,
    }
}

pub(crate) fn restore(cause: &Restore) -> Option<&'static str> {
    match cause {
        Restore::Container(error) => container(error),
        Restore::Criu(error) => criu(error),
        Restore::Fetcher(error) => fetcher(error),
        Restore::Probe(error) => probe(error),
        Restore::NotStarted { source, .. } => restore(source),
        Restore::Incompatible { .. } => Some(
            "take a snapshot on this kind of machine under the same tag, or start cold where it does not fit with --cold-fallback",
        ),
        _ => None,
    }
}
