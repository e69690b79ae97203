//! Device memory that goes from the store to the devices without lying in the server's memory: block after block, as it arrives,
//! through a socket to the process that holds the driver.
//!
//! What does not arrive, or is not what was stored, ends the stream too early: the driver then never says that it is done, and
//! the replica is killed.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use rewarm_criu::layout::{Layout, Run};
use rewarm_fetcher::{BLOCK_BYTES, Stream};
use rewarm_gpu::carried::Carried;

use crate::blueprint::DirectRegion;
use crate::error::Cause;
use crate::fetch::BLOCK_WITHIN;

/// Zeros that are written at a time.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
/// How long a restore that failed waits for the failure of the stream that may be behind it.
const WHY_WITHIN: Duration = Duration::from_millis(200);

/// What is sent, in this order.
#[derive(Debug)]
pub(crate) struct Feed {
    stream: Arc<Stream>,
    /// Where a part begins in the stream, and its layout.
    parts: Vec<(u64, Arc<Layout>)>,
}

impl Feed {
    /// Finds each part that the driver will ask for. None where all device memory lies in the tasks.
    pub(crate) fn plan(
        carried: &Carried,
        regions: &[DirectRegion],
        stream: &Arc<Stream>,
    ) -> Result<Option<Self>, Cause> {
        let mut parts = Vec::new();
        for process in &carried.processes {
            for part in &process.direct {
                let (pid, gpu) = (process.pid.unsigned_abs(), part.gpu.to_string());
                let mut fitting = regions.iter().filter(|region| region.pid == pid && region.gpu == gpu);
                let what = || format!("device memory of task {pid} on {gpu}");
                let (Some(region), None) = (fitting.next(), fitting.next()) else {
                    return Err(Cause::Inconsistent { what: format!("{} is not there once", what()) });
                };
                if covers(region.layout.runs()) != Some(part.bytes) {
                    let bytes = part.bytes;
                    return Err(Cause::Inconsistent { what: format!("{} is not {bytes} bytes", what()) });
                }
                parts.push((stream.layout().base(region.region), region.layout.clone()));
            }
        }
        if parts.len() != regions.len() {
            let what =
                format!("{} regions of device memory, of which {} are wanted", regions.len(), parts.len());
            return Err(Cause::Inconsistent { what });
        }
        Ok((!parts.is_empty()).then(|| Self { stream: stream.clone(), parts }))
    }

    /// Begins to send, in a thread of its own.
    pub(crate) fn begin(self) -> Result<Feeding, Cause> {
        let (ours, theirs) = UnixStream::pair().map_err(Cause::io("make a socket pair for device memory"))?;
        let (failed, failure) = channel();
        let work = move || {
            if let Err(cause) = self.send(ours) {
                // Nobody listens any more if the restore has ended.
                let _ = failed.send(cause);
            }
        };
        let thread = std::thread::Builder::new().name("restore-device".to_owned()).spawn(work);
        thread.map_err(Cause::io("start a thread for device memory"))?;
        Ok(Feeding { socket: theirs.into(), failure })
    }

    fn send(&self, mut to: UnixStream) -> Result<(), Cause> {
        for (base, layout) in &self.parts {
            for (offset, run) in layout.placed() {
                let sent = match run.zero {
                    true => send_zeros(&mut to, run.end() - run.vaddr),
                    false => self.send_run(&mut to, base + offset, run.stream_bytes())?,
                };
                match sent {
                    // The driver has refused; whoever asked it says why.
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                    sent => sent.map_err(Cause::io("send device memory to the driver"))?,
                }
            }
        }
        Ok(())
    }

    fn send_run(&self, to: &mut UnixStream, start: u64, bytes: u64) -> Result<io::Result<()>, Cause> {
        let (mut at, end) = (start, start + bytes);
        while at < end {
            let block = at / BLOCK_BYTES;
            let content = self.stream.wait(block, BLOCK_WITHIN)?;
            let until = ((block + 1) * BLOCK_BYTES).min(end);
            let within = |place: u64| usize::try_from(place - block * BLOCK_BYTES).expect("in a block");
            if let Err(error) = to.write_all(&content[within(at)..within(until)]) {
                return Ok(Err(error));
            }
            at = until;
        }
        Ok(Ok(()))
    }
}

fn send_zeros(to: &mut UnixStream, mut bytes: u64) -> io::Result<()> {
    while bytes > 0 {
        let count = usize::try_from(bytes).unwrap_or(usize::MAX).min(ZEROS.len());
        to.write_all(&ZEROS[..count])?;
        bytes -= count as u64;
    }
    Ok(())
}

/// The bytes that runs cover, if they do so from 0 on without a gap.
fn covers(runs: &[Run]) -> Option<u64> {
    runs.iter().try_fold(0, |end, run| (run.vaddr == end).then(|| run.end()))
}

/// Device memory on its way.
#[derive(Debug)]
pub(crate) struct Feeding {
    /// The end that goes to the driver's process.
    pub(crate) socket: OwnedFd,
    failure: Receiver<Cause>,
}

impl Feeding {
    /// Why it ended too early, if it did.
    pub(crate) fn failure(&self) -> Option<Cause> {
        self.failure.recv_timeout(WHY_WITHIN).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_begins_at_0_and_has_no_gap_covers() {
        let run = |vaddr: u64, pages| Run { vaddr: vaddr * 4096, pages, zero: vaddr == 2, lazy: true };
        assert_eq!(covers(&[run(0, 2), run(2, 3), run(5, 1)]), Some(6 * 4096));
        assert_eq!(covers(&[]), Some(0));
        assert_eq!(covers(&[run(1, 2)]), None);
        assert_eq!(covers(&[run(0, 2), run(3, 1)]), None);
    }
}
