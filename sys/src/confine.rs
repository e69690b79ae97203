//! Giving rights up: a process that was started by root and goes on as a user of its own, for good.

use std::io;

use nix::sys::prctl;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

/// `CAP_DAC_READ_SEARCH`: read any file and look into any folder.
pub const READ_ANY_FILE: u32 = 2;

/// Makes this process run as `uid` and `gid` without groups and without a capability but `keep`. It can never gain any
/// again (`no_new_privs`), and no other process of that user can look into it (not dumpable).
///
/// Call it before the first thread.
///
/// # Errors
/// `PermissionDenied` without the rights to change the user, and the kernel's other refusals. Rights may have been given
/// up in part by then: end the process.
pub fn confine(uid: u32, gid: u32, keep: Option<u32>) -> io::Result<()> {
    prctl::set_no_new_privs()?;
    prctl::set_keepcaps(keep.is_some())?;
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setgroups(&[])?;
    setresgid(group, group, group)?;
    setresuid(user, user, user)?;
    set_capabilities(keep.map_or(0, |number| 1 << number))?;
    prctl::set_keepcaps(false)?;
    // The change of user has done this already, unless the machine is set up otherwise.
    prctl::set_dumpable(false)?;
    Ok(())
}

/// Sets the permitted and the effective capabilities to `mask` and empties the inheritable and the ambient ones.
fn set_capabilities(mask: u32) -> io::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let header = Header { version: VERSION_3, pid: 0 };
    let none = || Data { effective: 0, permitted: 0, inheritable: 0 };
    let data = [Data { effective: mask, permitted: mask, ..none() }, none()];
    // SAFETY: version 3 takes a header and two data structures, which live until the call returns.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether the process at the other end of a Unix socket runs as root.
///
/// # Errors
/// If the kernel does not tell.
pub fn peer_is_root(socket: &std::os::unix::net::UnixStream) -> io::Result<bool> {
    let peer = nix::sys::socket::getsockopt(socket, nix::sys::socket::sockopt::PeerCredentials)?;
    Ok(peer.uid() == 0)
}
