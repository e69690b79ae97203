//! Network namespaces: made, entered for one call, dialled into, and ports that stay shut until told.
//!
//! A socket belongs for ever to the namespace of the thread that made it. So a thread that goes in, makes a socket and
//! comes back with it is all that is needed to reach a server inside: no bridge, no address, no firewall rule.

use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};

/// Makes a network namespace whose loopback interface is up. It lives as long as the descriptor or a process in it.
///
/// # Errors
/// `PermissionDenied` without `CAP_SYS_ADMIN`.
pub fn create() -> io::Result<OwnedFd> {
    make(true)
}

/// Makes a network namespace in which not even the loopback interface is up.
///
/// # Errors
/// `PermissionDenied` without `CAP_SYS_ADMIN`.
pub fn create_isolated() -> io::Result<OwnedFd> {
    make(false)
}

fn make(loopback: bool) -> io::Result<OwnedFd> {
    in_thread(move || {
        unshare(CloneFlags::CLONE_NEWNET)?;
        if loopback {
            loopback_up()?;
        }
        Ok(File::open("/proc/thread-self/ns/net")?.into())
    })
}

/// The network namespace of this process.
///
/// # Errors
/// If `/proc` is not mounted.
pub fn own() -> io::Result<OwnedFd> {
    Ok(File::open("/proc/self/ns/net")?.into())
}

/// Runs `work` in a thread of its own inside the namespace.
///
/// # Errors
/// Those of `setns(2)` and of `work`.
pub fn run_in<T, F>(namespace: impl AsFd, work: F) -> io::Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> io::Result<T> + Send + 'static,
{
    let namespace = namespace.as_fd().try_clone_to_owned()?;
    in_thread(move || {
        enter(&namespace)?;
        work()
    })
}

/// Moves the calling thread, and only it, into the namespace for good.
///
/// # Errors
/// Those of `setns(2)`.
pub fn enter(namespace: impl AsFd) -> io::Result<()> {
    setns(namespace, CloneFlags::CLONE_NEWNET).map_err(io::Error::from)
}

/// Connects to `address` inside the namespace.
///
/// # Errors
/// Those of `connect(2)`; `TimedOut` after `timeout`.
pub fn dial(namespace: impl AsFd, address: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    run_in(namespace, move || TcpStream::connect_timeout(&address, timeout))
}

// A namespace entered by a thread would stay with it, so the thread is used once and thrown away.
fn in_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    std::thread::Builder::new()
        .name("netns".into())
        .stack_size(128 << 10)
        .spawn(work)?
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn loopback_up() -> io::Result<()> {
    // SAFETY: plain call; the result is checked.
    let raw = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = (*from).cast_signed();
    }
    request.ifr_ifru.ifru_flags =
        i16::try_from(libc::IFF_UP | libc::IFF_RUNNING).expect("both flags lie in the low byte");
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which lives until the call returns.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A TCP port that is taken but does not answer yet: nobody else can have it, and clients find it silent until [`open`].
///
/// A filter drops every packet for it. Binding without listening would not do: with `SO_REUSEADDR`, which a port
/// needs to be taken again right after its last user, two sockets may bind the same port as long as none listens.
///
/// # Errors
/// `AddrInUse` if the port is taken; others of `bind(2)`.
pub fn reserve(address: SocketAddr) -> io::Result<TcpListener> {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: plain call; the result is checked.
    let raw = unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::ReuseAddr, &true)?;
    drop_all_packets(&socket)?;
    let storage = nix::sys::socket::SockaddrStorage::from(address);
    nix::sys::socket::bind(socket.as_raw_fd(), &storage)?;
    nix::sys::socket::listen(&socket, nix::sys::socket::Backlog::new(1024)?)?;
    Ok(TcpListener::from(socket))
}

/// Lets a reserved port answer.
///
/// # Errors
/// If the port was not [`reserve`]d.
pub fn open(listener: &TcpListener) -> io::Result<()> {
    let unused: libc::c_int = 0;
    // SAFETY: SO_DETACH_FILTER takes an int that it ignores.
    let result = unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_DETACH_FILTER,
            (&raw const unused).cast(),
            std::mem::size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn drop_all_packets(socket: &OwnedFd) -> io::Result<()> {
    // `ret #0`: keep 0 bytes of each packet.
    let mut code = libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 };
    let program = libc::sock_fprog { len: 1, filter: &raw mut code };
    // SAFETY: the program and its one instruction live until the call returns; the kernel copies them.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            std::mem::size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loopback(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    #[test]
    fn a_reserved_port_is_taken_silent_and_answers_once_opened() {
        let listener = reserve(loopback(0)).expect("any port");
        let address = listener.local_addr().expect("address");
        let error = reserve(address).expect_err("taken");
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        let error = TcpStream::connect_timeout(&address, Duration::from_millis(50)).expect_err("silent");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        open(&listener).expect("open");
        TcpStream::connect_timeout(&address, Duration::from_secs(2)).expect("answers");
    }

    #[expect(clippy::print_stdout, reason = "a test says why it is skipped")]
    #[test]
    fn a_server_in_a_namespace_is_reached_by_dialling_into_it_and_not_from_outside() {
        let namespace = match create() {
            Ok(namespace) => namespace,
            Err(error) => {
                let needs = std::env::var("REWARM_TEST_NEEDS").unwrap_or_default();
                assert!(!needs.split(',').any(|need| need == "root"), "needs root: {error}");
                println!("skipped: needs root");
                return;
            }
        };
        let listener =
            run_in(&namespace, || TcpListener::bind(loopback(0))).expect("bind on the loopback inside");
        let address = listener.local_addr().expect("address");
        dial(&namespace, address, Duration::from_secs(1)).expect("reached from inside");
        let outside = TcpStream::connect_timeout(&address, Duration::from_millis(200));
        assert!(outside.is_err(), "the namespace must not be reachable from outside");
    }
}
