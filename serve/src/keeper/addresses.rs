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
/// A connection on which nothing has come for so long is asked whether its client is there, so often, with so many seconds in between.
/// A client whose machine went away without a word would keep a replica's slot for ever, on a WebSocket that is silent.
const SILENT_SECONDS: u32 = 60;
const ASKED_TIMES: u32 = 6;
const ASKED_EVERY_SECONDS: u32 = 10;

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
    // Connections inherit it from the socket that accepts them.
    setsockopt(&socket, sockopt::KeepAlive, &true)?;
    setsockopt(&socket, sockopt::TcpKeepIdle, &SILENT_SECONDS)?;
    setsockopt(&socket, sockopt::TcpKeepCount, &ASKED_TIMES)?;
    setsockopt(&socket, sockopt::TcpKeepInterval, &ASKED_EVERY_SECONDS)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(TcpListener::from(socket))
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::getsockopt;

    use super::*;

    #[test]
    fn a_connection_of_a_client_that_goes_without_a_word_is_found_out() {
        let listener = take(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a port");
        let address = listener.local_addr().expect("its address");
        let _client = std::net::TcpStream::connect(address).expect("it listens");
        let (connection, _) = listener.accept().expect("a connection");
        assert!(getsockopt(&connection, sockopt::KeepAlive).expect("an option"));
        let idle = getsockopt(&connection, sockopt::TcpKeepIdle).expect("an option");
        let count = getsockopt(&connection, sockopt::TcpKeepCount).expect("an option");
        let interval = getsockopt(&connection, sockopt::TcpKeepInterval).expect("an option");
        assert_eq!(idle + count * interval, 120, "seconds");
    }
}
