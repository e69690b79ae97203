//! What a subject's memory holds before it runs: the same on both sides, made from a seed.

use rewarm_restore::pager::{AtFork, Mapping, PAGE, Plan, Run};
use serde::{Deserialize, Serialize};

/// Where areas lie; each has room to the next.
const BASE: u64 = 0x1000_0000_0000;
const ROOM: u64 = 0x4000_0000;

/// A small generator: a seed gives one sequence, everywhere.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A word of the content stream. Never zero, so that a missing page shows.
pub(crate) fn word(seed: u64, stream_page: u64, word: u64) -> u64 {
    mix(seed ^ stream_page.wrapping_mul(512).wrapping_add(word)) | 1
}

/// What makes a layout.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Shape {
    pub(crate) seed: u64,
    pub(crate) areas: u64,
    pub(crate) pages: u64,
    /// Whether every page is stored.
    pub(crate) dense: bool,
}

/// One area of memory: for each page its place in the content stream, in pages, or nothing.
#[derive(Debug, Clone)]
pub(crate) struct Laid {
    pub(crate) start: u64,
    pub(crate) stored: Vec<Option<u64>>,
}

/// The areas of a shape, lowest first.
pub(crate) fn areas(shape: Shape) -> Vec<Laid> {
    let mut random = Random::new(shape.seed);
    let mut stream = 0;
    (0..shape.areas)
        .map(|index| {
            let mut stored = Vec::new();
            while (stored.len() as u64) < shape.pages {
                // Runs of stored pages, mostly long, with holes between them.
                let run = [1, 3, 15, 200][random.below(4) as usize];
                let hole = if shape.dense { 0 } else { [0, 1, 7, 40][random.below(4) as usize] };
                for _ in 0..run {
                    stored.push(Some(stream));
                    stream += 1;
                }
                stored.extend((0..hole).map(|_| None));
                while stored.len() as u64 > shape.pages {
                    stream -= u64::from(stored.pop().flatten().is_some());
                }
            }
            Laid { start: BASE + index * ROOM, stored }
        })
        .collect()
}

/// Pages in the content stream.
pub(crate) fn stream_pages(areas: &[Laid]) -> u64 {
    areas.iter().flat_map(|area| &area.stored).flatten().count() as u64
}

/// The plan for these areas.
pub(crate) fn plan(areas: &[Laid]) -> Plan {
    let mappings = areas.iter().map(|area| Mapping {
        start: area.start,
        end: area.start + area.stored.len() as u64 * PAGE,
        writable: true,
        at_fork: AtFork::Copied,
    });
    let mut runs: Vec<Run> = Vec::new();
    for area in areas {
        for (page, stored) in area.stored.iter().enumerate() {
            let Some(stream) = stored else { continue };
            let vaddr = area.start + page as u64 * PAGE;
            match runs.last_mut() {
                Some(last) if last.vaddr + last.bytes == vaddr => last.bytes += PAGE,
                _ => runs.push(Run { vaddr, bytes: PAGE, offset: stream * PAGE }),
            }
        }
    }
    Plan::new(mappings.collect(), &runs, stream_pages(areas) * PAGE).expect("the layout makes a plan")
}
