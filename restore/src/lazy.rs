//! Memory that is filled while the server runs: the content stream that the pagers of all replicas read, and what each
//! of them is told.
//!
//! The fetcher verifies and decodes once, for all; each replica's pager copies from its memory. No pager has credentials
//! or parses what came from a network.

use std::fs::File;
use std::io::{Seek, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rewarm_criu::image::mm::{self, Vma};
use rewarm_criu::layout::Layout;
use rewarm_criu::page_server::Object;
use rewarm_criu::patch;
use rewarm_fetcher::{Lease, Stream};
use rewarm_gpu::carried::Carried;
use rewarm_gpu::ranges;
use serde::{Deserialize, Serialize};

use crate::blueprint::{Blueprint, DeviceRegion, DirectRegion};
use crate::direct::Feed;
use crate::error::Cause;
use crate::pager::{AtFork, Extent, Mapping, Plan, Run};
use crate::shared::{self, Segment};

const HUGE_PAGE: u64 = 2 << 20;
const MADV_DONTFORK: u64 = 1 << 10;
const MADV_WIPEONFORK: u64 = 1 << 18;

/// What a pager is told, as JSON in a memory file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Orders {
    /// The tasks whose memory it fills.
    pub(crate) tasks: Vec<TaskOrders>,
    /// Device memory of tasks, which is filled before anything of them runs.
    pub(crate) devices: Vec<TaskOrders>,
    /// Shared memory, each segment through the mapping of one task; filled before anything of them runs.
    pub(crate) shared: Vec<TaskOrders>,
    /// When memory is filled.
    pub(crate) when: When,
    /// Find out what is touched first. What is filled before anybody touches it is not noticed.
    pub(crate) record: bool,
    /// No other pager reads the stream: what this one is done with is given back.
    pub(crate) passing: bool,
    /// What to fill first: pid inside its pid namespace, offset and length in the task's content.
    pub(crate) first: Vec<(u32, u64, u64)>,
    /// See [`Lazy::unblock`].
    pub(crate) unblock: Vec<u32>,
}

/// When a pager fills what nobody has asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum When {
    /// While the tree is stopped; it goes on afterwards.
    Stopped,
    /// As soon as the tree runs, in the pauses of what it waits for.
    AtOnce,
    /// Once it is known what the tree touches first.
    Recorded,
}

/// The memory of one task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct TaskOrders {
    /// Pid inside its pid namespace.
    pub(crate) pid: u32,
    /// Where its content begins in the fetcher's stream; a multiple of the block length.
    pub(crate) base: u64,
    /// Length of its content.
    pub(crate) bytes: u64,
    /// Mappings: start, end, writable, and 0 copied, 1 wiped, 2 absent at fork.
    pub(crate) mappings: Vec<(u64, u64, bool, u8)>,
    /// Runs: address, bytes, offset in the task's content.
    pub(crate) runs: Vec<(u64, u64, u64)>,
    /// Of device memory, pages that are zero and must be there all the same: address, bytes.
    pub(crate) zeros: Vec<(u64, u64)>,
}

impl TaskOrders {
    fn mappings(&self) -> Vec<Mapping> {
        let at_fork = |kind| match kind {
            1 => AtFork::Wiped,
            2 => AtFork::Absent,
            _ => AtFork::Copied,
        };
        let mapping = |&(start, end, writable, kind): &(u64, u64, bool, u8)| Mapping {
            start,
            end,
            writable,
            at_fork: at_fork(kind),
        };
        self.mappings.iter().map(mapping).collect()
    }

    /// Mappings and runs joined and checked.
    pub(crate) fn plan(&self) -> Result<Plan, Cause> {
        Plan::new(self.mappings(), &self.runs(), self.bytes).map_err(|defect| Cause::Inconsistent {
            what: format!("the memory of task {}: {defect}", self.pid),
        })
    }

    /// The mappings of at least one huge page in which something lies.
    fn touched(&self) -> Vec<Range<u64>> {
        let parts = || {
            let runs = self.runs.iter().map(|&(vaddr, bytes, _)| (vaddr, bytes));
            runs.chain(self.zeros.iter().copied())
        };
        let mappings = self.mappings.iter().filter(|(start, end, writable, _)| {
            let inside = |(vaddr, bytes): (u64, u64)| vaddr < *end && vaddr + bytes > *start;
            *writable && end - start >= HUGE_PAGE && parts().any(inside)
        });
        mappings.map(|&(start, end, ..)| start..end).collect()
    }

    fn runs(&self) -> Vec<Run> {
        self.runs.iter().map(|&(vaddr, bytes, offset)| Run { vaddr, bytes, offset }).collect()
    }
}

/// The fetcher's stream and the orders of one restore.
pub(crate) struct Lazy {
    stream: Arc<Stream>,
    orders: OwnedFd,
    /// When memory is filled.
    when: When,
    /// Whether only one pager reads the stream, and says what it is done with: nobody says so of device memory.
    passing: bool,
    /// The tasks' pids and their regions.
    regions: Vec<(u32, u32)>,
    /// Shared memory that the pager writes.
    shared: Vec<Segment>,
    /// Device memory that goes past the tasks.
    direct: Vec<DirectRegion>,
    unblock: Vec<u32>,
}

/// Device memory of a task has a content stream of its own, named by the task's pid and this bit, which no pid has.
pub(crate) const DEVICE_STREAM: u32 = 1 << 31;

impl Lazy {
    /// Plans the filling of a snapshot's tasks. The images of all replicas hold their `mm` images already; where memory
    /// is filled before it is used, mappings that are worth huge pages are marked for them there.
    pub(crate) fn plan(
        blueprint: &Blueprint,
        images: &[PathBuf],
        stream: Arc<Stream>,
        when: When,
    ) -> Result<Self, Cause> {
        let mut tasks = Vec::new();
        let mut regions = Vec::new();
        for object in &blueprint.objects {
            let (Object::Task { pid }, Some(first)) = (object.object, images.first()) else { continue };
            let mut task = orders(&object.layout, pid, stream.layout().base(object.region), first)?;
            task.zeros.clear();
            if when == When::Stopped {
                let huge = task.plan()?.huge();
                for directory in images {
                    patch::advise_huge_pages(directory, pid, &huge)?;
                }
            }
            tasks.push(task);
            regions
                .push((pid, u32::try_from(object.region).expect("the store limits the number of regions")));
        }
        let mut devices = Vec::new();
        for (pid, region) in device_tasks(blueprint) {
            let Some(first) = images.first() else { continue };
            let mut orders = match region {
                Some(device) => orders(&device.layout, pid, stream.layout().base(device.region), first)?,
                None => orders(&Layout::default(), pid, 0, first)?,
            };
            if let Some(copies) = blueprint.copies.get(&pid) {
                orders.zeros = untouched(copies, &orders.runs);
            }
            // The driver pins its copies whole, so none of them is sparse.
            let huge = orders.touched();
            for directory in images {
                patch::advise_huge_pages(directory, pid, &huge)?;
            }
            devices.push(orders);
        }
        let base = |region| stream.layout().base(region);
        let shared = images.first().map(|first| shared::plan(blueprint, first, base)).transpose()?;
        let shared = shared.unwrap_or_default();
        let pid = |region| regions.iter().find(|(_, own)| *own == region).map(|(pid, _)| *pid);
        let known = stream.working_set().map(|set| &set.extents[..]).unwrap_or_default();
        let first = known.iter().filter_map(|&(region, offset, bytes)| Some((pid(region)?, offset, bytes)));
        let passing = images.len() == 1 && blueprint.devices.is_empty() && blueprint.direct.is_empty();
        let record = when == When::Recorded || (when == When::AtOnce && stream.working_set().is_some());
        let mut unblock = Vec::new();
        if when == When::Stopped || !shared.is_empty() || has_devices(blueprint) {
            for directory in images {
                unblock = patch::block_child_stops(directory)?;
            }
        }
        let orders = Orders {
            first: first.collect(),
            unblock: unblock.clone(),
            tasks,
            devices,
            shared: shared.iter().map(|segment| segment.orders.clone()).collect(),
            when,
            record,
            passing,
        };
        let orders = memory_file(&orders).map_err(Cause::io("write the pager's orders"))?;
        let direct = blueprint.direct.clone();
        Ok(Self { stream, orders, when, passing, regions, shared, direct, unblock })
    }

    /// Whether the tree is filled while it is stopped.
    pub(crate) fn is_eager(&self) -> bool {
        self.when == When::Stopped
    }

    /// The threads, by their ids in the replica, in which SIGCHLD is blocked until a tree goes on that comes back stopped.
    pub(crate) fn unblock(&self) -> &[u32] {
        &self.unblock
    }

    /// Whether content is said to be done with as it is put into place.
    pub(crate) fn is_passing(&self) -> bool {
        self.passing
    }

    /// What carries device memory past the tasks, to the driver.
    pub(crate) fn feed(&self, carried: &Carried) -> Result<Option<Feed>, Cause> {
        Feed::plan(carried, &self.direct, &self.stream)
    }

    /// Regions of shared memory that the pager writes, while the tree is stopped.
    pub(crate) fn shared(&self) -> impl Iterator<Item = usize> + '_ {
        self.shared.iter().map(|segment| segment.region)
    }

    /// Regions of device memory that goes past the tasks.
    pub(crate) fn direct(&self) -> impl Iterator<Item = usize> + '_ {
        self.direct.iter().map(|direct| direct.region)
    }

    /// What was touched, by region.
    pub(crate) fn by_region(&self, touched: &[Extent]) -> Vec<(u32, u64, u64)> {
        let region = |task| self.regions.iter().find(|(pid, _)| *pid == task).map(|(_, region)| *region);
        touched.iter().filter_map(|part| Some((region(part.task)?, part.offset, part.length))).collect()
    }

    /// What keeps the stream in memory for one pager when this command has ended.
    pub(crate) fn lease(&self) -> Result<Lease, Cause> {
        Ok(self.stream.lease()?)
    }

    /// What a pager gets beside its lease, in this order: its orders, the content, the table.
    pub(crate) fn files(&self) -> [BorrowedFd<'_>; 3] {
        let [content, table] = self.stream.files();
        [self.orders.as_fd(), content, table]
    }
}

fn has_devices(blueprint: &Blueprint) -> bool {
    !blueprint.devices.is_empty() || !blueprint.direct.is_empty()
}

/// The tasks that have copies of device memory, with the region of what was dumped of them; a task of which nothing was has none.
/// Nothing where no task has a region: there, copies lie among the other pages.
fn device_tasks(blueprint: &Blueprint) -> Vec<(u32, Option<&DeviceRegion>)> {
    let with = blueprint.devices.iter().map(|device| (device.pid, Some(device)));
    let is_known = |pid: u32| blueprint.devices.iter().any(|device| device.pid == pid);
    let rest = blueprint.copies.iter().filter(|(_, copies)| !copies.is_empty());
    let rest = rest.filter(|(pid, _)| !blueprint.devices.is_empty() && !is_known(**pid));
    with.chain(rest.map(|(pid, _)| (*pid, None))).collect()
}

/// What the driver's copies have beside their content: it must be there all the same, since the driver pins them whole.
fn untouched(copies: &[ranges::Range], runs: &[(u64, u64, u64)]) -> Vec<(u64, u64)> {
    let mut runs: Vec<_> =
        runs.iter().map(|&(vaddr, bytes, _)| ranges::Range { start: vaddr, end: vaddr + bytes }).collect();
    runs.sort_unstable();
    ranges::added(&runs, copies).into_iter().map(|range| (range.start, range.bytes())).collect()
}

fn orders(layout: &Layout, pid: u32, base: u64, images: &Path) -> Result<TaskOrders, Cause> {
    Ok(TaskOrders::of(layout, pid, base, &mm::read(images, pid)?.vmas))
}

impl TaskOrders {
    /// What a task with these mappings lacks.
    pub(crate) fn of(layout: &Layout, pid: u32, base: u64, vmas: &[Vma]) -> Self {
        let lazy = layout.placed().filter(|(_, run)| run.lazy && !run.zero);
        let zeros = layout.runs().iter().filter(|run| run.lazy && run.zero);
        Self {
            pid,
            base,
            bytes: layout.stream_bytes(),
            zeros: zeros.map(|run| (run.vaddr, run.end() - run.vaddr)).collect(),
            mappings: vmas.iter().filter(|vma| vma.can_be_lazy()).map(mapping).collect(),
            runs: lazy.map(|(offset, run)| (run.vaddr, run.stream_bytes(), offset)).collect(),
        }
    }
}

fn mapping(vma: &Vma) -> (u64, u64, bool, u8) {
    let at_fork = match vma.madv {
        madv if madv & MADV_DONTFORK != 0 => 2,
        madv if madv & MADV_WIPEONFORK != 0 => 1,
        _ => 0,
    };
    (vma.start, vma.end, vma.is_writable(), at_fork)
}

fn memory_file(orders: &Orders) -> std::io::Result<OwnedFd> {
    let fd = nix::sys::memfd::memfd_create(c"rewarm-orders", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
    let mut file = File::from(fd);
    file.write_all(&serde_json::to_vec(orders)?)?;
    file.rewind()?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_driver_mapped_and_nobody_touched_is_there_as_zeros() {
        let range = |start, end| ranges::Range { start, end };
        // Behind the content, in a copy without any, and between two runs that do not come in order.
        let runs = [(0x9000, 0x1000, 0x2000), (0x1000, 0x2000, 0)];
        let copies = [range(0x1000, 0x4000), range(0x6000, 0x7000), range(0x8000, 0xb000)];
        let zeros = [(0x3000, 0x1000), (0x6000, 0x1000), (0x8000, 0x1000), (0xa000, 0x1000)];
        assert_eq!(untouched(&copies, &runs), zeros);
        assert_eq!(untouched(&[], &runs), []);
    }

    #[test]
    fn a_task_of_whose_copies_nothing_was_dumped_has_them_all_the_same() {
        let range = ranges::Range { start: 0x1000, end: 0x2000 };
        let copies = [(7, vec![range]), (8, vec![range]), (9, Vec::new())].into();
        let of_older_format = Blueprint { copies, ..Blueprint::default() };
        assert!(device_tasks(&of_older_format).is_empty());
        let region = DeviceRegion { region: 3, pid: 7, layout: Arc::default() };
        let blueprint = Blueprint { devices: vec![region], ..of_older_format };
        let tasks: Vec<_> =
            device_tasks(&blueprint).iter().map(|(pid, region)| (*pid, region.is_some())).collect();
        assert_eq!(tasks, [(7, true), (8, false)]);
    }
}
