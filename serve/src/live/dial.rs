//! Connections into replicas: only the parent may make them, and sends them over.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rewarm_gateway::Dial;
use tokio::net::TcpStream;
use tokio::sync::oneshot;

use crate::link::{Line, ToParent};

type Answer = io::Result<OwnedFd>;

/// Questions for connections that are under way.
pub(crate) struct Dialler {
    line: Line,
    next: AtomicU64,
    asked: Mutex<HashMap<u64, oneshot::Sender<Answer>>>,
}

impl Dialler {
    pub(crate) fn new(line: Line) -> Self {
        Self { line, next: AtomicU64::new(1), asked: Mutex::default() }
    }

    /// A connection to a replica's port.
    pub(crate) async fn dial(&self, name: &str, port: u16) -> io::Result<TcpStream> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, hear) = oneshot::channel();
        self.lock().insert(number, answer);
        // Who does not wait any more is forgotten when the answer comes.
        self.line.tell(&ToParent::Dial { number, name: name.to_owned(), port }, &[])?;
        let socket = hear.await.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))??;
        let stream = std::net::TcpStream::from(socket);
        stream.set_nonblocking(true)?;
        TcpStream::from_std(stream)
    }

    /// The parent's answer.
    pub(crate) fn answered(&self, number: u64, answer: Answer) {
        if let Some(asked) = self.lock().remove(&number) {
            // Dropped where nobody waits any more, and the connection with it.
            let _ = asked.send(answer);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Answer>>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The server of one replica.
pub(super) struct Inside {
    pub(super) dialler: Arc<Dialler>,
    pub(super) name: String,
    pub(super) port: u16,
}

#[async_trait::async_trait]
impl Dial for Inside {
    async fn dial(&self) -> io::Result<TcpStream> {
        self.dialler.dial(&self.name, self.port).await
    }
}
