//! Threads that exist before there is work for them.
//!
//! The calls of a dump wait for each other, so each needs a thread, and the server stands still meanwhile. Where memory or the
//! limit of processes is short that must show before it does; and the runtime's own threads would not show it at all: it queues
//! a call for which it can make no thread behind the others.

use std::sync::mpsc::{Sender, channel};

use tokio::sync::oneshot;

use crate::error::Cause;

/// A thread that waits for its one call. Dropped without one, it ends.
pub(crate) struct Aside(Sender<Box<dyn FnOnce() + Send>>);

impl Aside {
    /// Starts it.
    pub(crate) fn start(name: &str) -> Result<Self, Cause> {
        let (call, called) = channel::<Box<dyn FnOnce() + Send>>();
        let wait = move || {
            if let Ok(call) = called.recv() {
                call();
            }
        };
        let thread = std::thread::Builder::new().name(format!("snapshot-{name}")).spawn(wait);
        thread.map_err(Cause::io("start a thread, for which memory or the limit of processes is short"))?;
        Ok(Self(call))
    }

    /// Has it make its call.
    pub(crate) fn run<T: Send + 'static>(
        self,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> oneshot::Receiver<T> {
        let (end, ended) = oneshot::channel();
        let call = move || {
            // Nobody listens any more if the dump was given up.
            let _ = end.send(call());
        };
        self.0.send(Box::new(call)).unwrap_or_else(|_| unreachable!("it waits as long as there is a sender"));
        ended
    }
}
