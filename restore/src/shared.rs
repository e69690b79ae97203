//! Shared memory that does not go through CRIU: which segments the pager writes, and through whose mapping.
//!
//! CRIU restores a segment in one thread, from an image that has to be made first: each page is made twice and copied twice
//! (measured: 1.2 s a GiB beside the fetch). Instead it makes the segment empty, and leaves the tree stopped; the pager then writes
//! the content with several threads through the mapping of a task that may write it, and lets the tree go on. The pages are
//! charged to the replica, as if it had written them itself.

use std::path::Path;

use rewarm_criu::image::mm::{self, Vma};
use rewarm_criu::image::{core, files, memfd};
use rewarm_criu::layout::Layout;
use rewarm_criu::page_server::Object;

use crate::blueprint::Blueprint;
use crate::error::Cause;
use crate::lazy::TaskOrders;

/// Content streams of segments are named by their place among them and this bit, which no pid has.
pub(crate) const SHARED_STREAM: u32 = 1 << 30;

/// A segment with less content is left to CRIU, which takes some milliseconds for it: the tree need not stop for that.
const BYTES_MIN: u64 = 16 << 20;

const MAP_SHARED: u32 = 1;

/// CRIU's word for a task that was stopped by a signal, and has to stay so.
const STOPPED: u32 = 3;

/// A segment that the pager writes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Segment {
    /// Its region of the snapshot.
    pub(crate) region: usize,
    /// Through whose mapping it is written, and what lies where.
    pub(crate) orders: TaskOrders,
}

/// Chooses the segments of which one task maps all content in one piece that it may write. `base` says where a region begins in the
/// fetcher's stream. None where a task was stopped already: the signal that lets the others go on would let it go on too.
pub(crate) fn plan(
    blueprint: &Blueprint,
    images: &Path,
    base: impl Fn(usize) -> u64,
) -> Result<Vec<Segment>, Cause> {
    let large = blueprint.objects.iter().filter(|object| object.layout.stream_bytes() >= BYTES_MIN);
    let mut wanted: Vec<(u64, usize, &Layout)> = large
        .filter_map(|object| match object.object {
            Object::Shmem { id } => Some((id, object.region, object.layout.as_ref())),
            Object::Task { .. } => None,
        })
        .collect();
    let mut segments = Vec::new();
    if wanted.is_empty() {
        return Ok(segments);
    }
    let memory_files = memfd::segments(&memfd::read(images)?, &files::read(images)?);
    for object in &blueprint.objects {
        let Object::Task { pid } = object.object else { continue };
        if core::read(images, pid)?.task.is_some_and(|task| task.state == STOPPED) {
            return Ok(Vec::new());
        }
        let vmas = mm::read(images, pid)?.vmas;
        wanted.retain(|&(id, region, layout)| {
            let shows = |vma: &Vma| match vma.file() {
                Some(file) => memory_files.get(&file).is_some_and(|segment| u64::from(*segment) == id),
                None => vma.segment() == Some(id),
            };
            let Some(vma) = vmas.iter().find(|vma| shows(vma) && writes_all(vma, layout)) else {
                return true;
            };
            segments.push(Segment { region, orders: orders(pid, vma, layout, base(region)) });
            false
        });
    }
    Ok(segments)
}

/// Whether a task can write all content of a segment through this mapping of it.
fn writes_all(vma: &Vma, layout: &Layout) -> bool {
    let runs = layout.runs();
    let (Some(first), Some(last)) = (runs.first(), runs.last()) else { return false };
    vma.flags & MAP_SHARED != 0
        && vma.is_writable()
        && !vma.is_huge_tlb()
        && vma.offset <= first.vaddr
        && last.end() - vma.offset <= vma.bytes()
}

fn orders(pid: u32, vma: &Vma, layout: &Layout, base: u64) -> TaskOrders {
    let content = layout.placed().filter(|(_, run)| !run.zero);
    let at = |vaddr: u64| vma.start + (vaddr - vma.offset);
    TaskOrders {
        pid,
        base,
        bytes: layout.stream_bytes(),
        mappings: vec![(vma.start, vma.end, true, 0)],
        runs: content.map(|(offset, run)| (at(run.vaddr), run.stream_bytes(), offset)).collect(),
        // A page of a new segment that nobody wrote is zero.
        zeros: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rewarm_criu::layout::Run;

    const PAGE: u64 = 4096;
    const WRITES: u32 = 3;

    fn layout() -> Layout {
        let mut layout = Layout::new();
        for (page, pages, zero) in [(2, 2, false), (4, 1, true), (5, 3, false)] {
            layout.push(Run { vaddr: page * PAGE, pages, zero, lazy: false });
        }
        layout
    }

    fn vma(first: u64, pages: u64) -> Vma {
        let start = 0x7000_0000;
        let (offset, end) = (first * PAGE, start + pages * PAGE);
        Vma { start, end, offset, id: 7, protection: WRITES, flags: MAP_SHARED, status: 0, madv: 0 }
    }

    #[test]
    fn one_mapping_must_hold_all_content_and_be_writable() {
        assert!(writes_all(&vma(0, 8), &layout()));
        assert!(writes_all(&vma(2, 6), &layout()));
        for (other, what) in [
            (vma(3, 8), "begins behind the first page"),
            (vma(0, 7), "ends before the last one"),
            (Vma { protection: 1, ..vma(0, 8) }, "read-only"),
            (Vma { flags: 2, ..vma(0, 8) }, "private"),
            (Vma { flags: MAP_SHARED | 0x4_0000, ..vma(0, 8) }, "pages of hugetlbfs"),
        ] {
            assert!(!writes_all(&other, &layout()), "{what}");
        }
    }

    #[test]
    fn content_goes_where_the_mapping_shows_it_and_zero_pages_nowhere() {
        let at = |page: u64| 0x7000_0000 + page * PAGE;
        let orders = orders(5, &vma(1, 9), &layout(), 99 * PAGE);
        assert_eq!((orders.pid, orders.base, orders.bytes), (5, 99 * PAGE, 5 * PAGE));
        assert_eq!(orders.mappings, [(at(0), at(9), true, 0)]);
        assert_eq!(orders.runs, [(at(1), 2 * PAGE, 0), (at(4), 3 * PAGE, 2 * PAGE)]);
        orders.plan().expect("a plan that can be carried out");
    }
}
