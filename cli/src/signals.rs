//! SIGINT, SIGTERM and SIGHUP: an operation that is interrupted is undone before the program ends.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::Cause;

/// Signals that ask this command to end.
pub(crate) struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

impl Interrupts {
    /// From here on the three signals do not end the process by themselves.
    pub(crate) fn watch() -> Result<Self, Cause> {
        let watch = |kind| signal(kind).map_err(Cause::Signals);
        Ok(Self {
            interrupt: watch(SignalKind::interrupt())?,
            terminate: watch(SignalKind::terminate())?,
            hang_up: watch(SignalKind::hangup())?,
        })
    }

    /// Waits for one of them and gives its name.
    pub(crate) async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.hang_up.recv() => "SIGHUP",
        }
    }
}
