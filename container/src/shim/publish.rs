//! Ports of the host in front of ports of the replica.
//!
//! One thread does all of it: it lives in the replica's network namespace, so that whatever it connects comes out inside;
//! the listening sockets were made before, in the host's namespace, and stay there.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;

use rewarm_sys::netns;
use tokio::io::copy_bidirectional;
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use crate::error::{Context, Error};
use crate::spec::Publish;

/// A port that is taken but silent, until the replica is ready.
#[derive(Debug)]
pub(super) struct Reserved {
    publish: Publish,
    listener: TcpListener,
}

/// Takes the host's ports; a port of 0 is replaced by the one that the kernel chose.
pub(super) fn reserve(wanted: &[Publish]) -> Result<Vec<Reserved>, Error> {
    wanted
        .iter()
        .map(|publish| {
            let address = publish.host();
            let listener = netns::reserve(address).map_err(|source| Error::PortInUse { address, source })?;
            let chosen = listener.local_addr().context("look at", address)?.port();
            Ok(Reserved { publish: Publish { host_port: chosen, ..*publish }, listener })
        })
        .collect()
}

impl Reserved {
    pub(super) fn publish(&self) -> Publish {
        self.publish
    }
}

/// Ports that are open. Dropping it closes them and all connections through them.
#[derive(Debug)]
pub(super) struct Open {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Open {
    fn drop(&mut self) {
        drop(self.stop.take());
        // It ends at the word; one that has failed has closed everything.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Opens the ports and forwards until the value is dropped.
pub(super) fn open(reserved: Vec<Reserved>, namespace: OwnedFd) -> Result<Open, Error> {
    if reserved.is_empty() {
        return Ok(Open { stop: None, thread: None });
    }
    for port in &reserved {
        port.listener.set_nonblocking(true).context("set up", port.publish)?;
        netns::open(&port.listener).context("open", port.publish)?;
    }
    let thread = std::thread::Builder::new().name("publish".into());
    let (stop, stopped) = oneshot::channel();
    let work = move || {
        let result = netns::enter(&namespace)
            .and_then(|()| tokio::runtime::Builder::new_current_thread().enable_io().build());
        match result {
            // What still runs when it returns is closed with the runtime.
            Ok(runtime) => runtime.block_on(forward_all(reserved, stopped)),
            Err(error) => tracing::error!(%error, "published ports are dead"),
        }
    };
    let thread = thread.spawn(work).context("start", "the thread of the published ports")?;
    Ok(Open { stop: Some(stop), thread: Some(thread) })
}

async fn forward_all(reserved: Vec<Reserved>, stopped: oneshot::Receiver<()>) {
    for port in reserved {
        tokio::spawn(forward(port));
    }
    // The other end is dropped when the ports are to be closed.
    let _ = stopped.await;
}

async fn forward(reserved: Reserved) {
    let port = reserved.publish;
    let listener = match tokio::net::TcpListener::from_std(reserved.listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, %port, "a published port is dead"),
    };
    loop {
        match listener.accept().await {
            Ok((client, _)) => {
                tokio::spawn(carry(client, port));
            }
            // Out of descriptors: the next one may do better.
            Err(error) => {
                tracing::warn!(%error, %port, "accept");
                tokio::task::yield_now().await;
            }
        }
    }
}

async fn carry(mut client: TcpStream, port: Publish) {
    // Requests and tokens are small and wait for each other.
    let _ = client.set_nodelay(true);
    match TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port.port))).await {
        Ok(mut server) => {
            let _ = server.set_nodelay(true);
            // How a connection ends is between its two ends.
            let _ = copy_bidirectional(&mut client, &mut server).await;
        }
        Err(error) => tracing::debug!(%error, %port, "the server does not listen"),
    }
}
