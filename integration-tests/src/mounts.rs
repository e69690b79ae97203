//! File systems that a test mounts below its world, and takes away again.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Mounts on `path`, with these arguments of `mount`.
///
/// # Panics
///
/// When it cannot be mounted.
pub fn mount(arguments: &[&str], path: &Path) {
    let status = Command::new("mount").args(arguments).arg(path).status();
    assert!(status.expect("mount is part of the base system").success(), "mount {arguments:?}");
}

/// Unmounts `path`. A process that has just ended may hold a file there for a moment.
///
/// # Panics
///
/// When somebody still holds it after ten seconds.
pub fn unmount(path: &Path) {
    let unmounted =
        || Command::new("umount").arg(path).status().expect("umount is part of the base system").success();
    let wait = || std::thread::sleep(Duration::from_millis(200));
    let done = (0..50).any(|_| {
        let gone = unmounted();
        if !gone {
            wait();
        }
        gone
    });
    assert!(done, "umount {}", path.display());
}
