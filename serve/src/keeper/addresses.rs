//! Listening sockets: made by root, so that any port can be had, and given to the gateway.

use std::collections::BTreeSet;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket, sockopt,
};

use crate::config::Config;
use crate::error::{Error, Result};
use crate::link::Purpose;

/// Connections that wait to be accepted: a burst must not wait for the second try of a lost packet.
const BACKLOG: i32 = 4096;

/// Addresses that the gateway has.
#[derive(Debug, Default)]
pub(super) struct Addresses(BTreeSet<(Purpose, SocketAddr)>);

impl Addresses {
    /// The gateway is gone, and its sockets with it.
    pub(super) fn forget(&mut self) {
        self.0.clear();
    }

    /// Opens what the configuration names and the gateway does not have yet.
    ///
    /// # Errors
    /// An address is taken or does not exist; then nothing is open that was not before.
    pub(super) fn open(&mut self, config: &Config) -> Result<Vec<(Purpose, SocketAddr, TcpListener)>> {
        let mut wanted: BTreeSet<(Purpose, SocketAddr)> =
            config.pools.iter().map(|pool| (Purpose::Clients, pool.listen)).collect();
        wanted.extend(config.serve.admin.map(|address| (Purpose::Admin, address)));
        wanted.extend(config.serve.keda.map(|address| (Purpose::Keda, address)));
        let opened = wanted
            .difference(&self.0)
            .map(|(purpose, address)| {
                let listener =
                    take(*address).map_err(|source| Error::Listen { address: *address, source })?;
                Ok((*purpose, *address, listener))
            })
            .collect::<Result<Vec<_>>>()?;
        self.0 = wanted;
        Ok(opened)
    }
}

fn take(address: SocketAddr) -> io::Result<TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(TcpListener::from(socket))
}
