//! Lists the files that CRIU will look for at restore, and refuse to go on without.

use std::collections::BTreeMap;
use std::path::Path;

use crate::image::files::{self, FileKind, OpenFile};

use super::mapped;

/// A file that must be there, at the same path and with the same size and build id.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct HostFile {
    /// Absolute path in the replica.
    pub path: String,
    /// Size in bytes.
    pub bytes: u64,
    /// GNU build id in hexadecimal, for an ELF file that has one.
    pub build_id: Option<String>,
    /// Some task has mapped it or runs it: its content is in use, not only its name.
    pub mapped: bool,
    /// Some task can write to it.
    pub writable: bool,
    /// It is a folder: open, or some task's root or working folder.
    pub folder: bool,
}

/// The files and folders that are open or mapped, by path. Without deleted ones, whose content is in the images.
///
/// # Errors
/// [`crate::Error::Io`] or [`crate::Error::Image`] if the images cannot be read.
pub fn host_files(directory: &Path) -> crate::Result<Vec<HostFile>> {
    const O_ACCMODE: u32 = 3;
    let deleted = files::remapped(directory)?;
    let mapped = mapped(directory)?;
    let mut found: BTreeMap<String, HostFile> = BTreeMap::new();
    for OpenFile { id, kind } in files::read(directory)? {
        let FileKind::Regular(file) = kind else { continue };
        let folder = file.is_folder();
        // A folder's own size says nothing.
        let Some(bytes) = file.bytes.filter(|_| !folder).or(folder.then_some(0)) else { continue };
        if deleted.contains(&id) || file.external || !(file.is_file() || folder) {
            continue;
        }
        let build_id = file.build_id.map(|id| id.iter().map(|byte| format!("{byte:02x}")).collect());
        let (mapped, writable) = (mapped.contains(&id), file.flags & O_ACCMODE != 0);
        let entry = found.entry(file.path.clone());
        let entry = entry.or_insert(HostFile {
            path: file.path,
            bytes,
            build_id: None,
            mapped: false,
            writable: false,
            folder,
        });
        entry.build_id = entry.build_id.take().or(build_id);
        entry.mapped |= mapped;
        entry.writable |= writable;
    }
    Ok(found.into_values().collect())
}
