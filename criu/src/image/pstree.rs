//! `pstree.img`: the tree of tasks.

use std::collections::HashSet;
use std::path::Path;

use prost::Message;

use super::{Image, Kind};
use crate::{Error, Fault};

/// The most tasks, threads not counted, and the most threads of one task: the kernel's largest `pid_max`.
const TASKS_MAX: usize = 1 << 22;

/// A task. All numbers are those of the innermost pid namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Pid.
    pub pid: u32,
    /// Pid of the parent, 0 for the root.
    pub parent: u32,
    /// Process group.
    pub group: u32,
    /// Session.
    pub session: u32,
    /// Ids of all threads, the main one first.
    pub threads: Vec<u32>,
}

#[derive(Clone, PartialEq, Message)]
struct PstreeEntry {
    #[prost(uint32, tag = "1")]
    pid: u32,
    #[prost(uint32, tag = "2")]
    parent: u32,
    #[prost(uint32, tag = "3")]
    group: u32,
    #[prost(uint32, tag = "4")]
    session: u32,
    #[prost(uint32, repeated, packed = "false", tag = "5")]
    threads: Vec<u32>,
}

/// Reads the tree of an image directory, the root first.
///
/// # Errors
/// [`crate::Error::Io`] if there is none, [`crate::Error::Image`] if it is not what CRIU writes or a pid comes twice.
pub fn read(directory: &Path) -> crate::Result<Vec<Task>> {
    let image = Image::read(&directory.join("pstree.img"), Kind::Pstree)?;
    let limit = TASKS_MAX as u64;
    if image.records().len() > TASKS_MAX {
        let fault = Fault::Limit { what: "number of tasks", seen: image.records().len() as u64, limit };
        return Err(Error::image(&image.path)(fault));
    }
    let mut tasks = Vec::new();
    let mut pids = HashSet::new();
    image.each(|entry: PstreeEntry| {
        let what = "pid";
        let seen = u64::from(entry.pid);
        if entry.pid == 0 || entry.pid as usize > TASKS_MAX {
            return Err(Fault::Value { what, seen, expected: "a pid" });
        }
        if !pids.insert(entry.pid) {
            return Err(Fault::Value { what, seen, expected: "each pid once" });
        }
        let PstreeEntry { pid, parent, group, session, threads } = entry;
        tasks.push(Task { pid, parent, group, session, threads });
        Ok(())
    })?;
    if tasks.is_empty() {
        return Err(Error::image(&image.path)(Fault::Absent { what: "task" }));
    }
    Ok(tasks)
}
