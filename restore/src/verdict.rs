//! Whether a snapshot fits a machine, told before any data moves, with every reason at once.
//!
//! Pure: facts of the snapshot and facts of the machine go in, reasons come out. What must be looked up (files of the
//! host) goes through [`Lookup`], so that `inspect` and `restore` give the same verdict.

use std::collections::{BTreeMap, BTreeSet};

use rewarm_store::{Facts, HostFile};

/// What a restore on this machine would meet.
#[derive(Debug, Clone, Default)]
pub struct Machine {
    /// Architecture as `uname -m` says.
    pub architecture: String,
    /// Release of the kernel.
    pub kernel: String,
    /// Instruction set flags of the processor.
    pub cpu_features: BTreeSet<String>,
    /// Version of the CRIU that would restore.
    pub criu: String,
    /// Bytes of memory that can be taken without pressure.
    pub free_bytes: u64,
    /// The limits that a restored process cannot have more of, by the kernel's name; `None` where any can be given.
    pub limits: Option<BTreeMap<String, u64>>,
}

/// Finds files as the replica would see them.
pub trait Lookup {
    /// What lies at `path` inside the replica, as far as it comes from the host; `None` if nothing does.
    fn find(&self, path: &str) -> Option<Found>;
    /// BLAKE3 of the content in hexadecimal digits; `None` if it cannot be read. Asked only when size and time do not decide.
    fn digest(&self, path: &str) -> Option<String>;
    /// Whether `path` is a folder inside the replica.
    fn is_folder(&self, path: &str) -> bool;
}

/// A file of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Its length.
    pub bytes: u64,
    /// ELF build id in hexadecimal digits.
    pub build_id: Option<String>,
    /// Time of its last change, nanoseconds since 1970.
    pub mtime_ns: i64,
}

/// One reason why a snapshot does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// Another architecture.
    #[error("the snapshot is for {snapshot}, this machine is {machine}")]
    Architecture {
        /// Of the snapshot.
        snapshot: String,
        /// Of this machine.
        machine: String,
    },
    /// The server may have looked for processor features that are missing here.
    #[error("this processor lacks {}, which the server may use", missing.join(", "))]
    CpuFeatures {
        /// Which.
        missing: Vec<String>,
    },
    /// Another CUDA driver: the server has the old one's library in its memory.
    #[error(
        "the snapshot holds device state of a driver for CUDA {snapshot}, the driver here is for CUDA {machine}"
    )]
    Driver {
        /// Of the snapshot.
        snapshot: String,
        /// Of this machine.
        machine: String,
    },
    /// Another release of the driver: its library and its kernel module insist on each other.
    #[error(
        "the snapshot holds device state of driver {snapshot}, the driver here is {machine}: the server has the old one's library in its memory"
    )]
    Release {
        /// Of the snapshot.
        snapshot: String,
        /// Of this machine.
        machine: String,
    },
    /// The devices here cannot take the snapshot's device state.
    #[error("the snapshot holds device state: {reason}")]
    Device {
        /// Why not.
        reason: String,
    },
    /// Images belong to the version of CRIU that wrote them.
    #[error("the snapshot was made by CRIU {snapshot}, this machine has {machine}")]
    Criu {
        /// Of the snapshot.
        snapshot: String,
        /// Of this machine.
        machine: String,
    },
    /// A file that the server has open or mapped is missing.
    #[error("{path} is missing; the server has it open or mapped")]
    FileMissing {
        /// Its path inside the replica.
        path: String,
    },
    /// A folder that the server has open, or works in, is missing.
    #[error("the folder {path} is missing; the server has it open or works in it")]
    FolderMissing {
        /// Its path inside the replica.
        path: String,
    },
    /// A process of the server has a higher limit than one can be given here.
    #[error(
        "the server has a limit of {} for {:?}, this process {}, and without CAP_SYS_RESOURCE nobody can raise it",
        number(*expected),
        name,
        number(*found)
    )]
    Limit {
        /// The kernel's name of it.
        name: String,
        /// What can be given here.
        found: u64,
        /// What the server had.
        expected: u64,
    },
    /// A file that the server has open or mapped has another length.
    #[error("{path} has {found} bytes, {expected} at the snapshot")]
    FileSize {
        /// Its path inside the replica.
        path: String,
        /// Bytes here.
        found: u64,
        /// Bytes at the snapshot.
        expected: u64,
    },
    /// A library or program was replaced by another build.
    #[error("{path} is another build: {}, {expected} at the snapshot", found.as_deref().unwrap_or("no build id"))]
    FileBuild {
        /// Its path inside the replica.
        path: String,
        /// Build id here.
        found: Option<String>,
        /// Build id at the snapshot.
        expected: String,
    },
    /// A file that is mapped has other content.
    #[error("{path} has other content than at the snapshot")]
    FileContent {
        /// Its path inside the replica.
        path: String,
    },
    /// The replica's memory limit is below what the snapshot needs.
    #[error(
        "the memory limit of {limit} bytes is below the {needed} bytes of the snapshot, counted without sharing between processes"
    )]
    MemoryLimit {
        /// Bytes that are needed.
        needed: u64,
        /// Bytes that are allowed.
        limit: u64,
    },
    /// This machine has too little free memory.
    #[error("{count} replicas need {needed} bytes of memory, {free} are free")]
    MemoryFree {
        /// How many replicas.
        count: u32,
        /// Bytes that they need together.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// The source of a mount does not exist here.
    #[error("the mount source {path} does not exist")]
    MountSource {
        /// Its path on this machine.
        path: String,
    },
}

/// Compares a snapshot with a machine. An empty list means that it fits.
#[must_use]
pub fn reasons(facts: &Facts, machine: &Machine, lookup: &dyn Lookup) -> Vec<Reason> {
    let mut reasons = Vec::new();
    if facts.architecture != machine.architecture {
        reasons.push(Reason::Architecture {
            snapshot: facts.architecture.clone(),
            machine: machine.architecture.clone(),
        });
    }
    let missing: Vec<String> = facts
        .cpu
        .features
        .iter()
        .filter(|feature| matters(feature) && !machine.cpu_features.contains(*feature))
        .cloned()
        .collect();
    if !missing.is_empty() {
        reasons.push(Reason::CpuFeatures { missing });
    }
    if facts.criu != machine.criu {
        reasons.push(Reason::Criu { snapshot: facts.criu.clone(), machine: machine.criu.clone() });
    }
    for (name, &found) in machine.limits.iter().flatten() {
        if let Some(&expected) = facts.limits.get(name)
            && expected > found
        {
            reasons.push(Reason::Limit { name: name.clone(), found, expected });
        }
    }
    reasons.extend(facts.host_files.iter().filter_map(|file| compare(file, lookup)));
    reasons
}

fn number(limit: u64) -> String {
    if limit == u64::MAX { "unlimited".to_owned() } else { limit.to_string() }
}

/// Whether `count` replicas of `bytes` each fit into the limit of each and into what is free.
pub(crate) fn memory_reasons(needed: u64, limit: Option<u64>, count: u32, free: u64) -> Vec<Reason> {
    let mut reasons = Vec::new();
    if let Some(limit) = limit.filter(|limit| *limit < needed) {
        reasons.push(Reason::MemoryLimit { needed, limit });
    }
    let together = needed.saturating_mul(u64::from(count));
    if together > free {
        reasons.push(Reason::MemoryFree { count, needed: together, free });
    }
    reasons
}

/// Flags that describe the kernel's own work or the machine's condition, and that no program asks the processor for.
fn matters(feature: &str) -> bool {
    const KERNEL: [&str; 12] = [
        "constant_tsc",
        "nonstop_tsc",
        "tsc_known_freq",
        "rep_good",
        "nopl",
        "cpuid",
        "extd_apicid",
        "arch_capabilities",
        "hypervisor",
        "tsc_deadline_timer",
        "tsc_adjust",
        "xtopology",
    ];
    !KERNEL.contains(&feature)
        && !feature.starts_with("ib")
        && !feature.starts_with("ssbd")
        && !feature.starts_with("stibp")
}

fn compare(file: &HostFile, lookup: &dyn Lookup) -> Option<Reason> {
    let path = file.path.clone();
    if file.folder {
        return (!lookup.is_folder(&path)).then_some(Reason::FolderMissing { path });
    }
    let Some(found) = lookup.find(&path) else { return Some(Reason::FileMissing { path }) };
    if let Some(expected) = &file.build_id {
        // The build id names the content; a package that was only repacked may differ in length.
        let same = found.build_id.as_ref() == Some(expected);
        return match (same, found.bytes == file.bytes) {
            (false, _) => Some(Reason::FileBuild { path, found: found.build_id, expected: expected.clone() }),
            (true, false) => Some(Reason::FileSize { path, found: found.bytes, expected: file.bytes }),
            (true, true) => None,
        };
    }
    if found.bytes != file.bytes {
        return Some(Reason::FileSize { path, found: found.bytes, expected: file.bytes });
    }
    // Pages of a mapped file that the server never wrote are read from the file again: its content is part of the answers.
    match &file.digest {
        Some(expected) if found.mtime_ns != file.mtime_ns => match lookup.digest(&path) {
            Some(digest) if digest == *expected => None,
            _ => Some(Reason::FileContent { path }),
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Files(BTreeMap<String, (Found, Option<String>)>);

    impl Lookup for Files {
        fn find(&self, path: &str) -> Option<Found> {
            self.0.get(path).map(|(found, _)| found.clone())
        }
        fn digest(&self, path: &str) -> Option<String> {
            self.0.get(path).and_then(|(_, digest)| digest.clone())
        }
        fn is_folder(&self, path: &str) -> bool {
            path.ends_with('/')
        }
    }

    fn fitting() -> (Facts, Machine) {
        let facts = Facts {
            architecture: "x86_64".into(),
            criu: "4.2.1".into(),
            cpu: rewarm_store::Cpu {
                features: vec!["avx2".into(), "constant_tsc".into()],
                ..Default::default()
            },
            ..Facts::default()
        };
        let machine = Machine {
            architecture: "x86_64".into(),
            criu: "4.2.1".into(),
            cpu_features: ["avx2", "avx512f"].map(str::to_owned).into(),
            ..Machine::default()
        };
        (facts, machine)
    }

    fn host(bytes: u64, build_id: Option<&str>, digest: Option<&str>) -> HostFile {
        HostFile {
            path: "/f".into(),
            bytes,
            build_id: build_id.map(str::to_owned),
            digest: digest.map(str::to_owned),
            mtime_ns: 1,
            mapped: true,
            folder: false,
        }
    }

    fn files(bytes: u64, build_id: Option<&str>, mtime_ns: i64, digest: Option<&str>) -> Files {
        let found = Found { bytes, build_id: build_id.map(str::to_owned), mtime_ns };
        Files([("/f".to_owned(), (found, digest.map(str::to_owned)))].into())
    }

    #[test]
    fn a_machine_with_more_features_fits_and_kernel_flags_do_not_matter() {
        let (facts, machine) = fitting();
        assert_eq!(reasons(&facts, &machine, &Files::default()), []);
    }

    #[test]
    fn all_reasons_come_at_once() {
        let (mut facts, machine) = fitting();
        facts.architecture = "aarch64".into();
        facts.criu = "4.1.1".into();
        facts.cpu.features.push("amx_tile".into());
        facts.host_files.push(host(3, None, None));
        let texts: Vec<String> =
            reasons(&facts, &machine, &Files::default()).iter().map(Reason::to_string).collect();
        assert_eq!(texts.len(), 4, "{texts:?}");
        assert!(texts[1].contains("amx_tile"));
        assert!(texts[3].contains("/f is missing"));
    }

    #[test]
    fn a_library_of_another_build_is_named_with_both_builds() {
        let reason = compare(&host(3, Some("aa"), None), &files(3, Some("bb"), 1, None)).expect("differs");
        assert_eq!(reason.to_string(), "/f is another build: bb, aa at the snapshot");
        assert_eq!(compare(&host(3, Some("aa"), None), &files(3, Some("aa"), 2, None)), None);
    }

    #[test]
    fn content_is_compared_only_when_the_time_of_change_differs() {
        let file = host(3, None, Some("d1"));
        assert_eq!(compare(&file, &files(3, None, 1, Some("d2"))), None);
        assert_eq!(compare(&file, &files(3, None, 2, Some("d1"))), None);
        assert!(matches!(compare(&file, &files(3, None, 2, Some("d2"))), Some(Reason::FileContent { .. })));
        assert!(matches!(compare(&file, &files(4, None, 1, None)), Some(Reason::FileSize { .. })));
    }

    #[test]
    fn a_folder_must_be_there_and_a_limit_must_be_reached() {
        let (mut facts, mut machine) = fitting();
        let folder = |path: &str| HostFile { path: path.into(), folder: true, ..HostFile::default() };
        facts.host_files = vec![folder("/there/"), folder("/gone")];
        facts.limits = [("Max open files", 4096), ("Max cpu time", u64::MAX)]
            .map(|(name, limit)| (name.to_owned(), limit))
            .into();
        let texts = |machine: &Machine| -> Vec<String> {
            reasons(&facts, machine, &Files::default()).iter().map(Reason::to_string).collect()
        };
        assert_eq!(texts(&machine), ["the folder /gone is missing; the server has it open or works in it"]);
        machine.limits =
            Some([("Max open files".to_owned(), 1024), ("Max cpu time".to_owned(), u64::MAX)].into());
        assert_eq!(
            texts(&machine)[0],
            "the server has a limit of 4096 for \"Max open files\", this process 1024, and without CAP_SYS_RESOURCE nobody can raise it"
        );
    }

    #[test]
    fn memory_is_compared_with_the_limit_of_each_and_with_what_is_free() {
        assert_eq!(memory_reasons(100, Some(100), 2, 200), []);
        assert_eq!(memory_reasons(100, Some(99), 3, 200).len(), 2);
    }
}
