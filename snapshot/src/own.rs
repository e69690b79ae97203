//! Rewarm's own connections to the server: published ports, probes and hooks, a gateway's requests.
//!
//! Nobody but Rewarm can connect to a server in a network namespace of its own. In a network that others use too (`--net host`,
//! `ns:`) a connection is Rewarm's own if a process of Rewarm holds its other end. Nothing is written down for that: the
//! gateway's connections never pass the shim, and every one of them may change hands or end at any time.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;

use procfs::net::{TcpNetEntry, TcpState};
use procfs::process::{FDTarget, Process};

/// The server's address and the other one of each connection.
pub(crate) type Pairs = BTreeSet<(SocketAddr, SocketAddr)>;

/// The processes of Rewarm that may hold an end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Own(Vec<i32>);

impl Own {
    /// Finds them: all that run the program of this process, or that of the shim, which may be an earlier version's.
    pub(crate) fn find(shim: i32) -> Self {
        let program = |pid: &str| {
            let metadata = std::fs::metadata(format!("/proc/{pid}/exe")).ok()?;
            Some((metadata.dev(), metadata.ino()))
        };
        let programs: BTreeSet<_> =
            [program("self"), program(&shim.to_string())].into_iter().flatten().collect();
        let all =
            procfs::process::all_processes().into_iter().flatten().flatten().map(|process| process.pid());
        Self(all.filter(|pid| program(&pid.to_string()).is_some_and(|it| programs.contains(&it))).collect())
    }

    /// The connections between them and ports on which somebody else listens in the network of the task `init`. The other way
    /// round, from the server to a published port or a gateway, a connection is the server's and not Rewarm's.
    pub(crate) fn connections(&self, init: i32) -> Pairs {
        let sockets: BTreeSet<u64> = self.0.iter().flat_map(|pid| sockets(*pid)).collect();
        let entries = entries(init);
        let is_own = |entry: &&TcpNetEntry| sockets.contains(&entry.inode);
        let listened: BTreeSet<u16> = entries
            .iter()
            .filter(|entry| entry.state == TcpState::Listen && !is_own(entry))
            .map(|entry| entry.local_address.port())
            .collect();
        entries
            .iter()
            .filter(|entry| entry.state != TcpState::Listen)
            .filter(is_own)
            .filter(|entry| listened.contains(&entry.remote_address.port()))
            .map(|entry| (plain(entry.remote_address), plain(entry.local_address)))
            .collect()
    }
}

/// All TCP sockets in the network of a task.
pub(crate) fn entries(task: i32) -> Vec<TcpNetEntry> {
    let Ok(process) = Process::new(task) else { return Vec::new() };
    process.tcp().into_iter().chain(process.tcp6()).flatten().collect()
}

/// An IPv4 address inside an IPv6 socket is the same address.
pub(crate) fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Inodes of the sockets that a process holds.
fn sockets(pid: i32) -> Vec<u64> {
    let fds = Process::new(pid).and_then(|process| process.fd()).into_iter().flatten().flatten();
    fds.filter_map(|fd| if let FDTarget::Socket(inode) = fd.target { Some(inode) } else { None }).collect()
}
