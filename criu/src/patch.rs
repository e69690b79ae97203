//! Mends and changes images between a dump and a restore.
//!
//! Every patch works on the fields of the messages and leaves all others byte for byte as they were, those that this
//! program does not know too. Each writes a file anew beside the old one and puts it in its place at once.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use prost::Message;

use crate::image::files::{self, FileKind, OpenFile, Protocol, SocketState, Timerfd};
use crate::image::mm::{self, MADV_HUGEPAGE, MADV_NOHUGEPAGE, Vma, VmaEntry};
use crate::image::namespaces::Clocks;
use crate::image::{Image, Kind, core, numbered, pstree, replace};
use crate::wire::{self, Broken};
use crate::{Error, Fault};

/// Fields of an open file.
const FILE_ID: u32 = 2;
const FILE_INET: u32 = 4;
const FILE_TIMERFD: u32 = 12;

/// Fields of a timer descriptor.
const TIMER_FLAGS: u32 = 6;
const TIMER_VALUE_S: u32 = 7;
const TIMER_VALUE_NS: u32 = 8;

/// Fields of an IPv4 or IPv6 socket.
const SOCKET_STATE: u32 = 6;
const SOCKET_LOCAL_PORT: u32 = 7;
const SOCKET_REMOTE_PORT: u32 = 8;
const SOCKET_SHUTDOWN: u32 = 19;
/// Both directions are shut down.
const SHUTDOWN_BOTH: u64 = 3;

/// Field of a mapping with its advice.
const VMA_ADVICE: u32 = 9;

/// SIGCHLD in a set of signals.
const CHILD_SIGNAL: u64 = 1 << 16;

const CLOCK_REALTIME: u32 = 0;
/// Set with an absolute time.
const TIMER_ABSTIME: u32 = 1;
/// What a timer that should have expired already is given.
const AT_ONCE: Duration = Duration::from_millis(1);

/// A timer descriptor that was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rearmed {
    /// Id of the file in `files.img`.
    pub id: u32,
    /// As CRIU dumped it.
    pub before: Timerfd,
    /// As CRIU will set it.
    pub after: Timerfd,
}

/// Mends timer descriptors, which CRIU (up to 4.2 at least) does not restore as they were:
///
/// - A periodic one that expired while everything was frozen is dumped with no time left, which at restore means: not
///   armed, never again. It is set to expire in a millisecond.
/// - One that was set with an absolute time is restored by adding the time left to the clock's whole seconds, and so
///   expires up to a second early. With CLOCK_MONOTONIC and CLOCK_BOOTTIME, which nobody can set, it is set to the time
///   left.
/// - One that was set with an absolute time and is not armed any more has no time left, to which CRIU adds the same: it
///   expires once more. It stays as it is.
///
/// To be applied after a dump, before its first restore; a second time changes nothing.
///
/// # Errors
/// [`Error::Io`] or [`Error::Image`] if `files.img` cannot be read or written.
pub fn rearm_timerfds(directory: &Path) -> crate::Result<Vec<Rearmed>> {
    set_timerfds(directory, |before| {
        let mut after = before;
        if before.value.is_zero() && !before.interval.is_zero() {
            after.value = AT_ONCE;
        }
        if before.clock != CLOCK_REALTIME || after.value.is_zero() {
            after.settime_flags &= !TIMER_ABSTIME;
        }
        after
    })
}

/// Brings alarms (timer descriptors set to a time of day) forward by the time that has passed since the dump, so that an
/// alarm at noon stays at noon; CRIU would give it the time that was left. Alarms that were missed go off at once.
///
/// To be applied once to each copy of the images, right before its restore.
///
/// # Errors
/// [`Error::Io`] or [`Error::Image`] if `files.img` cannot be read or written.
pub fn forward_alarms(directory: &Path, passed: Duration) -> crate::Result<Vec<Rearmed>> {
    set_timerfds(directory, |before| {
        let is_alarm = before.clock == CLOCK_REALTIME && before.settime_flags & TIMER_ABSTIME != 0;
        let value = before.value.saturating_sub(passed).max(AT_ONCE);
        if is_alarm && !before.value.is_zero() { Timerfd { value, ..before } } else { before }
    })
}

fn set_timerfds(directory: &Path, set: impl Fn(Timerfd) -> Timerfd) -> crate::Result<Vec<Rearmed>> {
    let mut changed = Vec::new();
    for file in files::read(directory)? {
        if let OpenFile { id, kind: FileKind::Timerfd(before) } = file {
            let after = set(before);
            if after != before {
                changed.push(Rearmed { id, before, after });
            }
        }
    }
    if changed.is_empty() {
        return Ok(changed);
    }
    change_files(directory, FILE_TIMERFD, |id, body| {
        let Some(Rearmed { after, .. }) = changed.iter().find(|rearmed| rearmed.id == id) else {
            return Ok(None);
        };
        let numbers = [
            (TIMER_FLAGS, u64::from(after.settime_flags)),
            (TIMER_VALUE_S, after.value.as_secs()),
            (TIMER_VALUE_NS, u64::from(after.value.subsec_nanos())),
        ];
        wire::with_numbers(body, &numbers).map(Some)
    })?;
    Ok(changed)
}

/// Makes chosen sockets come back closed: TCP connections and connected UDP sockets, by their ids in `files.img`. All
/// others stay as they are, so that the connections between processes inside a replica survive.
///
/// In the restored process the descriptor of a TCP connection is there, its reads return the end of the stream and its
/// writes fail with EPIPE, as after the other side closed the connection. A UDP socket has forgotten its peer and can be
/// connected anew. CRIU itself can only close all TCP connections at once (`tcp-close`). The images of what was queued in them are removed. Returns the number of sockets that were changed.
///
/// # Errors
/// [`Error::Io`] or [`Error::Image`] if `files.img` cannot be read or written; [`Error::Image`] if an id is not that of a
/// connected socket. Nothing is changed then.
pub fn close_connections(directory: &Path, ids: &[u32]) -> crate::Result<usize> {
    let chosen: HashSet<u32> = ids.iter().copied().collect();
    let mut wanted = HashMap::new();
    let mut inodes = Vec::new();
    for OpenFile { id, kind } in files::read(directory)? {
        if let FileKind::Inet(socket) = kind
            && chosen.contains(&id)
            && socket.is_connected()
        {
            wanted.insert(id, socket.protocol);
            inodes.push(socket.inode);
        }
    }
    if wanted.len() != chosen.len() {
        let fault = Fault::Absent { what: "connected socket of each given id" };
        return Err(Error::image(directory.join("files.img"))(fault));
    }
    if inodes.is_empty() {
        return Ok(0);
    }
    // Without a remote port CRIU takes it for a socket that was never connected; without a local one it does not bind it.
    // CRIU then calls shutdown, which fails with ENOTCONN and yet marks both directions as ended: that is what makes
    // reads return 0 instead of an error that no server expects from a connection it has accepted.
    let unconnected =
        [(SOCKET_STATE, u64::from(SocketState::CLOSED)), (SOCKET_LOCAL_PORT, 0), (SOCKET_REMOTE_PORT, 0)];
    let ended = [&unconnected[..], &[(SOCKET_SHUTDOWN, SHUTDOWN_BOTH)]].concat();
    change_files(directory, FILE_INET, |id, body| match wanted.get(&id) {
        Some(Protocol::Tcp) => wire::with_numbers(body, &ended).map(Some),
        Some(_) => wire::with_numbers(body, &unconnected).map(Some),
        None => Ok(None),
    })?;
    for inode in &inodes {
        let path = directory.join(format!("tcp-stream-{inode:x}.img"));
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io("remove", path)(error));
            }
            _ => {}
        }
    }
    Ok(inodes.len())
}

/// Asks for huge pages in every mapping of a task that overlaps one of the ranges, can be lazy and was not advised against
/// them by the task itself. Returns those mappings.
///
/// CRIU gives the advice last, after its own filling: only what is filled after the restore is finished gets huge
/// pages.
///
/// # Errors
/// [`Error::Io`] or [`Error::Image`] if `mm-PID.img` cannot be read or written.
pub fn advise_huge_pages(directory: &Path, pid: u32, ranges: &[Range<u64>]) -> crate::Result<Vec<Vma>> {
    // Reads and checks the whole file before anything is written.
    let all = mm::read(directory, pid)?.vmas;
    let wanted = |vma: &Vma| {
        vma.can_be_lazy()
            && vma.madv & (MADV_NOHUGEPAGE | MADV_HUGEPAGE) == 0
            && ranges.iter().any(|range| range.start < vma.end && vma.start < range.end)
    };
    let chosen: Vec<Vma> = all.into_iter().filter(wanted).collect();
    if chosen.is_empty() {
        return Ok(chosen);
    }
    let image = Image::read(&mm::path(directory, pid), Kind::Mm)?;
    image.rewrite(|record| {
        wire::with_messages(record, mm::VMA_FIELD, |vma| {
            let entry = VmaEntry::decode(vma).map_err(|_| "a mapping is not decodable")?;
            let vma_is = Vma::from(entry);
            if !wanted(&vma_is) {
                return Ok(None);
            }
            wire::with_numbers(vma, &[(VMA_ADVICE, vma_is.madv | MADV_HUGEPAGE)]).map(Some)
        })
    })?;
    Ok(chosen)
}

/// Blocks SIGCHLD in every thread of the tasks whose handler would see that a child of theirs was stopped. Returns the threads, by
/// their ids in the innermost pid namespace, that did not block it before: it has to be unblocked in them when the tree goes on.
///
/// For a tree that CRIU leaves stopped: each task is stopped by a signal of its own, so a parent that is not yet on its way to stop
/// when its child has stopped runs the handler first, and nobody could take that back.
///
/// # Errors
/// [`Error::Io`] or [`Error::Image`] if the tree or a thread cannot be read or written.
pub fn block_child_stops(directory: &Path) -> crate::Result<Vec<u32>> {
    let tasks = pstree::read(directory)?;
    let parents: HashSet<u32> = tasks.iter().map(|task| task.parent).collect();
    let mut changed = Vec::new();
    for task in tasks.iter().filter(|task| parents.contains(&task.pid)) {
        let main = core::read(directory, task.pid)?;
        if main.is_ended() || !main.task.is_some_and(|task| task.hears_of_stops) {
            continue;
        }
        for &thread in &task.threads {
            let image = Image::read(&core::path(directory, thread), Kind::Core)?;
            let block = |field: u32| {
                move |part: &[u8]| {
                    let blocked = wire::number(part, field)?.unwrap_or(0);
                    let now = blocked | CHILD_SIGNAL;
                    if now == blocked {
                        Ok(None)
                    } else {
                        wire::with_numbers(part, &[(field, now)]).map(Some)
                    }
                }
            };
            let rewritten = image.rewrite(|record| {
                let task = wire::with_messages(record, core::TASK_FIELD, block(core::TASK_BLOCKED))?;
                let from = task.as_deref().unwrap_or(record);
                let both = wire::with_messages(from, core::THREAD_FIELD, block(core::THREAD_BLOCKED))?;
                Ok(both.or(task))
            })?;
            if rewritten {
                changed.push(thread);
            }
        }
    }
    Ok(changed)
}

/// Sets the clocks from which a restored replica goes on, see [`crate::image::namespaces::clocks`]. Returns the number of
/// files changed: 0 where the dump has no clocks.
///
/// # Errors
/// [`Error::Io`] or [`Error::Image`] if the file cannot be read or written.
pub fn set_clocks(directory: &Path, clocks: Clocks) -> crate::Result<usize> {
    let found = numbered(directory, "timens-", 10)?;
    for (_, path) in &found {
        let image = Image::read(path, Kind::Timens)?;
        if image.records().len() != 1 {
            return Err(Error::image(path)(Fault::Absent { what: "clock" }));
        }
        // Numbers that are 0 must be written too: CRIU's messages require them.
        let mut bytes = crate::image::head(Kind::Timens);
        let mut message = Vec::new();
        for (number, time) in [(1, clocks.monotonic), (2, clocks.boottime)] {
            let mut part = Vec::new();
            wire::put_number(&mut part, 1, time.as_secs());
            wire::put_number(&mut part, 2, u64::from(time.subsec_nanos()));
            wire::put_bytes(&mut message, number, &part);
        }
        bytes.extend_from_slice(&(message.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&message);
        replace(path, &bytes)?;
    }
    Ok(found.len())
}

/// Changes the bodies of open files: `change` gets id and body of each file that has a body of this kind.
fn change_files(
    directory: &Path,
    body_field: u32,
    mut change: impl FnMut(u32, &[u8]) -> Result<Option<Vec<u8>>, Broken>,
) -> crate::Result<()> {
    let image = Image::read(&directory.join("files.img"), Kind::Files)?;
    image.rewrite(|record| {
        let Some(id) = wire::number(record, FILE_ID)?.and_then(|id| u32::try_from(id).ok()) else {
            return Ok(None);
        };
        wire::with_messages(record, body_field, |body| change(id, body))
    })?;
    Ok(())
}
