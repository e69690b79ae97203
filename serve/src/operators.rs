//! The addresses for operators: opened, changed and closed as the configuration says.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;

use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::admin::{self, Access};
use crate::config::Config;
use crate::keda;
use crate::link::{Configure, Purpose};
use crate::status::Handle;

/// The admin API and the KEDA scaler.
pub(crate) struct Operators {
    handle: Handle,
    access: Access,
    /// Certificate and key of the scaler.
    tls: Option<(String, String)>,
    offered: BTreeMap<(Purpose, SocketAddr), Offered>,
}

struct Offered {
    /// The same socket once more: a changed certificate needs another server on it.
    socket: std::net::TcpListener,
    /// The server ends when this is dropped.
    _serving: oneshot::Sender<()>,
}

impl Operators {
    pub(crate) fn new(handle: Handle) -> Self {
        Self { handle, access: Access::default(), tls: None, offered: BTreeMap::new() }
    }

    /// Answers at a new address.
    pub(crate) fn offer(
        &mut self,
        purpose: Purpose,
        address: SocketAddr,
        socket: std::net::TcpListener,
    ) -> io::Result<()> {
        let listener = TcpListener::from_std(socket.try_clone()?)?;
        let (serving, ended) = oneshot::channel::<()>();
        let stop = async {
            let _ = ended.await;
        };
        let (handle, access, tls) = (self.handle.clone(), self.access.clone(), self.tls.clone());
        tokio::spawn(async move {
            match purpose {
                Purpose::Admin => admin::serve(listener, access, handle, stop).await,
                Purpose::Keda => {
                    if let Err(error) = keda::serve(listener, tls.as_ref(), handle, stop).await {
                        tracing::error!(%address, %error, "the KEDA scaler ended");
                    }
                }
                Purpose::Clients => unreachable!("clients have a front"),
            }
        });
        self.offered.insert((purpose, address), Offered { socket, _serving: serving });
        Ok(())
    }

    /// Closes what is not wanted any more, and takes token and certificate in. New sockets are offered afterwards.
    pub(crate) fn change(&mut self, config: &Config, configure: &Configure) -> io::Result<()> {
        let wanted = |purpose, address| match purpose {
            Purpose::Admin => config.serve.admin == Some(address),
            Purpose::Keda => config.serve.keda == Some(address),
            Purpose::Clients => false,
        };
        self.offered.retain(|(purpose, address), _| wanted(*purpose, *address));
        self.access.change(configure.token.clone());
        if self.tls != configure.tls {
            self.tls.clone_from(&configure.tls);
            if let Some(place) = config.serve.keda.map(|address| (Purpose::Keda, address))
                && let Some(before) = self.offered.remove(&place)
            {
                self.offer(place.0, place.1, before.socket)?;
            }
        }
        Ok(())
    }
}
