//! This machine, and the files of the host as a replica would see them.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use object::elf::{ELF_NOTE_GNU, FileHeader64, NT_GNU_BUILD_ID};
use object::read::ReadCache;
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, Object};
use rewarm_container::Spec;

use crate::verdict::{Found, Lookup, Machine};

/// What is read of an ELF file at first: linkers put headers and notes in front, and reading tables of symbols of the hundreds of
/// libraries that a Python server has mapped took longer than all else of a verdict.
const HEAD_BYTES: usize = 4096;

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
    let file = std::fs::File::open(path).ok()?;
    let mut head = [0; HEAD_BYTES];
    let bytes = file.read_at(&mut head, 0).ok()?;
    let mut id = match build_id_in(&head[..bytes]) {
        Ok(id) => id?,
        // Its notes lie elsewhere, or it is of another kind.
        Err(_) => object::File::parse(&ReadCache::new(file)).ok()?.build_id().ok()??.to_vec(),
    };
    id.resize(id.len().next_multiple_of(4), 0);
    Some(id.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The build id of an ELF file of 64 bits whose beginning this is, `None` if it has none.
///
/// # Errors
/// Where the beginning does not say.
fn build_id_in(head: &[u8]) -> object::Result<Option<Vec<u8>>> {
    let header = FileHeader64::<Endianness>::parse(head)?;
    let endian = header.endian()?;
    for segment in header.program_headers(endian, head)? {
        let Some(mut notes) = segment.notes(endian, head)? else { continue };
        while let Some(note) = notes.next()? {
            if note.name() == ELF_NOTE_GNU && note.n_type(endian) == NT_GNU_BUILD_ID {
                return Ok(Some(note.desc().to_vec()));
            }
        }
    }
    Ok(None)
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

    /// Of every library that there is, both ways find the same.
    #[test]
    fn the_beginning_of_a_library_says_what_all_of_it_does() {
        let folder = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"]
            .iter()
            .find(|path| Path::new(path).is_dir());
        let libraries = std::fs::read_dir(folder.expect("libraries")).expect("readable").flatten();
        let mut compared = 0;
        for library in libraries.filter(|entry| entry.file_name().to_string_lossy().contains(".so")).take(200)
        {
            let Ok(content) = std::fs::read(library.path()) else { continue };
            let Ok(whole) = object::File::parse(&*content) else { continue };
            let whole = whole.build_id().expect("well-formed").map(<[u8]>::to_vec);
            let Ok(seen) = build_id_in(&content[..content.len().min(HEAD_BYTES)]) else { continue };
            assert_eq!(seen, whole, "{}", library.path().display());
            compared += usize::from(seen.is_some());
        }
        assert!(compared > 0, "no library begins with its build id");
        assert!(build_id_in(b"#!/bin/sh\n").is_err());
        assert!(build_id_in(&[]).is_err());
    }
}
