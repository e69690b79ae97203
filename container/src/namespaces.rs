//! The network namespace of a replica, made by us and given to runc by path.
//!
//! One that runc makes is restored empty, with its loopback interface down, and restoring TCP connections in it fails.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use rewarm_sys::netns;

use crate::error::{Context, Error, Refusal};
use crate::spec::Net;

/// The network that a server lives in. It lives as long as this value, or a process in it.
#[derive(Debug)]
pub struct Network {
    namespace: OwnedFd,
    host: bool,
}

impl Network {
    /// Makes or opens what the specification asks for.
    ///
    /// # Errors
    /// `Refused` if a namespace given by path does not exist or is none.
    pub fn make(net: &Net) -> Result<Self, Error> {
        let namespace = match net {
            Net::Private => netns::create(),
            Net::None => netns::create_isolated(),
            Net::Host => netns::own(),
            Net::Path(path) => {
                let missing =
                    |source| Refusal::Missing { what: "network namespace", path: path.clone(), source };
                let file = File::open(path).map_err(missing)?;
                netns::run_in(&file, || Ok(())).map_err(missing)?;
                Ok(file.into())
            }
        };
        let namespace = namespace.context("make", format_args!("network {net}"))?;
        Ok(Self { namespace, host: *net == Net::Host })
    }

    /// The path by which runc and CRIU find it while this process lives; `None` for the host's own network.
    #[must_use]
    pub fn path(&self) -> Option<PathBuf> {
        let (pid, fd) = (std::process::id(), self.namespace.as_raw_fd());
        (!self.host).then(|| PathBuf::from(format!("/proc/{pid}/fd/{fd}")))
    }

    /// Connects to a port of its loopback interface.
    ///
    /// # Errors
    /// Those of `connect(2)`.
    pub fn dial(&self, port: u16, timeout: Duration) -> io::Result<TcpStream> {
        netns::dial(&self.namespace, SocketAddr::from((Ipv4Addr::LOCALHOST, port)), timeout)
    }

    /// A descriptor of the namespace for a thread that moves into it.
    ///
    /// # Errors
    /// If no more files can be opened.
    pub fn namespace(&self) -> io::Result<OwnedFd> {
        self.namespace.as_fd().try_clone_to_owned()
    }
}
