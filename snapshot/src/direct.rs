//! Device memory that goes past the server's own: from the devices into a file in memory, which keeps it until the server has its
//! devices back and the snapshot is uploaded, and from there into regions of the store, one for each process and device.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use bytes::Bytes;
use rewarm_criu::layout::{PAGE_BYTES, Run};
use rewarm_gpu::carried::Carried;
use rewarm_gpu::custom::Part;
use rewarm_store::{RegionKind, Session};

use crate::error::Cause;
use crate::stream::{Pages, alike};

/// Bytes that are read at a time.
const STEP: u64 = 2 << 20;

/// An empty file that only this process and those it is passed to know.
pub(crate) fn file() -> Result<OwnedFd, Cause> {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    nix::sys::memfd::memfd_create(c"rewarm-device-memory", flags)
        .map_err(|errno| Cause::io("make a file in memory for device memory")(errno.into()))
}

/// Puts everything that was kept into the store.
pub(crate) async fn store(session: &Session, file: &File, carried: &Carried) -> Result<(), Cause> {
    for process in &carried.processes {
        for part in &process.direct {
            let (pid, gpu) = (process.pid.unsigned_abs(), Some(part.gpu.to_string()));
            let mut region = Pages::begin(session, RegionKind::Device { pid, gpu, direct: true }).await?;
            put(&mut region, file, part).await?;
            region.finish().await?;
        }
    }
    Ok(())
}

async fn put(region: &mut Pages, file: &File, part: &Part) -> Result<(), Cause> {
    let whole = part.bytes / PAGE_BYTES * PAGE_BYTES;
    if whole != part.bytes {
        let what = format!("{} bytes of device memory on {} are no whole pages", part.bytes, part.gpu);
        return Err(Cause::io("store device memory")(std::io::Error::other(what)));
    }
    let mut at = 0;
    while at < part.bytes {
        let mut bytes = vec![0; usize::try_from(STEP.min(part.bytes - at)).expect("small")];
        let read = file.read_exact_at(&mut bytes, part.offset + at);
        read.map_err(Cause::io("read the device memory that was kept"))?;
        let mut bytes = Bytes::from(bytes);
        let runs: Vec<Run> = alike(&bytes).collect();
        for run in runs {
            let of_it = bytes.split_to(usize::try_from(run.pages * PAGE_BYTES).expect("small"));
            region.push(Run { vaddr: at + run.vaddr, lazy: true, ..run }, of_it).await?;
        }
        at += STEP;
    }
    Ok(())
}
