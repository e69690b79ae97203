//! What Rewarm needs of a machine, and whether it is there.
//!
//! Every need has a consequence (what does not work without it) and a fix. Nothing here changes the machine, and the
//! whole takes less than 100 ms: CRIU's own `criu check` alone would take half of that. Only asking the CUDA driver takes
//! longer, and is done where the user wants it.

mod gpu;
mod kernel;
mod machine;
mod programs;

use std::path::PathBuf;

use serde::Serialize;

/// Whether a need is met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    /// Met.
    Ok,
    /// Met in part: the consequence says what is lost.
    Degraded,
    /// Not met: Rewarm cannot work.
    Missing,
}

/// One need of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Need {
    /// What is needed.
    pub(crate) name: &'static str,
    /// Whether it is there.
    pub(crate) state: State,
    /// What was found.
    pub(crate) found: String,
    /// What follows, where it is not there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) consequence: Option<&'static str>,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) fix: Option<&'static str>,
}

impl Need {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, state: State::Ok, found: found.into(), consequence: None, fix: None }
    }

    fn degraded(
        name: &'static str,
        found: impl Into<String>,
        consequence: &'static str,
        fix: &'static str,
    ) -> Self {
        let (consequence, fix) = (Some(consequence), Some(fix));
        Self { name, state: State::Degraded, found: found.into(), consequence, fix }
    }

    fn missing(
        name: &'static str,
        found: impl Into<String>,
        consequence: &'static str,
        fix: &'static str,
    ) -> Self {
        Self { state: State::Missing, ..Self::degraded(name, found, consequence, fix) }
    }
}

/// The first privilege that this process lacks and cannot do without.
pub(crate) fn lacking_privilege() -> Option<Need> {
    machine::privileges().into_iter().find(|need| need.state == State::Missing)
}

/// Where the programs and folders are looked for.
#[derive(Debug)]
pub(crate) struct Places {
    /// The CRIU program, where the user names one.
    pub(crate) criu: Option<PathBuf>,
    /// The cache folder.
    pub(crate) cache: Option<PathBuf>,
    /// The folder of replicas.
    pub(crate) state: PathBuf,
    /// NVML's library.
    pub(crate) libnvml: PathBuf,
    /// This program, where the CUDA driver shall be asked by a helper process of it.
    pub(crate) ask_driver: Option<PathBuf>,
}

/// Looks at everything.
pub(crate) fn examine(places: &Places) -> Vec<Need> {
    // The two programs are started beside the rest: each needs some milliseconds to say its version.
    std::thread::scope(|scope| {
        let criu = scope.spawn(|| programs::criu(places));
        let runc = scope.spawn(programs::runc);
        let gpu = scope.spawn(|| gpu::needs(places));
        let mut needs = vec![kernel::version()];
        needs.extend(machine::privileges());
        let at = needs.len();
        needs.push(machine::cgroups());
        needs.push(kernel::userfaultfd());
        needs.push(kernel::pagemap_scan());
        needs.push(kernel::overlayfs());
        needs.push(kernel::seccomp());
        needs.push(machine::state_folder(&places.state));
        needs.push(machine::disk(&places.state));
        needs.push(machine::memory());
        let joined =
            |need: std::thread::ScopedJoinHandle<'_, Need>| need.join().expect("no panic while looking");
        needs.extend(gpu.join().expect("no panic while looking"));
        needs.splice(at..at, [joined(criu), joined(runc), programs::kernel_cache()]);
        needs
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_ok_says_what_follows_and_what_to_do() {
        let places = Places {
            criu: Some("/nowhere/criu".into()),
            cache: None,
            state: "/run/rewarm-that-does-not-exist".into(),
            libnvml: "/nowhere/libnvidia-ml.so.1".into(),
            ask_driver: None,
        };
        let needs = examine(&places);
        assert!(needs.iter().any(|need| need.name == "criu" && need.state == State::Missing));
        for need in needs {
            let told = need.consequence.is_some() && need.fix.is_some();
            assert_eq!(told, need.state != State::Ok, "{need:?}");
            assert!(!need.found.is_empty(), "{need:?}");
        }
    }
}
