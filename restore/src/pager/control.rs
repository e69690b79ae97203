//! The socket pair between the shim and its pager, and what the shim holds.
//!
//! ```text
//! pager -> shim   frame: 4 bytes length (little endian), JSON of a Report; a descriptor travels with the first byte of `held`
//! shim  -> pager  one byte for each Command; closing the socket means: kill the tasks
//! ```
//!
//! The shim's duties, all in [`Holder`]: keep every duplicate until it is `released` or `done` came; on `failed` and on
//! the end of the stream without `done`, kill every task **first**, and let go of the duplicates afterwards. As long as
//! a duplicate is open, a task that touches a missing page waits; when the last one closes, the page reads as zeros.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rewarm_sys::fdpass;
use serde::{Deserialize, Serialize};

use super::Summary;
use super::working_set::WorkingSet;

/// Bytes of one frame at most: a working set of some hundred thousand extents.
const FRAME_MAX: usize = 64 << 20;

/// What the pager tells the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "report")]
pub enum Report {
    /// A duplicate of a userfaultfd comes along; faults are served from now on.
    Held {
        /// Number of the address space.
        id: u32,
        /// Task, by its pid inside its pid namespace; for a forked child the task that its pages come from.
        task: u32,
    },
    /// CRIU says that the tasks are about to run.
    Finished,
    /// The address space is filled and unregistered, or gone: its duplicate can be closed.
    Released {
        /// Number of the address space.
        id: u32,
    },
    /// Shared and device memory are in place; the tree may run, the driver may be called.
    MayRun,
    /// Answer to [`Command::StopRecording`].
    Recorded {
        /// What was touched, in order.
        set: WorkingSet,
    },
    /// All is in place and the pager ends: every duplicate can be closed.
    Done {
        /// What was done.
        summary: Summary,
    },
    /// The replica must be killed; the pager holds on until the socket is closed.
    Failed {
        /// The error, then its causes.
        chain: Vec<String>,
    },
}

/// What the shim tells the pager.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Fill everything: start the background, or in eager mode write to the stopped tree.
    Fill,
    /// End the recording of the working set and report it.
    StopRecording,
    /// The tree is restored and stopped: write what must be there before anything runs, shared and device memory.
    Stopped,
}

impl Command {
    /// The byte that stands for it.
    #[must_use]
    pub fn byte(self) -> u8 {
        match self {
            Command::Fill => b'f',
            Command::StopRecording => b's',
            Command::Stopped => b'd',
        }
    }

    /// The command that a byte stands for.
    #[must_use]
    pub fn of(byte: u8) -> Option<Command> {
        let all = [Command::Fill, Command::StopRecording, Command::Stopped];
        all.into_iter().find(|command| command.byte() == byte)
    }
}

/// Sends a report, with the descriptor that belongs to it.
///
/// # Errors
/// When the shim is gone.
pub(super) fn send(control: &UnixStream, report: &Report, fd: Option<&dyn AsFd>) -> io::Result<()> {
    let body = serde_json::to_vec(report)?;
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    let mut frame = length.to_le_bytes().to_vec();
    frame.extend(body);
    let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
    fdpass::send(control, &frame, &fds)
}

/// What the shim knows of its pager after a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// A report that asks for nothing.
    Report(Report),
    /// All is in place; the duplicates are closed.
    Done(Summary),
    /// **Kill every task now**; only then drop the [`Holder`].
    Kill {
        /// The error, then its causes; empty when the pager died without a word.
        chain: Vec<String>,
    },
}

/// The shim's end: it holds a duplicate of every userfaultfd.
///
/// Dropping it closes the duplicates **and** tells a living pager to kill the tasks.
#[derive(Debug)]
pub struct Holder {
    control: UnixStream,
    held: BTreeMap<u32, OwnedFd>,
}

impl Holder {
    /// Over the shim's end of the socket pair.
    #[must_use]
    pub fn new(control: UnixStream) -> Holder {
        Holder { control, held: BTreeMap::new() }
    }

    /// The socket, to wait until a report can be read.
    #[must_use]
    pub fn control(&self) -> &UnixStream {
        &self.control
    }

    /// The duplicate of an address space's userfaultfd, to hand on to whoever outlives this process.
    #[must_use]
    pub fn duplicate(&self, id: u32) -> Option<&OwnedFd> {
        self.held.get(&id)
    }

    /// How many duplicates are held.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Tells the pager something.
    ///
    /// # Errors
    /// When the pager is gone: [`Holder::hear`] then says what to do.
    pub fn tell(&self, command: Command) -> io::Result<()> {
        fdpass::send(&self.control, &[command.byte()], &[])
    }

    /// Waits for the next report. After [`Heard::Done`] and [`Heard::Kill`] there is none.
    ///
    /// Whatever is wrong with what comes in means that the pager cannot be trusted: [`Heard::Kill`].
    pub fn hear(&mut self) -> Heard {
        match self.receive() {
            Ok(Report::Done { summary }) => {
                self.held.clear();
                Heard::Done(summary)
            }
            Ok(Report::Failed { chain }) => Heard::Kill { chain },
            Ok(report) => {
                if let Report::Released { id } = report {
                    self.held.remove(&id);
                }
                Heard::Report(report)
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Heard::Kill { chain: Vec::new() },
            Err(error) => Heard::Kill { chain: vec!["hear from the pager".to_owned(), error.to_string()] },
        }
    }

    fn receive(&mut self) -> io::Result<Report> {
        let mut head = [0; 4];
        let (mut got, mut fds) = fdpass::recv(&self.control, &mut head, 1)?;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        while got < head.len() {
            match self.control.read(&mut head[got..])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                more => got += more,
            }
        }
        let length = u32::from_le_bytes(head) as usize;
        if length > FRAME_MAX {
            let text = format!("report of {length} bytes, at most {FRAME_MAX} expected");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let mut body = vec![0; length];
        self.control.read_exact(&mut body)?;
        let report: Report = serde_json::from_slice(&body)?;
        match (&report, fds.pop()) {
            (Report::Held { id, .. }, Some(fd)) => {
                self.held.insert(*id, fd);
                Ok(report)
            }
            (Report::Held { .. }, None) | (_, Some(_)) => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "report and descriptor do not belong together",
            )),
            (_, None) => Ok(report),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::*;

    #[test]
    fn duplicates_are_held_until_released_or_done() {
        let (pager, shim) = UnixStream::pair().expect("a socket pair");
        let mut holder = Holder::new(shim);
        let file = File::open("/dev/null").expect("a file");
        send(&pager, &Report::Held { id: 1, task: 7 }, Some(&file)).expect("sent");
        send(&pager, &Report::Held { id: 2, task: 7 }, Some(&file)).expect("sent");
        send(&pager, &Report::Released { id: 1 }, None).expect("sent");
        for left in [1, 2, 1] {
            assert!(matches!(holder.hear(), Heard::Report(_)));
            assert_eq!(holder.held(), left);
        }
        send(&pager, &Report::Done { summary: Summary::default() }, None).expect("sent");
        assert!(matches!(holder.hear(), Heard::Done(_)));
        assert_eq!(holder.held(), 0);
    }

    #[test]
    fn a_dead_or_babbling_pager_means_kill_and_keeps_the_duplicates() {
        for babble in [&b""[..], b"\xff\xff\xff\xff", b"\x02\0\0\0{}", b"\x02\0\0\0{"] {
            let (mut pager, shim) = UnixStream::pair().expect("a socket pair");
            let mut holder = Holder::new(shim);
            let file = File::open("/dev/null").expect("a file");
            send(&pager, &Report::Held { id: 1, task: 7 }, Some(&file)).expect("sent");
            assert!(matches!(holder.hear(), Heard::Report(_)));
            pager.write_all(babble).expect("sent");
            drop(pager);
            assert!(matches!(holder.hear(), Heard::Kill { .. }), "{babble:?}");
            assert_eq!(holder.held(), 1);
        }
    }

    #[test]
    fn a_held_report_without_its_descriptor_is_not_believed() {
        let (pager, shim) = UnixStream::pair().expect("a socket pair");
        let mut holder = Holder::new(shim);
        send(&pager, &Report::Held { id: 1, task: 7 }, None).expect("sent");
        assert!(matches!(holder.hear(), Heard::Kill { .. }));
    }
}
