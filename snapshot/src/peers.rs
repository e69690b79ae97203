//! Which Unix socket is connected to which.
//!
//! `/proc` tells paths and nothing of connections. The kernel's diagnosis of sockets does (`sock_diag(7)`, which CRIU needs too), for
//! those of one network namespace.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::unix::nlas::Nla;
use netlink_packet_sock_diag::unix::{ShowFlags, StateFlags, UnixRequest};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use netlink_sys::{Socket, SocketAddr};

/// The kernel packs answers into messages of at most this many bytes.
const MESSAGE_BYTES: usize = 32 << 10;

/// The other end of each connected Unix socket in the network namespace of a task, by inode. An end that nobody has accepted yet has
/// none, and is left out.
///
/// # Errors
/// The task has ended, its namespace cannot be entered, or the kernel has no such diagnosis.
pub(crate) fn peers(task: i32) -> io::Result<BTreeMap<u64, u64>> {
    rewarm_sys::netns::run_in(File::open(format!("/proc/{task}/ns/net"))?, ask)
}

fn ask() -> io::Result<BTreeMap<u64, u64>> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let request = UnixRequest {
        state_flags: StateFlags::all(),
        inode: 0,
        show_flags: ShowFlags::PEER,
        cookie: [0xff; 8],
    };
    let mut message = NetlinkMessage::new(header, SockDiagMessage::UnixRequest(request).into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let (mut found, mut received) = (BTreeMap::new(), vec![0; MESSAGE_BYTES]);
    loop {
        let length = socket.recv(&mut &mut received[..], 0)?;
        let mut rest = received.get(..length).ok_or(io::ErrorKind::InvalidData)?;
        while !rest.is_empty() {
            let answer = NetlinkMessage::<SockDiagMessage>::deserialize(rest).map_err(io::Error::other)?;
            match answer.payload {
                NetlinkPayload::InnerMessage(SockDiagMessage::UnixResponse(seen)) => {
                    let peer = seen.nlas.iter().find_map(|nla| match nla {
                        Nla::Peer(inode) if *inode > 0 => Some(u64::from(*inode)),
                        _ => None,
                    });
                    found.extend(peer.map(|peer| (u64::from(seen.header.inode), peer)));
                }
                NetlinkPayload::Done(_) => return Ok(found),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
            let taken = (answer.header.length as usize).next_multiple_of(4).max(4);
            rest = rest.get(taken..).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn both_ends_know_each_other_until_one_is_closed() {
        let inode = |socket: &UnixStream| {
            let link = std::fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd())).expect("open");
            let link = link.to_string_lossy().into_owned();
            link.trim_start_matches("socket:[").trim_end_matches(']').parse::<u64>().expect("a number")
        };
        let pid = i32::try_from(std::process::id()).expect("a pid");
        // More than one message has room for.
        let pairs: Vec<_> = (0..200).map(|_| UnixStream::pair().expect("a pair")).collect();
        let found = peers(pid).expect("the kernel tells");
        for (one, other) in &pairs {
            assert_eq!(
                (found.get(&inode(one)), found.get(&inode(other))),
                (Some(&inode(other)), Some(&inode(one)))
            );
        }
        let (one, other) = UnixStream::pair().expect("a pair");
        let left = inode(&one);
        drop(other);
        assert_eq!(peers(pid).expect("the kernel tells").get(&left), None);
    }
}
