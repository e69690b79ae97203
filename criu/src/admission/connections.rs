//! Lists the network connections of a dump and says where their other sides are.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use crate::image::files::{self, Descriptor, FileKind, InetSocket, OpenFile, Protocol, SocketState};

/// Where the other side of a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// In the dump too: the connection survives. The id of the other socket where there is exactly one.
    Inside {
        /// Id of the other socket in `files.img`; `None` for UDP, where any number of sockets can answer.
        id: Option<u32>,
    },
    /// A listener of the dump that has not accepted the connection: the other side is not in the dump, and the first
    /// data sent in a clone are answered with a reset.
    Unaccepted,
    /// Somewhere else. In a clone's own network namespace nobody answers.
    Outside,
}

/// A connected socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connection {
    /// Id of the socket in `files.img`, for [`crate::patch::close_connections`].
    pub id: u32,
    /// Protocol.
    pub protocol: Protocol,
    /// State.
    pub state: SocketState,
    /// Own address.
    pub local: SocketAddr,
    /// Address of the other side.
    pub remote: SocketAddr,
    /// Where the other side is.
    pub peer: Peer,
    /// Who has it open; empty if it is only in a queue.
    pub owners: Vec<Descriptor>,
}

/// A socket that accepts connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listener {
    /// Id of the socket in `files.img`.
    pub id: u32,
    /// Its address.
    pub local: SocketAddr,
    /// Who has it open.
    pub owners: Vec<Descriptor>,
}

/// All connected IPv4 and IPv6 sockets.
///
/// # Errors
/// [`crate::Error::Io`] or [`crate::Error::Image`] if the images cannot be read.
pub fn connections(directory: &Path) -> crate::Result<Vec<Connection>> {
    let mut owners = files::descriptors(directory)?;
    let sockets = sockets(directory)?;
    let mut by_address: HashMap<(u32, SocketAddr, SocketAddr), u32> = HashMap::new();
    let mut listening = HashSet::new();
    for (id, socket) in &sockets {
        if socket.protocol == Protocol::Tcp && socket.is_connected() {
            by_address.insert((socket.namespace, plain(socket.local), plain(socket.remote)), *id);
        } else if socket.state == SocketState::Listen {
            listening.insert((socket.namespace, socket.local.port()));
        }
    }
    let peer = |socket: &InetSocket| {
        let (local, remote) = (plain(socket.local), plain(socket.remote));
        if socket.protocol != Protocol::Tcp {
            return if is_local(remote.ip()) { Peer::Inside { id: None } } else { Peer::Outside };
        }
        match by_address.get(&(socket.namespace, remote, local)) {
            Some(&id) => Peer::Inside { id: Some(id) },
            None if is_local(remote.ip()) && listening.contains(&(socket.namespace, remote.port())) => {
                Peer::Unaccepted
            }
            None => Peer::Outside,
        }
    };
    let connected = sockets.iter().filter(|(_, socket)| socket.is_connected());
    let connection = |(id, socket): &(u32, InetSocket)| Connection {
        id: *id,
        protocol: socket.protocol,
        state: socket.state,
        local: socket.local,
        remote: socket.remote,
        peer: peer(socket),
        owners: owners.remove(id).unwrap_or_default(),
    };
    Ok(connected.map(connection).collect())
}

/// All TCP sockets that accept connections.
///
/// # Errors
/// [`crate::Error::Io`] or [`crate::Error::Image`] if the images cannot be read.
pub fn listeners(directory: &Path) -> crate::Result<Vec<Listener>> {
    let mut owners = files::descriptors(directory)?;
    let listening = sockets(directory)?.into_iter().filter(|(_, socket)| socket.state == SocketState::Listen);
    let listener = |(id, socket): (u32, InetSocket)| Listener {
        id,
        local: socket.local,
        owners: owners.remove(&id).unwrap_or_default(),
    };
    Ok(listening.map(listener).collect())
}

fn sockets(directory: &Path) -> crate::Result<Vec<(u32, InetSocket)>> {
    let files = files::read(directory)?.into_iter();
    let socket =
        |OpenFile { id, kind }| if let FileKind::Inet(socket) = kind { Some((id, socket)) } else { None };
    Ok(files.filter_map(socket).collect())
}

/// An IPv4 address inside an IPv6 socket is the same address.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn is_local(ip: IpAddr) -> bool {
    ip.is_loopback() || ip.is_unspecified()
}
