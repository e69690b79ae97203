//! Mounts: a private mount namespace, overlay, tmpfs, detached tmpfs, bind.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// Gives this process a mount namespace of its own. Mounts of the host still arrive in it; its own stay in it, and
/// vanish when its last process and descriptor are gone. Call it before the first thread.
///
/// # Errors
/// `PermissionDenied` without `CAP_SYS_ADMIN`.
pub fn private_namespace() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)?;
    Ok(())
}

/// Mounts an overlay. The features that would tie the upper layer to this host's lower one (index, redirects,
/// metadata-only copies) are off, so that the upper layer alone is the difference and can be carried elsewhere.
///
/// # Errors
/// Those of `mount(2)`; `InvalidInput` if the options do not fit into one page.
pub fn overlay(lower: &Path, upper: &Path, work: &Path, target: &Path) -> io::Result<()> {
    let mut options = Vec::new();
    for (key, path) in [("lowerdir", lower), ("upperdir", upper), ("workdir", work)] {
        options.extend_from_slice(key.as_bytes());
        options.push(b'=');
        for byte in path.as_os_str().as_bytes() {
            // The overlay's own option parser splits at these.
            if matches!(byte, b',' | b':' | b'\\') {
                options.push(b'\\');
            }
            options.push(*byte);
        }
        options.push(b',');
    }
    options.extend_from_slice(b"index=off,metacopy=off,redirect_dir=off");
    if options.len() >= 4096 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("overlay options of {} bytes, the kernel takes at most 4095", options.len()),
        ));
    }
    // Nothing in a replica's upper layer outlives it, so its data need not reach a disk (Linux 5.10).
    let mut volatile = options.clone();
    volatile.extend_from_slice(b",volatile");
    let with =
        |options: &[u8]| mount(Some("overlay"), target, Some("overlay"), MsFlags::empty(), Some(options));
    with(&volatile).or_else(|_| with(&options)).map_err(io::Error::from)
}

/// Mounts a tmpfs of at most `bytes`; its root has `mode` (octal digits, as `mount(8)` takes them).
///
/// # Errors
/// Those of `mount(2)`.
pub fn tmpfs(target: &Path, bytes: u64, mode: &str) -> io::Result<()> {
    let options = format!("size={bytes},mode={mode}");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), target, Some("tmpfs"), flags, Some(options.as_str())).map_err(io::Error::from)
}

/// Attaches a mount that nobody sees yet (from `fsmount(2)` or `open_tree(2)`) at `target`.
///
/// # Errors
/// Those of `move_mount(2)`.
pub fn attach(detached: impl AsFd, target: &Path) -> io::Result<()> {
    const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 0x4;
    let target = CString::new(target.as_os_str().as_bytes())?;
    // SAFETY: both strings end in NUL and live until the call returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            detached.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A tmpfs that is mounted nowhere: the descriptor is its root, and its memory is free when the last descriptor and
/// the last mount made of it by [`attach`] are gone. `options` are pairs such as `("size", "64m")`, `("huge", "always")`.
///
/// # Errors
/// Those of `fsopen(2)`, `fsconfig(2)` (an option that this kernel does not know) and `fsmount(2)`.
pub fn detached_tmpfs(options: &[(&str, &str)]) -> io::Result<OwnedFd> {
    const FSOPEN_CLOEXEC: libc::c_uint = 1;
    const FSMOUNT_CLOEXEC: libc::c_uint = 1;
    const FSCONFIG_SET_STRING: libc::c_uint = 1;
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    const MOUNT_ATTR_NOSUID_NODEV: libc::c_uint = 2 | 4;
    // SAFETY: the name ends in NUL.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), FSOPEN_CLOEXEC) })?;
    for (key, value) in options {
        let (key, value) = (CString::new(*key)?, CString::new(*value)?);
        // SAFETY: both strings end in NUL and live until the call returns.
        let result = unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                context.as_raw_fd(),
                FSCONFIG_SET_STRING,
                key.as_ptr(),
                value.as_ptr(),
                0,
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let null = std::ptr::null::<libc::c_char>();
    // SAFETY: FSCONFIG_CMD_CREATE wants both pointers to be null.
    let result =
        unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), FSCONFIG_CMD_CREATE, null, null, 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: plain call; the result is checked.
    owned(unsafe {
        libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, MOUNT_ATTR_NOSUID_NODEV)
    })
}

/// Takes a mount away at once; users that still hold it keep it until they let go.
///
/// # Errors
/// Those of `umount2(2)`.
pub fn detach(target: &Path) -> io::Result<()> {
    umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).map_err(io::Error::from)
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let raw = i32::try_from(result).expect("a file descriptor fits in an int");
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}
