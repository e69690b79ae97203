//! The root file system of a replica: an overlay whose upper layer is what the replica wrote.
//!
//! It is mounted in the shim's own mount namespace, right before runc needs it: a delta that is restored is written into
//! the upper layer before, because changes below a mounted overlay are undefined.

use std::path::Path;

use nix::sys::statfs::{OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, statfs};
use rewarm_sys::mount;

use crate::error::{Context, Error, Refusal};
use crate::shim::Paths;
use crate::state::make_dir;

/// Makes the directories of the upper layer. Where the state directory lies on a file system that cannot hold one (an
/// overlay, as inside a container), a tmpfs is mounted for it.
///
/// # Errors
/// If something cannot be made or mounted.
pub fn prepare(paths: &Paths, tmpfs_bytes: u64) -> Result<(), Error> {
    let layer = paths.layer();
    make_dir(&layer)?;
    let kind = statfs(&layer).context("look at", layer.display())?.filesystem_type();
    if kind == OVERLAYFS_SUPER_MAGIC {
        mount::tmpfs(&layer, tmpfs_bytes, "0700").context("mount a tmpfs on", layer.display())?;
    }
    tracing::debug!(layer = %layer.display(), tmpfs = (kind == TMPFS_MAGIC), "upper layer");
    for dir in [paths.upper(), paths.overlay_work(), paths.rootfs()] {
        make_dir(&dir)?;
    }
    // The root directory of the replica: everybody must be able to look into it.
    set_mode(&paths.upper(), 0o755)
}

/// Mounts the root file system over `lower`.
///
/// # Errors
/// `Refused` if `lower` is no directory; else what the kernel says.
pub fn mount_over(lower: &Path, paths: &Paths) -> Result<(), Error> {
    check_lower(lower)?;
    mount::overlay(lower, &paths.upper(), &paths.overlay_work(), &paths.rootfs())
        .context("mount the overlay of", lower.display())
}

/// Refuses a lower layer that is no directory.
///
/// # Errors
/// [`Refusal::Missing`].
pub fn check_lower(lower: &Path) -> Result<(), Refusal> {
    match std::fs::read_dir(lower) {
        Ok(_) => Ok(()),
        Err(source) => Err(Refusal::Missing { what: "root file system", path: lower.into(), source }),
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .context("set the mode of", path.display())
}
