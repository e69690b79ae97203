//! This machine, and the files of the host as a replica would see them.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use object::Object;
use object::read::ReadCache;
use rewarm_container::Spec;

use crate::verdict::{Found, Lookup, Machine};

/// What a restore on this machine would meet.
///
/// # Errors
/// If `/proc` cannot be read.
pub fn here(criu_version: &str) -> io::Result<Machine> {
    use rewarm_sys::{machine, process};
    Ok(Machine {
        architecture: machine::architecture()?,
        kernel: machine::kernel_release()?,
        cpu_features: machine::cpu()?.features.into_iter().collect::<BTreeSet<_>>(),
        criu: criu_version.to_owned(),
        free_bytes: machine::free_bytes()?,
        limits: if process::may_change_limits() {
            None
        } else {
            // A replica's processes descend from this one and inherit what it may have.
            Some(process::hard_limits(std::process::id().cast_signed())?)
        },
    })
}

/// Files as a replica of this spec would see them: its mounts over the lower layer of its root.
#[derive(Debug, Clone)]
pub struct HostView {
    rootfs: PathBuf,
    /// Targets and sources, the longest target first.
    mounts: Vec<(PathBuf, PathBuf)>,
}

impl HostView {
    /// The view of a spec.
    #[must_use]
    pub fn new(spec: &Spec) -> Self {
        let mut mounts: Vec<_> = spec.mounts.iter().map(|m| (m.target.clone(), m.source.clone())).collect();
        if let Some(gpu) = &spec.gpu {
            mounts.extend(gpu.provided.files.iter().map(|(source, target)| (target.clone(), source.clone())));
        }
        mounts.sort_by_key(|(target, _)| std::cmp::Reverse(target.components().count()));
        Self { rootfs: spec.rootfs.clone(), mounts }
    }

    /// Where a path of the replica lies on the host.
    #[must_use]
    pub fn locate(&self, path: &str) -> PathBuf {
        let path = Path::new(path);
        for (target, source) in &self.mounts {
            if let Ok(rest) = path.strip_prefix(target) {
                return if rest.as_os_str().is_empty() { source.clone() } else { source.join(rest) };
            }
        }
        self.rootfs.join(path.strip_prefix("/").unwrap_or(path))
    }
}

impl Lookup for HostView {
    fn find(&self, path: &str) -> Option<Found> {
        let path = self.locate(path);
        let metadata = std::fs::metadata(&path).ok().filter(std::fs::Metadata::is_file)?;
        let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        Some(Found {
            bytes: metadata.len(),
            build_id: build_id(&path),
            mtime_ns: modified.and_then(|time| i64::try_from(time.as_nanos()).ok()).unwrap_or(0),
        })
    }

    fn is_folder(&self, path: &str) -> bool {
        self.locate(path).is_dir()
    }

    fn digest(&self, path: &str) -> Option<String> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(std::fs::File::open(self.locate(path)).ok()?).ok()?;
        Some(hasher.finalize().to_hex().to_string())
    }
}

/// The GNU build id of an ELF file in hexadecimal digits, padded to words of four bytes as CRIU writes it.
fn build_id(path: &Path) -> Option<String> {
    let cache = ReadCache::new(std::fs::File::open(path).ok()?);
    let file = object::File::parse(&cache).ok()?;
    let mut id = file.build_id().ok()??.to_vec();
    id.resize(id.len().next_multiple_of(4), 0);
    Some(id.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_mount_wins_and_the_rest_is_the_root() {
        let spec = Spec {
            rootfs: "/lower".into(),
            mounts: ["/a:/models", "/b:/models/x"].map(|m| m.parse().expect("a mount")).to_vec(),
            ..Spec::default()
        };
        let view = HostView::new(&spec);
        assert_eq!(view.locate("/models/x/w"), Path::new("/b/w"));
        assert_eq!(view.locate("/models/y"), Path::new("/a/y"));
        assert_eq!(view.locate("/models"), Path::new("/a"));
        assert_eq!(view.locate("/modelsx"), Path::new("/lower/modelsx"));
    }

    #[test]
    fn the_running_program_is_found_with_its_size_and_content() {
        let view = HostView::new(&Spec::default());
        let path = std::env::current_exe().expect("proc").display().to_string();
        let found = view.find(&path).expect("it runs");
        assert_eq!(found.bytes, std::fs::metadata(&path).expect("it runs").len());
        assert_eq!(view.digest(&path).expect("readable").len(), 64);
        assert_eq!(view.find("/no/such/file"), None);
    }

    #[test]
    fn a_shared_library_of_the_system_has_a_build_id() {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("proc");
        let libc = maps
            .lines()
            .filter_map(|line| line.split_whitespace().nth(5))
            .find(|path| path.contains("libc.so"))
            .expect("linked with libc");
        let id = build_id(Path::new(libc)).expect("Debian's libc has one");
        assert_eq!(id.len() % 8, 0);
    }
}
