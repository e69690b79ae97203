//! What a snapshot holds of each process, mapping by mapping; whether its parts are all there; how two snapshots differ.
//!
//! Reads CRIU's images of a boot object only; no content moves.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::Path;

use rewarm_criu::image::files::{self, FileKind};
use rewarm_criu::image::mm::{self, Vma};
use rewarm_criu::image::{core, inventory, pstree};
use rewarm_criu::layout::Layout;
use rewarm_criu::page_server::Object;
use rewarm_store::{Boot, Comparison, RegionKind, RegionSide};
use serde::Serialize;

use crate::blueprint::Blueprint;
use crate::error::Cause;

const PROT_READ: u32 = 1;
const PROT_WRITE: u32 = 2;
const PROT_EXEC: u32 = 4;
const MAP_SHARED: u32 = 1;
const MAP_GROWSDOWN: u32 = 0x100;

/// A process of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Process {
    /// Its number inside the replica.
    pub pid: u32,
    /// Its threads.
    pub threads: usize,
    /// Its program.
    pub program: String,
    /// Its mappings by address.
    pub mappings: Vec<Mapping>,
}

/// A mapping of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// As `/proc/PID/maps` shows them.
    pub permissions: String,
    /// A path, `[stack]`, `shared segment N`, or nothing for anonymous memory.
    pub name: String,
    /// Bytes of private pages that the snapshot holds.
    pub content_bytes: u64,
    /// Bytes of private pages that are zero.
    pub zero_bytes: u64,
}

/// A mapping that is not the same in two snapshots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MappingDifference {
    /// The process.
    pub pid: u32,
    /// Its program.
    pub program: String,
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// As in [`Mapping`].
    pub permissions: String,
    /// As in [`Mapping`].
    pub name: String,
    /// Bytes of chunks that only the first snapshot has here; absent if it has no such mapping.
    pub first_bytes: Option<u64>,
    /// The same of the second.
    pub second_bytes: Option<u64>,
}

/// The processes of a snapshot, by number.
///
/// # Errors
/// [`Cause::Inconsistent`] or [`Cause::Criu`] if its images are not what CRIU writes, [`Cause::Io`] if no temporary
/// folder can be made.
pub fn processes(boot: &Boot) -> Result<Vec<Process>, Cause> {
    let blueprint = Blueprint::of(boot)?;
    let folder = images(&blueprint)?;
    let directory = folder.path();
    let mut names = BTreeMap::new();
    for file in files::read(directory)? {
        if let FileKind::Regular(regular) = file.kind {
            names.insert(file.id, regular.path);
        }
    }
    let mut processes = Vec::new();
    for task in pstree::read(directory)? {
        if core::read(directory, task.pid)?.is_ended() {
            continue;
        }
        let space = mm::read(directory, task.pid)?;
        let layout = blueprint.objects.iter().find(|one| one.object == Object::Task { pid: task.pid });
        let mut mappings: Vec<Mapping> = space.vmas.iter().map(|vma| mapping(vma, &names)).collect();
        if let Some(object) = layout {
            fill(&mut mappings, &object.layout);
        }
        let program = names.get(&space.exe).cloned().unwrap_or_default();
        processes.push(Process { pid: task.pid, threads: task.threads.len(), program, mappings });
    }
    processes.sort_by_key(|process| process.pid);
    Ok(processes)
}

/// Checks that a restore would find all it needs in a boot object whose digest is right.
///
/// # Errors
/// What is missing or contradicts itself.
pub fn check_parts(boot: &Boot) -> Result<(), Cause> {
    let blueprint = Blueprint::of(boot)?;
    let folder = images(&blueprint)?;
    inventory::read(folder.path())?;
    files::read(folder.path())?;
    let tasks = pstree::read(folder.path())?;
    for task in &tasks {
        if core::read(folder.path(), task.pid)?.is_ended() {
            continue;
        }
        mm::read(folder.path(), task.pid)?;
        for thread in &task.threads {
            core::read(folder.path(), *thread)?;
        }
    }
    for object in &blueprint.objects {
        if let Object::Task { pid } = object.object
            && !tasks.iter().any(|task| task.pid == pid)
        {
            let what = format!("there are pages of process {pid}, which is not in the tree");
            return Err(Cause::Inconsistent { what });
        }
    }
    Ok(())
}

/// The mappings that differ between two snapshots, by process and address. Differences are found by chunk, so a byte that
/// changed counts with those around it.
///
/// # Errors
/// As [`processes`].
pub fn differences(
    first: &Boot,
    second: &Boot,
    comparison: &Comparison,
) -> Result<Vec<MappingDifference>, Cause> {
    let mut found = BTreeMap::new();
    let sides = [(first, true), (second, false)];
    for (boot, is_first) in sides {
        let blueprint = Blueprint::of(boot)?;
        let mut changed = BTreeMap::<u32, Vec<Range<u64>>>::new();
        for region in &comparison.regions {
            let side = if is_first { &region.first } else { &region.second };
            if let (RegionKind::Task { pid }, Some(side)) = (&region.kind, side) {
                changed.insert(*pid, addresses(&blueprint, side));
            }
        }
        for process in processes(boot)? {
            let ranges = changed.get(&process.pid).map(Vec::as_slice).unwrap_or_default();
            for mapping in &process.mappings {
                let bytes = overlap(ranges, mapping);
                let key = (process.pid, mapping.start, mapping.end, mapping.name.clone());
                let entry = found.entry(key).or_insert_with(|| MappingDifference {
                    pid: process.pid,
                    program: process.program.clone(),
                    start: mapping.start,
                    end: mapping.end,
                    permissions: mapping.permissions.clone(),
                    name: mapping.name.clone(),
                    first_bytes: None,
                    second_bytes: None,
                });
                *(if is_first { &mut entry.first_bytes } else { &mut entry.second_bytes }) = Some(bytes);
            }
        }
    }
    let differs = |one: &MappingDifference| one.first_bytes != Some(0) || one.second_bytes != Some(0);
    Ok(found.into_values().filter(differs).collect())
}

/// Writes the images that are read here into a folder of their own.
fn images(blueprint: &Blueprint) -> Result<tempfile::TempDir, Cause> {
    let folder = tempfile::tempdir().map_err(Cause::io("make a temporary folder"))?;
    let wanted = |name: &str| {
        ["inventory.img", "pstree.img", "files.img"].contains(&name)
            || ["mm-", "core-", "ids-", "reg-files"].iter().any(|begins| name.starts_with(begins))
    };
    for (name, bytes) in blueprint.images.iter().filter(|(name, _)| wanted(name)) {
        let path: &Path = &folder.path().join(name);
        fs::write(path, bytes).map_err(Cause::io(format!("write {}", path.display())))?;
    }
    Ok(folder)
}

fn mapping(vma: &Vma, names: &BTreeMap<u32, String>) -> Mapping {
    let bit = |bit: u32, letter: char| if vma.protection & bit != 0 { letter } else { '-' };
    let shared = if vma.flags & MAP_SHARED != 0 { 's' } else { 'p' };
    let name = match (vma.file().and_then(|id| names.get(&id)), vma.segment()) {
        (Some(path), _) => path.clone(),
        (None, Some(segment)) => format!("shared segment {segment}"),
        (None, None) if vma.flags & MAP_GROWSDOWN != 0 => "[stack]".to_owned(),
        (None, None) => String::new(),
    };
    Mapping {
        start: vma.start,
        end: vma.end,
        permissions: [bit(PROT_READ, 'r'), bit(PROT_WRITE, 'w'), bit(PROT_EXEC, 'x'), shared]
            .iter()
            .collect(),
        name,
        content_bytes: 0,
        zero_bytes: 0,
    }
}

/// Counts the pages of each mapping. Both lists are in the order of addresses.
fn fill(mappings: &mut [Mapping], layout: &Layout) {
    let mut at = 0;
    for run in layout.runs() {
        while mappings.get(at).is_some_and(|mapping| mapping.end <= run.vaddr) {
            at += 1;
        }
        for mapping in &mut mappings[at..] {
            if mapping.start >= run.end() {
                break;
            }
            let bytes = mapping.end.min(run.end()) - mapping.start.max(run.vaddr);
            *(if run.zero { &mut mapping.zero_bytes } else { &mut mapping.content_bytes }) += bytes;
        }
    }
}

/// Where the differing stretches of a task's stream lie in its memory.
fn addresses(blueprint: &Blueprint, side: &RegionSide) -> Vec<Range<u64>> {
    let Some(object) = blueprint.objects.iter().find(|object| object.region == side.region) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    let mut stretches = side.differing.iter().peekable();
    for (offset, run) in object.layout.placed().filter(|(_, run)| !run.zero) {
        let end = offset + run.stream_bytes();
        while stretches.next_if(|stretch| stretch.end <= offset).is_some() {}
        for stretch in stretches.clone() {
            if stretch.start >= end {
                break;
            }
            let (from, to) = (stretch.start.max(offset), stretch.end.min(end));
            found.push(run.vaddr + (from - offset)..run.vaddr + (to - offset));
        }
    }
    found
}

fn overlap(ranges: &[Range<u64>], mapping: &Mapping) -> u64 {
    let first = ranges.partition_point(|range| range.end <= mapping.start);
    let within = ranges[first..].iter().take_while(|range| range.start < mapping.end);
    within.map(|range| range.end.min(mapping.end) - range.start.max(mapping.start)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rewarm_criu::layout::Run;

    fn mapping(start: u64, end: u64) -> Mapping {
        let (permissions, name) = ("rw-p".to_owned(), String::new());
        Mapping { start, end, permissions, name, content_bytes: 0, zero_bytes: 0 }
    }

    #[test]
    fn pages_are_counted_for_the_mapping_that_they_lie_in() {
        let mut layout = Layout::new();
        for (page, pages, zero) in [(1, 2, false), (3, 2, true), (9, 1, false)] {
            layout.push(Run { vaddr: page * 4096, pages, zero, lazy: true });
        }
        let mut mappings = [mapping(0, 2 * 4096), mapping(2 * 4096, 4 * 4096), mapping(4 * 4096, 16 * 4096)];
        fill(&mut mappings, &layout);
        let counts: Vec<_> = mappings.iter().map(|one| (one.content_bytes, one.zero_bytes)).collect();
        assert_eq!(counts, [(4096, 0), (4096, 4096), (4096, 4096)]);
    }

    #[test]
    fn overlaps_are_those_of_each_range() {
        let ranges = [0..10, 20..30, 40..50];
        assert_eq!(overlap(&ranges, &mapping(5, 25)), 10);
        assert_eq!(overlap(&ranges, &mapping(30, 40)), 0);
        assert_eq!(overlap(&ranges, &mapping(0, 100)), 30);
    }
}
